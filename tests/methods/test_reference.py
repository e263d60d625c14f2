"""The nodes against diffusers and peft, composed here by the papers' formulas, on seeds, ranks, sizes and batches that no golden case has."""

import pytest
import torch
import toys
from toys import conditioning, golden, picture, relative_error

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

TOLERANCE = 1e-4
SCALE = 0.18215


def load(network, state_dict):
    network.load_state_dict(state_dict)
    return network.eval().requires_grad_(False)


def reference_unet(seed):
    return load(diffusers.UNet2DConditionModel(**golden("osediff_square")[0]["unet"]), toys.unet_state_dict(seed))


def reference_vae(seed):
    return load(diffusers.AutoencoderKL(**golden("osediff_square")[0]["vae"]), toys.vae_state_dict(seed))


def put_on(network, checkpoint, part):
    """The adapter as the authors load it: peft's LoraConfig without lora_alpha, then the tensors by name."""
    for group in ("encoder", "decoder", "others"):
        if layers := checkpoint.get(f"{part}_lora_{group}_modules"):
            network.add_adapter(peft.LoraConfig(r=checkpoint[f"rank_{part}"], target_modules=layers), adapter_name=f"default_{group}")
    state = checkpoint[f"state_dict_{part}"]
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora" in name or (part == "unet" and "conv_in" in name):
                parameter.copy_(state[name])
    network.set_adapter([f"default_{g}" for g in ("encoder", "decoder", "others") if checkpoint.get(f"{part}_lora_{g}_modules")])


def alphas(index):
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return scheduler.alphas_cumprod[index]


@pytest.mark.parametrize(
    ("seed", "rank", "height", "width"),
    [
        pytest.param(2, 1, 64, 64, marks=pytest.mark.slow),
        pytest.param(3, 4, 72, 136, marks=pytest.mark.slow),
        pytest.param(4, 16, 200, 88, marks=pytest.mark.slow),
        (5, 3, 24, 40),
    ],
)
@torch.inference_mode()
def test_osediff(comfy, seed, rank, height, width):
    checkpoint = toys.osediff_checkpoint(seed, rank)
    torch.save(checkpoint, comfy.folder("osediff") / "reference.pth")
    model, vae = comfy.run("OSEDiffLoader", model=toys.comfy_model(seed), vae=toys.comfy_vae(seed), osediff_name="reference.pth").args
    unet, autoencoder = reference_unet(seed), reference_vae(seed)
    put_on(unet, checkpoint, "unet")
    put_on(autoencoder, checkpoint, "vae")

    pixels = picture(seed, height, width)
    z = autoencoder.encode(pixels.movedim(-1, 1) * 2 - 1).latent_dist.mean * SCALE
    latent = comfy.run("FewStepSRVAEEncode", pixels=pixels, vae=vae)[0]
    assert relative_error(latent["samples"] * SCALE, z) < TOLERANCE

    a = alphas(999)
    noise_pred = unet(z, 999, encoder_hidden_states=conditioning(seed)[0][0]).sample
    x0 = (z - (1 - a).sqrt() * noise_pred) / a.sqrt()
    restored = comfy.run("OSEDiffOneStep", model=model, positive=conditioning(seed), latent=latent)[0]
    assert relative_error(restored["samples"] * SCALE, x0) < TOLERANCE

    image = (autoencoder.decode(x0 / SCALE).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    assert relative_error(comfy.run("FewStepSRVAEDecode", samples=restored, vae=vae)[0], image) < TOLERANCE


class ReferencePredictor(torch.nn.Module):
    """InvSR's predictor from diffusers' own blocks."""

    def __init__(self, channels, layers, temb):
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps
        from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block

        super().__init__()
        encoder = self.encoder = torch.nn.Module()
        width = max(128, channels[0])
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        encoder.time_embedding = TimestepEmbedding(width, temb)
        encoder.conv_in = torch.nn.Conv2d(3, channels[0], 3, padding=1)
        common = {"resnet_eps": 1e-6, "resnet_act_fn": "silu", "resnet_groups": 32, "attention_head_dim": 64, "temb_channels": temb}
        encoder.down_blocks = torch.nn.ModuleList(
            get_down_block(
                "AttnDownBlock2D",
                num_layers=layers[i],
                in_channels=channels[max(i - 1, 0)],
                out_channels=channels[i],
                add_downsample=i < len(channels) - 1,
                downsample_padding=0,
                **common,
            )
            for i in range(len(channels))
        )
        encoder.mid_block = UNetMidBlock2D(in_channels=channels[-1], output_scale_factor=1, **common)
        encoder.conv_norm_out = torch.nn.GroupNorm(32, channels[-1], eps=1e-6)
        encoder.conv_out = torch.nn.Conv2d(channels[-1], 8, 3, padding=1)

    def forward(self, image, timestep):
        encoder = self.encoder
        temb = encoder.time_embedding(self.time_proj(torch.full((len(image),), timestep)))
        hidden = encoder.conv_in(image)
        for block in encoder.down_blocks:
            hidden, _ = block(hidden, temb)
        hidden = encoder.mid_block(hidden, temb)
        return encoder.conv_out(torch.nn.functional.silu(encoder.conv_norm_out(hidden))).chunk(2, dim=1)


@pytest.mark.parametrize(
    ("seed", "channels", "layers", "temb", "height", "width", "timesteps", "cfg"),
    [
        (2, (64, 128), (1, 1), 128, 16, 16, (200,), 1.0),
        (3, (128, 64), (2, 1), 96, 24, 46, (250, 120), 1.0),
        pytest.param(4, (64, 128, 64), (1, 2, 1), 64, 36, 20, (150, 100, 50), 1.5, marks=pytest.mark.slow),
        pytest.param(5, (256, 512), (3, 3), 512, 8, 12, (100, 1), 1.0, marks=pytest.mark.slow),
    ],
)
@torch.inference_mode()
def test_invsr(comfy, seed, channels, layers, temb, height, width, timesteps, cfg):
    shapes = {k: v.shape for k, v in ReferencePredictor(channels, layers, temb).state_dict().items()}
    state_dict = toys.weights(seed, "noise_predictor", shapes)
    torch.save(state_dict, comfy.folder("invsr") / "reference.pth")
    predictor = load(ReferencePredictor(channels, layers, temb), state_dict)
    unet, autoencoder = reference_unet(seed), reference_vae(seed)
    model, vae = toys.comfy_model(seed), toys.comfy_vae(seed)
    node_predictor = comfy.run("InvSRNoisePredictorLoader", noise_predictor_name="reference.pth")[0]

    batch = 2
    image = picture(seed, height, width, batch=batch)
    enlarged = torch.nn.functional.interpolate(image.movedim(-1, 1), scale_factor=8 / 2 ** (len(channels) - 1), mode="bicubic")
    indices = [t - 1 for t in timesteps]
    sigmas = torch.tensor([((1 - alphas(i)) / alphas(i)).sqrt().item() for i in indices] + [0.0])
    mean, logvar = predictor(image.movedim(-1, 1) * 2 - 1, indices[0])
    generator = torch.Generator().manual_seed(12345)
    noise = mean + torch.exp(0.5 * logvar) * torch.randn((1, *mean.shape[1:]), generator=generator)
    z = autoencoder.encode(enlarged * 2 - 1).latent_dist.mean * SCALE
    state = z + sigmas[0] * noise
    positive, negative = conditioning(seed), conditioning(seed, "negative_prompt_embeds")

    def noise_pred(x, sigma, index, cond):
        return unet(x / (sigma**2 + 1).sqrt(), index, encoder_hidden_states=cond[0][0].expand(batch, -1, -1)).sample

    latent = comfy.run("FewStepSRVAEEncode", pixels=enlarged.movedim(1, -1), vae=vae)[0]
    node_sigmas = comfy.run("FewStepScheduler", model=model, timesteps=", ".join(map(str, timesteps)))[0]
    assert relative_error(node_sigmas, sigmas) < TOLERANCE
    node_noise, start = comfy.run("InvSRStartState", noise_predictor=node_predictor, image=image, latent=latent, sigmas=node_sigmas).args
    assert relative_error(node_noise.generate_noise(latent), noise) < TOLERANCE
    assert relative_error(start["samples"] * SCALE, state) < TOLERANCE

    for i, index in enumerate(indices):
        predicted = noise_pred(state, sigmas[i], index, positive)
        if cfg != 1.0:
            unconditional = noise_pred(state, sigmas[i], index, negative)
            predicted = unconditional + cfg * (predicted - unconditional)
        state = state + (sigmas[i + 1] - sigmas[i]) * predicted
    guider = comfy.run("CFGGuider", model=model, positive=positive, negative=negative, cfg=cfg)[0]
    sampler = comfy.run("KSamplerSelect", sampler_name="euler")[0]
    sampled = comfy.run("SamplerCustomAdvanced", noise=node_noise, guider=guider, sampler=sampler, sigmas=node_sigmas, latent_image=latent)[0]
    assert relative_error(sampled["samples"] * SCALE, state) < TOLERANCE
    pictures = (autoencoder.decode(state / SCALE).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    assert relative_error(comfy.run("FewStepSRVAEDecode", samples=sampled, vae=vae)[0], pictures) < TOLERANCE
