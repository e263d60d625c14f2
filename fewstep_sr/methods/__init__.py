"""Each published method: its equations, its schedule, its files."""
