"""Measuring as the papers do: ``evaluate``, ``compare`` and ``verify``."""
