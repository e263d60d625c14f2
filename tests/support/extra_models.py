"""Small files of real kinds that templates use beside the methods' own: a LoRA, a ControlNet, a GAN upscaler, a video."""

from fractions import Fraction
from pathlib import Path

import safetensors.torch
import torch
from stable_diffusion import UNETS, random_weights, unet_shapes


def write_lora(path: Path, size: str = "reduced", rank: int = 2) -> None:
    """A LoRA in kohya's layout on the cross attention of :func:`stable_diffusion.write_checkpoint`'s UNet."""
    shapes = {}
    for key, (rows, columns) in ((k, s) for k, s in unet_shapes(size).items() if "attn2.to_" in k and k.endswith(".weight")):
        layer = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        shapes |= {f"{layer}.lora_down.weight": (rank, columns), f"{layer}.lora_up.weight": (rows, rank)}
    safetensors.torch.save_file(random_weights(shapes, seed=2), path)


def write_controlnet(path: Path, size: str = "reduced") -> None:
    """A ControlNet for the same UNet, in the layout that ControlNet's authors publish."""
    from comfy.cldm.cldm import ControlNet

    config = {k: v for k, v in UNETS[size].items() if k != "transformer_depth_output"}
    config |= {"image_size": 32, "in_channels": 4, "hint_channels": 3, "model_channels": 320, "context_dim": 1024, "num_head_channels": 64}
    network = ControlNet(**config, use_linear_in_transformer=True, use_spatial_transformer=True, transformer_depth_middle=1, device="meta")
    shapes = {f"control_model.{k}": tuple(v.shape) for k, v in network.state_dict().items()}
    safetensors.torch.save_file(random_weights(shapes, seed=3), path)


def write_upscaler(path: Path) -> None:
    """An ESRGAN that enlarges four times: its convolutions pass the picture on and its one block adds nothing, so that it repeats pixels."""
    from spandrel.architectures.ESRGAN import ESRGAN

    network = ESRGAN(num_filters=8, num_blocks=1, scale=4)
    for name, weight in network.named_parameters():
        if weight.dim() == 4:
            torch.nn.init.dirac_(weight)
        if weight.dim() == 1 or name.startswith("model.1."):
            torch.nn.init.zeros_(weight)
    safetensors.torch.save_file(network.state_dict(), path)


def write_video(path: Path, pictures: torch.Tensor, fps: int = 8) -> None:
    """Pictures (B, H, W, 3) in [0, 1] with even sides as an H.264 video."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray((picture * 255).round().byte().numpy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
