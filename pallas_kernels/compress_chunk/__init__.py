"""Windows of projected tokens, pooled into rows in one pass."""
