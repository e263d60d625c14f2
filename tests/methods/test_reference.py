"""Nodes and pipelines against diffusers and peft, composed here by the papers' formulas, on seeds, ranks, sizes and batches that no golden case has."""

import pytest
import torch
import torch.nn.functional as F
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
        return encoder.conv_out(F.silu(encoder.conv_norm_out(hidden))).chunk(2, dim=1)


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
    enlarged = F.interpolate(image.movedim(-1, 1), scale_factor=8 / 2 ** (len(channels) - 1), mode="bicubic")
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


def add_products(network, state, marks, scale):
    """Add ``scale`` B A to the weights of a network's layers, of the sets whose PEFT names end with one of ``marks``."""
    for key, down in state.items():
        layer, _, adapter = key.removesuffix(".weight").partition(".lora_A.")
        if adapter and adapter.endswith(marks):
            weight = network.get_submodule(layer).weight
            up = state[key.replace("lora_A", "lora_B")]
            weight += (scale * up.flatten(1) @ down.flatten(1)).view(weight.shape)
    return network


def loaded(comfy, family, checkpoint, seed):
    """MODEL and VAE with an adapter by the one loader, and a pipeline with it."""
    import pipeline_toys

    import pipelines
    from fewstep_sr.methods import METHODS

    path = comfy.folder(family) / "reference.pth"
    torch.save(checkpoint, path)
    base = {"model": toys.comfy_model(seed), "vae": toys.comfy_vae(seed)}
    model, vae = comfy.run("FewStepSRAdapterLoader", **base, adapter_name=f"{family}/{path.name}").args
    pipeline = getattr(pipelines, METHODS[family].pipeline)(**pipeline_toys.components(seed))
    pipeline.load_weights(path)
    return model, vae, pipeline


def check(comfy, seed, z, x0, image, model, vae, pipeline, knobs=None, **inputs):
    """The step and the decoder, by the nodes and by the pipeline."""
    knobs, cond = knobs or {}, conditioning(seed)
    (restored,) = comfy.run("FewStepSROneStep", model=model, positive=cond, latent={"samples": z / SCALE}, **knobs, **inputs).args
    assert relative_error(restored["samples"] * SCALE, x0) < TOLERANCE
    assert relative_error(comfy.run("FewStepSRVAEDecode", samples=restored, vae=vae, clamp=False)[0].movedim(-1, 1), image) < TOLERANCE
    texts = [inputs[name][0][0] for name in ("negative",) if name in inputs]
    assert relative_error(pipeline.one_step(z, cond[0][0], *texts, **knobs), x0) < TOLERANCE
    pipeline.clamps_decoded = False
    assert relative_error(pipeline.decode(x0), image) < TOLERANCE


@pytest.mark.parametrize(
    ("seed", "rank_pix", "rank_sem", "height", "width", "pixel", "semantic"),
    [
        pytest.param(2, 1, 5, 64, 64, 1.0, 1.0, marks=pytest.mark.slow),
        pytest.param(3, 8, 2, 72, 136, 0.7, 1.3, marks=pytest.mark.slow),
        pytest.param(4, 16, 4, 40, 88, 1.1, 0.0, marks=pytest.mark.slow),
        (5, 3, 2, 64, 24, 0.3, 1.2),
    ],
)
@torch.inference_mode()
def test_pisasr(comfy, seed, rank_pix, rank_sem, height, width, pixel, semantic):
    settings = {"adapter_weight_prefix": "pisasr.unet", "seed": seed, "rank_pix": rank_pix, "rank_sem": rank_sem}
    checkpoint = toys.adapter_checkpoint(settings)
    model, vae, pipeline = loaded(comfy, "pisasr", checkpoint, seed)
    autoencoder, state, text = reference_vae(seed), checkpoint["state_dict_unet"], conditioning(seed)[0][0]
    z = autoencoder.encode(picture(seed, height, width).movedim(-1, 1) * 2 - 1).latent_dist.mean * SCALE
    pix = add_products(reference_unet(seed), state, "_pix", 8 / rank_pix)
    eps_pix = pix(z, 1, encoder_hidden_states=text).sample
    eps_full = add_products(pix, state, "_sem", 8 / rank_sem)(z, 1, encoder_hidden_states=text).sample
    x0 = z - (pixel * eps_pix + semantic * (eps_full - eps_pix))
    image = autoencoder.decode(x0 / SCALE).sample / 2 + 0.5
    check(comfy, seed, z, x0, image, model, vae, pipeline, {"pixel": pixel, "semantic": semantic})


@pytest.mark.parametrize(
    ("seed", "rank", "height", "width", "coeff_t"),
    [
        pytest.param(2, 1, 64, 64, 200, marks=pytest.mark.slow),
        pytest.param(3, 32, 136, 72, 50, marks=pytest.mark.slow),
        (4, 5, 24, 40, 499),
    ],
)
@torch.inference_mode()
def test_hypir(comfy, seed, rank, height, width, coeff_t):
    checkpoint = toys.adapter_checkpoint({"adapter_weight_prefix": "hypir.unet", "seed": seed, "rank": rank})
    model, vae, pipeline = loaded(comfy, "hypir", checkpoint, seed)
    autoencoder = reference_vae(seed)
    z = autoencoder.encode(picture(seed, height, width).movedim(-1, 1) * 2 - 1).latent_dist.mean * SCALE
    unet = add_products(reference_unet(seed), checkpoint, "default", 1.0)
    noise_pred = unet(z, 200, encoder_hidden_states=conditioning(seed)[0][0]).sample
    x0 = (z - (1 - alphas(coeff_t)).sqrt() * noise_pred) / alphas(coeff_t).sqrt()
    check(comfy, seed, z, x0, autoencoder.decode(x0 / SCALE).sample / 2 + 0.5, model, vae, pipeline, {"coeff_t": coeff_t})


def estimated(state, image):
    """S3Diff's degradation estimator, written out."""

    def conv(hidden, name, **options):
        return F.conv2d(hidden, state[f"{name}.weight"], state[f"{name}.bias"], padding=1, **options)

    scores = []
    for i in range(2):
        hidden = conv(image, f"conv_first.{i}")
        for n in range(9):
            if n == 6:
                hidden = conv(hidden, f"body.{i}.{n}", stride=2)
            else:
                hidden = hidden + conv(conv(hidden, f"body.{i}.{n}.conv1").relu(), f"body.{i}.{n}.conv2")
        hidden = F.linear(hidden.mean(dim=(2, 3)), state[f"fc_degree.{i}.0.weight"], state[f"fc_degree.{i}.0.bias"]).relu()
        scores.append(F.linear(hidden, state[f"fc_degree.{i}.2.weight"], state[f"fc_degree.{i}.2.bias"]).sigmoid())
    return torch.cat(scores, dim=1)


UNET_BLOCKS = {"down_blocks.0": 0, "down_blocks.1": 1, "down_blocks.2": 2, "down_blocks.3": 3, "mid_block": 4}
UNET_BLOCKS |= {"up_blocks.0": 5, "up_blocks.1": 6, "up_blocks.2": 7, "up_blocks.3": 8, "conv_out": 9}
ENCODER_BLOCKS = {f"encoder.{name}": block for name, block in UNET_BLOCKS.items() if block < 5} | {"encoder.conv_in": 5, "encoder.conv_out": 5}


def modulate(network, checkpoint, part, blocks, scores):
    """The layers as published: base(x) + 8 / r B(A(x) M_k), the r numbers of A(x) a row on the left of M_k."""
    angles = 2 * torch.pi * checkpoint["w"] * scores[:, None]
    p = torch.cat([angles[0].sin(), angles[0].cos(), angles[1].sin(), angles[1].cos()])
    mlps = {name: checkpoint[f"state_dict_{part}_{name}"] for name in ("de_mlp", "block_mlp", "fuse_mlp")}
    embeddings, rank = checkpoint["state_embeddings"][f"state_dict_{part}_block"]["weight"], checkpoint[f"rank_{part}"]
    degradation = F.linear(p, mlps["de_mlp"]["0.weight"], mlps["de_mlp"]["0.bias"]).relu()
    state = checkpoint[f"state_dict_{part}"]

    def act(layer, down, up, matrix):
        def with_update(module, inputs, output):
            if down.ndim == 2:
                return output + 8 / rank * F.linear(inputs[0], down) @ matrix @ up.T
            padded = F.conv2d(inputs[0], down, stride=module.stride, padding=module.padding)
            return output + 8 / rank * F.conv2d(torch.einsum("bkhw,kr->brhw", padded, matrix), up)

        network.get_submodule(layer).register_forward_hook(with_update)

    for key in [key for key in state if ".lora_A." in key]:
        layer = key.partition(".lora_A.")[0]
        embedding = embeddings[next(block for name, block in blocks.items() if layer.startswith(name))]
        block = F.linear(embedding, mlps["block_mlp"]["0.weight"], mlps["block_mlp"]["0.bias"]).relu()
        matrix = F.linear(torch.cat([degradation, block]), mlps["fuse_mlp"]["weight"], mlps["fuse_mlp"]["bias"]).view(rank, rank)
        act(layer, state[key], state[key.replace("lora_A", "lora_B")], matrix)
    return network


@pytest.mark.parametrize(
    ("seed", "rank_unet", "rank_vae", "channels", "height", "width"),
    [(2, 3, 1, 4, 16, 32), pytest.param(3, 8, 6, 12, 32, 16, marks=pytest.mark.slow)],
)
@torch.inference_mode()
def test_s3diff(comfy, seed, rank_unet, rank_vae, channels, height, width):
    """Two images with scores of their own: each is what it is alone."""
    from fewstep_sr.networks.degradation import DegradationConfig, DegradationEstimator

    def drawn(shapes, seed):
        return toys.weights(seed, f"s3diff.{len(shapes)}", shapes)

    checkpoint = toys.s3diff_checkpoint(seed, rank_unet, rank_vae, toys.SHAPES, drawn)
    model, vae, pipeline = loaded(comfy, "s3diff", checkpoint, seed)
    network = DegradationEstimator(DegradationConfig(channels, channels + 8, 24), device="meta")
    estimator = toys.weights(seed, "de_net", {key: tuple(value.shape) for key, value in network.state_dict().items()})
    torch.save(estimator, comfy.folder("s3diff") / "reference_de_net.pth")
    pipeline.load_s3diff(comfy.folder("s3diff") / "reference.pth", comfy.folder("s3diff") / "reference_de_net.pth")

    low = picture(seed, height, width, batch=2)
    scores = estimated(estimator, low.movedim(-1, 1))
    assert relative_error(scores[1], scores[0]) > 1e-3
    (node_estimator,) = comfy.run("S3DiffEstimatorLoader", estimator_name="reference_de_net.pth").args
    (found,) = comfy.run("S3DiffDegradation", estimator=node_estimator, image=low).args
    assert relative_error(found, scores) < TOLERANCE and relative_error(pipeline.degradation(low.movedim(-1, 1)), scores) < TOLERANCE

    enlarged = F.interpolate(low.movedim(-1, 1), scale_factor=4, mode="bilinear", align_corners=False)
    positive, negative = conditioning(seed), conditioning(seed, "negative_prompt_embeds")
    z, x0, image = [], [], []
    for i in range(2):
        unet, autoencoder = reference_unet(seed), reference_vae(seed)
        unet.conv_in.load_state_dict({name: checkpoint["state_dict_unet"][f"conv_in.{name}"] for name in ("weight", "bias")})
        modulate(unet, checkpoint, "unet", UNET_BLOCKS, scores[i])
        modulate(autoencoder, checkpoint, "vae", ENCODER_BLOCKS, scores[i])
        z.append(autoencoder.encode(enlarged[i : i + 1] * 2 - 1).latent_dist.mean * SCALE)
        eps = [unet(z[i], 999, encoder_hidden_states=text[0][0]).sample for text in (positive, negative)]
        x0.append((z[i] - (1 - alphas(999)).sqrt() * (eps[1] + 1.07 * (eps[0] - eps[1]))) / alphas(999).sqrt())
        image.append(autoencoder.decode(x0[i] / SCALE).sample / 2 + 0.5)
    z, x0, image = (torch.cat(each) for each in (z, x0, image))

    model, vae = comfy.run("S3DiffAdapt", model=model, vae=vae, scores=scores).args
    pipeline.adapt(scores)
    assert relative_error(comfy.run("FewStepSRVAEEncode", pixels=enlarged.movedim(1, -1), vae=vae)[0]["samples"] * SCALE, z) < TOLERANCE
    assert relative_error(pipeline.encode(enlarged), z) < TOLERANCE
    check(comfy, seed, z, x0, image, model, vae, pipeline, negative=negative)
