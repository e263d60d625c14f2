"""A MODEL compiled by core's TorchCompileModel under Tiled Model: the same results, and as few graphs as promised whatever sizes latents have."""

import pytest
import torch
import toys
from graphs import Graphs, fresh_compiler
from sampling import sample, tiled
from toys import conditioning, relative_error

SIZES = [(40, 56), (33, 47), (32, 32), (20, 28), (64, 36)]
"""Height and width in latent pixels, of which tiles have 32: several, one, and none."""


@pytest.fixture(autouse=True)
def forget():
    with fresh_compiler():
        yield


@pytest.mark.slow
def test_two_graphs_at_most(comfy, monkeypatch):
    """With PyTorch's attention, which ComfyUI takes on a GPU: its own for CPUs asks the system for free memory, which no graph holds."""
    from comfy.ldm.modules import attention
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, name, attention.attention_pytorch)
    model, graphs = toys.comfy_model(5), Graphs()
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend=graphs)
    for height, width in SIZES:
        latents = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(height))
        expected, found = (sample(comfy, tiled(comfy, of, tile_size=32, overlap=8), conditioning(5), latents) for of in (model, compiled))
        assert relative_error(found, expected) < 1e-4, (height, width)
    assert 0 < len(graphs) <= 2
