"""A video from file to file, a few frames at a time: its length is not bounded by memory."""

import inspect
import itertools
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import comfy.model_management
import comfy.samplers
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import InputImpl, Types, io
from server import PromptServer

from ..fewstep_sr.image.color import COLOR_FIXES
from ..fewstep_sr.image.temporal import Steady
from ..fewstep_sr.methods import INVSR
from ..fewstep_sr.video.encoding import Encoding
from ..fewstep_sr.video.formats import CODECS, default_codec, default_pixel_format
from ..fewstep_sr.video.frames import Clip
from ..fewstep_sr.video.segments import Segments, require_copies
from .color import FewStepSRColorFix
from .invsr import NoisePredictorSocket, predicted_start
from .marks import PER_IMAGE, found_adapter
from .one_step import FewStepSROneStep
from .page import require_number, warn
from .sampling import require_step
from .scheduler import FewStepScheduler
from .tiled_model import stream_pictures
from .vae import FewStepSRVAEDecode, FewStepSRVAEEncode

_SEGMENT = 120
"""Frames that are encoded together."""


class FewStepSRVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FewStepSRVideo",
            display_name="Restore Video (Few-Step SR)",
            category="FewStepSR",
            description="Restores a video of any length, a few frames at a time, with the stages that the other nodes have: upscale, encode, one step, decode, "
            "colour fix. Sound, subtitles, timestamps, colours and rotation stay. Save Video writes the result without encoding it again.",
            search_aliases=["video upscale", "long video", "upscale video", "batch", "frames", "restore", "osediff", "invsr", "super resolution"],
            inputs=[
                io.Video.Input("video", tooltip="From Load Video, Trim Video or Create Video."),
                io.Model.Input(
                    "model",
                    tooltip="The model from Load OSEDiff or Load Few-Step SR Adapter; with noise_predictor, InvSR's base. Tiled Model may follow it.",
                ),
                io.Conditioning.Input("positive", tooltip="The prompt, one for all frames."),
                io.Vae.Input("vae", tooltip="The VAE from the same loader; for InvSR the checkpoint's own."),
                NoisePredictorSocket.Input(
                    "noise_predictor",
                    optional=True,
                    tooltip="Restores by InvSR: from Load InvSR Noise Predictor. Leave it open for the adapter on the model.",
                ),
                io.Float.Input(
                    "scale_by",
                    default=2.0,
                    min=0.01,
                    max=8.0,
                    step=0.01,
                    tooltip="How much larger the video becomes. Odd sides get a row or column more.",
                ),
                io.Int.Input(
                    "frames",
                    default=4,
                    min=1,
                    max=256,
                    tooltip="Frames in memory at a time. More is faster where models are moved to the GPU and back.",
                ),
                io.Combo.Input(
                    "color_fix",
                    options=[*COLOR_FIXES, "none"],
                    default="adain",
                    tooltip="As in Color Fix (Few-Step SR): adain for OSEDiff, wavelet for InvSR.",
                ),
                io.Boolean.Input(
                    "steady",
                    default=False,
                    tooltip="Averages grain over time before frames are restored, along the motion of the whole picture: lowers flicker, and leaves no ghosts.",
                ),
                io.Boolean.Input(
                    "clamp",
                    default=True,
                    advanced=True,
                    tooltip="As in VAE Decode (Few-Step SR): on; off for HYPIR, where the colour fix clamps after its correction.",
                ),
                io.Int.Input(
                    "steps", default=1, min=1, max=50, advanced=True, tooltip="InvSR: steps of the published schedule, 1 to 5 as published."
                ),
                io.Int.Input(
                    "seed",
                    default=12345,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    advanced=True,
                    tooltip="InvSR: draws the noise map, one for all frames.",
                ),
                io.Float.Input(
                    "crf",
                    default=16.0,
                    min=0.0,
                    max=51.0,
                    step=1.0,
                    advanced=True,
                    tooltip="Quality of the result: H.264, or HEVC where the source has more than 8 bits. Lower is better and larger.",
                ),
            ],
            outputs=[io.Video.Output(tooltip="The restored video, a file in ComfyUI's temporary folder. Wire it into Save Video.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        video,
        model,
        positive,
        vae,
        noise_predictor=None,
        scale_by=2.0,
        frames=4,
        color_fix="adain",
        steady=False,
        clamp=True,
        steps=1,
        seed=12345,
        crf=16.0,
    ) -> io.NodeOutput:
        for value, name, low, high in ((scale_by, "scale_by", 0.01, 8.0), (frames, "frames", 1, 256), (crf, "crf", 0.0, 51.0)):
            require_number(value, name, low, high)
        _require_method(model, noise_predictor)

        def restore(images: torch.Tensor) -> torch.Tensor:
            """(B, 3, h, w) to (B, 3, H, W), in [0, 1]."""
            pixels = images.movedim(1, -1)
            size = [max(1, round(side * scale_by)) for side in images.shape[-1:-3:-1]]
            enlarged = comfy.utils.common_upscale(images, *size, "bicubic", "disabled").movedim(1, -1)
            latent = FewStepSRVAEEncode.execute(enlarged, vae)[0]
            if noise_predictor is None:
                latent = FewStepSROneStep.execute(model, positive, latent)[0]
            else:
                latent = _invsr(model, noise_predictor, positive, pixels, latent, steps, seed)
            decoded = FewStepSRVAEDecode.execute(latent, vae, clamp=clamp)[0]
            return FewStepSRColorFix.execute(decoded, pixels, color_fix)[0].movedim(-1, 1)

        temporary = Path(folder_paths.get_temp_directory())
        temporary.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fewstepsr_", dir=temporary) as folder:
            try:
                source = _open(video, Path(folder))
            except ValueError as error:
                raise ValueError(f"video: {error}") from error
            target = _target(source, temporary / f"fewstepsr_{uuid.uuid4().hex}.mp4")
            done = _counted(cls, _restored(source.read(), Steady() if steady else None, restore, frames), source)
            notes = _write(done, source, target, scale_by, crf, Path(folder, "result"))
        warn(cls, [f"video: {note}." for note in (*source.notes, *notes)])
        return io.NodeOutput(InputImpl.VideoFromFile(str(target)))


def _require_method(model, noise_predictor) -> None:
    if (carried := model.get_attachment(PER_IMAGE)) is not None:
        title = carried.method.title
        raise ValueError(
            f"model: found {title}'s adapter, which is another one for each image, expected one for all frames. Take another method, or the command "
            f"line (upscale --method {carried.method.key})."
        )
    mark, _ = found_adapter(model)
    if noise_predictor is None and mark is None:
        raise ValueError(
            "model: found no adapter of a few-step method on it, expected one. Put 'Load OSEDiff' or 'Load Few-Step SR Adapter' before, or wire a "
            "noise_predictor for InvSR."
        )
    if noise_predictor is not None and mark is not None:
        raise ValueError(f"noise_predictor: found one, and {mark.method.title}'s adapter on the model, expected one of them. Take one out.")


def _invsr(model, noise_predictor, positive, image: torch.Tensor, latent: dict, steps: int, seed: int) -> dict:
    """InvSR's restored LATENT: start state, then euler, as on the graph."""
    conds = require_step(model, positive, latent, None, 1.0)
    sigmas = FewStepScheduler.execute(model, INVSR.title, steps)[0]
    noise = predicted_start(noise_predictor, image, latent, sigmas, "sample", seed)[1]
    guider = comfy.samplers.CFGGuider(stream_pictures(model))
    guider.inner_set_conds(conds)
    guider.set_cfg(1.0)
    samples = guider.sample(
        noise.generate_noise(latent),
        latent["samples"],
        comfy.samplers.sampler_object("euler"),
        sigmas,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return {**latent, "samples": samples.to(comfy.model_management.intermediate_device())}


def _open(video, folder: Path) -> Clip:
    """The video's own file, or the part of it that Trim Video left; what never was a file becomes one, without loss where core can."""
    if isinstance(video, InputImpl.VideoFromFile):
        source, path = video.get_stream_source(), folder / "source"
        if isinstance(source, str):
            path = Path(source)
        else:
            path.write_bytes(source.getbuffer())
        return Clip(path, *video.get_active_trim_window())
    width, height = video.get_dimensions()
    if width % 2 or height % 2:
        raise ValueError(
            f"found frames of {width} x {height} pixels that were never a file, expected even sides. Crop a row or a column with 'Image Crop' before."
        )
    lossless = {"crf": 0.0} if "crf" in inspect.signature(video.save_to).parameters else {}
    video.save_to(str(folder / "source.mp4"), format=Types.VideoContainer.MP4, codec=Types.VideoCodec.H264, **lossless)
    return Clip(folder / "source.mp4")


def _target(source: Clip, target: Path) -> Path:
    """``target``, or the same name in Matroska where MP4 does not hold the source's sound or subtitles."""
    try:
        require_copies(source.path, target, source.index)
    except ValueError:
        target = target.with_suffix(".mkv")
    return target


Frames = Iterator[tuple[int, int, torch.Tensor]]
"""Timestamp, duration and RGB, (3, H, W) or (1, 3, h, w) in [0, 1], of each."""


def _counted(node: type[io.ComfyNode], frames: Frames, source: Clip) -> Frames:
    """The frames; how many are done, and the time left, on the node."""
    began = time.monotonic()
    for number, frame in enumerate(frames, 1):
        if node.hidden:  # run by the server
            seconds = (time.monotonic() - began) / number
            left = f" of {source.count}, {_in_words(seconds * (source.count - number))} left" if source.count and source.count > number else ""
            PromptServer.instance.send_progress_text(f"Frame {number}{left}", node.hidden.unique_id)
        yield frame


def _in_words(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _restored(frames: Frames, steady: Steady | None, restore: Callable[[torch.Tensor], torch.Tensor], together: int) -> Frames:
    while group := list(itertools.islice(frames, together)):
        comfy.model_management.throw_exception_if_processing_interrupted()
        images = restore(torch.cat([image if steady is None else steady(image) for _, _, image in group]))
        for (pts, duration, _), image in zip(group, images, strict=True):
            yield pts, duration, image


def _write(frames: Frames, source: Clip, target: Path, scale: float, crf: float, folder: Path) -> list[str]:
    """The frames as the source's video. Returns what could not be kept."""
    sides = [max(1, round(side * scale)) for side in source.size]
    codec = default_codec("mp4", source.deep)
    encoding = Encoding(codec, crf, default_pixel_format(CODECS[codec], source.deep), (sides[0] + sides[0] % 2, sides[1] + sides[1] % 2), source)
    segments, durations = Segments(folder, ""), deque([1], 1)

    def noted() -> Frames:
        for frame in frames:
            durations.append(frame[1])
            yield frame

    stream = noted()
    while (first := next(stream, None)) is not None:
        segments.write(itertools.chain([first], itertools.islice(stream, _SEGMENT - 1)), encoding)
    return segments.join(target, source, source.index, durations[0], "")
