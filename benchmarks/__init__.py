"""Workloads that compare providers: each provider is checked before it is timed, and rows are JSON."""
