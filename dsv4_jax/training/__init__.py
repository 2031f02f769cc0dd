"""Training: losses, optimizer, phases, data and the loop. Nothing here is needed to serve."""
