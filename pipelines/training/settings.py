"""What ``train`` was asked for, complete and checked: behind this nothing reads the command line."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from fewstep_sr.networks.indices import MAX_LAYERS
from fewstep_sr.networks.noise_predictor import NoisePredictorConfig

from .options import TIMESTEPS, InvSROptions, LoopOptions, OSEDiffOptions, PiSASROptions


@dataclass(frozen=True)
class DataSettings:
    """The pictures of a training, and how it goes on with them.

    Args:
        data: folders, lists and pictures, each with ``=SHARE`` behind it where it has a share.
        patch: side of the crops in pixels.
        crops: how many different ones there are; None for ever new ones.
        threads: of the CPU, for the networks; None for torch's own choice.
        mild: share of the pictures that are degraded mildly.
    """

    data: tuple[str, ...]
    patch: int
    loop: LoopOptions
    crops: int | None = None
    threads: int | None = None
    mild: float = 0.0

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "DataSettings":
        loop = LoopOptions(
            output=arguments.output,
            steps=arguments.steps,
            batch=arguments.batch,
            lr=arguments.lr,
            warmup=arguments.warmup,
            cosine=arguments.cosine,
            seed=arguments.seed,
            ema=arguments.ema,
            accumulate=arguments.accumulate,
            mixed_precision=arguments.mixed_precision,
            max_grad_norm=arguments.max_grad_norm,
            weight_decay=arguments.weight_decay,
            optimizer=arguments.optimizer,
            matrix_lr=arguments.matrix_lr,
            workers=arguments.workers,
            save_every=arguments.save_every,
            sample_every=arguments.sample_every,
            max_minutes=arguments.max_minutes,
            resume=arguments.resume,
        )
        return cls(tuple(arguments.data), arguments.patch, loop, arguments.crops, arguments.threads, getattr(arguments, "mild_degradation", 0.0))


@dataclass(frozen=True)
class BaseSettings:
    """The base that a method is trained on, and one prompt for all pictures.

    Args:
        base: a path, a name or a hub id; None for the published one.
        comfyui: a ComfyUI folder to look in.
        prompt: None for the method's own.
        prompt_embeds: a file, in place of text.
    """

    base: str | None = None
    comfyui: Path | None = None
    download: bool = False
    prompt: str | None = None
    prompt_embeds: Path | None = None
    gradient_checkpointing: bool = False

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "BaseSettings":
        return cls(
            base=arguments.base,
            comfyui=Path(arguments.comfyui).expanduser() if arguments.comfyui else None,
            download=arguments.download,
            prompt=arguments.prompt,
            prompt_embeds=arguments.prompt_embeds,
            gradient_checkpointing=arguments.gradient_checkpointing,
        )


@dataclass(frozen=True)
class OSEDiffSettings:
    """Settings of ``train osediff``. ``negative_prompt`` is the published one where it is None; ``tagger`` and ``dape`` are files."""

    data: DataSettings
    base: BaseSettings
    options: OSEDiffOptions
    negative_prompt: str | None = None
    tagger: Path | None = None
    dape: Path | None = None

    def __post_init__(self):
        require_whole_cells(self.data.patch)

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "OSEDiffSettings":
        """Raises ValueError where an option is wrong."""
        options = OSEDiffOptions(
            rank=arguments.rank,
            mse=arguments.mse_weight,
            lpips=arguments.lpips_weight,
            vsd=arguments.vsd_weight,
            regulariser=arguments.regulariser_weight,
            regulariser_everywhere=arguments.regulariser_everywhere,
            guidance=arguments.guidance,
            latent=arguments.latent_weight,
            latent_l1=arguments.latent_loss == "l1",
            gradients=arguments.gradient_weight,
            structure=arguments.structure_weight,
            timestep=arguments.timestep,
            vae_lr=arguments.vae_lr,
        )
        data, base = DataSettings.from_arguments(arguments), BaseSettings.from_arguments(arguments)
        return cls(data, base, options, arguments.negative_prompt, arguments.tagger, arguments.dape)


@dataclass(frozen=True)
class PiSASRSettings:
    """Settings of ``train pisasr``: ``weights`` is the first stage's result, a file or the run's folder. The rest as :class:`OSEDiffSettings`."""

    data: DataSettings
    base: BaseSettings
    options: PiSASROptions
    weights: Path | None = None
    negative_prompt: str | None = None
    tagger: Path | None = None
    dape: Path | None = None

    def __post_init__(self):
        semantic = self.options.stage == "semantic"
        if semantic and self.weights is None:
            raise ValueError("--weights: found none, expected the pixel stage's run or its file: --stage semantic learns on top of it.")
        if not semantic and self.weights is not None:
            raise ValueError(f"--weights: found {self.weights}, but --stage pixel begins anew. Leave it out, or give --stage semantic.")
        require_whole_cells(self.data.patch)

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "PiSASRSettings":
        """Raises ValueError where an option is wrong, or does not go with another."""
        options = PiSASROptions(
            stage=arguments.stage,
            rank_pixel=arguments.rank_pixel,
            rank_semantic=arguments.rank_semantic,
            mse=arguments.mse_weight,
            lpips=arguments.lpips_weight,
            csd=arguments.csd_weight,
            guidance=arguments.guidance,
            null_prompt=arguments.null_prompt,
        )
        data, base = DataSettings.from_arguments(arguments), BaseSettings.from_arguments(arguments)
        return cls(data, base, options, arguments.weights, arguments.negative_prompt, arguments.tagger, arguments.dape)


@dataclass(frozen=True)
class InvSRSettings:
    """Settings of ``train invsr``: ``perceptual`` is the latent LPIPS's file, ``init`` a noise predictor to go on from, whose dimensions count instead
    of ``predictor``'s.
    """

    data: DataSettings
    base: BaseSettings
    options: InvSROptions
    predictor: NoisePredictorConfig
    perceptual: Path | None = None
    init: Path | None = None

    def __post_init__(self):
        options = self.options
        if options.variance_alone and (self.data.loop.weight_decay or not self.init or not options.variance):
            raise ValueError("--variance-alone: expected --init with a trained predictor, --variance-weight above 0, and no --weight-decay.")
        channels, layers = self.predictor.block_out_channels, self.predictor.layers_per_block
        if len(channels) != len(layers):
            found = f"{len(channels)} and {len(layers)}"
            raise ValueError(
                f"--predictor-channels, --predictor-layers: found {found} numbers, expected as many of one as of the other, one a level."
            )
        if sum(layers) > MAX_LAYERS:
            raise ValueError(f"--predictor-layers: found {sum(layers)} in all, expected at most {MAX_LAYERS}: a file of more is not read.")
        require_whole_cells(self.data.patch)

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "InvSRSettings":
        """Raises ValueError where an option is wrong, or does not go with another."""
        start = arguments.mode == "start"
        gaussian = arguments.gaussian_weight
        options = InvSROptions(
            start=start,
            timesteps=tuple(arguments.timesteps or (TIMESTEPS if start else TIMESTEPS[1:])),
            latent=arguments.latent_weight,
            perceptual=arguments.perceptual_weight,
            gaussian=gaussian if gaussian is not None else (0.0 if start else 0.1),
            variance=arguments.variance_weight,
            variance_alone=arguments.variance_alone,
            mse=arguments.mse_weight,
            structure=arguments.structure_weight,
            adversarial=arguments.adversarial_weight,
            adversarial_from=arguments.adversarial_from,
            discriminator_channels=tuple(arguments.discriminator_channels),
        )
        time, temb = arguments.predictor_time
        channels, layers = tuple(arguments.predictor_channels), tuple(arguments.predictor_layers)
        predictor = NoisePredictorConfig(block_out_channels=channels, layers_per_block=layers, time_channels=time, temb_channels=temb)
        data, base = DataSettings.from_arguments(arguments), BaseSettings.from_arguments(arguments)
        return cls(data, base, options, predictor, arguments.perceptual, arguments.init)


def require_whole_cells(patch: int) -> None:
    """Raises ValueError where a patch is not whole cells of the UNet at its coarsest."""
    if patch % 64:
        raise ValueError(f"--patch: found {patch}, expected a multiple of 64, the size of the UNet's coarsest latent pixel.")
