"""Answering requests over HTTP: plan, generate, parse, reply."""
