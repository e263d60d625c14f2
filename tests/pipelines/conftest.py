"""Small networks, whose speed on this processor nobody needs to know."""

import pytest
import torch


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch, request):
    """``upscale`` takes plain convolutions without measuring which are fastest, which takes longer than the rest of most tests (test_processor.py measures)."""
    if request.path.name == "test_processor.py":
        return
    pytest.importorskip("diffusers")
    from pipelines import upscale
    from pipelines.convolutions import Convolutions

    monkeypatch.setattr(upscale, "choose", lambda dtypes: (next(iter(dtypes)), torch.contiguous_format))
    monkeypatch.setattr(upscale, "choose_convolutions", lambda dtype, memory_format: Convolutions())
