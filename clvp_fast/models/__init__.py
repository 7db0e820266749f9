"""Model families: each in a folder of its own, written on transformers' public base classes."""
