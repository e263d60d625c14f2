"""Methods that are an adapter on Stable Diffusion 2.1: putting it on and off, saving and loading it with the base, one step on the latents."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from fewstep_sr.image.sizes import size_of
from fewstep_sr.methods import load_weights
from fewstep_sr.weights.lora import Adapter, LowRank

from .adapter import put_on, require_layers, require_replaced
from .base import FewStepSRPipeline, Generators, Pictures


class AdapterPipeline(FewStepSRPipeline):
    """Base of the pipelines whose weights are a LoRA. Subclasses take ``<key>: dict = None`` as a component's argument and hand it to :meth:`_begin`.

    A saved pipeline has the base without the adapter, and the adapter beside it as ``<key>.safetensors``, with the strengths in its configuration.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    posterior = "mean"

    _adapter: Adapter | None
    _conv_in: dict[str, torch.Tensor]
    _fused: bool

    def _begin(self, saved: dict | None) -> None:
        self._adapter, self._conv_in, self._fused = None, {}, False
        if saved:
            self.register_to_config(**{self.method.key: saved})

    @property
    def _file(self) -> str:
        return f"{self.method.key}.safetensors"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if saved := pipeline.config.get(cls.method.key):
            folder = Path(pretrained_model_name_or_path)
            hub = {k: kwargs[k] for k in ("cache_dir", "revision", "token", "local_files_only") if k in kwargs}
            path = folder / saved["file"] if folder.is_dir() else hf_hub_download(str(pretrained_model_name_or_path), saved["file"], **hub)
            pipeline._load(path, saved["strength_model"], saved["strength_vae"])
        return pipeline

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """The base without the adapter, and the adapter beside it, so that loading gives the pipeline as it is now, but never fused."""
        adapter, fused = self._adapter, self._fused
        if adapter is None:
            return super().save_pretrained(save_directory, *args, **kwargs)
        strengths = {k: self.config[self.method.key][k] for k in ("strength_model", "strength_vae")}
        self._unload()
        try:
            self.register_to_config(**{self.method.key: {"file": self._file, **strengths}})
            super().save_pretrained(save_directory, *args, **kwargs)
            self.method.save(adapter, Path(save_directory) / self._file)
        finally:
            self._put_on(adapter, **strengths)
            if fused:
                self.fuse()

    def load_weights(self, path: str | Path, strength_vae: float = 1.0) -> None:
        self._load(path, 1.0, strength_vae)

    def _load(self, path: str | Path, strength_model: float, strength_vae: float) -> None:
        """Put an adapter on, in place of the one before. Where it does not fit, ValueError, and the pipeline is as before."""
        adapter = load_weights(self.method, path)
        width = self.unet.config.cross_attention_dim
        if adapter.context_dim != width:
            raise ValueError(
                f"unet: found a cross-attention dimension of {width}, but the adapter was trained for {adapter.context_dim}. "
                f"Load the base that the adapter belongs to: {self.method.base.what} for the published ones."
            )
        for layers in self._sets(adapter).values():
            require_layers(self.unet, layers, "unet", self.method.base.what)
        require_layers(self.vae, adapter.vae, "vae", self.method.base.what)
        require_replaced(self.unet, adapter.unet_replaced, "unet", self.method.base.what)
        self._unload()
        self._put_on(adapter, strength_model, strength_vae)

    def _sets(self, adapter: Adapter) -> dict[str, dict[str, LowRank]]:
        """The LoRA sets on the UNet by a name of each."""
        return {"": adapter.unet}

    def _peft_name(self, layer: str, which: str) -> str:
        """PEFT's name of the adapter that holds a UNet layer's update of a set."""
        return "default"

    def _put_on(self, adapter: Adapter, strength_model: float, strength_vae: float) -> None:
        if adapter.unet_replaced:
            self._conv_in = {name: parameter.detach().cpu().clone() for name, parameter in self.unet.conv_in.named_parameters()}
            for name, parameter in self.unet.conv_in.named_parameters():
                replacement = adapter.unet_replaced[f"conv_in.{name}"].to(parameter)
                parameter.data.copy_((1 - strength_model) * parameter + strength_model * replacement)
        for which, layers in self._sets(adapter).items():
            put_on(self.unet, layers, {layer: self._peft_name(layer, which) for layer in layers}, strength_model)
        self._activate(*self._sets(adapter))
        if adapter.vae:
            put_on(self.vae, adapter.vae, dict.fromkeys(adapter.vae, "default_encoder"), strength_vae)
        self._adapter = adapter
        self.register_to_config(**{self.method.key: {"file": self._file, "strength_model": strength_model, "strength_vae": strength_vae}})

    def _activate(self, *sets: str) -> None:
        """Let these sets act, and no others."""
        names = [name for name in self.unet.peft_config if not sets or any(name.endswith(which) for which in sets)]
        self.unet.set_adapter(names)
        self.unet.requires_grad_(False)

    def _unload(self) -> None:
        """Take the adapter off; the base is as it was."""
        if self._adapter is None:
            return
        self.unfuse()
        self.unet.unload_lora()
        if self._adapter.vae:
            self.vae.unload_lora()
        if self._conv_in:
            self.unet.conv_in.load_state_dict(self._conv_in)
        self._adapter, self._conv_in = None, {}
        self.register_to_config(**{self.method.key: None})

    def fuse(self) -> None:
        """Add the adapter's update to the base's weights: the same result, a little faster. :meth:`unfuse` takes it out again."""
        self._require_adapter("fuse")
        if not self._fused:
            self.unet.fuse_lora()
            if self._adapter and self._adapter.vae:
                self.vae.fuse_lora()
            self._fused = True

    def unfuse(self) -> None:
        if self._fused:
            self.unet.unfuse_lora()
            if self._adapter and self._adapter.vae:
                self.vae.unfuse_lora()
            self._fused = False

    def _require_adapter(self, what: str) -> None:
        if self._adapter is None:
            raise ValueError(f"{what}: no adapter is loaded, and the base alone does not restore. Call load_{self.method.key} first.")

    def _restore(
        self,
        image: Pictures,
        prompt: str | list[str],
        prompt_embeds: torch.Tensor | None,
        scale: float,
        posterior: str,
        generator: Generators,
        color_fix: str | None,
        output_type: str,
        return_dict: bool,
        callback: Callable | None,
        callback_inputs: Sequence[str],
        timestep: int,
        step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> Any:
        """From images to images through ``step(latents, prompt_embeds)``, the method's one step at ``timestep``."""
        self._require_adapter(self.method.title)
        _, enlarged = self.preprocess(image, scale)
        embeds, _ = self._prompts(prompt, "", prompt_embeds, None, 1.0, enlarged.shape[0])
        latents = step(self.encode(enlarged, posterior, generator), embeds)
        tensors = self._call_back(callback, callback_inputs, 0, timestep, {"latents": latents, "prompt_embeds": embeds})
        restored = self.decode(tensors["latents"], size_of(enlarged))
        return self._finish(restored, enlarged, color_fix, output_type, return_dict)
