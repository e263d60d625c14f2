"""What a video encoder after these nodes cannot take, said before the work instead of after it."""

from comfy_api.latest import io

KEEP_SIZE = {
    "OSEDiffOneStep",
    "OSEDiffStartState",
    "InvSRStartState",
    "SamplerCustomAdvanced",
    "SamplerCustom",
    "KSampler",
    "KSamplerAdvanced",
    "SetLatentNoiseMask",
    "FewStepSRVAEDecode",
    "FewStepSRColorFix",
}
"""Nodes after which pictures have the size that they had before."""

ANY_SIZE = ("av1", "webm")
"""Formats and codecs whose encoders take odd sides; H.264's does not."""


def require_even_sides(hidden: io.HiddenHolder | None, height: int, width: int, name: str) -> None:
    """Refuse odd sides where the pictures go into a video that takes only even ones.

    Args:
        hidden: the node's, with the prompt that is run; None outside a server.
        height, width: of the pictures, in pixels.
        name: the input that has this size.
    """
    if (height % 2 or width % 2) and hidden and hidden.prompt and _goes_into_video(hidden.prompt, str(hidden.unique_id)):
        raise ValueError(
            f"{name}: found frames of {width} x {height} pixels for Create Video, expected even sides, since H.264 takes no others. Upscale by "
            "another factor, crop a row or a column with 'Image Crop' before, or save as AV1."
        )


def _goes_into_video(prompt: dict, node_id: str) -> bool:
    seen, waiting = set(), [node_id]
    while waiting:
        for found, node in _consumers(prompt, waiting.pop()):
            if node["class_type"] == "CreateVideo":
                savers = [saver for _, saver in _consumers(prompt, found)]
                if not savers or not all(any(str(value).lower() in ANY_SIZE for value in saver["inputs"].values()) for saver in savers):
                    return True
            elif node["class_type"] in KEEP_SIZE and found not in seen:
                seen.add(found)
                waiting.append(found)
    return False


def _consumers(prompt: dict, node_id: str) -> list[tuple[str, dict]]:
    """The nodes of a prompt that take an output of this one as what they work on."""
    return [
        (found, node)
        for found, node in prompt.items()
        for name, value in node.get("inputs", {}).items()
        if name != "reference" and isinstance(value, list) and len(value) == 2 and str(value[0]) == node_id
    ]
