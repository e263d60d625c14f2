"""The miniature's workshop: synthetic pictures, a small VAE and UNet to train on, and packing. ``python -m tools.miniature``."""
