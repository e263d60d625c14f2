"""The methods' stages as ComfyUI nodes on native sockets."""

from .color import FewStepSRColorFix
from .cutout import FewStepSRFillTransparent
from .demo import FewStepSRDemoLoader
from .invsr import InvSRNoisePredictorLoader, InvSRStartState
from .load_adapter import FewStepSRAdapterLoader
from .one_step import FewStepSROneStep
from .osediff import OSEDiffLoader, OSEDiffOneStep, OSEDiffStartState
from .s3diff import S3DiffAdapt, S3DiffDegradation, S3DiffEstimatorLoader
from .scheduler import FewStepScheduler
from .tagger import DAPETagger, DAPETaggerLoader
from .tiled_model import FewStepSRTiledModel
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
    FewStepSRTiledModel,
    FewStepSRVAEEncode,
    FewStepSRVAEDecode,
    FewStepSRColorFix,
    FewStepSRDemoLoader,
    FewStepSRFillTransparent,
    FewStepSRAdapterLoader,
    FewStepSROneStep,
    S3DiffEstimatorLoader,
    S3DiffDegradation,
    S3DiffAdapt,
]
