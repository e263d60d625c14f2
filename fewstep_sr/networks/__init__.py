"""The networks that the methods bring along, in plain torch."""
