"""VAE encode and decode that keep every picture's exact size."""

import comfy.model_management
from comfy_api.latest import io

from ..fewstep_sr.networks.posterior import Posterior, draw_noise
from .checks import require_finite, require_image, require_latent, require_vae
from .page import require_choice, warn
from .picture_size import find_picture, remember_size
from .tiled_vae import decode_pictures, encode_moments
from .video import require_even_sides


def _tile_size_input(what: str) -> io.Int.Input:
    return io.Int.Input(
        "tile_size",
        default=0,
        min=0,
        max=8192,
        step=64,
        advanced=True,
        tooltip=f"{what} in overlapping tiles of this many pixels (at least 128). 0: whole if it fits into free memory, otherwise in the largest tiles that do.",
    )


class FewStepSRVAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FewStepSRVAEEncode",
            display_name="VAE Encode (Few-Step SR)",
            category="FewStepSR",
            description="Encodes an upscaled picture of any size. Sides are padded by reflection to whole latent pixels, and the size is remembered, "
            "so VAE Decode (Few-Step SR) returns exactly the original size.",
            search_aliases=["vae encode", "osediff", "invsr", "latent", "pad"],
            inputs=[
                io.Image.Input("pixels", tooltip="The low-quality picture, already upscaled to the output size (Upscale Image By, bicubic, 4)."),
                io.Vae.Input("vae", tooltip="OSEDiff: the VAE from Load OSEDiff. InvSR: the checkpoint's own."),
                io.Combo.Input(
                    "posterior",
                    options=["mean", "sample"],
                    default="mean",
                    tooltip="mean: the same latent each time. sample: drawn with the seed, as in the published programs.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip="Only used if posterior is 'sample'."
                ),
                _tile_size_input("Encode"),
            ],
            outputs=[io.Latent.Output(tooltip="The picture's latent, which also stores the original size.")],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, pixels, vae, posterior="mean", seed=0, tile_size=0) -> io.NodeOutput:
        require_vae(vae)
        require_choice(posterior, "posterior", ("mean", "sample"))
        picture = require_image(pixels, "pixels")
        require_even_sides(cls.hidden, *picture.shape[-2:], "pixels")
        samples = encode_moments(vae, picture, tile_size)
        samples = require_finite(samples, "VAE Encode (Few-Step SR)", "--fp32-vae or --bf16-vae")
        distribution = Posterior.from_moments(samples)
        latent = distribution.mean if posterior == "mean" else distribution.sample(draw_noise(distribution.mean.shape, seed))
        return io.NodeOutput(remember_size(latent.contiguous(), *picture.shape[-2:]))


class FewStepSRVAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FewStepSRVAEDecode",
            display_name="VAE Decode (Few-Step SR)",
            category="FewStepSR",
            description="Decodes a latent and crops the padding that VAE Encode (Few-Step SR) added: the picture has exactly the size that was encoded.",
            search_aliases=["vae decode", "osediff", "invsr", "crop"],
            inputs=[
                io.Latent.Input("samples", tooltip="The restored latent."),
                io.Vae.Input("vae", tooltip="Any Stable Diffusion VAE; use the one that encoded the picture."),
                _tile_size_input("Decode"),
                io.Boolean.Input(
                    "clamp",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Clamp values to [0, 1], as other nodes expect. Off: Color Fix (Few-Step SR) clamps after its correction, as HYPIR's program does.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The picture, in [0, 1].")],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, samples, vae, tile_size=0, clamp=True) -> io.NodeOutput:
        require_vae(vae)
        latent = require_latent(samples, "samples")
        _, rows, columns, unknown = find_picture(samples)
        warn(cls, [f"samples: {unknown}"] if unknown else [])
        require_even_sides(cls.hidden, rows.stop - rows.start, columns.stop - columns.start, "samples")
        images = decode_pictures(vae, latent, tile_size, clamp)[:, :, rows, columns].movedim(1, -1)  # BCHW -> BHWC
        images = require_finite(images, "VAE Decode (Few-Step SR)", "--fp32-vae or --bf16-vae")
        return io.NodeOutput(images.to(comfy.model_management.intermediate_device()))
