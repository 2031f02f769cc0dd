"""Expert matmuls: dropless groups of rows against FP4 or FP8 weights that stay packed in memory."""
