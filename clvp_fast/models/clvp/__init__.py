"""CLVP: configuration, modeling, tokenization, features, processing, and the conversion of Tortoise checkpoints."""
