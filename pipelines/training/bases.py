"""The base that a method is trained on, and the prompts that it is trained with."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from fewstep_sr.weights.read import read_weights
from fewstep_sr.weights.strict import own_copies

from ..checks import require_stable_diffusion
from ..osediff import OSEDiffPipeline
from ..single_file import find_tokenizer
from ..tagger import PromptTagger

PROMPT_FILE = "prompt_embeds.safetensors"
"""Beside a base without a text encoder: ``prompt_embeds`` (1, n, width), and ``negative_prompt_embeds`` and ``empty_prompt_embeds`` where it has them."""

_log = logging.getLogger(__name__)


@dataclass
class Base:
    """Stable Diffusion's networks, float32, frozen. Text encoder and tokenizer may be missing."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel | None = None
    tokenizer: CLIPTokenizer | None = None
    prompt_file: Path | None = None


def load_base(name: str, download: bool = False, comfyui: Path | None = None) -> Base:
    """Read a base in one file (.safetensors, .ckpt), in a folder or on the hub.

    Raises:
        OSError, ValueError: it is not there, or not a noise-predicting Stable Diffusion 2.x.
    """
    offline = {"local_files_only": not download}
    if Path(name).is_file():
        pipeline = OSEDiffPipeline.from_single_file(name, tokenizer=find_tokenizer(comfyui=comfyui, **offline), **offline)
        base = Base(pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer)
    else:
        base = _load_folder(name, offline)
    for network in (base.unet, base.vae, base.text_encoder):
        if network is not None:
            network.float().requires_grad_(False)
    return base


def _load_folder(name: str, offline: dict) -> Base:
    unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", **offline)
    vae = AutoencoderKL.from_pretrained(name, subfolder="vae", **offline)
    require_stable_diffusion(unet, vae, DDIMScheduler.from_pretrained(name, subfolder="scheduler", **offline))
    base = Base(unet, vae)
    if not Path(name).is_dir() or (Path(name) / "text_encoder").is_dir():
        base.text_encoder = CLIPTextModel.from_pretrained(name, subfolder="text_encoder", **offline)
        base.tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **offline)
    if (Path(name) / PROMPT_FILE).is_file():
        base.prompt_file = Path(name) / PROMPT_FILE
    return base


def read_prompt_embeds(file: Path, width: int) -> dict[str, torch.Tensor]:
    """The embeddings in a file such as :data:`PROMPT_FILE`, float32, by their names there; ``width`` is the base's.

    Raises:
        FileNotFoundError, ValueError: there is none, it is damaged, or its embeddings are none for the base.
    """
    tensors = own_copies(read_weights(file)[0], file.name)
    for name in {"prompt_embeds", *tensors}:
        found = tensors.get(name, torch.empty(0))
        if found.ndim != 3 or found.shape[-1] != width:
            raise ValueError(f"{file.name}: found {name} of shape {tuple(found.shape[:8])}, expected (1, tokens, {width}), as the base has it.")
    return {name: tensor.float() for name, tensor in tensors.items()}


class Prompts:
    """Prompt embeddings of pictures: from a file, of a fixed text, or of the tags that a tagger reads off the high-quality pictures (OSEDiff).

    ``networks`` are those that it still needs.
    """

    def __init__(self, base: Base, text: str = "", negative: str = "", tagger: PromptTagger | None = None, file: Path | None = None):
        self._base, self._text, self._tagger = base, text, tagger
        self._file = file = file or (None if base.text_encoder else base.prompt_file)
        self._negative_text = negative
        self.networks: list[torch.nn.Module] = []
        self._fixed: torch.Tensor | None = None
        self._negative: torch.Tensor | None = None
        self._empty: torch.Tensor | None = None
        if file:
            self._read(file)
        elif base.text_encoder is None:
            raise ValueError(f"prompt: the base has no text encoder and no {PROMPT_FILE}. Give embeddings with --prompt-embeds, or another base.")
        else:
            self._negative, self._empty = self._encode([negative]), self._encode([""])
            self._fixed = None if tagger else self._encode([text])
            self.networks = [base.text_encoder, tagger.network] if tagger else []

    def _read(self, file: Path) -> None:
        tensors = read_prompt_embeds(file, self._base.unet.config.cross_attention_dim)
        if self._tagger:
            raise ValueError("tagger: a tagger's tags need a text encoder, but the prompt is given as embeddings. Give one or the other.")
        self._fixed, self._negative, self._empty = tensors["prompt_embeds"], tensors.get("negative_prompt_embeds"), tensors.get("empty_prompt_embeds")

    def settings(self) -> dict[str, Any]:
        """What a run keeps of them: texts, or a file's contents."""
        if self._file is not None:
            return {"prompt_embeds": hashlib.sha256(self._file.read_bytes()).hexdigest()[:16]}
        return {"prompt": self._text, "negative_prompt": self._negative_text, "tagger": self._tagger is not None}

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> torch.Tensor:
        encoder: Any = self._base.text_encoder
        tokenizer: Any = self._base.tokenizer
        length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return encoder(tokens.input_ids.to(encoder.device))[0].float()

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, n, width) for high-quality pictures (B, 3, H, W) in [0, 1]."""
        embeds = self._fixed
        if embeds is None:
            assert self._tagger is not None  # one of the two is there
            embeds = self._encode(self._tagger(pictures, self._text))
        return embeds.to(pictures.device, non_blocking=True).expand(len(pictures), -1, -1)

    def negative(self, pictures: torch.Tensor) -> torch.Tensor:
        """Embeddings of the negative prompt, as many as pictures. Raises ValueError where there are none."""
        if self._negative is None:
            raise ValueError("negative prompt: found none beside the prompt's embeddings. Give it, or guidance 1.")
        return self._negative.to(pictures.device, non_blocking=True).expand(len(pictures), -1, -1)

    def empty(self, pictures: torch.Tensor) -> torch.Tensor | None:
        """Embeddings of the empty text, as many as pictures; None where prompts are given as embeddings without it."""
        return None if self._empty is None else self._empty.to(pictures.device, non_blocking=True).expand(len(pictures), -1, -1)

    @property
    def has_negative(self) -> bool:
        return self._negative is not None
