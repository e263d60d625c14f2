"""Putting an adapter on a base: one loader for every method whose weights are an adapter with a single step."""

import logging

import folder_paths
from comfy_api.latest import io

from ..fewstep_sr.methods import METHODS, OSEDIFF, load_adapter
from .adapter import adapt_model, adapt_vae
from .checks import require_stable_diffusion, require_vae
from .marks import PER_IMAGE, acting_adapters
from .page import find_listed, fingerprint, full_path, listing, quoted, require_number, warn
from .per_image import carry_model, carry_vae
from .sampling import USUAL

FAMILIES = {method.weights.folder: method for method in METHODS.values() if method.one_step}
"""Methods whose adapters are loaded here, by their model folders."""

MAX_STRENGTH = 10.0

NODE = "Load Few-Step SR Adapter"


class FewStepSRAdapterLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FewStepSRAdapterLoader",
            display_name=NODE,
            category="FewStepSR",
            description="Applies an adapter to the UNet of its base, and to the VAE encoder if the adapter has weights for it. The method "
            f"({listing((method.title for method in FAMILIES.values()), 'or')}) is recognised by the file's contents. Wire both outputs; Few-Step SR One "
            f"Step then takes the method's step{_exceptions()}",
            search_aliases=[
                *(method.title.lower() for method in FAMILIES.values()),
                "lora",
                "one-step diffusion",
                "super resolution",
                "upscale",
                "restore",
            ],
            inputs=[
                io.Model.Input("model", tooltip=f"The method's base from Load Checkpoint: SD 2.1-base (512 pixels, predicts noise){_other_bases()}."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.Combo.Input(
                    "adapter_name",
                    options=_list_adapters(),
                    tooltip=f"Adapter file in {_folders()}, such as pisasr/pisa_sr.pkl.",
                ),
                strength_input(
                    "strength_model",
                    f"Adapter strength on the UNet. Use 1, the published method; {_with_knobs()} own settings are on Few-Step SR One Step.",
                ),
                strength_input(
                    "strength_vae",
                    "Adapter strength on the VAE encoder. 1 is the published method. Adapters without weights for the VAE leave it unchanged.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The adapted UNet; it tells Few-Step SR One Step which method it is."),
                io.Vae.Output(tooltip="The VAE with the adapted encoder, or the unchanged VAE if the adapter has no weights for it."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, adapter_name=None) -> bool | str:
        if adapter_name is None:
            return True
        folder, name = _split(adapter_name)
        if folder in FAMILIES:
            return find_listed(FAMILIES[folder], name)
        found = ", ".join(_list_adapters()[:5])
        files = " ".join(method.source for method in FAMILIES.values())
        return f"found {quoted(adapter_name)}, expected one of: {found}. {files} Put it into {_folders()}, and press R on the page."

    @classmethod
    def fingerprint_inputs(cls, adapter_name=None, **_) -> list[tuple]:
        if adapter_name is None:  # a link brings it
            return [file for folder in FAMILIES for file in fingerprint(folder, None)]
        folder, name = _split(adapter_name)
        return fingerprint(folder, name) if folder in FAMILIES else []

    @classmethod
    def execute(cls, model, vae, adapter_name, strength_model=1.0, strength_vae=1.0) -> io.NodeOutput:
        warnings = check_base(model, vae, strength_model, strength_vae, NODE)
        folder, name = _split(adapter_name)
        if folder not in FAMILIES:
            raise ValueError(f"adapter_name: {cls.validate_inputs(adapter_name)}")
        method, adapter = load_adapter(full_path(folder, name, "adapter_name", lambda _: cls.validate_inputs(adapter_name)))
        if not adapter.vae and strength_vae != 1.0:
            warnings.append(f"strength_vae: found {strength_vae:g}, but {method.title}'s adapter leaves the VAE unchanged. Set it back to 1.")
        warn(cls, warnings)
        logging.info("%s: %s\n%s\n  licence: %s", name, method.kind.phrase, "\n".join(method.summary(adapter)), method.weights.licence)
        if adapter.per_image:
            return io.NodeOutput(carry_model(model, method, adapter, strength_model), carry_vae(vae, method, adapter, strength_vae))
        return io.NodeOutput(adapt_model(model, method, adapter, strength_model), adapt_vae(vae, method, adapter, strength_vae))


def _exceptions() -> str:
    """What a user is to know of single methods, from their records."""
    between = "".join(f". For {method.title}, add {method.one_step.between} between them" for method in FAMILIES.values() if method.one_step.between)
    restricted = [f"{method.title}'s" for method in FAMILIES.values() if "non-commercial" in method.weights.licence]
    return f"{between}." + (f" {listing(restricted)} weights are for non-commercial use only." if restricted else "")


def _other_bases() -> str:
    usual = OSEDIFF.base
    return "".join(f", {method.base.what} for {method.title}" for method in FAMILIES.values() if method.base != usual)


def _with_knobs() -> str:
    return listing(f"{method.title}'s" for method in FAMILIES.values() if method.one_step.controls)


def strength_input(name: str, tooltip: str) -> io.Float.Input:
    """A loader's LoRA strength, 1 as published."""
    return io.Float.Input(name, default=1.0, min=-MAX_STRENGTH, max=MAX_STRENGTH, step=0.01, tooltip=tooltip)


def check_base(model, vae, strength_model: float, strength_vae: float, node: str) -> list[str]:
    """Warnings on what an adapter is to be put on by a loader ``node``. Raises ValueError where it does not fit."""
    require_stable_diffusion(model)
    require_vae(vae)
    strengths = {"strength_model": strength_model, "strength_vae": strength_vae}
    for name, strength in strengths.items():
        require_number(strength, name, -MAX_STRENGTH, MAX_STRENGTH)
    extreme = {name: strength for name, strength in strengths.items() if not 0 <= strength <= USUAL}
    warnings = [
        f"{name}: found {strength:g}, expected 1 (0 to {USUAL:g}). Use 1; values outside 0-2 usually give artefacts."
        for name, strength in extreme.items()
    ]
    for name, patcher in {"model": model, "vae": vae.patcher}.items():
        if acting := next((mark for mark, share in acting_adapters(patcher).items() if share), None):
            both = "Take" if patcher.get_attachment(PER_IMAGE) else "Both act now: take"
            warnings.append(
                f"{name}: found {acting.method.kind.phrase} on it already, expected the base's own. {both} one '{node}' out, or set its strength to 0."
            )
    return warnings


def _list_adapters() -> list[str]:
    """Files of all folders as "folder/name". Where there are none it says so, as :func:`nodes.page.list_files`."""
    files = [f"{folder}/{name}" for folder in FAMILIES for name in folder_paths.get_filename_list(folder)]
    return files or [f"no adapter in {_folders()}"]


def _split(adapter_name) -> tuple[str, str]:
    """Folder and name of a listed file; its name itself may have folders."""
    folder, _, name = adapter_name.partition("/") if isinstance(adapter_name, str) else ("", "", "")
    return folder, name


def _folders() -> str:
    return ", ".join(f"models/{folder}" for folder in FAMILIES)
