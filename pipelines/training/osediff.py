"""Training of OSEDiff (Wu et al., NeurIPS 2024): a base becomes a one-step restorer, held to pictures by score distillation."""

import copy
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from fewstep_sr.diffusion import alpha_bar_at
from fewstep_sr.methods.osediff import TIMESTEP, one_step, save_adapter

from ..osediff import ADAPTER_FILE
from . import distillation
from .adapters import adapt_generator, adapt_regulariser, adapt_vae, extract_adapter
from .bases import Base, Prompts
from .common import denoiser, draw, enlarge, sample_grid
from .latents import Encoder
from .losses import gradient_loss, gradient_similarity
from .options import OSEDiffOptions
from .records import fingerprint
from .task import Task


class Generator(nn.Module):
    """Low-quality pictures to restored latents and pictures, by the networks that learn."""

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL, timestep: int = TIMESTEP):
        super().__init__()
        self.unet, self.vae, self.timestep = unet, vae, timestep

    def forward(
        self, enlarged: torch.Tensor, prompt_embeds: torch.Tensor, noise: torch.Tensor | None = None, decode: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            enlarged: low-quality pictures (B, 3, H, W) in [0, 1], enlarged to the result's size.
            prompt_embeds: (B, n, width).
            noise: standard normal (B, 4, H / 8, W / 8) for a sample of the encoder's posterior, as published; None takes its mean.
            decode: whether pictures are wanted.

        Returns:
            Restored latents (B, 4, H / 8, W / 8), times the scaling factor, and pictures (B, 3, H, W) in [-1, 1], or None.
        """
        scale = self.vae.config.scaling_factor
        posterior = self.vae.encode(enlarged * 2 - 1).latent_dist
        latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        latents = (latents * scale).float()
        timesteps = torch.full((len(latents),), self.timestep, device=latents.device)
        noise_pred = self.unet(latents, timesteps, encoder_hidden_states=prompt_embeds).sample.float()
        restored = one_step(latents, noise_pred, alpha_bar_at(timesteps, latents))
        return restored, self.vae.decode(restored / scale).sample.float().clamp(-1, 1) if decode else None


class OSEDiffTask(Task):
    """OSEDiff's losses and its two learners, the generator and, where there is distillation, the regulariser.

    Args:
        lpips: distance of pictures in [-1, 1]; None where its weights are not at hand.
    """

    def __init__(self, base: Base, prompts: Prompts, options: OSEDiffOptions, lpips: nn.Module | None = None, gradient_checkpointing: bool = False):
        if options.vsd and options.guidance != 1 and not prompts.has_negative:
            raise ValueError(
                "negative prompt: found none beside the prompt's embeddings, but distillation with guidance wants one. Give it, or guidance 1."
            )
        self.prompts, self.options, self.lpips = prompts, options, lpips
        if not any((options.mse, options.vsd, options.latent, options.gradients, options.structure, options.lpips and lpips)):
            raise ValueError("losses: found none that has a weight above 0, so nothing would be trained. Give one, such as --mse-weight 1.")
        self._base = fingerprint(base.unet, base.vae)
        self.frozen, self.measures = list(prompts.networks), [lpips] if lpips else []
        self.phases = {}
        learners = [base.unet]
        if options.vsd:
            self.judge, self.regulariser = copy.deepcopy(base.unet), copy.deepcopy(base.unet)
            self.frozen.append(self.judge)
            adapt_regulariser(self.regulariser, options.rank, options.regulariser_everywhere)
            learners += [self.judge, self.regulariser]
        if options.latent:
            self.target = copy.deepcopy(base.vae)
            self.target.decoder = None
            self.frozen.append(self.target)
            self._target = Encoder(self.target)
        adapt_generator(base.unet, options.rank)
        adapt_vae(base.vae, options.rank)
        self.generator = self.phases["generator"] = Generator(base.unet, base.vae, options.timestep).train()
        if options.vsd:
            self.phases["regulariser"] = self.regulariser.train()
        if gradient_checkpointing:
            for network in (*learners, base.vae):
                network.enable_gradient_checkpointing()

    def optimizer(self, phase, parameters, options):
        """The generator's has a group for the encoder, where that has a learning rate of its own."""
        if phase != "generator" or self.options.vae_lr is None:
            return super().optimizer(phase, parameters, options)
        if options.optimizer != "adamw":
            raise ValueError(f"--vae-lr: found {options.optimizer}, expected --optimizer adamw.")
        encoder = {id(parameter) for parameter in self.generator.vae.parameters()}
        groups: list[dict] = [{"params": [p for p in parameters if id(p) not in encoder]}]
        groups.append({"params": [p for p in parameters if id(p) in encoder], "lr": self.options.vae_lr})
        return torch.optim.AdamW(groups, options.lr, betas=options.betas, weight_decay=options.weight_decay)

    def settings(self):
        options = {name: value for name, value in asdict(self.options).items() if name != "vae_lr"}
        return {"method": "osediff", **options, "lpips": self.options.lpips if self.lpips else 0.0, "base": self._base, **self.prompts.settings()}

    def loss(self, phase, batch, generator):
        return self._restore(batch, generator) if phase == "generator" else self._regularise(generator)

    def _restore(self, batch, generator):
        options, hq = self.options, batch["hq"] * 2 - 1
        embeds = self.prompts(batch["hq"])
        decode = bool(options.mse or options.gradients or options.structure or (options.lpips and self.lpips))
        latents, pictures = self.phases["generator"](enlarge(batch["lq"], hq.shape[-2:]), embeds, draw(hq, generator), decode)
        self._latents, self._seen = latents.detach(), (hq, embeds)
        losses = {}
        if options.mse:
            losses["mse"] = options.mse * F.mse_loss(pictures, hq)
        if options.lpips and self.lpips:
            losses["lpips"] = options.lpips * self.lpips(pictures, hq).mean()
        if options.gradients:
            losses["gradients"] = options.gradients * gradient_loss(pictures, hq)
        if options.structure:
            losses["structure"] = options.structure * (1 - gradient_similarity(pictures / 2 + 0.5, batch["hq"]))
        if options.latent:
            target = self._target(batch["hq"], batch.get("number")).mean
            losses["latent"] = options.latent * (F.l1_loss if options.latent_l1 else F.mse_loss)(latents, target)
        if options.vsd:
            losses["vsd"] = options.vsd * self._distil(latents, embeds, batch["hq"], generator)
        return sum(losses.values()), {name: value.detach() for name, value in losses.items()}

    def _distil(self, latents, embeds, hq, generator):
        timesteps = distillation.draw_timesteps(len(hq), generator, distillation.MIN_TIMESTEP, distillation.MAX_TIMESTEP)
        guidance = self.options.guidance
        return distillation.distillation_loss(
            latents,
            draw(hq, generator),
            timesteps.to(latents.device, non_blocking=True),
            denoiser(self.judge),
            denoiser(self.regulariser),
            embeds,
            self.prompts.negative(hq) if guidance != 1 else None,
            guidance,
        )

    def _regularise(self, generator):
        hq, embeds = self._seen
        timesteps = distillation.draw_timesteps(len(hq), generator).to(hq.device, non_blocking=True)
        loss = distillation.regulariser_loss(self._latents, draw(hq, generator), timesteps, denoiser(self.phases["regulariser"]), embeds)
        return self.options.regulariser * loss, {}

    def sample(self, batch):
        enlarged = enlarge(batch["lq"], batch["hq"].shape[-2:])
        _, pictures = self.generator(enlarged, self.prompts(batch["hq"]))
        return sample_grid(batch["lq"], pictures / 2 + 0.5, batch["hq"])

    def save(self, folder: Path) -> None:
        save_adapter(extract_adapter(self.generator.unet, self.generator.vae, self.generator.timestep), folder / ADAPTER_FILE)
