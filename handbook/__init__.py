"""What `make docs` needs beside MkDocs: links between docstrings, the versions in the footer, a look at the prose."""
