"""Training of a small VAE of Stable Diffusion's shape: 8 x 8 pixels to one latent cell of 4 channels."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from torch import nn

from fewstep_sr.networks.posterior import Posterior
from pipelines.training.common import draw
from pipelines.training.discriminator import PatchDiscriminator
from pipelines.training.losses import adversarial_loss, gaussian_constraint, gradient_loss, gradient_similarity, hinge_loss, texture_loss
from pipelines.training.task import Task

SCALING_FACTOR = 0.18215
"""Stable Diffusion's: latents times this have deviation 1."""


def small_vae(channels: tuple[int, ...] = (32, 32, 64, 128), layers: int = 1, groups: int = 8) -> AutoencoderKL:
    """A VAE with random weights, whose residual blocks add nothing yet.

    Group normalisation would take the tone away: each group's mean, and its deviation. Here groups have several channels, and the first convolutions of encoder and
    decoder add to each a constant of its own, larger than the picture's part; the residual stream carries it on, so that a group's mean and deviation are nearly
    the same for all pictures, of all sizes.
    """
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=layers,
        latent_channels=4,
        norm_num_groups=groups,
        scaling_factor=SCALING_FACTOR,
    )
    for conv in (vae.encoder.conv_in, vae.decoder.conv_in):
        nn.init.normal_(conv.bias)
    # latents of a deviation near 1 and a posterior far narrower, so that the decoder hears the encoder from the first step on
    vae.encoder.conv_out.weight.data.mul_(14)
    nn.init.constant_(vae.quant_conv.bias.data[4:], -6.0)
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            if module.conv_shortcut is not None:
                _pass_on(module.conv_shortcut)
        elif isinstance(module, Downsample2D | Upsample2D):
            _pass_on(module.conv)
        elif isinstance(module, Attention):
            nn.init.zeros_(module.to_out[0].weight)
    return vae


@torch.no_grad()
def _pass_on(conv: nn.Conv2d) -> None:
    """Begin as little more than a pass through: the mean of 2 x 2 pixels where the convolution halves the size, each pixel itself elsewhere."""
    rows, columns = conv.weight.shape[:2]
    channels = torch.eye(rows) if rows == columns else nn.init.orthogonal_(torch.empty(rows, columns))
    conv.weight.mul_(0.1)
    if conv.kernel_size == (1, 1):
        conv.weight.copy_(channels[..., None, None])
    elif conv.stride == (2, 2):
        conv.weight[:, :, :2, :2] += channels[..., None, None] / 4
    else:
        conv.weight[:, :, 1, 1] += channels


class Autoencoder(nn.Module):
    """A VAE there and back in one call, which is what accelerate wraps."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pictures: torch.Tensor, noise: torch.Tensor, restored: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Of pictures (B, 3, H, W) in [-1, 1]: the reconstruction from a sample of the posterior, and the posterior's divergence from the standard normal.

        The last pictures are not encoded, but decoded from ``restored`` (b, 4, H / 8, W / 8), times the scaling factor.
        """
        latents, kl = [], pictures.new_zeros(())
        encoded = len(pictures) - (0 if restored is None else len(restored))
        if encoded:
            posterior = self.vae.encode(pictures[:encoded]).latent_dist
            kl = gaussian_constraint(Posterior(posterior.mean, posterior.logvar))
            latents.append(posterior.mean + posterior.std * noise[:encoded])
        if restored is not None:
            latents.append(restored / self.vae.config.scaling_factor)
        return self.vae.decode(torch.cat(latents)).sample, kl


@dataclass(frozen=True)
class TextureOptions:
    """Of a decoder that draws texture where it can't know it: weights of its losses, and the share of pictures that are decoded from restored latents."""

    texture: float = 0.0
    structure: float = 0.0
    adversarial: float = 0.0
    adversarial_from: int = 0
    discriminator_channels: tuple[int, ...] = (32, 64, 128)
    restored: float = 0.0


class AutoencoderTask(Task):
    """Reconstruction (L1, L1 of differences at three scales, L1 of each latent cell's mean tone and hue, which normalisation would drop) and a weak pull of the
    posterior to the standard normal; and what the texture options add: the strength of textures and edges, and a discriminator's opinion.

    ``decoder_only`` leaves the latents as they are, so that what was trained on them stays good; otherwise the result's latents are normalised
    over ``examples`` (B, 3, H, W) in [0, 1], see :func:`normalize_latents`. ``restore`` makes latents of low-quality pictures, see
    :class:`tools.miniature.restored.RestoredLatents`.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        examples: torch.Tensor,
        kl_weight: float = 1e-4,
        gradient_weight: float = 0.5,
        tone_weight: float = 2.0,
        chroma_weight: float = 8.0,
        decoder_only: bool = False,
        options: TextureOptions = TextureOptions(),
        restore: Callable[[torch.Tensor, torch.Tensor | None, torch.Generator], torch.Tensor] | None = None,
    ):
        self.vae, self.examples, self.kl_weight, self.decoder_only = vae, examples, kl_weight, decoder_only
        self.gradient_weight, self.tone_weight, self.chroma_weight = gradient_weight, tone_weight, chroma_weight
        self.options, self._restore = options, restore
        vae.requires_grad_(True)
        if decoder_only:
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)
        self.phases = {"autoencoder": Autoencoder(vae)}
        if options.adversarial:
            self.discriminator = self.phases["discriminator"] = PatchDiscriminator(options.discriminator_channels)

    def optimizer(self, phase, parameters, options):
        """The discriminator's is Adam, at the loop's rate."""
        if phase == "discriminator":
            return torch.optim.Adam(parameters, options.lr, betas=(0.5, 0.99))
        return super().optimizer(phase, parameters, options)

    def settings(self):
        """Nothing where there is no such option: runs from before there were any go on."""
        return {} if self.options == TextureOptions() else asdict(self.options)

    def loss(self, phase, batch, generator):
        return self._reconstruct(batch, generator) if phase == "autoencoder" else self._discriminate()

    def _reconstruct(self, batch, generator):
        options, hq = self.options, batch["hq"] * 2 - 1
        noise = draw(hq, generator)
        reconstruction, kl = self.phases["autoencoder"](hq, noise, self._restored(batch, generator))
        l1, gradient = (reconstruction - hq).abs().mean(), gradient_loss(reconstruction, hq)
        error = F.avg_pool2d(reconstruction - hq, 8)
        tone, chroma = error.abs().mean(), (error - error.mean(1, keepdim=True)).abs().mean()
        loss = (
            l1
            + self.gradient_weight * gradient
            + self.tone_weight * tone
            + self.chroma_weight * chroma
            + (0 if self.decoder_only else self.kl_weight * kl)
        )
        figures = {"l1": l1, "differences": gradient, "tone": tone, "chroma": chroma, "kl": kl}
        if options.texture:
            figures["texture"] = texture_loss(reconstruction, hq)
            loss = loss + options.texture * figures["texture"]
        if options.structure:
            figures["structure"] = 1 - gradient_similarity(reconstruction / 2 + 0.5, batch["hq"])
            loss = loss + options.structure * figures["structure"]
        if options.adversarial:
            self._seen = hq, reconstruction.detach()
            if self.step >= options.adversarial_from:
                self.discriminator.requires_grad_(False)  # its own gradients come from its own phase
                figures["adversarial"] = adversarial_loss(self.discriminator(reconstruction))
                self.discriminator.requires_grad_(True)
                loss = loss + options.adversarial * figures["adversarial"]
        return loss, {name: value.detach() for name, value in figures.items()}

    def _restored(self, batch, generator: torch.Generator) -> torch.Tensor | None:
        """Restored latents of the batch's last pictures, as many as their share."""
        last = round(self.options.restored * len(batch["hq"]))
        if not last or self._restore is None:
            return None
        number = batch.get("number")
        return self._restore(batch["lq"][-last:], None if number is None else number[-last:], generator)

    def _discriminate(self):
        logits = self.phases["discriminator"](torch.cat(self._seen))
        real, fake = zip(*(level.float().chunk(2) for level in logits), strict=True)
        return hinge_loss(real, fake), {"real": real[0].mean().detach(), "fake": fake[0].mean().detach()}

    def sample(self, batch):
        hq = batch["hq"]
        reconstruction = self.vae.decode(self.vae.encode(hq * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
        rows = [hq, reconstruction]
        if self.options.restored and self._restore:
            restored = self._restore(batch["lq"], None, torch.Generator().manual_seed(0))
            rows.append(self.vae.decode(restored / self.vae.config.scaling_factor).sample / 2 + 0.5)
        return torch.cat([torch.cat(list(row), -1) for row in rows], -2)

    def save(self, folder: Path) -> None:
        vae = self.vae
        if not self.decoder_only:
            vae = copy.deepcopy(vae).cpu()
            normalize_latents(vae, self.examples)
        vae.save_pretrained(folder / "vae")


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Shift and scale the latents, in the convolutions around them, so that over ``pictures`` (B, 3, H, W) in [0, 1] each channel, times the
    scaling factor, has mean 0 and deviation 1, as a diffusion model wants. Reconstructions stay what they are.
    """
    means = torch.cat([vae.encode(picture[None] * 2 - 1).latent_dist.mean for picture in pictures])
    shift, scale = means.mean((0, 2, 3)), 1 / (vae.config.scaling_factor * means.std((0, 2, 3)))
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += (post.weight * shift[None, :, None, None]).sum((1, 2, 3))
    post.weight /= scale[None, :, None, None]
    quant.weight[:4] *= scale[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - shift) * scale
    quant.bias[4:] += 2 * scale.log()
