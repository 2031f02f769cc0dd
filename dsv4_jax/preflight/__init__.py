"""Knowing before renting: programs compiled for slices that are not there."""
