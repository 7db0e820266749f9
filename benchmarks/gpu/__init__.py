"""Tests and measurements on a GPU, in half an hour: `make gpu-check`, `make gpu-bench`, `make gpu-evidence`.

A step is a list of items, tests or rows, that worker processes go through. `supervise.py` watches the workers and ends
those that hang, `journal.py` keeps what each item came to, `testing.py` and `measuring.py` are the two kinds of worker,
and `steps.py` says what is run, in which order, and how long it may take.
"""
