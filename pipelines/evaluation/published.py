"""The benchmarks that methods are measured on, and what is published of a method on one of them."""

from collections.abc import Iterable
from dataclasses import dataclass

from fewstep_sr.methods import METHODS
from fewstep_sr.methods.method import Published


@dataclass(frozen=True)
class Benchmark:
    """A set of images. ``images`` is their number, ``names`` how they begin where that tells the set."""

    key: str
    title: str
    images: int
    what: str
    where: str
    names: tuple[str, ...] = ()
    originals: bool = True


BENCHMARKS = {
    benchmark.key: benchmark
    for benchmark in (
        Benchmark(
            "realsr",
            "RealSR",
            100,
            "128 to 512 pixels, cropped by StableSR from RealSR's photos of two cameras",
            "https://huggingface.co/datasets/Iceclear/StableSR-TestSets, and with OSEDiff's results and logs in https://github.com/cswry/OSEDiff",
            names=("Canon_", "Nikon_"),
        ),
        Benchmark(
            "drealsr",
            "DRealSR",
            93,
            "128 to 512 pixels, cropped by StableSR from DRealSR's photos of five cameras",
            "https://huggingface.co/datasets/Iceclear/StableSR-TestSets",
        ),
        Benchmark(
            "div2k",
            "DIV2K-Val",
            3000,
            "128 to 512 pixels, cropped by StableSR from DIV2K's validation set and degraded by Real-ESRGAN's pipeline",
            "https://huggingface.co/datasets/Iceclear/StableSR-TestSets",
        ),
        Benchmark(
            "realset80", "RealSet80", 80, "real photos without originals", "https://github.com/zsyOAOA/InvSR, in testdata/RealSet80", originals=False
        ),
        Benchmark(
            "reallq250",
            "RealLQ250",
            250,
            "real photos of 256 pixels without originals",
            "https://github.com/shallowdream204/DreamClear",
            originals=False,
        ),
    )
}


def expected(method: str, benchmark: str) -> Published:
    """What is published of a method, by its key, on a benchmark.

    Raises:
        ValueError: nothing is known here of this method on this benchmark.
    """
    for published in METHODS[method].published:
        if published.benchmark == benchmark:
            return published
    known = ", ".join(f"{key} on {published.benchmark}" for key, record in METHODS.items() for published in record.published)
    raise ValueError(f"--expect: found {method} on {benchmark}, but known are {known}. Choose one of them with --expect and --benchmark.")


def recognise(names: Iterable[str]) -> Benchmark | None:
    """The benchmark that images of these names are, where names tell."""
    names = list(names)
    for benchmark in BENCHMARKS.values():
        if benchmark.names and names and all(name.startswith(benchmark.names) for name in names):
            return benchmark
    return None
