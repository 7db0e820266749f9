"""The predicted cost of the kernels and of a decode step on a GPU, without one.

`recording.py` runs a real step on tensors without storage and keeps its launches; `machine_code.py` counts the
instructions of what was compiled for them; `work.py` says what a launch moves and multiplies; `predicting.py` makes a
time of it, with the constants of `devices.py`; `tables.py` writes docs/kernels.md.
"""
