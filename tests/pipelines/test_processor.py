"""What a CPU's speed decides: precision and memory format by measured seconds, threads by a container's share."""

import argparse
import os
from pathlib import Path

import pipeline_toys
import pytest
import torch
import toys
from PIL import Image

from pipelines import OSEDiffPipeline, cli, processor
from pipelines.cli import main
from pipelines.convolutions import ProductConv2d, TransposedUpsample
from pipelines.processor import seconds_of_a_block
from pipelines.upscale import Upscaler

FLOAT32, BFLOAT16, PLAIN, LAST = torch.float32, torch.bfloat16, torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ((1.0, 1.0, 1.0, 1.0), (FLOAT32, PLAIN)),
        ((1.0, 0.97, 0.7, 0.9), (FLOAT32, PLAIN)),  # a gain too small for what it costs
        ((1.0, 0.9, 0.7, 0.8), (FLOAT32, LAST)),
        ((1.0, 0.9, 0.6, 0.3), (BFLOAT16, LAST)),
        ((1.0, 1.2, 0.5, float("inf")), (BFLOAT16, PLAIN)),
        ((1.0, 1.2, float("inf"), float("inf")), (FLOAT32, PLAIN)),
    ],
)
def test_what_is_fastest(monkeypatch, seconds, chosen):
    found = dict(zip([(dtype, kept) for dtype in (FLOAT32, BFLOAT16) for kept in (PLAIN, LAST)], seconds, strict=True))
    monkeypatch.setattr(processor, "seconds_of_a_block", lambda *choice: found[choice])
    assert processor.choose() == chosen
    assert processor.choose([FLOAT32])[0] == FLOAT32


def test_a_block_is_measured():
    assert 0 < seconds_of_a_block(FLOAT32, PLAIN, channels=32, side=8) < 10


@pytest.mark.parametrize(
    ("files", "share"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({}, None),
    ],
)
def test_a_containers_share(tmp_path, files, share):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert processor.processor_share(tmp_path) == share


@pytest.mark.parametrize(("share", "asked", "expected"), [(2, False, 2), (2, True, 8), (16, False, 8), (None, False, 8)])
def test_threads(monkeypatch, share, asked, expected):
    threads = [8]
    monkeypatch.setattr(processor, "processor_share", lambda: share)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "8") if asked else monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    processor.fit_threads()
    assert threads[-1] == expected


@pytest.mark.parametrize(
    ("words", "expected", "said"),
    [([], BFLOAT16, True), (["--dtype", "float32"], FLOAT32, False), pytest.param(["--dtype", "bfloat16"], BFLOAT16, False, marks=pytest.mark.slow)],
)
def test_upscale_takes_what_is_fastest(tmp_path, monkeypatch, capsys, words, expected, said):
    monkeypatch.setattr(processor, "seconds_of_a_block", lambda dtype, kept: 1 / (1 + 2 * (dtype == BFLOAT16) + (kept == LAST)))
    monkeypatch.setattr(processor, "gains_of_convolutions", lambda dtype, kept: {"transposed": 2.0, **dict.fromkeys(processor.PRODUCT_SIDES, 2.0)})
    OSEDiffPipeline(**pipeline_toys.components(3, tmp_path / "clip")).save_pretrained(tmp_path / "base")
    torch.save(toys.osediff_checkpoint(3, 4), tmp_path / "osediff.pkl")
    Image.new("RGB", (16, 12), "gray").save(tmp_path / "in.png")
    made: list[Upscaler] = []
    begin = Upscaler.__init__
    monkeypatch.setattr(Upscaler, "__init__", lambda self, *args, **kwargs: made.append(self) or begin(self, *args, **kwargs))
    files: list[str | Path] = [tmp_path / "in.png", "-o", tmp_path / "out.png", "--base", tmp_path / "base", "--weights", tmp_path / "osediff.pkl"]
    assert main(["upscale", *map(str, files), "--device", "cpu", "--scale", "2", *words]) == 0
    pipeline = made[0].pipeline
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {expected}
    assert pipeline.vae.decoder.conv_in.weight.is_contiguous(memory_format=LAST)
    kinds = {type(module) for network in (pipeline.vae.decoder, pipeline.unet) for module in network.modules()}
    assert {TransposedUpsample, ProductConv2d} <= kinds
    assert ("bfloat16 is chosen" in capsys.readouterr().err) == said


def test_tensors_lie_in_huge_pages_unless_told_otherwise(monkeypatch):
    """Before anything is imported that makes one, since PyTorch asks once."""
    found = []
    monkeypatch.setattr(cli, "require_packages", lambda: found.append(os.environ["THP_MEM_ALLOC_ENABLE"]))
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    run = argparse.Namespace(verbose=False, run=lambda arguments: 0)
    assert cli.run_command(run) == 0
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    assert cli.run_command(run) == 0
    assert found == ["1", "0"]
