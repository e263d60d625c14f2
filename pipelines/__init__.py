"""The methods without ComfyUI: diffusers pipelines and a command line, ``python -m pipelines``.

Pipelines are imported when they are asked for: torch and diffusers take seconds that ``--help`` need not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep_sr.methods.method import Method

    from .base import FewStepSRPipeline


def pipeline_class(method: "Method") -> "type[FewStepSRPipeline]":
    """A method's pipeline: the class that its record names, in the module of its key."""
    return getattr(import_module(f".{method.key}", __name__), method.pipeline)


def __getattr__(name: str) -> Any:
    if name == "InvSRNoisePredictor":
        return import_module(".noise_predictor", __name__).InvSRNoisePredictor
    from fewstep_sr.methods import METHODS

    pipelines = {method.pipeline: method for method in METHODS.values()}
    if name == "__all__":
        return sorted([*pipelines, "InvSRNoisePredictor", "pipeline_class"])
    if name in pipelines:
        return pipeline_class(pipelines[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
