"""Query heads: cut apart, normed and turned in one pass."""
