"""Large images and batches: tiles, windows and groups that fit into memory."""
