"""Parts that CLVP and CLAP share: layers, the storage of parameters, masks, clips, and the rule for plain modules."""
