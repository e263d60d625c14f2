"""The published networks at full size with random weights, and every stage that runs on them: for benchmarks without any weight file."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fewstep_sr.methods import METHODS as records  # noqa: E402
from fewstep_sr.networks.degradation import DegradationConfig, DegradationEstimator  # noqa: E402
from fewstep_sr.networks.noise_predictor import NoisePredictor, NoisePredictorConfig  # noqa: E402
from fewstep_sr.networks.ram import Tagger, TaggerConfig  # noqa: E402
from fewstep_sr.networks.swin import SwinConfig  # noqa: E402
from fewstep_sr.tiling.batching import Runtime  # noqa: E402
from fewstep_sr.tiling.predictor import MAX_WINDOWS, predict_noise_map  # noqa: E402
from fewstep_sr.tiling.tagging import tag_logits  # noqa: E402
from pipelines.compiled import Compiler  # noqa: E402
from pipelines.runtime import PipelineRuntime  # noqa: E402
from pipelines.tiling import Tiling  # noqa: E402

STAGES = {
    "encode": "vae",
    "step": "unet",
    "decode": "vae",
    "light decode": "light_vae",
    "start state": "predictor",
    "tagger": "tagger",
    "degradation": "estimator",
}
"""Every stage and the network that it runs."""

METHODS = {
    "OSEDiff, HYPIR, PiSA-SR": ("encode", "step", "decode"),
    "the same, light decoder": ("encode", "step", "light decode"),
    "OSEDiff with the tagger": ("tagger", "encode", "step", "decode"),
    "PiSA-SR with two knobs": ("encode", "step", "step", "decode"),
    **{method.title: ("degradation", "encode", "step", "step", "decode") for method in records.values() if method.companions and method.cfg != 1},
    "InvSR": ("encode", "start state", "step", "decode"),
    "InvSR, light decoder": ("encode", "start state", "step", "light decode"),
}
"""The stages of each method as published, one step; an adapter that is added to the weights costs nothing."""


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New parameters have ``dtype``: fake ones cannot be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass
class Networks:
    """Each network is built when it is first asked for.

    Args:
        reduced: the published structure with a fraction of its channels, for a run on a CPU.
    """

    dtype: torch.dtype
    device: torch.device
    reduced: bool = False

    def _build(self, make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        torch.manual_seed(5)
        with default_dtype(self.dtype), self.device:
            return make().eval().requires_grad_(False)

    def _autoencoder(self, decoder_channels: tuple[int, ...]):
        from diffusers import AutoencoderKL

        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        channels = (32, 64, 64, 64) if self.reduced else (128, 256, 512, 512)
        vae = AutoencoderKL(
            block_out_channels=channels, layers_per_block=1 if self.reduced else 2, norm_num_groups=8 if self.reduced else 32, **blocks
        )
        if decoder_channels != channels:
            light = AutoencoderKL(block_out_channels=decoder_channels, layers_per_block=2, norm_num_groups=8 if self.reduced else 32, **blocks)
            vae.decoder = light.decoder
        return vae

    @cached_property
    def vae(self):
        return self._build(lambda: self._autoencoder((32, 64, 64, 64) if self.reduced else (128, 256, 512, 512)))

    @cached_property
    def light_vae(self):
        """With the half-width decoder of AdcSR and VOSR."""
        return self._build(lambda: self._autoencoder((16, 32, 32, 32) if self.reduced else (64, 128, 256, 256)))

    @property
    def context_dim(self) -> int:
        return 64 if self.reduced else 1024

    @cached_property
    def unet(self):
        from diffusers import UNet2DConditionModel

        size = {"block_out_channels": (32, 64, 128, 128), "attention_head_dim": (2, 4, 8, 8), "norm_num_groups": 8} if self.reduced else {}
        published = {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": self.context_dim, "use_linear_projection": True}
        return self._build(lambda: UNet2DConditionModel(**published | size))

    @cached_property
    def predictor_config(self) -> NoisePredictorConfig:
        if self.reduced:
            return NoisePredictorConfig(block_out_channels=(64, 64), layers_per_block=(1, 1), time_channels=128, temb_channels=64)
        return NoisePredictorConfig()

    @cached_property
    def predictor(self):
        return self._build(lambda: NoisePredictor(self.predictor_config))

    @cached_property
    def tagger_config(self) -> TaggerConfig:
        return TaggerConfig(SwinConfig(24, (1, 1, 1, 1), (1, 2, 4, 8), 4), 32, 32, 32, 64) if self.reduced else TaggerConfig()

    @cached_property
    def tagger(self):
        return self._build(lambda: Tagger(self.tagger_config))

    @cached_property
    def estimator(self):
        """In float32 whatever the others are."""
        config = DegradationConfig(8, 16, 32) if self.reduced else DegradationConfig()
        return Networks(torch.float32, self.device)._build(lambda: DegradationEstimator(config))

    def weights(self, name: str) -> int:
        """Bytes of a network's weights."""
        return sum(tensor.numel() * tensor.element_size() for tensor in getattr(self, name).state_dict().values())


def stages(
    networks: Networks, pixels: int, tile: int | None, runtime: Runtime | None = None, compiler: Compiler | None = None
) -> dict[str, Callable[[], torch.Tensor]]:
    """Every stage for one image of ``pixels`` a side, as the pipelines run it: in tiles of ``tile`` pixels, or whole. Inputs are random and made once."""
    tiling = Tiling(tile // 8, tile // 32, compiler) if tile else Tiling(compiler=compiler)
    dtype, device, cells, runtime = networks.dtype, networks.device, pixels // 8, runtime or PipelineRuntime()
    generator = torch.Generator().manual_seed(5)
    image = torch.rand(1, 3, pixels, pixels, generator=generator)
    low_quality = image[..., ::4, ::4].contiguous()
    latents = torch.randn(1, 4, cells, cells, generator=generator)
    embeds = torch.randn(1, 77, networks.context_dim, generator=generator).to(device, dtype)

    timestep = torch.full((1,), 999, device=device)

    def unet(tiles: torch.Tensor, _) -> torch.Tensor:
        return tiling.call(networks.unet, tiles.to(device, dtype), timestep, encoder_hidden_states=embeds.expand(len(tiles), -1, -1)).sample

    def start_state() -> torch.Tensor:
        ratio = networks.predictor_config.pixels_per_cell
        window = torch.nn.functional.interpolate(low_quality, size=(ratio * cells, ratio * cells), mode="nearest")
        index = torch.full((1,), 199, device=device)
        call = lambda windows: tiling.call(networks.predictor, windows.to(device, dtype), index)  # noqa: E731
        return predict_noise_map(call, window, networks.predictor_config, lambda height, width: 1 if compiler else MAX_WINDOWS, runtime, device).mean

    return {
        "encode": lambda: tiling.encode(networks.vae, image, device, runtime),
        "step": lambda: tiling.predict(unet, latents.to(device), runtime),
        "decode": lambda: tiling.decode(networks.vae, latents, device, runtime),
        "light decode": lambda: tiling.decode(networks.light_vae, latents, device, runtime),
        "start state": start_state,
        "tagger": lambda: tag_logits(lambda picture: networks.tagger(picture.to(device, dtype)), low_quality, networks.tagger_config, runtime),
        "degradation": lambda: networks.estimator(low_quality.to(device)),
    }
