"""The methods' stages as ComfyUI nodes on native sockets."""

from importlib import import_module
from importlib.util import find_spec

from comfy_api.latest import io

from ..fewstep_sr.methods import METHODS
from .color import FewStepSRColorFix
from .cutout import FewStepSRFillTransparent
from .demo import FewStepSRDemoLoader
from .load_adapter import FewStepSRAdapterLoader
from .long_video import FewStepSRVideo
from .one_step import FewStepSROneStep
from .quality import FewStepSRQuality
from .scheduler import FewStepScheduler
from .tagger import DAPETagger, DAPETaggerLoader
from .tiled_model import FewStepSRTiledModel
from .vae import FewStepSRVAEDecode, FewStepSRVAEEncode


def nodes_of(key: str) -> list[type[io.ComfyNode]]:
    """The nodes of a method's own: those in the module of its key, where there is one."""
    if find_spec(f".{key}", __name__) is None:
        return []
    module = import_module(f".{key}", __name__)
    found = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, io.ComfyNode)]
    return [node for node in found if node.__module__ == module.__name__]


NODES = [
    *(node for key in METHODS for node in nodes_of(key)),
    FewStepScheduler,
    DAPETaggerLoader,
    DAPETagger,
    FewStepSRTiledModel,
    FewStepSRVAEEncode,
    FewStepSRVAEDecode,
    FewStepSRColorFix,
    FewStepSRDemoLoader,
    FewStepSRFillTransparent,
    FewStepSRAdapterLoader,
    FewStepSROneStep,
    FewStepSRQuality,
    FewStepSRVideo,
]
