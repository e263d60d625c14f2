"""The methods without ComfyUI: diffusers pipelines and a command line, ``python -m pipelines``."""

from .invsr import InvSRPipeline
from .noise_predictor import InvSRNoisePredictor
from .osediff import OSEDiffPipeline

__all__ = ["InvSRNoisePredictor", "InvSRPipeline", "OSEDiffPipeline"]
