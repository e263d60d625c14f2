"""``upscale``: weights to pipeline, pictures to pictures."""

import argparse
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from fewstep_sr.methods.schedule import few_step_indices
from fewstep_sr.miniature import INVSR_TIMESTEP

from .base import FewStepSRPipeline
from .batch import Job, join, list_jobs, run, share
from .demo import load_demo
from .find import BASES, WEIGHTS, find
from .invsr import InvSRPipeline
from .osediff import OSEDiffPipeline
from .pictures import FORMATS, read_picture, require_writable, write_picture
from .single_file import find_tokenizer


def upscale(arguments: argparse.Namespace) -> int:
    """Restore all pictures, this process its share. Returns 1 where some failed, else 0."""
    if arguments.scale <= 0:
        raise ValueError(f"--scale: found {arguments.scale:g}, expected more than 0.")
    arguments.method = arguments.method or ("invsr" if arguments.demo else "osediff")
    if arguments.demo:
        refused = {"--base": arguments.base, "--weights": arguments.weights, "--prompt": arguments.prompt, "--tagger": arguments.tagger}
        if given := [option for option, value in refused.items() if value is not None]:
            raise ValueError(f"--demo: found {', '.join(given)}, but the miniature has its own weights and one prompt. Leave out one or the other.")
        if arguments.cfg != 1:
            raise ValueError(f"--cfg: found {arguments.cfg:g}, expected 1 with --demo: the miniature has no negative prompt.")
    if arguments.tagger and arguments.method == "invsr":
        raise ValueError("--tagger: InvSR has one prompt for all pictures, expected --method osediff with a tagger.")
    if arguments.output is None:
        arguments.output = _beside(arguments.input, arguments.scale, arguments.format)
    if arguments.method == "invsr":
        if arguments.demo and arguments.steps == 1:
            arguments.timesteps = arguments.timesteps or [INVSR_TIMESTEP]
        few_step_indices("InvSR", arguments.steps, arguments.timesteps)
    state = join(arguments.device)
    jobs = list_jobs(arguments.input, arguments.output, arguments.format and f".{arguments.format}")
    mine, done = share(jobs, state, arguments.overwrite)
    if done and state.is_main_process:
        print(f"{done} of {len(jobs)} are done already and left as they are (--overwrite does them again).", file=sys.stderr)
    if done == len(jobs):
        return 0
    # Also where this process has nothing to do: one that fetches must fetch for those that wait.
    base, weights = _find(arguments, state)
    failures = run(mine, Upscaler(arguments, base, weights, state).work if mine else None, state)
    if failures and state.is_main_process:
        print(f"\n{len(failures)} of {len(jobs)} failed:", *(f"  {name}: {reason}" for name, reason in failures), sep="\n", file=sys.stderr)
    state.wait_for_everyone()  # a launcher ends all processes as soon as one has failed: not before the report
    return 1 if failures else 0


def _beside(inputs: list[str], scale: float, kind: str | None) -> Path:
    """Where one picture's result goes without -o: beside it."""
    path = Path(inputs[0]).expanduser()
    if len(inputs) > 1 or not path.is_file():
        raise ValueError(f"-o: found none for {', '.join(inputs)}, expected a folder for the results. Only a single picture's goes beside it.")
    suffix = f".{kind}" if kind else path.suffix if path.suffix.lower() in FORMATS else ".png"
    return path.with_name(f"{path.stem}_x{scale:g}{suffix}")


def _find(arguments: argparse.Namespace, state: PartialState) -> tuple[str, str]:
    comfyui = Path(arguments.comfyui).expanduser() if arguments.comfyui else None
    if comfyui and not (comfyui / "models").is_dir():
        raise FileNotFoundError(f"--comfyui: there is no models folder in {comfyui}. Give the folder that ComfyUI's main.py is in.")
    if arguments.demo:
        return "", ""
    with state.local_main_process_first():  # the others of this machine find in the cache what it fetched
        base = find(BASES[arguments.method], arguments.base, comfyui, arguments.download)
        return base, find(WEIGHTS[arguments.method], arguments.weights, comfyui, arguments.download)


class Upscaler:
    """A loaded pipeline and the settings of a run."""

    def __init__(self, arguments: argparse.Namespace, base: str, weights: str, state: PartialState):
        self.arguments = arguments
        device = torch.device(arguments.device) if arguments.device else state.device
        dtype = getattr(torch, arguments.dtype or ("float32" if device.type == "cpu" else "float16"))
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        kind = OSEDiffPipeline if arguments.method == "osediff" else InvSRPipeline
        self.prompt_embeds = None
        if arguments.demo:
            self.pipeline, self.prompt_embeds = load_demo(arguments.method)
        else:
            self.pipeline = load_base(kind, base, dtype, arguments)
            self.pipeline.load_osediff(weights) if kind is OSEDiffPipeline else self.pipeline.load_noise_predictor(weights)
        if kind is OSEDiffPipeline:
            self.pipeline.fuse()
            if arguments.tagger:
                self.pipeline.load_tagger(arguments.tagger, arguments.dape)
        self.pipeline.set_progress_bar_config(leave=False, dynamic_ncols=True, disable=state.num_processes > 1 or None)  # None: in a terminal alone
        if arguments.tile:
            self.pipeline.enable_tiling(arguments.tile)
        if arguments.offload:
            self.pipeline.enable_model_cpu_offload(device=device)
        else:
            self.pipeline.to(device)

    def work(self, job: Job) -> None:
        arguments = self.arguments
        picture = read_picture(job.source)
        width, height = picture.image.size
        require_writable(picture, (round(width * arguments.scale), round(height * arguments.scale)), job.target)
        settings = {
            "scale": arguments.scale,
            "guidance_scale": arguments.cfg,
            "generator": torch.Generator().manual_seed(arguments.seed),
            "prompt": arguments.prompt,
            "negative_prompt": arguments.negative_prompt,
            "prompt_embeds": self.prompt_embeds,
        }
        settings = {name: value for name, value in settings.items() if value is not None}
        if arguments.color_fix:
            settings["color_fix"] = None if arguments.color_fix == "none" else arguments.color_fix
        elif arguments.demo:
            settings["color_fix"] = "wavelet"  # the miniature's VAE knows next to no hues
        if arguments.method == "invsr":
            settings |= {"num_inference_steps": arguments.steps, "timesteps": arguments.timesteps}
        restored = self.pipeline(picture.image, **settings).images[0]
        write_picture(restored, picture, job.target, arguments.quality)


def load_base(kind: type[FewStepSRPipeline], base: str, dtype: torch.dtype, arguments: argparse.Namespace) -> FewStepSRPipeline:
    """A pipeline of ``kind`` on a base in one file, in a folder or on the hub."""
    offline = not arguments.download
    if Path(base).is_file():
        tokenizer = find_tokenizer(local_files_only=offline, comfyui=arguments.comfyui)
        return kind.from_single_file(base, tokenizer=tokenizer, torch_dtype=dtype, local_files_only=offline)
    return kind.from_pretrained(base, torch_dtype=dtype, local_files_only=offline)
