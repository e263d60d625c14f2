"""Weight files: read without running them, recognised by their contents, written whole or not at all."""
