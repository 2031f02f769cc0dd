"""FP8 block matmul: dense projections whose weights stay in memory as their checkpoint codes."""
