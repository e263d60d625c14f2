"""Prompts read off the picture: DAPE (SeeSR, Wu et al., CVPR 2024), the RAM tagger made to see through degradation, as OSEDiff uses it."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui
from server import PromptServer

from ..fewstep_sr.networks.ram import Tagger
from ..fewstep_sr.networks.vocabulary import TAG_LIST, THRESHOLD_LIST, TagVocabulary
from ..fewstep_sr.tiling import tagging
from ..fewstep_sr.weights.tagger import DAPE_FILE, TAGGER_FILE, TAGGER_SOURCE, by_preference, load_tagger_weights
from .checks import require_finite, require_image
from .managed import ManagedNetwork, manage
from .memory import MARGIN, TAGGER_ACTIVATIONS
from .page import find_in_folder, fingerprint, full_path, list_files, require_number, require_text
from .runtime import ComfyUI

TaggerSocket = io.Custom("DAPE_TAGGER")


@dataclass(frozen=True)
class LoadedTagger:
    """What the DAPE_TAGGER socket carries."""

    managed: ManagedNetwork
    vocabulary: TagVocabulary


class DAPETaggerLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        files = by_preference(folder_paths.get_filename_list("dape"))
        return io.Schema(
            node_id="DAPETaggerLoader",
            display_name="Load DAPE Tagger",
            category="FewStepSR/OSEDiff",
            description="Loads the image tagger that generates OSEDiff's prompts: RAM with DAPE's LoRA.",
            search_aliases=["dape", "ram", "recognize anything", "tagger", "osediff", "seesr", "caption", "interrogate"],
            inputs=[
                io.Combo.Input(
                    "tagger_name",
                    options=by_preference(list_files("dape")),
                    tooltip="File in models/dape: one made by 'python -m pipelines convert', or ram_swin_large_14m.pth "
                    "with ram_tag_list.txt and ram_tag_list_threshold.txt beside it.",
                ),
                io.Combo.Input(
                    "dape_name",
                    options=["auto", "none", *reversed(files)],
                    default="auto",
                    tooltip=f"DAPE's LoRA in models/dape. auto: {DAPE_FILE}, if it exists and is not yet merged into the tagger's file. "
                    "none: RAM alone, which is for clean pictures.",
                ),
            ],
            outputs=[TaggerSocket.Output(tooltip="For DAPE Tagger.")],
        )

    @classmethod
    def validate_inputs(cls, tagger_name=None, dape_name=None) -> bool | str:
        found = find_in_folder("dape", tagger_name, TAGGER_FILE, TAGGER_SOURCE)
        if found is not True or dape_name in ("auto", "none"):
            return found
        return find_in_folder("dape", dape_name, DAPE_FILE, f"{DAPE_FILE} is linked in OSEDiff's README.")

    @classmethod
    def fingerprint_inputs(cls, tagger_name=None, dape_name=None) -> list[tuple]:
        among = folder_paths.get_filename_list("dape") if dape_name == "auto" else [dape_name]
        names = [tagger_name, *(name for name in among if dape_name != "auto" or Path(name).name == DAPE_FILE)]
        return fingerprint("dape", *names, beside=(TAG_LIST, THRESHOLD_LIST))

    @classmethod
    def execute(cls, tagger_name, dape_name="auto") -> io.NodeOutput:
        path = full_path("dape", tagger_name, "tagger_name", cls.validate_inputs)
        dape = (
            None if dape_name in ("auto", "none") else full_path("dape", dape_name, "dape_name", lambda name: cls.validate_inputs(tagger_name, name))
        )
        among = map(partial(folder_paths.get_full_path_or_raise, "dape"), folder_paths.get_filename_list("dape")) if dape_name == "auto" else ()
        weights = load_tagger_weights(path, dape, among)
        logging.info("Tagger %s: %d tags, %s", tagger_name, weights.config.num_tags, f"with {weights.dape}" if weights.dape else "without DAPE")
        return io.NodeOutput(LoadedTagger(manage(partial(Tagger, weights.config), weights.state_dict), weights.vocabulary))


class DAPETagger(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DAPETagger",
            display_name="DAPE Tagger",
            category="FewStepSR/OSEDiff",
            description="Generates tags for a low-quality picture, the kind of prompt that OSEDiff was trained with, and shows them. "
            "Wire the text to CLIP Text Encode. Any other tagger or caption node can take its place.",
            search_aliases=["dape", "ram", "recognize anything", "tags", "image to text", "prompt from image", "osediff", "caption", "interrogate"],
            inputs=[
                TaggerSocket.Input("tagger", tooltip="From Load DAPE Tagger."),
                io.Image.Input("image", tooltip="The low-quality picture, upscaled or not; the tagger uses a small copy of it."),
                io.Float.Input(
                    "threshold",
                    default=0.0,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Added to the published threshold of each tag (0.65 for most). Higher: fewer, more certain tags. Lower: more tags.",
                ),
                io.Int.Input("max_tags", default=0, min=0, max=10000, tooltip="Keep only this many tags, the most probable ones. 0 keeps all."),
                io.String.Input("exclude", default="", tooltip="Tags to leave out, separated by commas, such as: blurry, screenshot."),
                io.String.Input("prefix", default="", multiline=True, tooltip="Text before the tags; a comma is added between."),
                io.String.Input(
                    "suffix",
                    default="",
                    multiline=True,
                    tooltip="Text after the tags; a comma is added between. OSEDiff's authors end the prompt with their own text and a comma: 'clean,"
                    " sharp,' here, or a single comma for no text, reproduces theirs exactly.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="tags", is_output_list=True, tooltip="One text for each picture of the batch, for CLIP Text Encode.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, tagger, image, threshold=0.0, max_tags=0, exclude="", prefix="", suffix="") -> io.NodeOutput:
        require_number(threshold, "threshold", -1.0, 1.0)
        for name, text in {"exclude": exclude, "prefix": prefix, "suffix": suffix}.items():
            require_text(text, name)
        logits = tag_logits(tagger, require_image(image, "image"))
        pictures = tagger.vocabulary.tags(logits, threshold, max_tags, exclude.split(","))
        prompts = [", ".join(part for part in (prefix.strip(", \n"), *tags, suffix.strip()) if part) for tags in pictures]
        shown = "\n\n".join(prompts)
        if cls.hidden:  # run by the server: the page shows this text on the node; the ui entry is for history and the API
            PromptServer.instance.send_progress_text(shown, cls.hidden.unique_id)
        return io.NodeOutput(prompts, ui=ui.PreviewText(shown))


def tag_logits(tagger: LoadedTagger, pictures: torch.Tensor) -> torch.Tensor:
    """Logits (B, tags) of pictures (B, 3, H, W) in [0, 1], float32 on the CPU. One picture at a time, which bounds the memory."""
    managed, config = tagger.managed, tagger.managed.network.config
    managed.load(int(MARGIN * managed.activation_size(TAGGER_ACTIVATIONS * config.num_tags * config.mlp_channels)))
    logits = tagging.tag_logits(lambda image: managed.network(managed.cast(image)), pictures, config, ComfyUI())
    return require_finite(logits, "DAPE Tagger", "--fp32-unet or --bf16-unet")
