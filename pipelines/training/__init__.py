"""Training of OSEDiff and InvSR: ``python -m pipelines train``."""
