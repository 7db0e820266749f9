"""Names of the checkpoints that come with the package. A folder that is called so is given as ./demo."""

RESERVED = ("demo", "random")
