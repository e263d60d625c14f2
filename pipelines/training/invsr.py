"""Training of InvSR's noise predictor (Yue et al., CVPR 2025) against a frozen diffusion model."""

from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fewstep_sr.diffusion import NUM_TRAIN_TIMESTEPS, alpha_bar_at
from fewstep_sr.image.predictor import fit_picture
from fewstep_sr.image.sizes import size_of
from fewstep_sr.methods.invsr import NoisePredictorWeights, intermediate_state, reverse_step, save_noise_predictor, start_state
from fewstep_sr.networks.noise_predictor import NoisePredictor, NoisePredictorConfig

from .bases import Base, Prompts
from .common import cells, denoiser, draw, enlarge, sample_grid
from .discriminator import LatentDiscriminator
from .latents import Encoder
from .losses import LATENT_BOUND, adversarial_loss, gaussian_constraint, gradient_similarity, hinge_loss, variance_constraint
from .options import TIMESTEPS, InvSROptions
from .records import fingerprint
from .task import Task

PREDICTOR_FILE = "noise_predictor.safetensors"


class InvSRTask(Task):
    """InvSR's losses and its learners, the noise predictor and, where there is an adversarial loss, the discriminator.

    Args:
        predictor: its dimensions; those published without.
        perceptual: distance of latents (:class:`pipelines.training.perceptual.LatentLPIPS`); None where its weights are not at hand.
    """

    def __init__(
        self,
        base: Base,
        prompts: Prompts,
        options: InvSROptions,
        predictor: NoisePredictorConfig | None = None,
        perceptual: nn.Module | None = None,
        gradient_checkpointing: bool = False,
    ):
        if not options.timesteps or not all(1 <= timestep <= NUM_TRAIN_TIMESTEPS for timestep in options.timesteps):
            raise ValueError(f"timesteps: found {options.timesteps}, expected numbers from 1 to {NUM_TRAIN_TIMESTEPS}, such as {TIMESTEPS}.")
        self.base, self.prompts, self.options, self.perceptual = base, prompts, options, perceptual
        losses = (options.latent, options.mse, options.gaussian, options.variance, options.structure, options.adversarial)
        if not any(losses) and not (options.perceptual and perceptual):
            raise ValueError("losses: found none that has a weight above 0, so nothing would be trained. Give one, such as --latent-weight 1.")
        self.encode_hq, self.encode_lq = Encoder(base.vae), Encoder(base.vae)
        self.frozen, self.measures = [*prompts.networks, base.unet, base.vae], [perceptual] if perceptual else []
        for network in self.frozen:
            network.requires_grad_(False)
        if gradient_checkpointing:
            base.unet.train().enable_gradient_checkpointing()  # which diffusers does in training alone; nothing in it draws
        self.predictor = NoisePredictor(predictor or NoisePredictorConfig())
        if options.variance_alone:
            _freeze_mean(self.predictor)
        self.phases = {"predictor": self.predictor}
        if options.adversarial:
            self.discriminator = LatentDiscriminator(base.unet.config.cross_attention_dim, options.discriminator_channels)
            self.phases["discriminator"] = self.discriminator

    def optimizer(self, phase, parameters, options):
        """The discriminator's is the published one, and not the loop's."""
        if phase == "discriminator":
            return torch.optim.Adam(parameters, options.lr, weight_decay=1e-3)
        return super().optimizer(phase, parameters, options)

    def settings(self):
        options = asdict(self.options) | {"perceptual": self.options.perceptual if self.perceptual else 0.0}
        if not self.options.mse:
            del options["mse"]  # runs that were begun before there was such a loss go on
        shape = {f"predictor_{name}": value for name, value in asdict(self.predictor.config).items()}
        return {"method": "invsr", **options, **shape, "base": fingerprint(self.base.unet, self.base.vae), **self.prompts.settings()}

    def loss(self, phase, batch, generator):
        return self._predict(batch, generator) if phase == "predictor" else self._discriminate()

    def _predict(self, batch, generator):
        options, hq, lq = self.options, batch["hq"], batch["lq"]
        embeds = self.prompts(hq)
        which = torch.randint(len(options.timesteps), (len(hq),), generator=generator)
        timesteps = (torch.tensor(options.timesteps)[which] - 1).to(hq.device, non_blocking=True)

        number = batch.get("number")
        target = self.encode_hq(hq, number).sample(draw(hq, generator))
        clean = self.encode_lq(enlarge(lq, hq.shape[-2:]), number).sample(draw(hq, generator)) if options.start else target
        posterior = self.phases["predictor"](self._fit(lq, hq), timesteps)
        x0 = self.restore(clean, posterior.sample(draw(hq, generator)).float(), timesteps, embeds)
        self._x0, self._seen = x0.detach(), (target, timesteps, embeds)
        losses = {"latent": options.latent * F.mse_loss(x0, target)}
        if options.perceptual and self.perceptual:
            losses["perceptual"] = options.perceptual * self.perceptual(x0, target)
        if options.gaussian:
            losses["gaussian"] = options.gaussian * gaussian_constraint(posterior)
        if options.variance:
            losses["variance"] = options.variance * variance_constraint(posterior)
        if options.mse or options.structure:
            pictures = self._decode(x0).clamp(0, 1)
        if options.mse:
            losses["mse"] = options.mse * F.mse_loss(pictures * 2 - 1, hq * 2 - 1)
        if options.structure:
            losses["structure"] = options.structure * (1 - gradient_similarity(pictures, hq))
        if options.adversarial and self.step >= options.adversarial_from:
            self.discriminator.requires_grad_(False)  # its own gradients come from its own phase
            logits = self.discriminator(x0.clamp(-LATENT_BOUND, LATENT_BOUND), timesteps, embeds)
            self.discriminator.requires_grad_(True)
            losses["adversarial"] = options.adversarial * adversarial_loss(logits)
        return sum(losses.values()), {name: value.detach() for name, value in losses.items()}

    def _fit(self, lq: torch.Tensor, hq: torch.Tensor) -> torch.Tensor:
        return fit_picture(lq, size_of(hq), cells(hq), self.predictor.config.pixels_per_cell) * 2 - 1

    def restore(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """x0 of one model call on the start state of low-quality latents, or in the middle on the intermediate state of high-quality ones."""
        alpha_bar = alpha_bar_at(timesteps, clean)
        state = (start_state if self.options.start else intermediate_state)(clean, noise, alpha_bar)
        return reverse_step(state, denoiser(self.base.unet)(state, timesteps, embeds), alpha_bar)

    def _discriminate(self):
        target, timesteps, embeds = self._seen
        both = torch.cat([target, self._x0.clamp(-LATENT_BOUND, LATENT_BOUND)])
        logits = self.phases["discriminator"](both, timesteps.repeat(2), embeds.repeat(2, 1, 1))
        real, fake = zip(*(level.float().chunk(2) for level in logits), strict=True)
        return hinge_loss(real, fake), {"real": real[-1].mean().detach(), "fake": fake[-1].mean().detach()}

    def sample(self, batch):
        """Restored in one step from the published start, from the posterior's means."""
        lq, hq = batch["lq"], batch["hq"]
        timesteps = torch.full((len(lq),), min(200, max(self.options.timesteps)) - 1, device=lq.device)
        latents = self.encode_lq(enlarge(lq, hq.shape[-2:])).mean
        noise = self.predictor(self._fit(lq, hq), timesteps).mean.float()
        x0 = self.restore(latents, noise, timesteps, self.prompts(hq))
        return sample_grid(lq, self._decode(x0), hq)

    def _decode(self, x0: torch.Tensor) -> torch.Tensor:
        """Latents times the scaling factor to pictures, of which [0, 1] is seen."""
        vae = self.base.vae
        return vae.decode((x0 / vae.config.scaling_factor).to(vae.dtype)).sample.float() / 2 + 0.5

    def save(self, folder: Path) -> None:
        state = {name: tensor.detach().float().cpu().clone() for name, tensor in self.predictor.state_dict().items()}
        save_noise_predictor(NoisePredictorWeights(self.predictor.config, state), folder / PREDICTOR_FILE)


def _freeze_mean(predictor: NoisePredictor) -> None:
    """Let nothing learn but the log-variance's half of the last convolution. Weight decay would change the other half: have none."""
    predictor.requires_grad_(False)
    for parameter in predictor.encoder.conv_out.parameters():
        parameter.requires_grad_(True)
        parameter.register_hook(lambda gradient: torch.cat([torch.zeros_like(gradient[: len(gradient) // 2]), gradient[len(gradient) // 2 :]]))
