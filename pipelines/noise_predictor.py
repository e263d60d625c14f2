"""InvSR's noise predictor as a component that diffusers saves and loads."""

from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from fewstep_sr.methods import INVSR, load_weights
from fewstep_sr.networks.noise_predictor import NoisePredictor, NoisePredictorConfig
from fewstep_sr.networks.posterior import Posterior


class InvSRNoisePredictor(ModelMixin, ConfigMixin):
    """:class:`fewstep_sr.networks.noise_predictor.NoisePredictor` with a config; the keys are the published ones, so that saved files load everywhere."""

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (256, 512),
        layers_per_block: tuple[int, ...] = (3, 3),
        time_channels: int = 256,
        temb_channels: int = 512,
    ):
        super().__init__()
        config = NoisePredictorConfig(
            in_channels=in_channels,
            latent_channels=latent_channels,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=tuple(layers_per_block),
            time_channels=time_channels,
            temb_channels=temb_channels,
        )
        network = NoisePredictor(config)
        self.encoder = network.encoder
        self._network = (network,)  # in a tuple: not a second submodule with the same weights

    def forward(self, image: torch.Tensor, timestep: int | torch.Tensor) -> Posterior:
        return self._network[0](image, timestep)

    @property
    def dimensions(self) -> NoisePredictorConfig:
        return self._network[0].config

    @property
    def pixels_per_cell(self) -> int:
        return self.dimensions.pixels_per_cell

    @classmethod
    def from_weights(cls, path: str | Path, torch_dtype: torch.dtype | None = None) -> "InvSRNoisePredictor":
        """Read a published file (.pth) or its safetensors form. Raises as :func:`fewstep_sr.methods.load_weights` does."""
        weights = load_weights(INVSR, path)
        network = cls(**vars(weights.config))
        network.load_state_dict(weights.state_dict)
        network.encoder.to(torch_dtype or torch.float32)
        return network.eval().requires_grad_(False)
