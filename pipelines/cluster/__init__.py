"""``upscale --ray``: pictures by the million on the machines of a Ray cluster, from and to any file system that fsspec knows."""
