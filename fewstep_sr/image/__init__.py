"""Images around the networks: sizes, colour, alpha."""
