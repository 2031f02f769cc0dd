"""Attention with a sink over window rows and compressed rows, in one online softmax."""
