"""Memory that runs out at each stage: the work goes on in smaller parts where it can, else a sentence says what to do, and the next run is whole."""

import pytest
import torch
import toys
from tagger_toys import golden_picture, write_ram
from toys import conditioning, picture, relative_error

SEED = 5
SIGMAS = torch.tensor([0.6, 0.0])


@pytest.fixture(scope="module")
def stages(comfy):
    """By stage: its call on a batch of four, and the network that it runs."""
    model, vae = toys.comfy_model(SEED), toys.comfy_vae(SEED)
    torch.save(toys.predictor_state_dict(SEED), comfy.folder("invsr") / "memory.pth")
    predictor = comfy.run("InvSRNoisePredictorLoader", noise_predictor_name="memory.pth")[0]
    latent = {"samples": torch.randn(4, 4, 20, 12, generator=torch.Generator().manual_seed(1))}
    images = picture(SEED, 160, 96, batch=4)
    tiled = comfy.run("FewStepSRTiledModel", model=model, tile_size=16, overlap=8)[0]

    def one_step(model):
        return comfy.run("OSEDiffOneStep", model=model, positive=conditioning(SEED), latent=latent)[0]["samples"]

    def start_state():
        inputs = {"noise_predictor": predictor, "image": images[:, ::4, ::4], "latent": latent, "sigmas": SIGMAS}
        return comfy.run("InvSRStartState", **inputs)[0].generate_noise(latent)

    return {
        "encode": (lambda: comfy.run("FewStepSRVAEEncode", pixels=images, vae=vae)[0]["samples"], vae.first_stage_model.encoder),
        "decode": (lambda: comfy.run("FewStepSRVAEDecode", samples=latent, vae=vae)[0], vae.first_stage_model.decoder),
        "start state": (start_state, predictor.network),
        "one step": (lambda: one_step(model), model.model.diffusion_model),
        "tiled model": (lambda: one_step(tiled), model.model.diffusion_model),
    }


STAGES = ["encode", "decode", "start state", "one step", "tiled model"]


class Card:
    """A network's forward on a card that is full at some of its calls."""

    def __init__(self, forward, full):
        self.forward, self.full, self.calls = forward, full, 0

    def __call__(self, x, *args, **kwargs):
        self.calls += 1
        if self.full(self.calls, x):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory, for this test")
        return self.forward(x, *args, **kwargs)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("at", [1, *(pytest.param(at, marks=pytest.mark.slow) for at in (2, 4))])
def test_one_call_that_runs_out(comfy, stages, stage, at, monkeypatch):
    """The card is full for a moment: that part is done again in smaller ones."""
    run, network = stages[stage]
    expected = run()
    card = Card(network.forward, lambda call, x: (call == at and len(x) > 1) or (call == at and stage in ("encode", "decode")))
    monkeypatch.setattr(network, "forward", card)
    found = run()
    assert found.isfinite().all() and relative_error(found, expected) < (0.5 if stage in ("encode", "decode") else 1e-4)
    monkeypatch.undo()
    assert torch.equal(run(), expected)


@pytest.mark.parametrize("stage", STAGES)
def test_a_card_that_is_too_small(comfy, stages, stage, monkeypatch):
    """Nothing fits: the error is one at which ComfyUI frees its models, and nothing of it stays."""
    from comfy import model_management

    run, network = stages[stage]
    expected = run()
    monkeypatch.setattr(network, "forward", Card(network.forward, lambda call, x: True))
    with pytest.raises(Exception) as caught:
        run()
    assert model_management.is_oom(caught.value)
    if stage in ("one step", "tiled model"):
        assert "Add 'Tiled Model (Few-Step SR)' as the last" in str(caught.value)
    monkeypatch.undo()
    assert torch.equal(run(), expected)


def test_the_tagger_that_runs_out(comfy, monkeypatch):
    """One picture at a time is the smallest part that there is."""
    from comfy import model_management

    folder = comfy.folder("dape")
    write_ram(folder)
    try:
        tagger = comfy.run("DAPETaggerLoader", tagger_name="ram_swin_large_14m.pth", dape_name="none")[0]
        network, image = tagger.managed.network, golden_picture()
        expected = comfy.run("DAPETagger", tagger=tagger, image=image)[0]
        monkeypatch.setattr(network, "forward", Card(network.forward, lambda call, x: True))
        with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
            comfy.run("DAPETagger", tagger=tagger, image=image)
        assert model_management.is_oom(caught.value)
        monkeypatch.undo()
        assert comfy.run("DAPETagger", tagger=tagger, image=image)[0] == expected
    finally:
        for file in folder.iterdir():
            file.unlink()
