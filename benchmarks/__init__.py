"""Measurements: each file is a command (`python -m benchmarks.NAME`) that prints ratios against a limit or a peer."""
