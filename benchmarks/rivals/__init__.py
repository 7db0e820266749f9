"""Programs that users could run instead, each rival in a file of its own; `benchmarks/providers.py` names their groups.

A rival imports its package when it is made, and whatever keeps it from running stands in the rows as why it is absent.
"""
