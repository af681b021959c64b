"""Benchmarks: each file is a command, `python -m benchmarks.<name>`."""
