"""Training of OSEDiff and InvSR, and of small base models to try them on: ``python -m pipelines train``."""
