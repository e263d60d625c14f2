"""Compiled networks: the same results, and as few graphs as promised whatever sizes images have."""

import pipeline_toys
import pytest
import torch
import toys
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import Decoder
from graphs import Graphs, fresh_compiler

from pipelines import InvSRPipeline

SIZES = [(96, 96), (40, 88), (33, 57), (304, 40), (264, 280)]
"""Of the upscaled images: an even and an odd number of latent pixels, square and not, the last two in tiles, the very last one with a mosaic's statistics."""


@pytest.fixture(autouse=True)
def forget():
    with fresh_compiler():
        yield


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> InvSRPipeline:
    folder = tmp_path_factory.mktemp("compiled")
    torch.save(toys.predictor_state_dict(3), folder / "predictor.pth")
    parts = pipeline_toys.components(3)
    torch.manual_seed(3)
    parts["unet"] = UNet2DConditionModel(
        block_out_channels=(32, 32), layers_per_block=1, attention_head_dim=8, cross_attention_dim=64, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    pipeline = InvSRPipeline(**parts)
    pipeline.enable_tiling(256)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_noise_predictor(folder / "predictor.pth")
    return pipeline


def graphs_of(pipeline, run, sizes=SIZES) -> int:
    """How many graphs ``run(pipeline, height, width)`` takes for all sizes, each with the same result as without compiling."""
    graphs = Graphs()
    expected = [run(pipeline, *size) for size in sizes]
    pipeline.enable_compile(graphs)
    try:
        for size, without in zip(sizes, expected, strict=True):
            assert torch.allclose(run(pipeline, *size), without, rtol=1e-4, atol=1e-5), size
    finally:
        pipeline.disable_compile()
    return len(graphs)


def latents(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 4, -(-height // 8), -(-width // 8), generator=torch.Generator().manual_seed(1))


EMBEDS = torch.randn(1, 77, 64, generator=torch.Generator().manual_seed(2))
RUNS = {
    "encode": lambda pipeline, height, width: pipeline.encode(toys.picture(1, height, width).movedim(-1, 1).expand(2, -1, -1, -1)),
    "decode": lambda pipeline, height, width: pipeline.decode(latents(height, width)),
    "predict": lambda pipeline, height, width: pipeline.predict_noise(latents(height, width), 999, EMBEDS),
    "noise map": lambda pipeline, height, width: (
        pipeline._predict(torch.rand(2, 3, 2 * (-(-height // 8)), 2 * (-(-width // 8)), generator=torch.Generator().manual_seed(1)), 199).mean
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["predict", "noise map"])
@torch.no_grad()
def test_two_graphs_at_most(pipeline, stage):
    assert 1 <= graphs_of(pipeline, RUNS[stage]) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["encode", "decode"])
@torch.no_grad()
def test_one_graph_for_whole_images_and_one_for_tiles(pipeline, stage):
    assert graphs_of(pipeline, RUNS[stage]) == 2


@pytest.mark.slow
@torch.no_grad()
def test_a_light_decoder(pipeline, monkeypatch):
    torch.manual_seed(4)
    light = Decoder(4, 3, ("UpDecoderBlock2D",) * 4, (8, 8, 16, 16), layers_per_block=1, norm_num_groups=4).eval()
    monkeypatch.setitem(pipeline.vae._modules, "decoder", light)
    assert graphs_of(pipeline, RUNS["decode"], SIZES[::2]) == 2
