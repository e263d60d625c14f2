"""ControlNets that are not core's plain one, in tiles and streams: the result is the whole picture's.

``ADVANCED_CONTROLNET_PATH`` names a checkout of Kosinkadink/ComfyUI-Advanced-ControlNet for the tests that run it.
"""

import asyncio
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toys
from sampling import local, sample, tiled, with_options
from toys import conditioning, picture, relative_error

SEED = 5


@pytest.fixture(scope="module")
def base(comfy):
    return toys.comfy_model(SEED)


def bound_control(image, how: str):
    """A ControlNet without context, whose working part hangs on the instance in one of the ways that packs use."""
    import comfy.controlnet

    class Control(comfy.controlnet.ControlBase):
        def __init__(self):
            super().__init__()
            self.steps, self.seen = [], None
            if how == "method":
                self.get_control = self.work
            elif how == "partial":
                self.get_control = partial(Control.work, self)
            elif how == "closure":
                self.get_control = lambda *args: self.work(*args)
            elif how == "helper":
                self.helper = SimpleNamespace(control=self)
                self.get_control = lambda *args: self.helper.control.work(*args)

        def work(self, x, t, cond, batched_number, transformer_options):
            if self.cond_hint is None or self.cond_hint.shape[-1] != x.shape[-1] * 8:
                self.cond_hint = comfy.utils.common_upscale(
                    self.cond_hint_original, x.shape[-1] * 8, x.shape[-2] * 8, self.upscale_algorithm, "center"
                )
            hint = comfy.controlnet.broadcast_image_to(self.cond_hint, x.shape[0], batched_number)
            hint = torch.nn.functional.avg_pool2d(hint, 8).mean(dim=1, keepdim=True).expand(x.shape)
            return self.control_merge({"output": [hint.clone()]}, None, None)

    control = Control()
    return control.set_cond_hint(image.movedim(-1, 1), 0.8)


@pytest.mark.parametrize("how", ["method", "partial", "closure", "helper"])
@pytest.mark.parametrize("tile_size", [16, 64])
def test_what_hangs_on_the_instance_is_cut_along(comfy, base, how, tile_size):
    model, latent = local(base)[0], torch.randn(3, 4, 24, 28)
    control = bound_control(picture(3, 150, 190, batch=3), how)
    before = dict(vars(control))
    positive = with_options(conditioning(SEED), control=control, control_apply_to_uncond=True)
    whole = sample(comfy, model, positive, latent)
    assert relative_error(sample(comfy, tiled(comfy, model, tile_size=tile_size, batch=2), positive, latent), whole) < 1e-5
    assert relative_error(whole, sample(comfy, model, conditioning(SEED), latent)) > 0.01
    after = vars(control)
    assert all(after[name] is before[name] for name in ("cond_hint_original", "extra_concat_orig", "strength", "cond_hint"))


def test_a_failed_call_puts_the_hint_back(comfy, base):
    model, control = base.clone(), bound_control(picture(3, 150, 190), "method")
    hint = control.cond_hint_original

    def fail(apply_model, args):
        raise RuntimeError("stopped, for this test")

    model.set_model_unet_function_wrapper(fail)
    with pytest.raises(RuntimeError, match="stopped"):
        sample(comfy, tiled(comfy, model), with_options(conditioning(SEED), control=control), torch.randn(1, 4, 24, 28))
    assert control.cond_hint_original is hint


def test_a_hint_that_is_no_picture_is_refused(comfy, base):
    control = bound_control(picture(3, 150, 190), "method")
    control.cond_hint_original = SimpleNamespace(condhint=control.cond_hint_original)
    positive = with_options(conditioning(SEED), control=control)
    with pytest.raises(ValueError, match=r"control_net: found Control, whose hint is no picture \(SimpleNamespace\)"):
        sample(comfy, tiled(comfy, base), positive, torch.randn(1, 4, 24, 28))


def network(base, seed: int = 1):
    """Core's ControlNet for the toy, with procedural weights."""
    from comfy import cldm, ops

    unet = base.model.model_config.unet_config
    config = {k: unet[k] for k in ("model_channels", "num_res_blocks", "channel_mult", "context_dim", "use_linear_in_transformer", "in_channels")}
    config |= {"transformer_depth": [1, 1, 1, 0], "transformer_depth_middle": 1, "num_head_channels": toys.HEAD_DIM, "hint_channels": 3}
    net = cldm.cldm.ControlNet(**config, image_size=32, use_spatial_transformer=True, dtype=torch.float32, operations=ops.disable_weight_init)
    net.load_state_dict(toys.weights(seed, "control", {k: tuple(v.shape) for k, v in net.state_dict().items()}))
    return net.eval()


def core_control(base, kind: str):
    import comfy.controlnet
    from comfy.t2i_adapter.adapter import Adapter

    if kind == "T2IAdapter":
        adapter = Adapter(cin=3 * 64, channels=[32, 64, 64, 64], nums_rb=1, ksize=1, sk=True, use_conv=False, xl=False).eval()
        adapter.load_state_dict(toys.weights(2, "t2i", {k: tuple(v.shape) for k, v in adapter.state_dict().items()}))
        return comfy.controlnet.T2IAdapter(adapter, 3, 8, "nearest-exact", device=torch.device("cpu"))
    if kind == "ControlLora":
        weights = {k: v for k, v in network(base).state_dict().items() if k.startswith(("input_hint_block", "zero_convs", "middle_block_out"))}
        return comfy.controlnet.ControlLora(weights)
    return comfy.controlnet.ControlNet(network(base), load_device=torch.device("cpu"), manual_cast_dtype=torch.float32)


def add_features(apply_model, args):
    """A network that answers with the latent and a T2I adapter's finest features."""
    control = args["c"].get("control")
    features = [f for f in control["input"] if f is not None and f.shape[-2:] == args["input"].shape[-2:]] if control else []
    return args["input"].sin() + sum(f.mean(1, keepdim=True) for f in features)


@pytest.mark.parametrize("kind", ["ControlNet", "T2IAdapter", "ControlLora"])
def test_cores_kinds_stream_as_whole(comfy, base, kind):
    """Frames a few at a time get their own hints, with guidance too."""
    control, latent = core_control(base, kind), torch.randn(3, 4, 8, 16)
    if kind == "T2IAdapter":  # whose features belong to other blocks than the toy has
        base = base.clone()
        base.set_model_unet_function_wrapper(add_features)
    applied = {"control_net": control, "image": picture(3, 64, 128, batch=3), "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    positive, negative = comfy.run("ControlNetApplyAdvanced", positive=conditioning(SEED), negative=conditioning(SEED, "negative"), **applied)
    whole = sample(comfy, base, positive, latent, negative, cfg=2.0)
    assert relative_error(sample(comfy, tiled(comfy, base, tile_size=16, batch=2), positive, latent, negative, cfg=2.0), whole) < 1e-4
    assert relative_error(whole, sample(comfy, base, conditioning(SEED), latent, conditioning(SEED, "negative"), cfg=2.0)) > 1e-3


@pytest.fixture(scope="module")
def advanced(comfy):
    """Core's ControlNet as Apply Advanced ControlNet applies it."""
    path = os.environ.get("ADVANCED_CONTROLNET_PATH")
    if not path:
        pytest.skip("set ADVANCED_CONTROLNET_PATH to a checkout of Kosinkadink/ComfyUI-Advanced-ControlNet")
    import nodes

    assert asyncio.run(nodes.load_custom_node(str(Path(path)), module_parent="custom_nodes")), "Advanced-ControlNet did not load; see the log"

    def apply(base, hints, **options):
        applied = {"control_net": core_control(base, "ControlNet"), "image": hints, "strength": 0.9, "start_percent": 0.0, "end_percent": 1.0}
        return comfy.run("ACN_AdvancedControlNetApply_v2", positive=conditioning(SEED), negative=None, **applied, **options).args[0]

    return apply


def keyframes(comfy, kind: str):
    """Options of Apply Advanced ControlNet in which something belongs to a place, a picture or a step."""
    import sys

    utils = next(module for name, module in sys.modules.items() if name.endswith("adv_control.utils"))
    mask = torch.linspace(0, 1, 200)[None, None].expand(2, 120, 200).clone()
    mask[1] = mask[1].flip(1)
    by_picture = utils.LatentKeyframeGroup()
    for index, strength in ((0, 1.0), (2, 0.3), (-1, 0.6)):
        by_picture.add(utils.LatentKeyframe(index, strength))
    by_step = utils.TimestepKeyframeGroup()
    by_step.add(utils.TimestepKeyframe(0.0, strength=0.4, mask_hint_orig=mask if kind == "masks by step" else None))
    by_step.add(utils.TimestepKeyframe(0.3, strength=1.0, latent_keyframes=by_picture if kind == "pictures by step" else None))
    return {
        "plain": {},
        "mask": {"mask_optional": mask},
        "pictures": {"latent_kf_override": by_picture},
        "steps": {"timestep_kf": by_step},
        "masks by step": {"timestep_kf": by_step},
        "pictures by step": {"timestep_kf": by_step},
    }[kind]


@pytest.mark.parametrize("kind", ["plain", "mask", "pictures", "steps", "masks by step", "pictures by step"])
def test_advanced_controlnet_streams_as_whole(comfy, base, advanced, kind):
    latent, hints = torch.randn(4, 4, 8, 16), picture(3, 64, 128, batch=3)
    positive = advanced(base, hints, **keyframes(comfy, kind))
    whole = sample(comfy, base, positive, latent)
    assert relative_error(sample(comfy, tiled(comfy, base, tile_size=16, batch=2), positive, latent), whole) < 1e-4
    assert relative_error(whole, sample(comfy, base, conditioning(SEED), latent)) > 1e-3


def test_advanced_controlnet_in_tiles_is_cores(comfy, base, advanced):
    """Tiles of Advanced-ControlNet's ControlNet are those of core's, and its mask is cut along."""
    latent, hints = torch.randn(1, 4, 24, 40), picture(3, 192, 320)
    applied = {"control_net": core_control(base, "ControlNet"), "image": hints, "strength": 0.9, "start_percent": 0.0, "end_percent": 1.0}
    core = comfy.run("ControlNetApplyAdvanced", positive=conditioning(SEED), negative=conditioning(SEED), **applied)[0]
    model = tiled(comfy, base, tile_size=16, overlap=8, batch=3)
    one_step = torch.tensor([2.0, 0.0])  # in further ones what a tile sees of its neighbours spreads
    expected = sample(comfy, model, core, latent, sigmas=one_step)
    assert relative_error(sample(comfy, model, advanced(base, hints), latent, sigmas=one_step), expected) < 1e-4
    nowhere = torch.zeros(1, 192, 320)
    nowhere[..., 160:] = 1
    half = sample(comfy, model, advanced(base, hints, mask_optional=nowhere), latent, sigmas=one_step)
    without = sample(comfy, model, conditioning(SEED), latent, sigmas=one_step)
    assert relative_error(half[..., :8], without[..., :8]) < 1e-4  # tiles of which the mask has no part
    assert relative_error(half[..., -8:], expected[..., -8:]) < 1e-4  # tiles that the mask covers
