"""The seam meter, and what it says of tiles."""

import pytest
import torch
from diffusers import AutoencoderKL

from benchmarks.networks import smooth, textured
from benchmarks.seams import borders, measure
from fewstep_sr.tiling.tiles import TileLayout
from fewstep_sr.tiling.vae import OVERLAP
from pipelines.runtime import PipelineRuntime
from pipelines.tiling import Tiling

PICTURES = pytest.mark.parametrize("draw", [smooth, textured])


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    """Random weights with groups of several channels, as Stable Diffusion's are."""
    torch.manual_seed(5)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    return AutoencoderKL(block_out_channels=(32, 32, 64, 64), norm_num_groups=8, **blocks).eval()


@PICTURES
def test_the_meter_sees_a_seam(draw):
    layout = TileLayout(32, 32, 18, 4)
    picture, (rows, columns) = draw(256), borders(layout, 8)
    assert measure(picture, picture, rows, columns).gradient_ratio == pytest.approx(1, abs=1e-3)
    seam = picture.clone()
    seam[..., rows[0] :, :] += 0.3 * picture.std()
    found = measure(seam, picture, rows, columns)
    assert found.gradient_ratio > 1.1 and found.beside_neighbours > 1.1


def test_the_meter_tells_a_line_from_a_neighbourhood():
    """Grain all around a border is no seam: it raises the ratio there against the whole picture, not against the neighbours."""
    picture, generator = smooth(256), torch.Generator().manual_seed(0)
    grain = torch.zeros_like(picture)
    grain[..., 60:160, :] = 0.02 * torch.randn(1, 3, 100, 256, generator=generator)
    found = measure(picture + grain, picture, [112], [])
    assert found.gradient_ratio > 1.5
    assert found.beside_neighbours < 1.1


def test_more_pictures_show_a_fainter_seam():
    """What chance does to single lines hides a faint step in one picture, and averages out over several."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.cat([textured(128, seed) for seed in range(8)])
    grain = 0.06 * torch.rand(8, 1, 128, 1, generator=generator) * torch.randn(whole.shape, generator=generator)
    tiled = whole + grain
    together = measure(tiled, whole, [61], [])
    assert together.gradient_ratio < together.elsewhere
    tiled[..., 61:, :] += 0.05
    together, alone = (measure(tiled[:count], whole[:count], [61], []) for count in (8, 1))
    assert together.gradient_ratio > together.elsewhere
    assert alone.gradient_ratio < alone.elsewhere


@PICTURES
@torch.no_grad()
def test_tiles_of_the_vae_show_no_seams(vae, draw):
    cpu, layout = torch.device("cpu"), TileLayout(24, 24, 16, OVERLAP)
    tiled, whole = (tiling.encode(vae, draw(192), cpu, PipelineRuntime()) for tiling in (Tiling(16), Tiling()))
    assert measure(tiled, whole, *borders(layout)).gradient_ratio < 1.1
    tiled, whole = (tiling.decode(vae, whole[:, :4], cpu, PipelineRuntime()) for tiling in (Tiling(16), Tiling()))
    assert 0.9 < measure(tiled, whole, *borders(layout, 8)).gradient_ratio < 1.1
