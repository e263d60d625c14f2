"""One node for the single step of every method whose adapter the loader puts on."""

from functools import partial

import comfy.model_management
import torch
from comfy_api.latest import io

from ..fewstep_sr.methods import METHODS
from ..fewstep_sr.methods.method import Method, Option
from .marks import Mark, found_adapter, with_sets
from .page import listing, require_number, warn
from .per_image import each_model
from .sampling import USUAL, require_step, sample_step

NODE = "Few-Step SR One Step"

FAMILIES = [method for method in METHODS.values() if method.one_step]

CONTROLS = {option.name: (method, option) for method in FAMILIES for option in method.options if option.name in method.one_step.controls}
"""All methods' controls by their names, each with its method."""

DEFAULTS = {name: option.default for name, (_, option) in CONTROLS.items()}
"""Published values of all methods' controls."""


class FewStepSROneStep(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FewStepSROneStep",
            display_name=NODE,
            category="FewStepSR",
            description="Restores a low-quality latent in a single step, by the method whose adapter is on the model: "
            f"{listing((method.title for method in FAMILIES), 'or')}. It runs ComfyUI's own sampler, so LoRAs, ControlNets, model patches, masks and "
            "previews work.",
            search_aliases=[
                *(method.title.lower() for method in FAMILIES),
                "one-step diffusion",
                "sampler",
                "restore",
                "super resolution",
                "fidelity",
                "detail",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model from Load Few-Step SR Adapter; LoRAs and other patches may follow it."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="A description of the image, encoded with the base's CLIP. "
                    + " ".join(f"{method.title}: {method.one_step.prompt}." for method in FAMILIES),
                ),
                io.Latent.Input("latent", tooltip="The upscaled low-quality image, encoded with the VAE from Load Few-Step SR Adapter."),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip=f"Only used if cfg is not 1. {_negatives()}",
                ),
                io.Float.Input(
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip=f"Classifier-free guidance. 0 is the method's published value: {_guidance()}. Values "
                    "other than 1 need the negative input and run the model twice.",
                ),
                *(_control(method, option) for method, option in CONTROLS.values()),
            ],
            outputs=[io.Latent.Output(tooltip="The restored latent. Decode it with VAE Decode (Few-Step SR).")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, positive, latent, negative=None, cfg=0.0, **controls) -> io.NodeOutput:
        mark, acts = found_adapter(model)
        if mark is None:
            raise ValueError(
                "model: found no adapter of a few-step method on it, expected one. Put 'Load Few-Step SR Adapter' before. (For a checkpoint that has "
                "OSEDiff merged in, take 'OSEDiff One Step'.)"
            )
        cfg = cfg or mark.method.cfg
        if negative is None and cfg == mark.method.cfg != 1:
            raise ValueError(
                f"negative: found none, expected {mark.method.title}'s negative prompt, since its published cfg is {cfg:g}. Wire the prompt of its "
                "template, or set cfg to 1."
            )
        conds = require_step(model, positive, latent, negative, cfg)
        controls = DEFAULTS | controls
        for name, value in controls.items():
            require_number(value, name, CONTROLS[name][1].widget.low, CONTROLS[name][1].widget.high)
        warn(cls, _warnings(mark, acts, cfg, controls))
        own = {name: controls[name] for name in mark.method.one_step.controls}
        return io.NodeOutput({**latent, "samples": restore(model, mark, latent, conds, cfg, own)})


def _control(method: Method, option: Option) -> io.Input:
    """The widget of a method's control."""
    widget = option.widget
    kind = io.Int if isinstance(option.default, int) else io.Float
    return kind.Input(
        option.name, default=option.default, min=widget.low, max=widget.high, step=widget.step, tooltip=f"{method.title}: {widget.tooltip}"
    )


def _negatives() -> str:
    having = "".join(f"{method.title}: the negative prompt of its template. " for method in FAMILIES if method.negative_prompt)
    return f"{having}{listing(method.title for method in FAMILIES if not method.negative_prompt)} have none."


def _guidance() -> str:
    return "".join(f"{method.cfg:g} for {method.title}, " for method in FAMILIES if method.cfg != 1) + "1 (no guidance) for the others"


def restore(model, mark: Mark, latent: dict, conds: dict, cfg: float, controls: dict) -> torch.Tensor:
    """The restored samples (B, 4, h, w) by the equation of the method that ``mark`` is of, not multiplied by the scaling factor.

    Where calls of the network differ in their LoRA sets they differ in its weights, which ComfyUI patches in place: all pictures go through one call
    before the next begins, so that the weights are patched once for each, whatever the number of pictures and tiles. So it is with adapters that are
    another one for each picture.
    """
    samples = latent["samples"]
    restored = torch.zeros_like(samples, dtype=torch.float32, device=comfy.model_management.intermediate_device())
    for own, images in each_model(model, len(samples)):
        answer = _restore(own, mark, latent, conds, cfg, controls, images)
        if images is None:
            return answer
        restored[list(images)] = answer[list(images)].to(restored)
    return restored


def _restore(model, mark: Mark, latent: dict, conds: dict, cfg: float, controls: dict, images: tuple[int, ...] | None) -> torch.Tensor:
    step = mark.method.one_step
    calls = step.calls(**controls)
    predicted: list[torch.Tensor] = []

    def keep(z_lq, noise_pred):
        predicted.append(noise_pred)
        return z_lq

    def equation(z_lq, noise_pred):
        return step.equation(z_lq, [*predicted, noise_pred], mark.timestep, **controls)

    for i, acting in enumerate(calls):
        last = i == len(calls) - 1
        run = partial(sample_step, with_sets(model, acting), latent, conds, cfg, mark.timestep, NODE, part=(i, len(calls)), images=images)
        restored = run(equation if last else keep)
    return restored


def _warnings(mark: Mark, acts: bool, cfg: float, controls: dict) -> list[str]:
    """What will probably spoil the result, or change nothing."""
    method, warnings = mark.method, []
    if not acts:
        warnings.append(
            f"model: the {method.title} adapter on it acts with strength 0, lost in a merge or by strength_model. Put the loader after the merge, with a "
            "strength of 1."
        )
    if cfg > USUAL:
        warnings.append(f"cfg: found {cfg:g}, expected {method.cfg:g} (to {USUAL:g}). Set it to {method.cfg:g}, or colours and edges overshoot.")
    for name, value in controls.items():
        if name not in method.one_step.controls:
            if value != DEFAULTS[name]:
                warnings.append(f"{name}: found {value:g}, but the adapter is {method.title}'s, which has no such setting. It changes nothing.")
        elif (usual := CONTROLS[name][1].widget.usual) and not usual[0] <= value <= usual[1]:
            low, high = usual
            warnings.append(
                f"{name}: found {value:g}, expected {DEFAULTS[name]:g} ({low:g} to {high:g}). Use {DEFAULTS[name]:g}; values outside {low:g}-{high:g} "
                "usually give artefacts."
            )
    return warnings
