"""The methods without ComfyUI: diffusers pipelines and a command line, ``python -m pipelines``.

Pipelines are imported when they are asked for: torch and diffusers take seconds that ``--help`` need not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep_sr.methods.method import Method

    from .base import FewStepSRPipeline
    from .hypir import HYPIRPipeline
    from .invsr import InvSRPipeline
    from .noise_predictor import InvSRNoisePredictor
    from .osediff import OSEDiffPipeline
    from .pisasr import PiSASRPipeline
    from .s3diff import S3DiffPipeline

__all__ = ["HYPIRPipeline", "InvSRNoisePredictor", "InvSRPipeline", "OSEDiffPipeline", "PiSASRPipeline", "S3DiffPipeline", "pipeline_class"]


def pipeline_class(method: "Method") -> "type[FewStepSRPipeline]":
    """A method's pipeline: the class that its record names, in the module of its key."""
    return getattr(import_module(f".{method.key}", __name__), method.pipeline)


def __getattr__(name: str) -> Any:
    if name == "InvSRNoisePredictor":
        return import_module(".noise_predictor", __name__).InvSRNoisePredictor
    from fewstep_sr.methods import METHODS

    for method in METHODS.values():
        if method.pipeline == name:
            return pipeline_class(method)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
