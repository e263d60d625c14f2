"""Large pictures and batches in a real ComfyUI: tiles against the whole."""

import pytest
import torch
import toys
from sampling import local, sample, tiled, with_options
from toys import conditioning, picture, relative_error

SEED = 5
PLACED = ["text", "text of each picture", "area", "area in a corner", "mask", "mask and the rest", "ControlNets", "GLIGEN"]


@pytest.fixture(scope="module")
def base(comfy):
    return toys.comfy_model(SEED), toys.comfy_vae(SEED)


@pytest.fixture(scope="module")
def predictor(comfy):
    torch.save(toys.predictor_state_dict(SEED), comfy.folder("invsr") / "tiled_predictor.pth")
    return comfy.run("InvSRNoisePredictorLoader", noise_predictor_name="tiled_predictor.pth")[0]


class LocalControl:
    """A ControlNet without context: its output is the hint, averaged over each cell."""

    def __new__(cls, image, strength=1.0, previous=None):
        import comfy.controlnet

        class Control(comfy.controlnet.ControlBase):
            def get_control(self, x, t, cond, batched_number, transformer_options):
                before = self.previous_controlnet
                before = before.get_control(x, t, cond, batched_number, transformer_options) if before else None
                size = [side * self.compression_ratio for side in x.shape[-2:]]
                hint = comfy.utils.common_upscale(self.cond_hint_original, *reversed(size), self.upscale_algorithm, "center")
                hint = comfy.controlnet.broadcast_image_to(hint, x.shape[0], batched_number)
                hint = torch.nn.functional.avg_pool2d(hint, 8).mean(dim=1, keepdim=True).expand(x.shape)
                return self.control_merge({"output": [hint.clone()]}, before, None)

        control = Control()
        control.set_cond_hint(image.movedim(-1, 1), strength)
        return control.set_previous_controlnet(previous)


def painted_boxes():
    """A GLIGEN without context: its patch is the boxes, painted on the canvas."""
    import comfy.gligen
    import comfy.model_patcher

    class Boxes(comfy.gligen.Gligen):
        def set_position(self, shape, boxes, device):
            canvas = torch.zeros(shape, device=device)
            for text, height, width, y, x in boxes:
                canvas[..., y : y + height, x : x + width] += text.mean()
            return canvas

        def set_empty(self, shape, device):
            return torch.zeros(shape, device=device)

    boxes = [(torch.ones(1, 768), 9, 30, 3, 12), (2 * torch.ones(1, 768), 41, 2, 0, 20)]
    return "position", comfy.model_patcher.CoreModelPatcher(Boxes([], torch.nn.Identity(), 768), torch.device("cpu"), torch.device("cpu")), boxes


def conditionings():
    """Positive conditionings in which something belongs to a place."""
    plain, other = conditioning(SEED), conditioning(SEED, "other")
    mask = torch.zeros(2, 300, 400)
    mask[0, 40:170, 100:333] = 0.7
    mask[1, 140:270] = 1
    area = with_options(other, area=(20, 13, 9, 5), strength=0.8)
    hints = picture(3, 190, 230, batch=2)
    control = LocalControl(hints, previous=LocalControl(hints[:1], 0.5))
    return {
        "text": plain,
        "text of each picture": [[torch.cat([plain[0][0], other[0][0]]), {}]],
        "area": plain + area,
        "area in a corner": plain + with_options(other, area=(12, 12, 29, 38)),
        "mask": plain + with_options(other, mask=mask, mask_strength=0.6),
        "mask and the rest": with_options(other, mask=mask) + with_options(plain, default=True),
        "ControlNets": with_options(plain, control=control, control_apply_to_uncond=True),
        "GLIGEN": with_options(plain, gligen=painted_boxes()) + area,
    }


@pytest.mark.parametrize("name", PLACED)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_everything_is_cut_along(comfy, base, name, cfg):
    model, calls = local(base[0])
    latent = torch.randn(2, 4, 41, 50)
    whole = sample(comfy, model, conditionings()[name], latent, cfg=cfg)
    calls.clear()
    result = sample(comfy, tiled(comfy, model, batch=3), conditionings()[name], latent, cfg=cfg)
    assert relative_error(result, whole) < 1e-5
    assert {shape[-2:] for shape in calls} == {(16, 16)}
    assert max(shape[0] for shape in calls) <= 3 * (2 if cfg != 1 else 1) * len(conditionings()[name])


def test_one_tile_is_left_alone(comfy, base):
    latent = torch.randn(2, 4, 16, 13)
    whole = sample(comfy, base[0], conditioning(SEED), latent, cfg=2.0)
    assert torch.equal(sample(comfy, tiled(comfy, base[0], batch=2), conditioning(SEED), latent, cfg=2.0), whole)


def test_pictures_stream_through_in_groups(comfy, base):
    latent = torch.randn(3, 4, 24, 16)
    model, calls = local(base[0])
    sample(comfy, tiled(comfy, model, tile_size=32, batch=2), conditioning(SEED), latent)
    assert {shape[0] for shape in calls} == {1, 2} and len(calls) == 2 * 2
    together = sample(comfy, tiled(comfy, base[0], batch=4), conditioning(SEED), latent)
    for i in range(3):
        assert relative_error(together[i : i + 1], sample(comfy, tiled(comfy, base[0]), conditioning(SEED), latent[i : i + 1])) < 1e-5


@pytest.mark.parametrize(
    ("inputs", "message"), [({"overlap": 24, "tile_size": 40}, "overlap: found 24 with tiles of 40, expected at most half a tile, 20")]
)
def test_unusable_tiles_are_refused(comfy, base, inputs, message):
    with pytest.raises(ValueError, match=message):
        comfy.run("FewStepSRTiledModel", model=base[0], **inputs)


def test_patches_that_cannot_be_cut_are_named(comfy, base, caplog):
    model, latent = local(base[0])[0], torch.randn(1, 4, 40, 40)
    sample(comfy, tiled(comfy, model), conditioning(SEED), latent)
    assert "attention patches" not in caplog.text
    model.set_model_attn2_patch(lambda q, k, v, options: (q, k, v))
    sample(comfy, tiled(comfy, model, tile_size=40), conditioning(SEED), latent)
    assert "attention patches" not in caplog.text  # one tile is the picture
    sample(comfy, tiled(comfy, model), conditioning(SEED), latent)
    assert "attention patches of other nodes (attn2_patch)" in caplog.text


class OutOfMemory:
    """A model or a network that runs out of memory where it is given more than ``most`` at once."""

    def __init__(self, run, most: int):
        self.run, self.most, self.sizes = run, most, []

    def __call__(self, *args):
        size = next(a for a in (*args, *(args[-1].values() if isinstance(args[-1], dict) else ())) if isinstance(a, torch.Tensor)).shape[0]
        self.sizes.append(size)
        if size > self.most:
            raise torch.cuda.OutOfMemoryError("out of memory, for this test")
        return self.run(*args)


@pytest.mark.slow
def test_fewer_tiles_when_memory_runs_out(comfy, base):
    model, latent = base[0].clone(), torch.randn(1, 4, 40, 40)
    expected = sample(comfy, tiled(comfy, model), conditioning(SEED), latent)
    wrapper = OutOfMemory(lambda apply_model, args: apply_model(args["input"], args["timestep"], **args["c"]), most=1)
    model.set_model_unet_function_wrapper(wrapper)
    assert relative_error(sample(comfy, tiled(comfy, model), conditioning(SEED), latent), expected) < 1e-5
    assert wrapper.sizes[:3] == [4, 2, 1]
    wrapper.most = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        sample(comfy, tiled(comfy, model), conditioning(SEED), latent)


def test_interrupt_within_one_call(comfy, base):
    from comfy import model_management

    model, calls = local(base[0])
    answer = model.model_options["model_function_wrapper"]

    def interrupted(apply_model, args):
        model_management.interrupt_current_processing(len(calls) == 1)
        return answer(apply_model, args)

    model.set_model_unet_function_wrapper(interrupted)
    with pytest.raises(model_management.InterruptProcessingException):
        sample(comfy, tiled(comfy, model, batch=1), conditioning(SEED), torch.randn(1, 4, 40, 40))
    assert len(calls) == 2


def test_noise_is_predicted_in_windows(comfy, predictor):
    from fewstep_sr.tiling.predictor import NoiseCanvas

    latent = {"samples": torch.ones(2, 4, 70, 20)}
    image = picture(2, 140, 40, batch=2)
    inputs = {"noise_predictor": predictor, "sigmas": torch.tensor([0.5, 0.0]), "posterior": "mean", "latent": latent}
    noise = comfy.run("InvSRStartState", image=image, **inputs)[0].generate_noise(latent)
    assert len(NoiseCanvas(2, 70, 20).windows) == 2 * 2
    small = {"samples": torch.ones(1, 4, 64, 20)}
    top = comfy.run("InvSRStartState", **(inputs | {"latent": small}), image=image[1:, :128])[0].generate_noise(small)
    assert relative_error(noise[1:, :, :6], top[:, :, :6]) < 1e-4  # where the other window does not reach


def vae_round(comfy, vae, image, tile_size=0):
    latent = comfy.run("FewStepSRVAEEncode", pixels=image, vae=vae, tile_size=tile_size)[0]
    return latent["samples"], comfy.run("FewStepSRVAEDecode", samples=latent, vae=vae, tile_size=tile_size)[0]


def tone_shift(found, expected):
    """Error of the pictures' coarse tone: what is left of it in squares of an eighth of a tile."""
    difference = torch.nn.functional.avg_pool2d((found - expected).movedim(-1, 1), 16)
    return (difference.norm() / expected.std() / difference.numel() ** 0.5).item()


@pytest.mark.slow
def test_tiled_vae_keeps_the_whole_pictures_tone(comfy, base):
    vae, image = base[1], picture(4, 170, 262)
    latent = vae_round(comfy, vae, image)[0]
    shared = comfy.run("FewStepSRVAEDecode", samples={"samples": latent}, vae=vae, tile_size=128)[0]
    with torch.inference_mode():
        whole = vae.decode(latent)
        separate = vae.decode_tiled(latent, tile_x=16, tile_y=16, overlap=4)  # core: three passes, each tile by itself
    assert shared.shape == separate.shape == (1, 176, 264, 3)
    assert tone_shift(shared, whole) < 0.7 * tone_shift(separate, whole)
    assert relative_error(shared, whole) < relative_error(separate, whole)


def test_adapter_acts_in_tiles(comfy, base):
    """OSEDiff's adapter on the encoder: tiles are as near to the whole picture with it as they are without it."""
    torch.save(toys.osediff_checkpoint(SEED, 4), comfy.folder("osediff") / "tiled.pkl")
    adapted = comfy.run("OSEDiffLoader", model=base[0], vae=base[1], osediff_name="tiled.pkl", strength_vae=2.0)[1]
    image = picture(SEED, 140, 205)

    def encode(vae, tile_size):
        return comfy.run("FewStepSRVAEEncode", pixels=image, vae=vae, tile_size=tile_size)[0]["samples"]

    tiled, whole = encode(adapted, 128), encode(adapted, 256)
    tiled_base, whole_base = encode(base[1], 128), encode(base[1], 256)
    assert relative_error(tiled, whole) < 1.3 * relative_error(tiled_base, whole_base) < 0.25
    assert relative_error(tiled, whole_base) > 3 * relative_error(tiled, whole)


@pytest.mark.slow
def test_tiled_batch_equals_singles(comfy, base):
    images = picture(4, 200, 140, batch=2)
    latents, pictures = vae_round(comfy, base[1], images, tile_size=128)
    for i in range(2):
        latent, single = vae_round(comfy, base[1], images[i : i + 1], tile_size=128)
        assert relative_error(latents[i : i + 1], latent) < 1e-5 and relative_error(pictures[i : i + 1], single) < 1e-5


def test_vae_of_others_is_left_alone(comfy, base):
    vae, image = base[1], picture(4, 200, 140)
    network = vae.first_stage_model
    modules, plain = list(network.modules()), vae.encode(image[:, :136, :136])
    attention = network.decoder.mid.attn_1.optimized_attention
    vae_round(comfy, vae, image, tile_size=128)
    assert all(a is b for a, b in zip(network.modules(), modules, strict=True))
    assert network.decoder.mid.attn_1.optimized_attention is attention
    assert torch.equal(vae.encode(image[:, :136, :136]), plain)


@pytest.mark.slow
def test_vae_goes_on_in_tiles_when_memory_runs_out(comfy, base, caplog):
    import copy

    vae, image = copy.copy(base[1]), picture(4, 200, 300)
    expected = vae_round(comfy, vae, image)[1]
    network = vae.first_stage_model

    class Short(type(network)):
        def decode(self, z):
            if z.shape[-1] * z.shape[-2] * z.shape[0] > 19 * 19:
                raise torch.cuda.OutOfMemoryError("out of memory, for this test")
            return super().decode(z)

    vae.first_stage_model = copy.copy(network)
    vae.first_stage_model.__class__ = Short
    result = vae_round(comfy, vae, image)[1]
    assert "tiles of 152 pixels" in caplog.text
    assert result.shape == expected.shape and tone_shift(result, expected) < 0.2


@pytest.mark.slow
def test_tiles_are_chosen_before_memory_runs_out(comfy, base, monkeypatch):
    vae = base[1]
    shapes, encode = [], type(vae.first_stage_model).encode
    monkeypatch.setattr(vae.patcher, "get_free_memory", lambda device: comfy.module(".nodes.memory").vae_memory(vae, "encode", 24, 24))
    monkeypatch.setattr(type(vae.first_stage_model), "encode", lambda self, x: shapes.append(x.shape) or encode(self, x))
    comfy.run("FewStepSRVAEEncode", pixels=picture(4, 330, 300), vae=vae)
    assert max(n * h * w for n, _, h, w in shapes) <= (24 * 8) ** 2 and len(shapes) > 4


def test_interrupted_vae_gives_nothing(comfy, base):
    from comfy import model_management

    model_management.interrupt_current_processing(True)
    with pytest.raises(model_management.InterruptProcessingException):
        vae_round(comfy, base[1], picture(4, 200, 140), tile_size=128)


@pytest.mark.parametrize(("device", "most", "queues", "expected"), [
    ("cuda", 2**30, True, True), ("cuda", -1, True, False), ("cuda", 2**30, False, False), ("cpu", 2**30, True, False), ("xpu", 2**30, True, False)
])  # fmt: skip
def test_page_locked_memory_is_comfyuis_to_forbid(comfy, monkeypatch, device, most, queues, expected):
    """-1 is what --disable-pinned-memory leaves, and other cards than NVIDIA's and AMD's."""
    from comfy import model_management

    monkeypatch.setattr(model_management, "MAX_PINNED_MEMORY", most)
    monkeypatch.setattr(model_management, "device_supports_non_blocking", lambda device: queues)
    assert comfy.module(".nodes.runtime").ComfyUI().locks_memory(torch.device(device)) is expected
