"""Training of PiSA-SR (Sun et al., CVPR 2025) in two stages: a set of LoRA weights for the pixels, then one for semantic detail on top of it."""

import copy
import logging
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from fewstep_sr.methods import PISASR, load_weights
from fewstep_sr.methods.pisasr import SETS, TIMESTEP, PiSASRAdapter, peft_name, residual_step, save_adapter, save_published
from fewstep_sr.weights.lora import PEFT_ALPHA

from ..adapter import put_on, require_layers
from . import distillation
from .adapters import adapt_set, extract_sets
from .bases import Base, Prompts
from .common import denoiser, draw, enlarge, sample_grid
from .options import STAGES, PiSASROptions
from .records import fingerprint
from .task import Task

ADAPTER_FILE, PUBLISHED_FILE = PISASR.weights.names

_log = logging.getLogger(__name__)


def read_pixel_set(path: str | Path) -> PiSASRAdapter:
    """What the first stage has made: its file, or the file in its output folder.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is something else.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in PISASR.weights.names if (path / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"--weights: found no {ADAPTER_FILE} in {path}. Give the pixel stage's output folder, or its file.")
        path = found
    return load_weights(PISASR, path)


class ResidualGenerator(nn.Module):
    """Low-quality pictures to restored latents and pictures, by the UNet that learns and a VAE that does not."""

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL):
        super().__init__()
        self.unet, self.vae = unet, vae

    def forward(self, enlarged: torch.Tensor, prompt_embeds: torch.Tensor, noise: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            enlarged: low-quality pictures (B, 3, H, W) in [0, 1], enlarged to the result's size.
            prompt_embeds: (B, n, width).
            noise: standard normal (B, 4, H / 8, W / 8) for a sample of the encoder's posterior, as published; None takes its mean.

        Returns:
            Restored latents (B, 4, H / 8, W / 8), times the scaling factor, and pictures (B, 3, H, W) in [-1, 1].
        """
        scale = self.vae.config.scaling_factor
        with torch.no_grad():
            posterior = self.vae.encode(enlarged * 2 - 1).latent_dist
            latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise
            latents = (latents * scale).float()
        timesteps = torch.full((len(latents),), TIMESTEP, device=latents.device)
        eps = self.unet(latents, timesteps, encoder_hidden_states=prompt_embeds).sample.float()
        restored = residual_step(latents, eps, eps)
        return restored, self.vae.decode(restored / scale).sample.float().clamp(-1, 1)


class PiSASRTask(Task):
    """PiSA-SR's losses. The pixel set learns by the pictures' squared distance; the semantic one by that, LPIPS and classifier score distillation,
    while the pixel set acts and stays as it is, to the last bit.

    Args:
        pixel: of the semantic stage: the first stage's result, of which the pixel set is taken.
        lpips: distance of pictures in [-1, 1]; None where its weights are not at hand.
    """

    def __init__(
        self,
        base: Base,
        prompts: Prompts,
        options: PiSASROptions,
        pixel: PiSASRAdapter | None = None,
        lpips: nn.Module | None = None,
        gradient_checkpointing: bool = False,
    ):
        self.semantic = options.stage == "semantic"
        if self.semantic != (pixel is not None):
            raise ValueError(
                f"pixel: found {'none' if pixel is None else 'weights'} in the {options.stage} stage; the semantic stage alone has them."
            )
        if self.semantic and options.csd and not prompts.has_negative:
            raise ValueError(
                "negative prompt: found none beside the prompt's embeddings, but the distillation wants one. Give it, or --csd-weight 0."
            )
        self.prompts, self.options, self.lpips = prompts, options, lpips if self.semantic else None
        self.csd = options.csd if self.semantic else 0.0
        if not (options.mse or self.csd or (options.lpips and self.lpips)):
            raise ValueError("losses: found none that has a weight above 0, so nothing would be trained. Give one, such as --mse-weight 1.")
        if options.null_prompt and prompts.empty(torch.empty(0)) is None:
            _log.warning("null prompt: the prompt is given as embeddings without empty_prompt_embeds beside it, and is the prompt of every batch.")
        self.frozen, self.measures = list(prompts.networks), [self.lpips] if self.lpips else []
        self._base = fingerprint(base.unet, base.vae)
        learners = [base.unet]
        if self.csd:
            self.judge = copy.deepcopy(base.unet)
            self.frozen.append(self.judge)
            learners.append(self.judge)
        self._pixel = _put_on_pixel(base.unet, pixel) if pixel else None
        adapt_set(base.unet, SETS[STAGES.index(options.stage)], options.rank_semantic if self.semantic else options.rank_pixel)
        base.vae.requires_grad_(False)
        self.generator = ResidualGenerator(base.unet, base.vae).train()
        self.phases = {"generator": self.generator}
        if gradient_checkpointing:
            for network in (*learners, base.vae):
                network.enable_gradient_checkpointing()

    def settings(self):
        lpips = self.options.lpips if self.lpips else 0.0
        return {"method": "pisasr", **asdict(self.options), "lpips": lpips, "pixel": self._pixel, "base": self._base, **self.prompts.settings()}

    def loss(self, phase, batch, generator):
        options, hq = self.options, batch["hq"] * 2 - 1
        embeds = self.prompts(batch["hq"])
        seen = self._emptied(embeds, batch["hq"], generator)
        latents, pictures = self.phases["generator"](enlarge(batch["lq"], hq.shape[-2:]), seen, draw(hq, generator))
        losses = {}
        if options.mse:
            losses["mse"] = options.mse * F.mse_loss(pictures, hq)
        if options.lpips and self.lpips:
            losses["lpips"] = options.lpips * self.lpips(pictures, hq).mean()
        if self.csd:
            losses["csd"] = self.csd * self._distil(latents, embeds, batch["hq"], generator)
        return sum(losses.values()), {name: value.detach() for name, value in losses.items()}

    def _emptied(self, embeds: torch.Tensor, hq: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The prompts, or in a share of the batches the empty one."""
        kept = torch.rand(1, 1, 1, generator=generator) >= self.options.null_prompt
        empty = self.prompts.empty(hq)
        return embeds if empty is None else torch.where(kept.to(embeds.device, non_blocking=True), embeds, empty)

    def _distil(self, latents, embeds, hq, generator):
        timesteps = distillation.draw_timesteps(len(hq), generator, *distillation.CLASSIFIER_TIMESTEPS)
        timesteps = timesteps.to(latents.device, non_blocking=True)
        judge, negative = denoiser(self.judge), self.prompts.negative(hq)
        return distillation.classifier_distillation_loss(latents, draw(hq, generator), timesteps, judge, embeds, negative, self.options.guidance)

    def sample(self, batch):
        enlarged = enlarge(batch["lq"], batch["hq"].shape[-2:])
        _, pictures = self.generator(enlarged, self.prompts(batch["hq"]))
        return sample_grid(batch["lq"], pictures / 2 + 0.5, batch["hq"])

    def save(self, folder: Path) -> None:
        """Both layouts: safetensors, and the authors'. After the pixel stage the semantic set is one that changes nothing."""
        adapter = extract_sets(self.generator.unet)
        save_adapter(adapter, folder / ADAPTER_FILE)
        save_published(adapter, folder / PUBLISHED_FILE)


def _put_on_pixel(unet: UNet2DConditionModel, adapter: PiSASRAdapter) -> str:
    """Put the pixel set on the UNet. Returns a fingerprint of both."""
    if other := {low_rank.alpha for low_rank in adapter.unet.values()} - {PEFT_ALPHA}:
        raise ValueError(f"--weights: found lora_alpha {other.pop():g}, expected {PEFT_ALPHA:g}, as the published layout has it.")
    require_layers(unet, adapter.unet, "--weights")
    put_on(unet, adapter.unet, {layer: peft_name(layer, SETS[0]) for layer in adapter.unet}, 1.0)
    return fingerprint(unet)
