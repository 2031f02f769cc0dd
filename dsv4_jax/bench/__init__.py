"""Measurements: what `scripts/bench.py` runs."""
