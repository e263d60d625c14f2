"""RAM, the Recognize Anything Model (Zhang et al., 2023), as far as tagging goes: a picture in, one logit for each of 4,585 tags out.

A Swin Transformer gives the picture's features, a linear layer narrows them to the 512 channels of the label embeddings, and in two
layers of cross-attention every label looks at the picture (Query2Label, Liu et al., 2021). DAPE (SeeSR, Wu et al., CVPR 2024) is the same
network with low-rank updates that see through degradation. Module names are those of the published weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .indices import dimension, layer_count
from .swin import SwinConfig, SwinTransformer

# Not visible in the weights' shapes; the same in every published configuration.
HEADS = 4
NORM_EPS = 1e-12
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TaggerConfig:
    """Dimensions of a tagger, all of them visible in its weights' shapes."""

    swin: SwinConfig = field(default_factory=SwinConfig)
    num_tags: int = 4585
    label_channels: int = 512
    hidden_channels: int = 768
    mlp_channels: int = 3072
    layers: int = 2

    @property
    def image_size(self) -> int:
        """Side in pixels of the square picture that the network sees."""
        return self.swin.image_size

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, torch.Tensor]) -> "TaggerConfig":
        """Read the dimensions off ``state_dict``. Raises ValueError where a tensor is missing or no network of this kind has its shape."""
        config = cls(
            swin=SwinConfig.from_state_dict(state_dict, "visual_encoder."),
            num_tags=dimension(state_dict, "label_embed", 0, ndim=2),
            label_channels=dimension(state_dict, "label_embed", 1, ndim=2),
            hidden_channels=dimension(state_dict, "wordvec_proj.weight", 0, ndim=2),
            mlp_channels=dimension(state_dict, "tagging_head.encoder.layer.0.intermediate.dense.weight", 0, ndim=2),
            layers=layer_count(state_dict, r"tagging_head\.encoder\.layer\.(\w+)\.output\.dense\.weight", "tagging_head"),
        )
        if config.hidden_channels % HEADS:
            raise ValueError(f"tagging_head: found {config.hidden_channels} channels, expected a multiple of {HEADS}, the number of heads.")
        return config


class Tagger(nn.Module):
    """The network. ``operations`` supplies the layers: ``torch.nn``, or ``comfy.ops`` under ComfyUI's memory management."""

    def __init__(self, config: TaggerConfig, dtype: torch.dtype | None = None, device=None, operations=nn):
        super().__init__()
        self.config = config
        kw = {"dtype": dtype, "device": device}
        self.visual_encoder = SwinTransformer(config.swin, operations=operations, **kw)
        self.image_proj = operations.Linear(config.swin.out_channels, config.label_channels, **kw)
        self.label_embed = nn.Parameter(torch.zeros(config.num_tags, config.label_channels, **kw))
        self.wordvec_proj = operations.Linear(config.label_channels, config.hidden_channels, **kw)
        layers = nn.ModuleList(TaggingLayer(config, operations, **kw) for _ in range(config.layers))
        self.tagging_head: Any = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": layers})})
        self.fc = operations.Linear(config.hidden_channels, 1, **kw)

    def image_embeds(self, image: torch.Tensor) -> torch.Tensor:
        """The picture's features (B, 1 + n, 512), the mean of all cells first.

        Args:
            image: (B, 3, side, side) of ``config.image_size``, as :func:`prepare_picture` gives it.

        Raises:
            ValueError: the picture has another size.
        """
        side = self.config.image_size
        if tuple(image.shape[-2:]) != (side, side):
            raise ValueError(f"image: found {image.shape[-1]} x {image.shape[-2]} pixels, expected {side} x {side}. Use prepare_picture.")
        return self.image_proj(self.visual_encoder(image))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_tags) of a picture as in :meth:`image_embeds`."""
        seen = self.image_embeds(image)
        labels = F.relu(self.wordvec_proj(self.label_embed.to(seen))).expand(seen.shape[0], -1, -1)
        for layer in self.tagging_head["encoder"]["layer"]:
            labels = layer(labels, seen)
        return self.fc(labels).squeeze(-1)


class TaggingLayer(nn.Module):
    """BERT's layer without its self-attention: cross-attention from the labels to the picture, then an MLP, each with a norm after the sum."""

    def __init__(self, config: TaggerConfig, operations, **kw):
        super().__init__()
        channels = config.hidden_channels
        attention = {
            "query": operations.Linear(channels, channels, **kw),
            "key": operations.Linear(config.label_channels, channels, **kw),
            "value": operations.Linear(config.label_channels, channels, **kw),
        }
        self.crossattention: Any = nn.ModuleDict({"self": nn.ModuleDict(attention), "output": AddAndNorm(channels, channels, operations, **kw)})
        self.intermediate = nn.ModuleDict({"dense": operations.Linear(channels, config.mlp_channels, **kw)})
        self.output = AddAndNorm(config.mlp_channels, channels, operations, **kw)

    def forward(self, labels: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        project = self.crossattention["self"]
        inputs = (project["query"](labels), project["key"](seen), project["value"](seen))
        q, k, v = (rearrange(tensor, "b n (m d) -> b m n d", m=HEADS) for tensor in inputs)
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b m n d -> b n (m d)")
        labels = self.crossattention["output"](attended, labels)
        return self.output(F.gelu(self.intermediate["dense"](labels)), labels)


class AddAndNorm(nn.Module):
    def __init__(self, in_channels: int, channels: int, operations, **kw):
        super().__init__()
        self.dense = operations.Linear(in_channels, channels, **kw)
        self.LayerNorm = operations.LayerNorm(channels, eps=NORM_EPS, **kw)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dense(hidden) + residual)


def prepare_picture(picture: torch.Tensor, side: int) -> torch.Tensor:
    """A picture (B, 3, H, W) in [0, 1], of any size, as the network sees it: float32 (B, 3, side, side), proportions not kept, normalised."""
    picture = picture.float()
    if tuple(picture.shape[-2:]) != (side, side):
        picture = F.interpolate(picture, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(values, device=picture.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (picture.clamp(0, 1) - mean) / std
