"""``upscale``: weights to pipeline, pictures to pictures."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from . import pipeline_class
from .base import FewStepSRPipeline
from .batch import Job, join, list_jobs, run, share
from .demo import load_demo
from .find import find_base, find_weights
from .pictures import FORMATS, read_picture, require_writable, write_picture
from .settings import Settings
from .single_file import find_tokenizer


def upscale(settings: Settings) -> int:
    """Restore all images, this process its share. Returns 1 where some failed, else 0."""
    output = settings.output or _beside(settings.inputs, settings.scale, settings.suffix)
    state = join(settings.device)
    jobs = list_jobs(list(settings.inputs), output, settings.suffix)
    mine, done = share(jobs, state, settings.overwrite)
    if done and state.is_main_process:
        print(f"{done} of {len(jobs)} are done already and left as they are (--overwrite does them again).", file=sys.stderr)
    if done == len(jobs):
        return 0
    # Also where this process has nothing to do: one that fetches must fetch for those that wait.
    base, weights = _find(settings, state)
    failures = run(mine, Upscaler(settings, base, weights, state).work if mine else None, state)
    if failures and state.is_main_process:
        print(f"\n{len(failures)} of {len(jobs)} failed:", *(f"  {name}: {reason}" for name, reason in failures), sep="\n", file=sys.stderr)
    state.wait_for_everyone()  # a launcher ends all processes as soon as one has failed: not before the report
    return 1 if failures else 0


def _beside(inputs: Sequence[str], scale: float, suffix: str | None) -> Path:
    """Where one picture's result goes without -o: beside it."""
    path = Path(inputs[0]).expanduser()
    if len(inputs) > 1 or not path.is_file():
        raise ValueError(f"-o: found none for {', '.join(inputs)}, expected a folder for the results. Only a single picture's goes beside it.")
    own = path.suffix if path.suffix.lower() in FORMATS else ".png"
    return path.with_name(f"{path.stem}_x{scale:g}{suffix or own}")


def _find(settings: Settings, state: PartialState) -> tuple[str, str]:
    if settings.demo:
        return "", ""
    with state.local_main_process_first():  # the others of this machine find in the cache what it fetched
        base = find_base(settings.method, settings.base, settings.comfyui, settings.download)
        return base, find_weights(settings.method, settings.weights, settings.comfyui, settings.download)


class Upscaler:
    """A loaded pipeline and the settings of a run."""

    def __init__(self, settings: Settings, base: str, weights: str, state: PartialState):
        self.settings = settings
        device = torch.device(settings.device) if settings.device else state.device
        dtype = getattr(torch, settings.dtype or ("float32" if device.type == "cpu" else "float16"))
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        self.prompt_embeds: torch.Tensor | None = None
        if settings.demo:
            self.pipeline, self.prompt_embeds = load_demo(settings.method.key)
        else:
            self.pipeline = load_base(pipeline_class(settings.method), base, dtype, settings)
            self.pipeline.load_weights(weights)
        self.pipeline.prepare(settings.options)
        self.pipeline.set_progress_bar_config(leave=False, dynamic_ncols=True, disable=state.num_processes > 1 or None)  # None: in a terminal alone
        if settings.tile:
            self.pipeline.enable_tiling(settings.tile)
        if settings.offload:
            self.pipeline.enable_model_cpu_offload(device=device)
        else:
            self.pipeline.to(device)

    def work(self, job: Job) -> None:
        settings = self.settings
        picture = read_picture(job.source)
        width, height = picture.image.size
        require_writable(picture, (round(width * settings.scale), round(height * settings.scale)), job.target)
        optional = {"prompt": settings.prompt, "negative_prompt": settings.negative_prompt, "prompt_embeds": self.prompt_embeds}
        restored = self.pipeline(
            picture.image,
            scale=settings.scale,
            guidance_scale=settings.cfg,
            generator=torch.Generator().manual_seed(settings.seed),
            color_fix=settings.color_fix,
            **{name: value for name, value in optional.items() if value is not None},
            **self.pipeline.call_options(settings.options),
        ).images[0]
        write_picture(restored, picture, job.target, settings.quality)


def load_base(kind: type[FewStepSRPipeline], base: str, dtype: torch.dtype, settings: Settings) -> FewStepSRPipeline:
    """A pipeline of ``kind`` on a base in one file, in a folder or on the hub."""
    offline = not settings.download
    if Path(base).is_file():
        tokenizer = find_tokenizer(local_files_only=offline, comfyui=settings.comfyui)
        return kind.from_single_file(base, tokenizer=tokenizer, torch_dtype=dtype, local_files_only=offline)
    return kind.from_pretrained(base, torch_dtype=dtype, local_files_only=offline)
