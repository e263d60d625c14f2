"""The nodes' estimates of memory against what the networks at their published size have alive at once, counted tensor by tensor."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.live_bytes import DEVICE, peak_bytes

CELLS = 64, 96
"""Height and width in latent pixels."""

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32])


@pytest.fixture(autouse=True)
def a_card(comfy, monkeypatch):
    """ComfyUI as it is where a CUDA device computes attention with PyTorch's kernels."""
    import comfy.ldm.modules.attention as attention
    from comfy import model_management

    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    monkeypatch.setattr(model_management, "pytorch_attention_flash_attention", lambda: True)
    monkeypatch.setattr(model_management, "pytorch_attention_enabled_vae", lambda: True)


@pytest.fixture
def memory(comfy):
    return comfy.module(".nodes.memory")


def new(make, dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # fake tensors are not converted
    try:
        with DEVICE:
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def agrees(estimate: float, peak: int) -> bool:
    """Enough, and at most 15 % more."""
    return peak <= estimate <= 1.15 * peak


@DTYPES
@pytest.mark.parametrize("decoder_channels", [128, 64])
def test_vae(memory, dtype, decoder_channels):
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from stable_diffusion import VAE

    class FakeVAE:
        vae_dtype = dtype

    height, width = CELLS
    with FakeTensorMode(allow_non_fake_inputs=True):
        FakeVAE.first_stage_model = network = new(
            lambda: AutoencoderKL(ddconfig=VAE, decoder_ddconfig=VAE | {"ch": decoder_channels}, embed_dim=4), dtype
        )
        image, latent = torch.zeros(1, 3, 8 * height, 8 * width, device=DEVICE), torch.zeros(1, 4, height, width, device=DEVICE)
        encode = peak_bytes(lambda: network.encode(image.to(dtype)))
        decode = peak_bytes(lambda: network.decode(latent.to(dtype)))
    assert agrees(memory.vae_memory(FakeVAE, "encode", height, width), encode)
    assert agrees(memory.vae_memory(FakeVAE, "decode", height, width), decode)


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("batch", [1, 4])
def test_unet(memory, dtype, batch):
    from comfy.supported_models import SD20
    from stable_diffusion import UNETS

    config = UNETS["full"] | {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "context_dim": 1024}
    config |= {"use_linear_in_transformer": True, "transformer_depth_middle": 1, "use_spatial_transformer": True, "dtype": dtype}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = new(lambda: SD20(config).get_model({}, device=DEVICE), dtype)
        latents = torch.zeros(batch, 4, *CELLS, device=DEVICE, dtype=dtype)
        timestep, text = torch.zeros(batch, device=DEVICE), torch.zeros(batch, 77, 1024, device=DEVICE, dtype=dtype)
        peak = peak_bytes(lambda: model.diffusion_model(latents, timestep, context=text))
    assert agrees(memory.unet_memory(model, list(latents.shape)), peak)


@pytest.mark.slow
@DTYPES
def test_our_own_networks(comfy, memory, dtype):
    from fewstep_sr.networks.degradation import DegradationConfig, DegradationEstimator
    from fewstep_sr.networks.noise_predictor import NoisePredictor, NoisePredictorConfig
    from fewstep_sr.networks.ram import Tagger, TaggerConfig

    height, width = CELLS
    with FakeTensorMode(allow_non_fake_inputs=True):
        predictor, tagger = new(lambda: NoisePredictor(NoisePredictorConfig()), dtype), new(lambda: Tagger(TaggerConfig()), dtype)
        estimator = new(lambda: DegradationEstimator(DegradationConfig()), dtype)
        window = torch.zeros(2, 3, 2 * height, 2 * width, device=DEVICE, dtype=dtype)
        picture = torch.zeros(1, 3, tagger.config.image_size, tagger.config.image_size, device=DEVICE, dtype=dtype)
        peaks = [peak_bytes(lambda: network(*given)) for network, given in ((predictor, (window, 199)), (tagger, (picture,)), (estimator, (window,)))]
    elements = (
        memory.PREDICTOR_ACTIVATIONS * predictor.config.block_out_channels[0] * 2 * 4 * height * width,
        memory.TAGGER_ACTIVATIONS * tagger.config.num_tags * tagger.config.mlp_channels,
        comfy.module(".nodes.s3diff").ESTIMATOR_ACTIVATIONS * estimator.config.channels * 2 * 4 * height * width,
    )
    for estimate, peak in zip(elements, peaks, strict=True):
        assert agrees(memory.MARGIN * estimate * dtype.itemsize, peak)


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("free", [0.5, 2.0])
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_tiles_take_what_was_reckoned_with(comfy, memory, monkeypatch, dtype, free, method):
    """The tiles that are chosen for so many free GiB, as many in a call as are said to fit, and the reduced pass before them."""
    from comfy import model_management
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from stable_diffusion import VAE

    tiled = comfy.module(".nodes.tiled_vae")
    free_bytes, height, width, calls = int(free * 2**30), 192, 256, []

    class FakeVAE:
        vae_dtype = dtype

        class patcher:
            get_free_memory = staticmethod(lambda device: free_bytes)

    FakeVAE.device = DEVICE
    estimate = memory.vae_memory
    monkeypatch.setattr(tiled, "vae_memory", lambda vae, method, *size: calls.append(size) or estimate(vae, method, *size))
    monkeypatch.setattr(model_management, "load_models_gpu", lambda models, memory_required: None)
    monkeypatch.setattr(model_management, "get_total_memory", lambda device: 2 * free_bytes)
    monkeypatch.setattr(tiled.ComfyUI, "has_room", lambda self, size, device: False)
    monkeypatch.setattr(tiled.WholePicture, "off", lambda self: 0.0)  # fake tensors have no values
    with FakeTensorMode(allow_non_fake_inputs=True):
        FakeVAE.first_stage_model = network = new(lambda: AutoencoderKL(ddconfig=VAE, embed_dim=4), dtype)
        scale_in, scale_out, channels_in, channels_out = (8, 1, 3, 4) if method == "encode" else (1, 8, 4, 3)
        source = torch.zeros(1, channels_in, height * scale_in, width * scale_in)
        result = torch.zeros(1, channels_out, height * scale_out, width * scale_out)
        peak = peak_bytes(lambda: tiled._run(FakeVAE, network, method, lambda i: source, result, lambda x: x, 0))
    tile = calls[-1]  # of which fitting was asked how many there are
    together = min(tiled.MAX_GROUP, free_bytes // estimate(FakeVAE, method, *tile))
    reckoned = together * estimate(FakeVAE, method, *tile)
    assert agrees(reckoned, peak) and reckoned <= free_bytes, (tile, together, reckoned / 2**30, peak / 2**30)
