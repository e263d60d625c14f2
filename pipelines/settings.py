"""What ``upscale`` was asked for, complete and checked: behind this nothing reads the command line."""

import argparse
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from fewstep_sr.methods import METHODS
from fewstep_sr.methods.method import Method, Option
from fewstep_sr.miniature import COLOR_FIX

from .ranges import require_ranges, say_ignored

DEFAULT, DEMO_DEFAULT = next(iter(METHODS)), "invsr"
"""Methods where none is named."""

_OF_UPSCALE = ("codec", "crf", "pixel_format", "fps", "segment", "steady", "watch", "long_side", "short_side", "megapixels", "ray")
"""Options that ``upscale`` has and the other commands that restore have not."""


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Args:
        inputs: images, folders and globs.
        output: folder for the results, or a file for a single image; None beside a single image.
        scale: factor; where ``long_side``, ``short_side`` (pixels) or ``megapixels`` (of 1024 x 1024) is given, that says the results' size instead.
        options: the method's own, by name; see :class:`fewstep_sr.methods.method.Option`.
        prompt, negative_prompt: None for the method's own.
        color_fix: None for none.
        base, weights: paths, names or hub ids; None for the published ones.
        decoder: a file with another decoder; None for the base's own.
        suffix: of the results, such as ``".png"``; None for each image's own.
        device, dtype: names; None for what suits the machine.
        tile: side of tiles in pixels of the result; 0 for whole images.
        codec, crf, pixel_format: of videos; None for what suits the result's container and the source.
        fps: frames a second of a video that is made of pictures.
        segment: frames after which a video that was cut can go on.
        steady: average grain over a video's frames before they are restored.
        watch: wait for what comes into the inputs, which are folders.
        address: the output's address on another file system (``s3://bucket/results``), in place of ``output``.
        ray: address of a Ray cluster; "" for the one of the environment, or this machine; None for a run without Ray.
    """

    inputs: tuple[str, ...]
    output: Path | None
    method: Method
    options: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 4.0
    prompt: str | None = None
    negative_prompt: str | None = None
    cfg: float = 1.0
    seed: int = 12345
    color_fix: str | None = None
    demo: bool = False
    base: str | None = None
    weights: str | None = None
    decoder: Path | None = None
    comfyui: Path | None = None
    download: bool = False
    device: str | None = None
    dtype: str | None = None
    tile: int = 1024
    offload: bool = False
    compile: bool = False
    suffix: str | None = None
    quality: int = 95
    overwrite: bool = False
    codec: str | None = None
    crf: float | None = None
    pixel_format: str | None = None
    fps: Fraction = Fraction(24)
    segment: int = 120
    steady: bool = False
    watch: bool = False
    long_side: int | None = None
    short_side: int | None = None
    megapixels: float | None = None
    address: str | None = None
    ray: str | None = None

    def __post_init__(self):
        require_ranges(self)
        if self.address and self.ray is None:
            raise ValueError(f"-o: found {self.address}, expected a folder of this machine. Other file systems need --ray.")
        if self.ray is not None and self.watch:
            raise ValueError("--ray: found --watch, which is for one machine. Leave out one or the other.")
        if self.ray is not None and self.device not in (None, "cpu", "cuda"):
            raise ValueError(f"--ray: found --device {self.device}, expected cpu or cuda: which GPU a worker gets is Ray's to say.")
        if self.ray is None and (remote := [text for text in self.inputs if "://" in text]):
            raise ValueError(f"INPUT: found {remote[0]}, expected files of this machine. Other file systems need --ray.")
        if self.steady and (self.watch or self.ray is not None):
            raise ValueError(
                f"--steady: found {'--watch' if self.watch else '--ray'}, which is for pictures, expected a video. Leave out one or the other."
            )
        if self.demo:
            self._require_demo()
        if self.decoder and not self.decoder.is_file():
            raise FileNotFoundError(f"--decoder: there is no file {self.decoder}. Give AdcSR's or VOSR's decoder, or a VAE file.")
        if self.comfyui and not (self.comfyui / "models").is_dir():
            raise FileNotFoundError(f"--comfyui: there is no models folder in {self.comfyui}. Give the folder that ComfyUI's main.py is in.")
        if self.method.schedule and "timesteps" in self.options:
            self.method.schedule.indices(self.options["steps"], self.options["timesteps"])

    def _require_demo(self) -> None:
        if self.method.demo is None:
            demos = ", ".join(method.key for method in METHODS.values() if method.demo)
            raise ValueError(f"--demo: the miniature has no weights for {self.method.title}. Choose --method {demos}.")
        refused = {
            "--base": self.base,
            "--decoder": self.decoder,
            "--prompt": self.prompt,
            "--tagger": self.options.get("tagger"),
        }
        if given := [option for option, value in refused.items() if value is not None]:
            raise ValueError(f"--demo: found {', '.join(given)}, but the miniature is a base of its own with one prompt. Leave out one or the other.")
        if self.weights and not Path(self.weights).expanduser().is_file():
            raise FileNotFoundError(
                f"--weights: there is no file {self.weights}. With --demo give one that was trained on the miniature, or leave it out."
            )
        if self.cfg != 1:
            raise ValueError(f"--cfg: found {self.cfg:g}, expected 1 with --demo: the miniature has no negative prompt.")

    @property
    def sized(self) -> bool:
        """Whether a side or an area says the results' size, and not ``scale``."""
        return (self.long_side, self.short_side, self.megapixels) != (None, None, None)

    def scale_of(self, size: tuple[int, int]) -> float:
        """The factor for an image of (width, height) pixels."""
        if self.long_side is not None:
            return self.long_side / max(size)
        if self.short_side is not None:
            return self.short_side / min(size)
        if self.megapixels is not None:
            return math.sqrt(self.megapixels * 2**20 / (size[0] * size[1]))
        return self.scale

    @property
    def size_in_words(self) -> str:
        """The results' size for a file's name: ``x4``, ``long1024``, ``short512``, ``2mp``."""
        if self.long_side is not None:
            return f"long{self.long_side}"
        if self.short_side is not None:
            return f"short{self.short_side}"
        return f"{self.megapixels:g}mp" if self.megapixels is not None else f"x{self.scale:g}"

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "Settings":
        """The settings that a command line asks for. Says on stderr which options the chosen method passes over.

        Raises:
            ValueError, FileNotFoundError: an option is wrong, or does not go with another.
        """
        method = METHODS[arguments.method or (DEMO_DEFAULT if arguments.demo else DEFAULT)]
        color_fix = arguments.color_fix or (COLOR_FIX if arguments.demo else method.color_fix)
        settings = cls(
            inputs=tuple(arguments.input),
            output=None if isinstance(arguments.output, str) else arguments.output,
            address=arguments.output if isinstance(arguments.output, str) else None,
            method=method,
            options=_method_options(method, arguments),
            scale=arguments.scale,
            prompt=arguments.prompt,
            negative_prompt=arguments.negative_prompt,
            cfg=method.cfg if arguments.cfg is None else arguments.cfg,
            seed=arguments.seed,
            color_fix=None if color_fix == "none" else color_fix,
            demo=arguments.demo,
            base=arguments.base,
            weights=arguments.weights,
            decoder=arguments.decoder.expanduser() if arguments.decoder else None,
            comfyui=Path(arguments.comfyui).expanduser() if arguments.comfyui else None,
            download=arguments.download,
            device=arguments.device,
            dtype=arguments.dtype,
            tile=arguments.tile,
            offload=arguments.offload,
            compile=arguments.compile,
            suffix=f".{arguments.format}" if arguments.format else None,
            quality=arguments.quality,
            overwrite=arguments.overwrite,
            **{name: getattr(arguments, name) for name in _OF_UPSCALE if hasattr(arguments, name)},
        )
        say_ignored(settings)
        return settings


def every_option() -> dict[str, list[tuple[Method, Option]]]:
    """The methods' own options by name, each with the methods that have it."""
    found: dict[str, list[tuple[Method, Option]]] = {}
    for method in METHODS.values():
        for option in method.options:
            found.setdefault(option.name, []).append((method, option))
    return found


def _method_options(method: Method, arguments: argparse.Namespace) -> dict[str, Any]:
    own = {option.name: option for option in method.options}
    for name, owners in every_option().items():
        if getattr(arguments, name) is None or name in own:
            continue
        flag, having = "--" + name.replace("_", "-"), " or ".join(other.key for other, _ in owners)
        if any(option.needed for _, option in owners):
            raise ValueError(
                f"{flag}: {method.title} has no such option, expected --method {having} with a {name}. Leave it out, or choose that method."
            )
        print(f"{flag} is ignored: it is an option of --method {having}, and the method is {method.key}.", file=sys.stderr)
    demo = method.demo.call if arguments.demo and method.demo else {}
    return {name: _value(getattr(arguments, name), option) for name, option in own.items()} | _demo_call(demo, own, arguments)


def _value(given: Any, option: Option) -> Any:
    if given is None:
        return option.default
    return tuple(value for word in given for value in word) if option.many else given


def _demo_call(demo: Mapping[str, Any], own: Mapping[str, Option], arguments: argparse.Namespace) -> dict[str, Any]:
    """What the miniature does otherwise than the published method, where nobody asked for something else."""
    if any(getattr(arguments, name) is not None and getattr(arguments, name) != option.default for name, option in own.items()):
        return {}
    return dict(demo)
