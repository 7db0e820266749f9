"""What CLVP and CLAP share: blocks of layers, layouts of parameters, masks, clips, and the rule for plain modules."""
