"""Copies that are queued: used once they have arrived, whatever happens in between. A device that answers late stands for a GPU."""

import logging
from types import SimpleNamespace

import pytest
import torch
from coder import Coder

from fewstep_sr.tiling import host, vae
from fewstep_sr.tiling.host import HostCopies

CUDA = torch.device("cuda")


class Late(torch.Tensor):
    """Page-locked memory, to which copies come when they are waited for; until then it holds NaN."""

    def copy_(self, source, non_blocking=False):
        assert non_blocking
        self.source = source
        LateEvent.queued.append(self)
        return self


class LateEvent:
    queued: list[Late] = []

    def record(self, stream):
        self.copy = self.queued.pop()

    def synchronize(self):
        self.copy.as_subclass(torch.Tensor).copy_(self.copy.source.as_subclass(torch.Tensor))


class Away(torch.Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def device(self):
        return CUDA


@pytest.fixture
def gpu(monkeypatch):
    """The device's part, and the copies that wait for it."""
    monkeypatch.setattr(HostCopies, "_buffer", lambda self, like: torch.full(like.shape, torch.nan, dtype=like.dtype).as_subclass(Late))
    monkeypatch.setattr(HostCopies, "send", lambda self, part, device: part.as_subclass(Away))
    monkeypatch.setattr(torch.cuda, "Event", LateEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)


def test_an_answer_is_used_once_the_next_is_on_its_way(gpu):
    copies, used = HostCopies(True), []
    for i in range(3):
        copies.receive(torch.full((2,), float(i)).as_subclass(Away), vae.CPU, lambda answer: used.append(answer.tolist()))
        assert used == [[float(n)] * 2 for n in range(i)]
    copies.finish()
    assert used == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    copies.finish()
    assert len(used) == 3


def test_answers_keep_their_order(gpu):
    """One that is on the host already needs no buffer, but waits for those before it."""
    copies, used = HostCopies(True), []
    copies.receive(torch.zeros(1).as_subclass(Away), vae.CPU, lambda answer: used.append(answer.item()))
    copies.receive(torch.ones(1), vae.CPU, lambda answer: used.append(answer.item()))
    assert used == [0, 1]


@pytest.mark.parametrize("corrections", [0, 2])
@pytest.mark.parametrize(("tile", "fits"), [(34, 1), (34, 3), (64, 2)])
def test_results_are_those_without_a_queue(gpu, monkeypatch, tile, fits, corrections):
    """Tiles alone and in groups, whole pictures, tiles that run again."""
    monkeypatch.setattr(vae.WholePicture, "off", lambda self: corrections)
    pictures = torch.randn(3, 2, 60, 50)
    assert torch.allclose(Coder(fits=fits).run(pictures, tile), pictures, atol=1e-6)


def test_memory_that_runs_out_between_two_tiles(gpu):
    """Tiles of half the size start from nothing: what was on its way is not added to them."""
    picture = torch.randn(1, 1, 60, 50)
    coder, call = Coder(), Coder.call

    def third(network, part):
        if len(coder.calls) == 3:  # the reduced pass, two tiles
            coder.calls.append((False, tuple(part.shape)))
            raise MemoryError
        return call(coder, network, part)

    object.__setattr__(coder.coder, "call", third)
    assert torch.allclose(coder.run(picture, 34), picture, atol=1e-6) and coder.runtime.freed == 1


def test_what_is_sent_is_the_devices(monkeypatch):
    """A copy in page-locked memory is what is sent, since the part may change before it is."""
    sent = []
    buffer = SimpleNamespace(copy_=lambda part: SimpleNamespace(to=lambda device, non_blocking: sent.append((part, device.type, non_blocking))))
    monkeypatch.setattr(HostCopies, "_buffer", lambda self, like: buffer)
    part = torch.zeros(2)
    HostCopies(True).send(part, CUDA)
    assert [(p is part, *rest) for p, *rest in sent] == [(True, "cuda", True)]
    assert HostCopies(True).send(part, vae.CPU) is part and len(sent) == 1


@pytest.mark.parametrize("locked", [False, True])
def test_without_page_locked_memory_copies_are_plain(monkeypatch, caplog, locked):
    """Where the system has none left, with one warning."""

    def full(*size, pin_memory=False, **kwargs):
        assert pin_memory
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(host.torch, "empty", full)
    copies, used = HostCopies(locked), []
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert copies.send(torch.zeros(2), torch.device("meta")).device.type == "meta"
            copies.receive(torch.ones(2).as_subclass(Away), vae.CPU, used.append)
    assert len(used) == 2 and len(caplog.messages) == locked and ("no page-locked memory (CUDA error: out of memory)" in caplog.text) == locked


def test_where_memory_is_locked(monkeypatch):
    from fewstep_sr.tiling.batching import Runtime

    assert Runtime().locks_memory(CUDA) is False
    runtime = pytest.importorskip("pipelines.runtime").PipelineRuntime()
    assert runtime.locks_memory(CUDA) and not any(runtime.locks_memory(torch.device(kind)) for kind in ("cpu", "mps", "xpu"))
