"""Which base models fit: what the nodes and the pipelines check alike."""

BASES = "SD 2.1-base (512 pixels) for OSEDiff or SD-Turbo for InvSR"

TEXT_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "the Stable Diffusion XL refiner", 2048: "Stable Diffusion XL"}
"""Width of the text conditioning by which a UNet, a prompt or a LoRA tells its base."""

TEXT_WIDTH = 1024


def require_text_width(width: int | None, channels: int, name: str) -> None:
    """Refuse a UNet of another base by the width of its text conditioning.

    Narrow networks (under 320 channels) whose text width is no published encoder's are let through: miniatures for trying and testing.
    """
    if width != TEXT_WIDTH and (width is None or width in TEXT_WIDTHS or channels >= 320):
        base = TEXT_WIDTHS.get(width or 0, "another model")
        raise ValueError(
            f"{name}: found a cross-attention dimension of {width} ({base}), expected {TEXT_WIDTH} (Stable Diffusion 2.x). Load {BASES}."
        )
