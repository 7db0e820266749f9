"""Files that are whole or not there, errors in a sentence, levels of recordings, and the style of pictures."""
