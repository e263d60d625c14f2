"""Batches stream through the nodes, and a run that is stopped or fails leaves nothing behind."""

import gc

import pytest
import torch
import toys
from toys import conditioning, picture, relative_error

SEED = 5
SIGMAS = torch.tensor([0.6, 0.3, 0.0])


class Stages:
    """Each stage as a call on pictures (B, H, W, 3), and the network that it runs."""

    def __init__(self, comfy):
        torch.save(toys.osediff_checkpoint(SEED, 4), comfy.folder("osediff") / "streams.pkl")
        torch.save(toys.predictor_state_dict(SEED), comfy.folder("invsr") / "streams.pth")
        self.run = comfy.run
        self.model, self.vae = comfy.run("OSEDiffLoader", model=toys.comfy_model(SEED), vae=toys.comfy_vae(SEED), osediff_name="streams.pkl").args
        self.predictor = comfy.run("InvSRNoisePredictorLoader", noise_predictor_name="streams.pth")[0]
        self.networks = {
            "encode": self.vae.first_stage_model,
            "decode": self.vae.first_stage_model,
            "one step": self.model.model.diffusion_model,
            "start state": self.predictor.network,
            "sampler": self.model.model.diffusion_model,
        }

    def latent(self, images, scale=8):
        samples = torch.nn.functional.interpolate(images.movedim(-1, 1), scale_factor=1 / scale, mode="area")
        return {"samples": torch.cat([samples, samples[:, :1]], 1).contiguous()}

    def __call__(self, stage: str, images: torch.Tensor, tile_size: int = 0) -> torch.Tensor:
        model = self.run("FewStepSRTiledModel", model=self.model, tile_size=16, overlap=8)[0] if tile_size else self.model
        if stage == "encode":
            return self.run("FewStepSRVAEEncode", pixels=images, vae=self.vae, posterior="sample", seed=3, tile_size=tile_size)[0]["samples"]
        if stage == "decode":
            return self.run("FewStepSRVAEDecode", samples=self.latent(images), vae=self.vae, tile_size=tile_size)[0]
        if stage == "one step":
            return self.run("OSEDiffOneStep", model=model, positive=conditioning(SEED), latent=self.latent(images))[0]["samples"]
        latent = self.latent(images, 2 if stage == "start state" else 8)
        settings = {"noise_predictor": self.predictor, "image": images, "latent": latent, "sigmas": SIGMAS, "seed": 3}
        noise, start = self.run("InvSRStartState", **settings).args
        if stage == "start state":
            return start["samples"]
        guider = self.run("BasicGuider", model=model, conditioning=conditioning(SEED))[0]
        sampler = self.run("KSamplerSelect", sampler_name="euler")[0]
        return self.run("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=SIGMAS, latent_image=latent)[0]["samples"]


@pytest.fixture(scope="module")
def stages(comfy):
    return Stages(comfy)


STAGES = ["encode", "decode", "one step", "start state", "sampler"]
SIZES = {"start state": (130, 24)}  # more than one window of the predictor


@pytest.mark.parametrize("tile_size", [pytest.param(0, marks=pytest.mark.slow), 128])
@pytest.mark.parametrize("stage", STAGES)
def test_batch_equals_singles(stages, stage, tile_size):
    images = picture(SEED, *SIZES.get(stage, (136, 64)), batch=2)
    together = stages(stage, images, tile_size)
    for i in range(2):
        assert relative_error(together[i : i + 1], stages(stage, images[i : i + 1], tile_size)) < 1e-5


def test_one_draw_for_all_frames(stages):
    still = picture(SEED, 64, 64).expand(3, -1, -1, -1)
    for stage in STAGES:
        frames = stages(stage, still)
        assert relative_error(frames[2], frames[0]) < 1e-5


class Layers:
    """Counts the calls of a network's layers, and does something at one of them."""

    def __init__(self, network: torch.nn.Module, at: int | None = None, action=None):
        self.calls, self.largest, self.at, self.action = 0, 0, at, action
        leaves = [module for module in network.modules() if not list(module.children()) and list(module.parameters())]
        self.handles = [leaf.register_forward_hook(self.after) for leaf in leaves]

    def after(self, layer, inputs, output):
        self.calls += 1
        self.largest = max(self.largest, inputs[0].numel())
        if self.calls == self.at:
            self.action()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_long_batch_needs_no_more_than_a_short_one(stages, stage):
    seen = []
    for frames in (10, 200):
        with Layers(stages.networks[stage]) as layers:
            assert len(stages(stage, picture(SEED, 24, 24).expand(frames, -1, -1, -1), 128)) == frames
        seen.append(layers.largest)
    assert seen[0] == seen[1] > 0


@pytest.mark.slow
def test_one_step_streams_without_tiles(stages):
    """The node does so by itself; other samplers behind Tiled Model."""
    with Layers(stages.networks["one step"]) as few:
        stages("one step", picture(SEED, 24, 24).expand(10, -1, -1, -1))
    with Layers(stages.networks["one step"]) as many:
        stages("one step", picture(SEED, 24, 24).expand(50, -1, -1, -1))
    assert few.largest == many.largest


def tensors() -> int:
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())  # isinstance would ask some of torch's objects, which warn


def attempt(stages, stage, images, error) -> None:
    with pytest.raises(error):
        stages(stage, images, 128)


STOPS = [(how, stage) for how in ("interrupted", "failed") for stage in STAGES]


@pytest.mark.parametrize(("how", "stage"), [STOPS[0], *(pytest.param(*stop, marks=pytest.mark.slow) for stop in STOPS[1:])])
def test_stopped_in_the_middle(comfy, stages, stage, how):
    """A stop acts before the next layer. It leaves no tensor behind, and the same call then gives what it gave before."""
    from comfy import model_management

    images = picture(SEED, *SIZES.get(stage, (136, 64)), batch=2)
    with Layers(stages.networks[stage]) as counted:
        expected = stages(stage, images, 128)

    def fail():
        raise RuntimeError("failed, for this test")

    action, error = {
        "interrupted": (model_management.interrupt_current_processing, model_management.InterruptProcessingException),
        "failed": (fail, RuntimeError),
    }[how]
    weights = {name: weight.clone() for name, weight in stages.networks[stage].state_dict().items()}
    gc.collect()
    before, middle = tensors(), counted.calls * 2 // 3
    with Layers(stages.networks[stage], middle, action) as stopped:
        attempt(stages, stage, images, error)
    if stage in ("one step", "sampler"):
        gc.collect()  # ComfyUI's guider is part of a circle
    assert tensors() == before
    assert stopped.calls == middle
    assert not model_management.processing_interrupted()
    assert all(torch.equal(weight, weights[name]) for name, weight in stages.networks[stage].state_dict().items())
    assert torch.equal(stages(stage, images, 128), expected)
