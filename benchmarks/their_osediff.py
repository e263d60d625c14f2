"""OSEDiff's own program on random weights, timed for benchmarks/against_osediff.py, which starts this with the Python of that program's environment.

    python their_osediff.py CHECKOUT CHECKPOINT

writes a random adapter to CHECKPOINT where there is none. Then each line of the standard input is the side of a result in pixels, and each of the output the seconds that it took, on the clock
and of the processor. Networks have Stable Diffusion 2.1's shapes; text encoder and tagger are left out.
"""

import os
import sys
import time
import types
from pathlib import Path

import torch

UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
RANK = 4


def build(program, checkpoint: Path):
    """The program's test-time module, made without files of weights."""
    from diffusers import DDPMScheduler

    program.UNet2DConditionModel.from_pretrained = classmethod(lambda kind, *args, **kwargs: kind(**UNET).eval())
    program.AutoencoderKL.from_pretrained = classmethod(lambda kind, *args, **kwargs: kind(**VAE, **BLOCKS).eval())
    settings = {"pretrained_model_name_or_path": "", "lora_rank": RANK, "merge_and_unload_lora": False}
    args = types.SimpleNamespace(latent_tiled_size=96, latent_tiled_overlap=32, **settings)
    if not checkpoint.exists():
        save_adapter(program, args, checkpoint)
    module = program.OSEDiff_test.__new__(program.OSEDiff_test)
    torch.nn.Module.__init__(module)
    module.args, module.device, module.weight_dtype = args, torch.device("cpu"), torch.float32
    module.noise_scheduler = DDPMScheduler(**SCHEDULE)
    module.noise_scheduler.set_timesteps(1)
    module.vae, module.unet = program.AutoencoderKL.from_pretrained(""), program.UNet2DConditionModel.from_pretrained("")
    module.load_ckpt(torch.load(checkpoint))
    module.timesteps = torch.tensor([999])
    module._init_tiled_vae(1024, 224)
    prompt = torch.randn(1, 77, UNET["cross_attention_dim"])
    module.encode_prompt = lambda _: prompt
    return module.eval()


def save_adapter(program, args: types.SimpleNamespace, checkpoint: Path) -> None:
    vae, of_vae = program.initialize_vae(args)
    unet, encoder, decoder, others = program.initialize_unet(args)
    for network in (vae, unet):
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.01)
    adapted = types.SimpleNamespace(
        vae=vae, unet=unet, lora_vae_modules_encoder=of_vae, lora_unet_modules_encoder=encoder, lora_unet_modules_decoder=decoder,
        lora_unet_others=others, lora_rank_unet=RANK, lora_rank_vae=RANK,
    )  # fmt: skip
    program.OSEDiff_gen.save_model(adapted, checkpoint)


if __name__ == "__main__":
    checkout, checkpoint = (Path(path).resolve() for path in sys.argv[1:])
    answers, sys.stdout = sys.stdout, sys.stderr  # the program prints
    sys.path.insert(0, str(checkout))
    os.chdir(checkout)
    import osediff as program

    torch.manual_seed(0)
    module = build(program, checkpoint)
    print(f"PyTorch {torch.__version__}", file=answers, flush=True)
    for line in sys.stdin:
        image = torch.rand(1, 3, int(line), int(line)) * 2 - 1
        clock, processor = time.perf_counter(), time.process_time()
        with torch.no_grad():
            module(image, "")
        print(time.perf_counter() - clock, time.process_time() - processor, file=answers, flush=True)
