"""Parts that CLVP and CLAP share: blocks of layers, layouts of parameters, masks, clips, the rule for plain modules."""
