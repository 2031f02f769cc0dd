"""Official checkpoint files in and out; Orbax storage."""
