"""InvSR (Yue et al., CVPR 2025): a predicted noise map makes the low-quality image a state of the diffusion trajectory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..diffusion import add_noise, predict_x0
from ..lazy import torch
from ..weights.kinds import FileKind, has_key, unwrap, without_wrappers
from ..weights.save import save_safetensors
from ..weights.strict import own_copies
from .method import Demo, Method, Option, Paper, Published, Source
from .schedule import Schedule, parse_timesteps

if TYPE_CHECKING:
    from ..networks.noise_predictor import NoisePredictorConfig  # a network's module imports torch

MAX_START = 250
"""The noise predictor is trained for start timesteps up to this one, counted from 1."""


def start_state(z_lq: torch.Tensor, noise: torch.Tensor, alpha_bar: float | torch.Tensor) -> torch.Tensor:
    """The state from which the diffusion model goes on, x_t = sqrt(a_t) y_0 + sqrt(1 - a_t) f_w(y_0, t) (eq. 8).

    Args:
        z_lq: latents (B, 4, h, w) of the upscaled low-quality images, times the scaling factor.
        noise: the predicted noise map f_w(y_0, t), as ``z_lq``.
        alpha_bar: of the noise schedule at t.
    """
    return add_noise(z_lq, noise, alpha_bar)


def intermediate_state(z_hq: torch.Tensor, noise: torch.Tensor, alpha_bar: float | torch.Tensor) -> torch.Tensor:
    """A training state on the way, of the high-quality latents instead, x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) f_w(y_0, t) (eq. 10)."""
    return add_noise(z_hq, noise, alpha_bar)


def reverse_step(x_t: torch.Tensor, noise_pred: torch.Tensor, alpha_bar: float | torch.Tensor) -> torch.Tensor:
    """The high-quality latents that one call of the diffusion model sees from a state, (x_t - sqrt(1 - a_t) eps(x_t, t)) / sqrt(a_t) (eq. 9)."""
    return predict_x0(x_t, noise_pred, alpha_bar)


def trajectory_step(
    x_t: torch.Tensor, noise_pred: torch.Tensor, alpha_bar: float | torch.Tensor, next_alpha_bar: float | torch.Tensor
) -> torch.Tensor:
    """One step along the inversion trajectory, x_s = g(x_t, t) (eq. 6), with the deterministic g that the authors' program samples with.

    g is DDIM's (Song et al., ICLR 2021, eq. 12 with eta 0), which in sigma space is Euler's. The term of eq. 6 that adds noise on the way has
    standard deviation 0 there. ``next_alpha_bar`` is 1 at the end of the trajectory.
    """
    return add_noise(reverse_step(x_t, noise_pred, alpha_bar), noise_pred, next_alpha_bar)


@dataclass(frozen=True)
class NoisePredictorWeights:
    """A noise predictor's weights under the keys of :class:`fewstep_sr.networks.noise_predictor.NoisePredictor`."""

    config: NoisePredictorConfig
    state_dict: dict[str, torch.Tensor]


def _parse(state: Mapping, metadata: Mapping[str, str], name: str) -> NoisePredictorWeights:
    """A bare state dict, or a training checkpoint with one inside. Dimensions come from the weights' shapes."""
    from ..networks.noise_predictor import NoisePredictorConfig

    inner = unwrap(state) or state
    weights = {k: v for k, v in without_wrappers(inner, name).items() if isinstance(v, torch.Tensor)}
    try:
        config = NoisePredictorConfig.from_state_dict(weights)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    _check_shapes(weights, config, name)
    return NoisePredictorWeights(config, own_copies(weights, name))


def _check_shapes(weights: Mapping[str, torch.Tensor], config: NoisePredictorConfig, name: str) -> None:
    from ..networks.noise_predictor import NoisePredictor

    try:
        expected = {k: tuple(v.shape) for k, v in NoisePredictor(config, device="meta").state_dict().items()}
    except RuntimeError:  # a product of its dimensions is beyond 64 bits
        raise ValueError(f"{name}: found a noise predictor of {config.block_out_channels} channels; the file is damaged.") from None
    for key, shape in expected.items():
        found = tuple(weights[key].shape) if key in weights else None
        if found != shape:
            raise ValueError(f"{name}: {key} has {f'shape {found}' if found else 'no tensor'}, expected {shape}; the file is incomplete or damaged.")
    if surplus := sorted(set(weights) - set(expected)):
        raise ValueError(f"{name}: {surplus[0]} is no part of the network ({len(surplus)} such tensors); the file is of another network.")


def save_noise_predictor(weights: NoisePredictorWeights, path: str | Path) -> None:
    """Write a noise predictor as safetensors under its published keys."""
    save_safetensors(weights.state_dict, path, {"family": "InvSR noise predictor"})


def _summary(weights: NoisePredictorWeights) -> list[str]:
    from ..networks.noise_predictor import NoisePredictorConfig

    is_published = weights.config == NoisePredictorConfig()
    published = "as published" if is_published else "not the published dimensions"
    fits = "SD-Turbo (and Stable Diffusion 2.1-base, whose latents are the same)" if is_published else "the base that it was trained with"
    blocks = ", ".join(f"{n} layers of {c}" for c, n in zip(weights.config.block_out_channels, weights.config.layers_per_block, strict=True))
    return [f"  network: {blocks} ({published})", f"  fits: {fits}"]


SCHEDULE = Schedule(
    start=MAX_START,
    origin=1,
    reason="InvSR's noise predictor is trained for start timesteps up to 250 (counted from 1)",
    published={1: (200,), 2: (200, 100), 3: (200, 100, 50), 4: (200, 150, 100, 50), 5: (250, 200, 150, 100, 50)},  # inference_invsr.py
)


def _timestep(text: str) -> tuple[int, ...]:
    return tuple(parse_timesteps(text))


INVSR = Method(
    key="invsr",
    title="InvSR",
    paper=Paper(
        authors="Zongsheng Yue, Kang Liao, Chen Change Loy",
        title="Arbitrary-steps Image Super-resolution via Diffusion Inversion",
        venue="CVPR 2025",
        url="https://arxiv.org/abs/2412.09013",
        code="https://github.com/zsyOAOA/InvSR",
    ),
    base=Source(
        what="SD-Turbo",
        folder="checkpoints",
        names=("sd_turbo.safetensors", "sd-turbo.safetensors"),
        licence="Stability AI Community License, https://huggingface.co/stabilityai/sd-turbo/blob/main/LICENSE.md",
        size="5.2 GB",
        repository="stabilityai/sd-turbo",
    ),
    weights=Source(
        what="InvSR's noise predictor",
        folder="invsr",
        names=("noise_predictor_sd_turbo_v5.safetensors", "noise_predictor_sd_turbo_v5.pth"),
        licence="NTU S-Lab License 1.0 (non-commercial use only), https://github.com/zsyOAOA/InvSR/blob/master/LICENSE",
        size="135 MB in float32",
        repository="OAOA/InvSR",
        file="noise_predictor_sd_turbo_v5.pth",
    ),
    kind=FileKind("invsr", "an InvSR noise predictor", has_key(r"^encoder\.(down_blocks\.0\.resnets\.0\.time_emb_proj|time_embedding\.linear_1)\.")),
    contents="",
    source="noise_predictor_sd_turbo_v5.pth is at huggingface.co/OAOA/InvSR.",
    parse=_parse,
    save=save_noise_predictor,
    summary=_summary,
    pipeline="InvSRPipeline",
    color_fix=None,
    # As published (sampler_invsr.py), to the missing space after "noisy,".
    prompt="Cinematic, high-contrast, photo-realistic, 8k, ultra HD, meticulous detailing, hyper sharpness, perfect without deformations",
    negative_prompt="Low quality, blurring, jpeg artifacts, deformed, over-smooth, cartoon, noisy,painting, drawing, sketch, oil painting",
    schedule=SCHEDULE,
    options=(
        Option("steps", "1 to 5 as published, or more, evenly spaced", int, default=1),
        Option(
            "timesteps",
            "instead of --steps, such as 250 150 50 (descending, 250 at most; with --demo: 50)",
            _timestep,
            default=(),
            metavar="T",
            many=True,
        ),
    ),
    demo=Demo(
        file="noise_predictor.safetensors",
        note="MODEL is the plain base; start at timestep 50",
        call={"timesteps": (50,)},  # of held-out photos it keeps more there than at the published 200
    ),
    published=(
        Published(
            "realsr",
            {"psnr": 24.50, "ssim": 0.726, "lpips": 0.287, "niqe": 4.22, "musiq": 67.46, "clipiqa": 0.692},
            "InvSR's paper (https://arxiv.org/abs/2412.09013, Tables 2 and 7 of its first version)",
            "One step from 200 with --color-fix wavelet, as its README says. Its RealSR is the camera's own test set (RealSRV3), not StableSR's crops: expect other figures on those.",
        ),
    ),
)
