"""Hyper-connections: mixing numbers, weighted sum of the streams, and their update."""
