"""One token into the compressor rings, and the rows that it completes."""
