"""The methods' stages as ComfyUI nodes on native sockets."""

from .color import FewStepSRColorFix
from .invsr import InvSRNoisePredictorLoader, InvSRStartState
from .osediff import OSEDiffLoader, OSEDiffOneStep, OSEDiffStartState
from .scheduler import FewStepScheduler
from .tagger import DAPETagger, DAPETaggerLoader
from .vae import FewStepSRVAEDecode, FewStepSRVAEEncode

NODES = [
    OSEDiffLoader,
    OSEDiffOneStep,
    OSEDiffStartState,
    InvSRNoisePredictorLoader,
    InvSRStartState,
    FewStepScheduler,
    DAPETaggerLoader,
    DAPETagger,
    FewStepSRVAEEncode,
    FewStepSRVAEDecode,
    FewStepSRColorFix,
]
