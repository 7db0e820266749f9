"""Parts of `make docs` besides MkDocs: hooks, and the script that finds sentences which are hard to read."""
