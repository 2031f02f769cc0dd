"""Runs, one per file: each defines `RUN`."""
