"""``upscale``: weights to pipeline, pictures to pictures."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from . import pipeline_class
from .base import DTYPE, FewStepSRPipeline
from .batch import Outcome, Written, join, run, share
from .demo import load_demo
from .done import Results, listed
from .files import size_in_words
from .find import find_base, find_companions, find_weights
from .jobs import Job, beside, list_jobs
from .pictures import read_picture, require_place, require_writable, write_picture
from .processes import Peers
from .processor import choose, choose_convolutions, fit_threads
from .ranges import say_ignored_of_videos, scaled
from .settings import Settings
from .single_file import find_tokenizer
from .video.run import upscale_frames


def upscale(settings: Settings) -> int:
    """Restore all images, this process its share. Returns 1 where some failed, else 0."""
    output = settings.output or beside(settings.inputs, settings.size_in_words, settings.suffix)
    state, peers = join(settings.device)
    try:
        return _upscale(settings, output, state, peers)
    finally:
        peers.leave()


def _upscale(settings: Settings, output: Path, state: PartialState, peers: Peers) -> int:
    began = time.monotonic()
    jobs = list_jobs(settings.inputs, output, settings.suffix)
    say_ignored_of_videos(settings, jobs)
    results = Results(settings, jobs)
    with peers.waiting(lambda: "Nothing was begun."):
        mine, done = share(jobs, state, results)
    if state.is_main_process:
        results.report(done)
    if done == len(jobs):
        return 0
    # Also where this process has nothing to do: one that fetches must fetch for those that wait.
    with peers.waiting(lambda: "Nothing was begun."):
        found = find_files(settings, state)
    outcome = run(mine, Upscaler(settings, *found, state, results.record, by_speed=True).work if mine else None, state, peers)
    if state.is_main_process:
        _report(outcome, len(jobs), output, time.monotonic() - began, settings)
    with peers.waiting(lambda: "All work is done."):
        state.wait_for_everyone()  # a launcher ends all processes as soon as one has failed: not before the report
    return 1 if outcome.failures else 0


def _report(outcome: Outcome, jobs: int, output: Path, seconds: float, settings: Settings) -> None:
    by = settings.method.title + (" (miniature)" if settings.demo else "")
    size = size_in_words(sum(written.bytes for written in outcome.written))
    if len(outcome.written) == 1:
        (written,) = outcome.written
        print(f"{written.path}: {written.size[0]} x {written.size[1]} pixels, {size}, {seconds:.1f} s, by {by}")
    elif outcome.written:
        names = listed([written.path for written in outcome.written])
        print(f"{len(outcome.written)} images written to {output} by {by}: {size}, {seconds:.1f} s ({names})")
    if outcome.failures:
        lines = (f"  {name}: {reason}" for name, reason in outcome.failures)
        print(f"\n{len(outcome.failures)} of {jobs} failed:", *lines, sep="\n", file=sys.stderr)
    if outcome.not_begun:
        print(f"{outcome.not_begun} were not started: each would have met the last error. The same command continues.", file=sys.stderr)


def find_files(settings: Settings, state: PartialState) -> tuple[str, str, dict[str, Path | None]]:
    """Where the base, the method's weights and the files beside them are."""
    if settings.demo:
        return "", "", {}
    with state.local_main_process_first():  # the others of this machine find in the cache what it fetched
        base = find_base(settings.method, settings.base, settings.comfyui, settings.download)
        weights = find_weights(settings.method, settings.weights, settings.comfyui, settings.download)
        return base, weights, find_companions(settings.method, settings.options, settings.comfyui, settings.download)


class Upscaler:
    """A loaded pipeline and the settings of a run.

    Args:
        by_speed: on a CPU, where the settings name no precision, take bfloat16 if it is much faster there.
    """

    def __init__(
        self,
        settings: Settings,
        base: str,
        weights: str,
        companions: dict[str, Path | None],
        state: PartialState,
        record: Callable[[Job], str],
        by_speed: bool = False,
    ):
        self.settings, self.record = settings, record
        self.position = state.local_process_index + state.num_processes
        device = torch.device(settings.device) if settings.device else state.device
        dtype, memory_format = getattr(torch, settings.dtype or ("float32" if device.type == "cpu" else "float16")), torch.contiguous_format
        if device.type == "cpu":
            fit_threads()
            if not settings.demo:
                dtype, memory_format = choose([dtype, torch.bfloat16] if by_speed and not settings.dtype else [dtype])
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        self.prompt_embeds: torch.Tensor | None = None
        if settings.demo:
            self.pipeline, self.prompt_embeds = load_demo(settings.method.key, settings.weights and str(Path(settings.weights).expanduser()))
        else:
            # On a CPU what adapters add is added in float32, and the sum rounded.
            self.pipeline = load_base(pipeline_class(settings.method), base, torch.float32 if device.type == "cpu" else dtype, settings)
            self.pipeline.load_weights(weights)
            if settings.decoder:
                self.pipeline.load_decoder(settings.decoder)
        self.pipeline.prepare({**settings.options, **companions})
        if device.type == "cpu" and not settings.demo:
            self.pipeline.convert(dtype, memory_format)
            self.pipeline.replace_convolutions(choose_convolutions(dtype, memory_format))
            if by_speed and dtype != torch.float32 and not settings.dtype and state.is_main_process:
                print("bfloat16 is chosen, which this processor computes much faster (--dtype float32 for more precision).", file=sys.stderr)
        self.pipeline.set_progress_bar_config(leave=False, dynamic_ncols=True, disable=state.num_processes > 1 or None)  # None: in a terminal alone
        if settings.tile:
            self.pipeline.enable_tiling(settings.tile)
        if settings.compile:
            self.pipeline.enable_compile()
        if settings.offload:
            self.pipeline.enable_model_cpu_offload(device=device)
        else:
            self.pipeline.to(device)

    def work(self, job: Job) -> Written:
        settings = self.settings
        if job.is_video:
            return upscale_frames(job, settings, self.restore, self.record(job), self.position)
        picture = read_picture(job.source)
        width, height = scaled(picture.pixels.size, settings.scale_of(picture.pixels.size))
        require_writable(picture, (width, height), job.target)
        require_place(job.target, (width, height))
        restored = self.restore(picture.pixels.tensor())
        notes = write_picture(restored, picture, job.target, settings.quality, self.record(job))
        return Written(job.target, (width, height), job.target.stat().st_size, (*self.pipeline.notes(), *picture.metadata.notes, *notes))

    def restore(self, image: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, h, w) in [0, 1] as (B, 3, H, W)."""
        settings = self.settings
        optional = {"prompt": settings.prompt, "negative_prompt": settings.negative_prompt, "prompt_embeds": self.prompt_embeds}
        return self.pipeline(
            image,
            scale=settings.scale_of((image.shape[-1], image.shape[-2])),
            guidance_scale=settings.cfg,
            generator=torch.Generator().manual_seed(settings.seed),
            color_fix=settings.color_fix,
            output_type="pt",
            **{name: value for name, value in optional.items() if value is not None},
            **self.pipeline.call_options(settings.options),
        ).images


def load_base(kind: type[FewStepSRPipeline], base: str, dtype: torch.dtype, settings: Settings) -> FewStepSRPipeline:
    """A pipeline of ``kind`` on a base in one file, in a folder or on the hub."""
    offline = not settings.download
    if Path(base).is_file():
        tokenizer = find_tokenizer(local_files_only=offline, comfyui=settings.comfyui)
        return kind.from_single_file(base, tokenizer=tokenizer, **{DTYPE: dtype}, local_files_only=offline)
    return kind.from_pretrained(base, **{DTYPE: dtype}, local_files_only=offline)
