"""Training of OSEDiff, PiSA-SR and InvSR: ``python -m pipelines train``."""
