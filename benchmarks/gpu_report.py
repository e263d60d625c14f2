"""What a run of ``gpu.py`` found, as Markdown and as a plot."""

from pathlib import Path
from typing import Any

from full_size import METHODS, STAGES

GIB = 2**30
CAP = 6.0
"""GiB of the run with little memory."""


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def report(results: dict[str, Any]) -> str:
    """The run as Markdown."""
    stage_rows, method_rows = [], []
    for pixels, found in results["eager"].items():
        compiled = results.get("compiled", {}).get(pixels, {})
        for stage, entry in found.items():
            fast = compiled.get(stage, {}).get("ms")
            stage_rows.append(
                [
                    f"{pixels}²",
                    stage,
                    f"{entry['ms']:.1f}",
                    f"{fast:.1f}" if fast else "",
                    f"{entry['loop_ms']:.1f}" if "loop_ms" in entry else "",
                    f"{entry['loop_ms'] / entry['ms']:.2f}" if "loop_ms" in entry else "",
                    f"{entry['floor']:.0%}" if "floor" in entry else "",
                    f"{entry['peak_gib']:.2f}" if results["cuda"] else "",
                ]
            )
        for method, names in METHODS.items():
            total = sum(found[name]["ms"] for name in names)
            fast = sum(compiled[name]["ms"] for name in names) if compiled else None
            peak = max(found[name]["peak_gib"] for name in names)
            method_rows.append([f"{pixels}²", method, f"{total:.0f}", f"{fast:.0f}" if fast else "", f"{peak:.2f}" if results["cuda"] else ""])
    parts = [
        f"# {results['machine']}",
        f"{results['dtype']}, tiles of {results['tile']} pixels, random weights{', reduced networks' if results['reduced'] else ' at the published sizes'}. "
        f"A matrix product reaches {results['speed'] / 1e12:.2f} · 10¹² multiply-adds a second.",
        "## Methods",
        table(["output", "method", "ms", "ms, compiled", "peak GiB beside the weights"], method_rows),
        "## Stages",
        table(["output", "stage", "ms", "ms, compiled", "loop, ms", "loop / ours", "share of the floor", "peak GiB"], stage_rows),
        "## Error against float32",
        table(["dtype", *STAGES], [[name, *(f"{found[stage]:.1e}" for stage in STAGES)] for name, found in results["errors"].items()]),
        "## Little memory",
        _say_cap(results["cap"]),
    ]
    return "\n\n".join(parts) + "\n"


def _say_cap(cap: dict[str, Any] | None) -> str:
    if cap is None:
        return "Not run: only a CUDA device can be held to less memory than it has."
    if not cap["done"]:
        return f"InvSR at {cap['pixels']}² with {CAP:g} GiB: out of memory ({cap['error']})."
    return (
        f"InvSR at {cap['pixels']}² with {CAP:g} GiB, one network on the card at a time: {cap['seconds']:.1f} s, at most {cap['peak_gib']:.2f} GiB."
    )


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    sizes = [int(pixels) for pixels in results["eager"]]
    for colour, (method, names) in enumerate(METHODS.items()):
        for kind, style in (("eager", "-"), ("compiled", "--")):
            if kind in results:
                values = [sum(found[name]["ms"] for name in names) for found in results[kind].values()]
                axes.plot(sizes, values, f"C{colour}{style}", marker="o", label=f"{method}, {kind}")
    axes.set(xscale="log", yscale="log", xlabel="output, pixels a side", ylabel="ms", xticks=sizes, xticklabels=sizes)
    axes.minorticks_off()
    axes.legend(fontsize=6)
    axes.set_title(results["machine"], fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
