"""``evaluate``, ``compare`` and ``verify`` on the command line."""

import argparse
import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..options import a_path

if TYPE_CHECKING:
    from ..settings import Settings


def add_evaluate(command: argparse.ArgumentParser) -> None:
    from fewstep_sr.methods import METHODS

    from ..options import Once, add_machine, add_method, add_weights
    from .published import BENCHMARKS

    prog = command.prog
    sets = "\n".join(f"  {b.title} ({b.key}; {b.images} images, {b.what}): {b.where}" for b in BENCHMARKS.values())
    command.epilog = (
        f"examples:\n  {prog} --data benchmark_realsr --results benchmark_realsr/results_osediff --expect osediff\n"
        f"  {prog} --data benchmark_realsr --method osediff --demo --json osediff.json\n\n"
        f"known benchmarks, and where they are published:\n{sets}\n\n"
        "An interrupted run continues where it stopped. Exit status: 0; 1 if images failed or have no counterpart; 2 if nothing could be measured."
    )
    command.set_defaults(run=_evaluate)
    data = command.add_argument_group("data")
    data.add_argument(
        "--data", type=a_path, metavar="FOLDER", help="a benchmark, with test_LR and test_HR in it; or low-quality images without originals"
    )
    data.add_argument("--lq", type=a_path, metavar="FOLDER", help="low-quality images")
    data.add_argument("--hq", type=a_path, metavar="FOLDER", help="originals; names are paired: x.png with x.png, x_LR4.png with x_HR.png")
    data.add_argument("--results", type=a_path, metavar="DIR", help="measure these results instead of restoring")
    data.add_argument("--benchmark", choices=list(BENCHMARKS), help="which benchmark it is, if the images' names do not show it")
    figures = command.add_argument_group("figures")
    figures.add_argument(
        "--metrics",
        nargs="+",
        default=["psnr", "ssim", "gmsd"],
        metavar="NAME",
        help="psnr ssim gmsd (default; these need nothing), and through pyiqa lpips dists fid niqe musiq maniqa-pipal clipiqa; or all. "
        "pyiqa is optional (pip install pyiqa), for non-commercial use, and fetches a metric's weights at its first use",
    )
    figures.add_argument("--pyiqa", action="store_true", help="compute psnr, ssim and gmsd with pyiqa as well (the same values)")
    figures.add_argument(
        "--expect",
        choices=sorted(key for key, method in METHODS.items() if method.published),
        help="show this method's published metrics beside yours",
    )
    files = command.add_argument_group("files")
    files.add_argument(
        "-o",
        "--output",
        type=a_path,
        metavar="OUT",
        help="folder for the restored images and their report (default: results_METHOD in the current folder, with --demo results_METHOD_demo)",
    )
    files.add_argument("--json", type=a_path, metavar="FILE", help="everything: mean, pictures, settings, versions, file hashes, seconds, memory")
    files.add_argument("--csv", type=a_path, metavar="FILE", help="the table")
    files.add_argument("--markdown", type=a_path, metavar="FILE", help="the means and the table")
    files.add_argument("--overwrite", action="store_true", help="restore again images whose results exist")
    add_method(command, ["bicubic"], "the method to restore with; bicubic only upscales", action=Once)
    add_weights(command)
    add_machine(command)


def _evaluate(arguments: argparse.Namespace) -> int:
    if (arguments.method is None) == (arguments.results is None):
        found = "neither --method nor --results" if arguments.method is None else "--method and --results"
        raise ValueError(f"evaluate: found {found}, expected one of them: a method restores the images, results exist already.")
    bicubic = arguments.method == "bicubic"
    if not arguments.results:
        from ..cli import require_packages

        require_packages()

    from .evaluate import Evaluation, default_output, evaluate, parse_metrics  # torch and diffusers take seconds that --help need not

    output = None if arguments.results else arguments.output or default_output(arguments.method, arguments.demo)
    restoration = None if arguments.results or bicubic else _restoration(arguments, output)

    return evaluate(
        Evaluation(
            metrics=parse_metrics(arguments.metrics),
            data=arguments.data,
            lq=arguments.lq,
            hq=arguments.hq,
            results=arguments.results,
            restoration=restoration,
            scale=arguments.scale,
            output=output,
            expect=arguments.expect,
            benchmark=arguments.benchmark,
            json=arguments.json,
            csv=arguments.csv,
            markdown=arguments.markdown,
            device=arguments.device,
            through_pyiqa=arguments.pyiqa,
            overwrite=arguments.overwrite,
        )
    )


def _restoration(arguments: argparse.Namespace, output: Path | None) -> "Settings":
    """Settings of the restoration: of ``upscale``'s, those that a benchmark has."""
    from ..settings import Settings

    arguments = copy.copy(arguments)
    arguments.input, arguments.output, arguments.format, arguments.quality = [], output, "png", 95
    return Settings.from_arguments(arguments)


def add_compare(command: argparse.ArgumentParser) -> None:
    prog = command.prog
    command.epilog = (
        f"examples:\n  {prog} OSEDiff=results_osediff InvSR=results_invsr --data benchmark_realsr -o sheet.html\n"
        f"  {prog} before after --hq originals --pictures cat dog --at 100 80 --size 192 -o sheet.png\n\n"
        "Seconds, and figures of other metrics than PSNR, SSIM and GMSD, are those that evaluate has left in a folder."
    )
    command.set_defaults(run=_compare)
    command.add_argument("folder", nargs="+", metavar="[LABEL=]FOLDER", help="a folder of results, and the name to show for it")
    command.add_argument(
        "-o", "--output", type=a_path, required=True, metavar="SHEET", help="a name that ends in .html (one file, with a zoom) or .png"
    )
    command.add_argument("--data", type=a_path, metavar="FOLDER", help="a benchmark, with test_LR and test_HR in it")
    command.add_argument("--lq", type=a_path, metavar="FOLDER", help="low-quality images, shown upscaled in a column of their own")
    command.add_argument("--hq", type=a_path, metavar="FOLDER", help="originals, shown in a column of their own; metrics are computed against them")
    command.add_argument("--pictures", nargs="+", default=[], metavar="NAME", help="which ones (default: six, evenly spread)")
    command.add_argument(
        "--at", type=int, nargs=2, metavar=("X", "Y"), help="left and top of the crop (default: where the original has the most detail)"
    )
    command.add_argument("--size", type=int, default=256, help="sides of the crop in pixels; 0: whole images (default: %(default)s)")


def _compare(arguments: argparse.Namespace) -> int:
    from .compare import Comparison, compare

    if arguments.size < 0 or 0 < arguments.size < 16:
        raise ValueError(f"--size: found {arguments.size}, expected 16 or more, or 0 for whole images.")
    return compare(
        Comparison(
            folders=arguments.folder,
            output=arguments.output,
            data=arguments.data,
            lq=arguments.lq,
            hq=arguments.hq,
            pictures=arguments.pictures,
            at=tuple(arguments.at) if arguments.at else None,
            size=arguments.size,
        )
    )


def add_verify(command: argparse.ArgumentParser) -> None:
    from ..options import Once, add_method, add_weights

    prog = command.prog
    command.epilog = (
        f"examples:\n  {prog} --comfyui ~/ComfyUI --download --json verify.json\n  {prog} --demo\n\n"
        "Always runs on the miniature, and on each method whose weights are found. Exit status: 0; 1 if something is wrong; 2 if nothing was started."
    )
    command.set_defaults(run=_verify)
    command.add_argument("--json", type=a_path, metavar="FILE", help="the whole report, to attach to an issue")
    command.add_argument(
        "--picture", type=a_path, metavar="FILE", help="the picture to take through the stages (default: the miniature's photo of 112 x 75 pixels)"
    )
    command.add_argument("--reference", type=a_path, metavar="FILE", help="another machine's report, to compare the stages with")
    command.add_argument(
        "--data",
        type=a_path,
        metavar="FOLDER",
        help="a benchmark to evaluate the methods on as well, into results_METHOD; with --demo the miniature, into results_METHOD_demo",
    )
    command.add_argument("--checkpoint", type=a_path, metavar="FILE", help="the base as one file, for the nodes, where --base is a folder")
    command.add_argument("--half", choices=["float16", "bfloat16"], help="default: float16 on a GPU, bfloat16 on a CPU")
    command.add_argument("--device", help="cuda, cuda:1, mps, cpu (default: the best one)")
    command.add_argument("--no-golden", action="store_true", help="skip the comparison with the outputs of the authors' code, which takes a minute")
    add_method(command, (), "this method alone (default: every one)", action=Once)
    add_weights(command)


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.method is None and (arguments.base or arguments.weights):
        raise ValueError("--method: found none with --base or --weights, expected the method that they are for.")
    if arguments.checkpoint and not arguments.checkpoint.is_file():
        raise FileNotFoundError(f"--checkpoint: there is no file {arguments.checkpoint}. Give the base as one .safetensors or .ckpt file.")

    from .verify import Verification, verify

    subjects, missing = _subjects(arguments)
    comfyui = Path(arguments.comfyui).expanduser() if arguments.comfyui else None
    if comfyui and not (comfyui / "main.py").is_file():
        raise FileNotFoundError(f"--comfyui: there is no main.py in {comfyui}. Give ComfyUI's own folder.")
    return verify(
        Verification(
            subjects=subjects,
            missing=missing,
            picture=arguments.picture,
            comfyui=comfyui,
            checkpoint=arguments.checkpoint,
            reference=arguments.reference,
            half=arguments.half,
            golden=not arguments.no_golden,
            data=arguments.data,
            json=arguments.json,
        )
    )


def _subjects(arguments: argparse.Namespace) -> tuple[list, list[str]]:
    """The miniature by each method that it has, and the methods whose weights are found; and what is missing, in words."""
    import torch

    from fewstep_sr.methods import METHODS

    from ..find import find_base, find_companions, find_weights
    from ..ranges import require_device
    from .subjects import Subject

    if arguments.device:
        require_device(arguments.device)
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = torch.device(arguments.device) if arguments.device else best or torch.device("cpu")
    chosen = [arguments.method] if arguments.method else list(METHODS)
    subjects, missing = [], []
    for key in chosen:
        if METHODS[key].demo:
            plain = {
                "demo": True,
                "method": key,
                "base": None,
                "weights": None,
                "prompt": None,
                "tagger": None,
                "cfg": None,
                "decoder": None,
                "download": False,
            }
            subjects.append(Subject(_settings(arguments, device, **plain), device))
    if not arguments.demo:
        for key in chosen:
            settings = _settings(arguments, device, method=key)
            try:
                base = find_base(settings.method, settings.base, settings.comfyui, settings.download)
                weights = find_weights(settings.method, settings.weights, settings.comfyui, settings.download)
                companions = find_companions(settings.method, settings.options, settings.comfyui, settings.download)
            except FileNotFoundError as error:
                missing.append(f"{settings.method.title} on its published weights: {error}")
            else:
                subjects.append(Subject(settings, device, base, weights, companions))
    if not subjects:
        raise FileNotFoundError(missing[0] if missing else f"--demo: the miniature has no weights for {METHODS[chosen[0]].title}.")
    return subjects, missing


def _settings(arguments: argparse.Namespace, device, **changes: Any) -> "Settings":
    """A method's settings; what the command line says of other methods' options does not concern it."""
    from ..settings import Settings

    arguments = copy.copy(arguments)
    vars(arguments).update(
        input=[],
        output=None,
        format="png",
        quality=95,
        overwrite=False,
        dtype=None,
        tile=0,
        offload=False,
        compile=False,
        device=str(device),
        **changes,
    )
    return Settings.from_arguments(arguments)
