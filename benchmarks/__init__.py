"""Workloads with their providers side by side: each checks itself before it is timed, and prints rows of JSON."""
