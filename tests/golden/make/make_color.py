"""Golden outputs of the colour fixes. usage: python make_color.py INVSR_CHECKOUT OUT_DIR"""

import os
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "support"))  # procedural.py
import procedural as P

ref, out = sys.argv[1], Path(sys.argv[2])
sys.path.insert(0, ref + "/src")
sys.path.insert(0, ref)
os.chdir(ref)
from utils import util_color_fix as C

content = torch.from_numpy(P.image(3, 64, 48)).permute(2, 0, 1)[None]
style = torch.from_numpy(P.image(4, 64, 48)).permute(2, 0, 1)[None]
r = dict(
    adain=C.adaptive_instance_normalization(content, style),
    wavelet=C.wavelet_reconstruction(content, style),
    ycbcr=C.ycbcr_color_replace(content, style),
)
np.savez_compressed(out / "color.npz", **{k: v.float().numpy() for k, v in r.items()})
print({k: tuple(v.shape) for k, v in r.items()})
