"""Frames out of and into videos, a few at a time, everything else of the file as it was. PyAV is imported where a video is opened."""
