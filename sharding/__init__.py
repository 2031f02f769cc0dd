"""Where arrays live: mesh axes, the table from dimension names to axes, placement, collectives."""
