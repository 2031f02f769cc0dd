"""Scores of the lightning indexer and the exact choice of its best rows, in one kernel."""
