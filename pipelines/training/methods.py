"""``train osediff``, ``train pisasr`` and ``train invsr`` of the command line."""

import argparse
import os
from typing import TYPE_CHECKING

from ..options import a_name, a_path
from .arguments import RAW, add_common, begin, report, training_pictures
from .ranges import WEIGHT, real, whole

if TYPE_CHECKING:
    from .bases import Base
    from .data import TrainingPictures
    from .settings import BaseSettings, DataSettings, InvSRSettings, OSEDiffSettings, PiSASRSettings

_PACKAGE = __package__.rpartition(".")[0]
_OSEDIFF = f"""\
examples:
  %(prog)s --base sd-2-1-base --data photos -o run --steps 100000 --mixed-precision bf16 --gradient-checkpointing
  accelerate launch --multi_gpu --num_processes 4 -m {_PACKAGE} train osediff --base sd-2-1-base --data train.txt -o run --steps 100000

The result, osediff.safetensors in the output folder, is what upscale --weights and the node 'Load OSEDiff' read.
"""
_PISASR = """\
examples:
  %(prog)s --base sd-2-1-base --data photos -o pixel --steps 4000 --mixed-precision bf16 --gradient-checkpointing
  %(prog)s --base sd-2-1-base --data photos -o semantic --stage semantic --weights pixel --steps 8000 --mixed-precision bf16

The result, in the output folder, is pisa_sr.safetensors, which upscale --weights reads, and pisa_sr.pkl, which the authors' own program reads.
"""
_INVSR = """\
examples:
  %(prog)s --base sd-turbo --data photos -o run --steps 100000 --mixed-precision fp16 --gradient-checkpointing
  %(prog)s --base sd-turbo --data photos -o run2 --steps 100000 --mode middle --init run/noise_predictor.safetensors

The result, noise_predictor.safetensors in the output folder, is what upscale --weights and the node 'Load InvSR Noise Predictor' read.
"""


def add_methods(trainings, common: argparse.ArgumentParser) -> None:
    command = trainings.add_parser("osediff", parents=[common], help="OSEDiff: an adapter for Stable Diffusion 2.1-base", epilog=_OSEDIFF, **RAW)
    add_common(command, lr=5e-5, patch_multiple=1)
    own = command.add_argument_group("method and losses")
    _add_degradation(own)
    _add_base(command, prompt="none")
    own.add_argument("--negative-prompt", help="negative prompt for guidance (default: the published one)")
    own.add_argument("--rank", type=whole(1, 4096), default=4, help="rank of the LoRA (default: %(default)s)")
    own.add_argument("--mse-weight", type=WEIGHT, default=1.0, help="weight of the squared distance of the pictures (default: %(default)g)")
    own.add_argument("--lpips-weight", type=WEIGHT, default=2.0, help="weight of LPIPS, if its weights are installed (default: %(default)g)")
    own.add_argument(
        "--vsd-weight", type=WEIGHT, default=1.0, help="weight of score distillation; 0 also saves the memory of its two UNets (default: %(default)g)"
    )
    own.add_argument("--regulariser-weight", type=WEIGHT, default=1.0, help="weight of the regulariser's own loss (default: %(default)g)")
    own.add_argument(
        "--regulariser-everywhere", action="store_true", help="train all layers of the regulariser, not only the UNet's middle block as published"
    )
    own.add_argument(
        "--guidance", type=real(0), default=7.5, help="guidance of the teacher (the frozen base) in the distillation (default: %(default)g)"
    )
    own.add_argument(
        "--timestep",
        type=whole(0, 999),
        default=999,
        help="timestep of the one step; use the result with the same one (default: %(default)s, as published)",
    )
    own.add_argument("--latent-weight", type=WEIGHT, default=0.0, help="not in the paper: weight of the latents' distance (default: %(default)g)")
    own.add_argument("--latent-loss", choices=["l1", "l2"], default="l2", help="the latents' distance (default: %(default)s)")
    own.add_argument("--gradient-weight", type=WEIGHT, default=0.0, help="not in the paper: weight of the edges' distance (default: %(default)g)")
    _add_structure(own)
    own.add_argument("--vae-lr", type=real(0, 10), help="learning rate of the encoder's LoRA (default: --lr)")
    _add_tagger(own)
    command.set_defaults(run=_osediff, weight_decay=1e-2, max_grad_norm=1.0)

    command = trainings.add_parser("pisasr", parents=[common], help="PiSA-SR: two LoRAs for Stable Diffusion 2.1-base", epilog=_PISASR, **RAW)
    add_common(command, lr=5e-5, patch_multiple=1)
    own = command.add_argument_group("method and losses")
    _add_degradation(own)
    _add_base(command, prompt="none")
    own.add_argument(
        "--stage", choices=["pixel", "semantic"], default="pixel", help="which LoRA to train; the semantic one needs the pixel one (default: pixel)"
    )
    own.add_argument("--weights", type=a_path, metavar="RUN", help="for the semantic stage: the pixel stage's output folder, or its file")
    own.add_argument("--negative-prompt", help="negative prompt of the distillation (default: the published one)")
    own.add_argument("--rank-pixel", type=whole(1, 4096), default=4, help="rank of the pixel LoRA, in its own stage (default: %(default)s)")
    own.add_argument("--rank-semantic", type=whole(1, 4096), default=4, help="rank of the semantic LoRA (default: %(default)s)")
    own.add_argument("--mse-weight", type=WEIGHT, default=1.0, help="weight of the squared distance of the pictures (default: %(default)g)")
    own.add_argument(
        "--lpips-weight", type=WEIGHT, default=2.0, help="semantic stage: weight of LPIPS, if its weights are installed (default: %(default)g)"
    )
    own.add_argument(
        "--csd-weight",
        type=WEIGHT,
        default=1.0,
        help="semantic stage: weight of score distillation; 0 also saves a UNet's memory (default: %(default)g)",
    )
    own.add_argument("--guidance", type=real(0), default=7.5, help="guidance of the distillation (default: %(default)g)")
    own.add_argument(
        "--null-prompt", type=real(0, 1), default=0.5, help="share of batches that are restored with an empty prompt (default: %(default)g)"
    )
    _add_tagger(own)
    command.set_defaults(run=_pisasr, weight_decay=1e-2, max_grad_norm=1.0)

    command = trainings.add_parser("invsr", parents=[common], help="InvSR: a noise predictor for SD-Turbo", epilog=_INVSR, **RAW)
    add_common(command, lr=5e-5, patch_multiple=1)
    own = command.add_argument_group("method and losses")
    _add_degradation(own)
    _add_base(command, prompt="the published one")
    own.add_argument(
        "--mode",
        choices=["start", "middle"],
        default="start",
        help="build states from low-quality pictures, or from high-quality ones (default: start)",
    )
    own.add_argument(
        "--timesteps", type=whole(1, 1000), nargs="+", metavar="T", help="counted from 1 (default: 250 200 150 100, without 250 in middle mode)"
    )
    own.add_argument("--latent-weight", type=WEIGHT, default=1.0, help="weight of the latents' squared distance (default: %(default)g)")
    own.add_argument("--perceptual", type=a_path, metavar="FILE", help="InvSR's latent LPIPS, vgg16_sdturbo_lpips.pth (default: no such loss)")
    own.add_argument("--perceptual-weight", type=WEIGHT, default=2.0, help="weight of that loss (default: %(default)g)")
    own.add_argument("--gaussian-weight", type=WEIGHT, help="weight of the Gaussian constraint (default: 0.1 in middle mode, otherwise 0)")
    own.add_argument(
        "--variance-weight",
        type=WEIGHT,
        default=0.0,
        help="not in the paper: weight of a loss that keeps the noise map's variance, which L2 alone would reduce (default: %(default)g)",
    )
    own.add_argument("--variance-alone", action="store_true", help="not in the paper: train only the variance; the mean stays as in --init")
    own.add_argument(
        "--mse-weight", type=WEIGHT, default=0.0, help="not in the paper: weight of the decoded pictures' squared distance (default: %(default)g)"
    )
    _add_structure(own)
    own.add_argument(
        "--adversarial-weight", type=WEIGHT, default=0.0, help="weight of the latent discriminator's loss; 0.1 as published (default: none)"
    )
    own.add_argument(
        "--adversarial-from", type=whole(0), default=10_000, help="steps in which only the discriminator is trained (default: %(default)s)"
    )
    own.add_argument("--discriminator-channels", type=whole(32, 8192, multiple=32), nargs="+", default=[128, 256, 512], help="default: 128 256 512")
    own.add_argument(
        "--predictor-channels", type=whole(64, 8192, multiple=64), nargs="+", default=[256, 512], help="multiples of 64 (default: 256 512)"
    )
    own.add_argument("--predictor-layers", type=whole(1, 64), nargs="+", default=[3, 3], help="layers of each level (default: 3 3)")
    own.add_argument(
        "--predictor-time", type=whole(2, 8192, multiple=2), nargs=2, default=[256, 512], help="widths of the timestep embedding (default: 256 512)"
    )
    own.add_argument("--init", type=a_path, metavar="FILE", help="start from this noise predictor; its dimensions are used")
    command.set_defaults(run=_invsr, warmup=2000, ema=0.999, weight_decay=0.0, max_grad_norm=float("inf"))


def _add_structure(command: argparse._ArgumentGroup) -> None:
    command.add_argument(
        "--structure-weight",
        type=WEIGHT,
        default=0.0,
        help="not in the paper: weight of 1 - the pictures' gradient magnitude similarity (default: %(default)g)",
    )


def _add_tagger(command: argparse._ArgumentGroup) -> None:
    command.add_argument("--tagger", type=a_path, help="image tagger that generates the prompts, as published; --prompt is added at their end")
    command.add_argument("--dape", type=a_path, help="DAPE's weights for the tagger (default: DAPE.pth beside it, if it is there)")


def _add_degradation(command: argparse._ArgumentGroup) -> None:
    command.add_argument(
        "--mild-degradation",
        type=real(0, 1),
        default=0.0,
        metavar="SHARE",
        help="not in the papers: share of pictures with a single mild degradation, as by cameras, instead of the published one (default: %(default)g)",
    )


def _add_base(command: argparse.ArgumentParser, prompt: str) -> None:
    command.add_argument(
        "--base", type=a_name, help="Stable Diffusion: a .safetensors or .ckpt file, a diffusers folder, or a hub id (default: the published one)"
    )
    command.add_argument(
        "--comfyui", type=a_path, default=os.environ.get("COMFYUI_PATH") or None, help="a ComfyUI folder to look in (default: COMFYUI_PATH)"
    )
    command.add_argument("--download", action="store_true", help="download the base if it is missing; its licence is shown")
    command.add_argument("--prompt", help=f"one prompt for all pictures (default: {prompt})")
    command.add_argument(
        "--prompt-embeds",
        type=a_path,
        metavar="FILE",
        help="instead of text: a safetensors file with prompt_embeds (default: the base's own, if it has no text encoder)",
    )
    command.add_argument("--gradient-checkpointing", action="store_true", help="less memory, about a third more time")


def _base(settings: "BaseSettings", method: str) -> "Base":
    from fewstep_sr.methods import METHODS

    from ..find import find_base
    from .bases import load_base

    name = find_base(METHODS[method], settings.base, settings.comfyui, settings.download)
    return load_base(name, settings.download, settings.comfyui)


def _pairs(settings: "DataSettings") -> "TrainingPictures":
    from .degradation import Degradation

    return training_pictures(settings, Degradation(mild_chance=settings.mild))


def _osediff(arguments: argparse.Namespace) -> int:
    from .settings import OSEDiffSettings

    return _train_osediff(OSEDiffSettings.from_arguments(arguments))


def _train_osediff(settings: "OSEDiffSettings") -> int:
    from fewstep_sr.methods.osediff import NEGATIVE_PROMPT

    from ..tagger import PromptTagger
    from .bases import Prompts
    from .loop import train
    from .osediff import ADAPTER_FILE, OSEDiffTask
    from .perceptual import load_lpips

    begin(settings.data)
    pictures, base = _pairs(settings.data), _base(settings.base, "osediff")
    tagger = PromptTagger.from_files(settings.tagger, settings.dape) if settings.tagger else None
    negative = NEGATIVE_PROMPT if settings.negative_prompt is None else settings.negative_prompt
    prompts = Prompts(base, settings.base.prompt or "", negative, tagger, settings.base.prompt_embeds)
    lpips = load_lpips() if settings.options.lpips else None
    train(OSEDiffTask(base, prompts, settings.options, lpips, settings.base.gradient_checkpointing), pictures, settings.data.loop)
    report(settings.data.loop, ADAPTER_FILE)
    return 0


def _pisasr(arguments: argparse.Namespace) -> int:
    from .settings import PiSASRSettings

    return _train_pisasr(PiSASRSettings.from_arguments(arguments))


def _train_pisasr(settings: "PiSASRSettings") -> int:
    from fewstep_sr.methods.osediff import NEGATIVE_PROMPT

    from ..tagger import PromptTagger
    from .bases import Prompts
    from .loop import train
    from .perceptual import load_lpips
    from .pisasr import ADAPTER_FILE, PiSASRTask, read_pixel_set

    begin(settings.data)
    pixel = read_pixel_set(settings.weights) if settings.weights else None
    pictures, base = _pairs(settings.data), _base(settings.base, "pisasr")
    tagger = PromptTagger.from_files(settings.tagger, settings.dape) if settings.tagger else None
    negative = NEGATIVE_PROMPT if settings.negative_prompt is None else settings.negative_prompt
    prompts = Prompts(base, settings.base.prompt or "", negative, tagger, settings.base.prompt_embeds)
    lpips = load_lpips() if settings.options.lpips and pixel else None
    train(PiSASRTask(base, prompts, settings.options, pixel, lpips, settings.base.gradient_checkpointing), pictures, settings.data.loop)
    report(settings.data.loop, ADAPTER_FILE)
    return 0


def _invsr(arguments: argparse.Namespace) -> int:
    from .settings import InvSRSettings

    return _train_invsr(InvSRSettings.from_arguments(arguments))


def _train_invsr(settings: "InvSRSettings") -> int:
    from fewstep_sr.methods import INVSR, load_weights

    from .bases import Prompts
    from .invsr import PREDICTOR_FILE, InvSRTask
    from .loop import train
    from .perceptual import LatentLPIPS

    begin(settings.data)
    pictures, base = _pairs(settings.data), _base(settings.base, "invsr")
    prompts = Prompts(base, INVSR.prompt if settings.base.prompt is None else settings.base.prompt, file=settings.base.prompt_embeds)
    weights = load_weights(INVSR, settings.init) if settings.init else None
    perceptual = LatentLPIPS.from_file(settings.perceptual) if settings.perceptual else None
    config = weights.config if weights else settings.predictor
    task = InvSRTask(base, prompts, settings.options, config, perceptual, settings.base.gradient_checkpointing)
    if weights:
        task.predictor.load_state_dict(weights.state_dict)
    train(task, pictures, settings.data.loop)
    report(settings.data.loop, PREDICTOR_FILE)
    return 0
