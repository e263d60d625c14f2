"""Published figures, each with its source, and the benchmarks that they are of."""

from collections.abc import Iterable
from dataclasses import dataclass


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


@dataclass(frozen=True)
class Published:
    """A method's means over a benchmark, as published."""

    method: str
    benchmark: str
    figures: dict[str, float]
    source: str
    note: str = ""


_OSEDIFF = "OSEDiff's paper (https://arxiv.org/abs/2406.08177, Table 1)"
_CODSR = "the comparison of CODSR's paper (CVPR 2026), read in a summary of it"

PUBLISHED = (
    Published(
        "osediff",
        "realsr",
        {
            "psnr": 25.1511,
            "ssim": 0.7341,
            "lpips": 0.2921,
            "dists": 0.2128,
            "fid": 123.4938,
            "niqe": 5.6476,
            "musiq": 69.0896,
            "maniqa-pipal": 0.6331,
            "clipiqa": 0.6693,
        },
        "the authors' log of their published results, https://github.com/cswry/OSEDiff",
    ),
    Published(
        "osediff",
        "drealsr",
        {
            "psnr": 27.92,
            "ssim": 0.784,
            "lpips": 0.297,
            "dists": 0.217,
            "fid": 135.3,
            "niqe": 6.49,
            "musiq": 64.65,
            "maniqa-pipal": 0.590,
            "clipiqa": 0.696,
        },
        _OSEDIFF,
    ),
    Published(
        "invsr",
        "realsr",
        {"psnr": 24.50, "ssim": 0.726, "lpips": 0.287, "niqe": 4.22, "musiq": 67.46, "clipiqa": 0.692},
        "InvSR's paper (https://arxiv.org/abs/2412.09013, Tables 2 and 7 of its first version)",
        "One step from 200 with --color-fix wavelet, as its README says. Its RealSR is the camera's own test set (RealSRV3), not StableSR's crops: expect other figures on those.",
    ),
    Published(
        "pisasr",
        "realsr",
        {
            "psnr": 25.50,
            "ssim": 0.7417,
            "lpips": 0.2672,
            "dists": 0.2044,
            "fid": 124.09,
            "niqe": 5.50,
            "musiq": 70.15,
            "maniqa-pipal": 0.6560,
            "clipiqa": 0.6702,
        },
        "PiSA-SR's paper (https://arxiv.org/abs/2412.03017, Table 2), as others quote it (FreqOrtho-SR, https://arxiv.org/abs/2606.28745)",
        "Both knobs at 1.",
    ),
    Published("pisasr", "drealsr", {"psnr": 28.32, "lpips": 0.2959, "dists": 0.2169, "niqe": 6.17, "musiq": 66.11}, _CODSR, "Both knobs at 1."),
    Published("hypir", "realsr", {"lpips": 0.3046, "musiq": 66.42, "maniqa-pipal": 0.6510}, _CODSR),
    Published("hypir", "drealsr", {"psnr": 26.04, "lpips": 0.3356, "dists": 0.2333, "niqe": 6.39, "musiq": 61.03}, _CODSR),
    Published(
        "s3diff",
        "realsr",
        {"psnr": 25.03, "lpips": 0.2699, "musiq": 67.89, "clipiqa": 0.6722},
        "S3Diff's paper (https://arxiv.org/abs/2409.17058, Table 1), as others quote it",
    ),
    Published(
        "s3diff",
        "div2k",
        {"psnr": 23.53, "lpips": 0.258, "musiq": 67.92, "clipiqa": 0.699},
        "the comparison of MoR-DASR's paper, read in a summary of it",
    ),
)


def expected(method: str, benchmark: str) -> Published:
    """What is published.

    Raises:
        ValueError: nothing is known here of this method on this benchmark.
    """
    for published in PUBLISHED:
        if (published.method, published.benchmark) == (method, benchmark):
            return published
    known = ", ".join(f"{published.method} on {published.benchmark}" for published in PUBLISHED)
    raise ValueError(f"--expect: found {method} on {benchmark}, but known are {known}. Choose one of them with --expect and --benchmark.")


def recognise(names: Iterable[str]) -> Benchmark | None:
    """The benchmark that images of these names are, where names tell."""
    names = list(names)
    for benchmark in BENCHMARKS.values():
        if benchmark.names and names and all(name.startswith(benchmark.names) for name in names):
            return benchmark
    return None
