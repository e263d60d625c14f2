"""The mistakes that newcomers make, on a real server with the files that they would have: what the page tells them names the thing, what was
found, what was expected and what to do, before any sampling.

Where ComfyUI itself catches a mistake, its own words are held to; where a setting is odd but may be meant, the run goes on with a warning.
"""

from dataclasses import dataclass, field

import pytest
import torch
import toys
from comfy_server import Server, to_prompt
from server_folder import fill, load
from wrong_models import write_wrong_models


@pytest.fixture(scope="module")
def server(comfy, tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    fill(base, "reduced")
    write_wrong_models(base / "models")
    with Server(comfy.path, base) as running:
        yield running


@dataclass(frozen=True)
class Mistake:
    """A template with other ``inputs`` on one of its nodes, and the node and words that the page must show.

    An input (class, slot) is wired to the node of that class, None is unplugged. ``added`` are nodes of the newcomer's own.
    """

    template: str
    node: str
    inputs: dict
    blamed: str
    words: tuple[str, ...]
    added: dict[str, dict] = field(default_factory=dict)

    def prompt(self, server) -> dict:
        prompt = to_prompt(load(self.template), server.schemas)
        ids = {node["class_type"]: node_id for node_id, node in reversed(prompt.items())}
        changed = self.node if self.node in self.added else ids[self.node]
        for class_type, inputs in self.added.items():
            ids[class_type] = class_type
            prompt[class_type] = {"class_type": class_type, "inputs": inputs}
        prompt[changed]["inputs"] |= self.inputs
        for node in prompt.values():
            wired = {name: [ids[value[0]], value[1]] if isinstance(value, tuple) else value for name, value in node["inputs"].items()}
            node["inputs"] = {name: value for name, value in wired.items() if value is not None}
        return prompt


def base(name: str, *words: str) -> Mistake:
    """Another checkpoint's MODEL under Load OSEDiff."""
    added = {"CheckpointLoaderSimple": {"ckpt_name": f"{name}.safetensors"}}
    words = ("model: found", *words, "Load SD 2.1-base (512 pixels) for OSEDiff")
    return Mistake("osediff_x4", "OSEDiffLoader", {"model": ("CheckpointLoaderSimple", 0)}, "OSEDiffLoader", words, added)


def adapter(name: str, *words: str) -> Mistake:
    return Mistake("osediff_x4", "OSEDiffLoader", {"osediff_name": name}, "OSEDiffLoader", (name, *words))


def osediff(node: str, inputs: dict, *words: str, blamed: str = "", **added: dict) -> Mistake:
    return Mistake("osediff_x4", node, inputs, blamed or node, words, added)


def invsr(node: str, inputs: dict, *words: str, blamed: str = "", **added: dict) -> Mistake:
    return Mistake("invsr_x4", node, inputs, blamed or node, words, added)


GET_ADAPTER = "osediff.pkl is at github.com/cswry/OSEDiff, in preset/models"
GET_PREDICTOR = "noise_predictor_sd_turbo_v5.pth is at huggingface.co/OAOA/InvSR"
EMPTY = {"width": 200, "height": 152, "batch_size": 1}
TALL = {"width": 64, "height": 200, "batch_size": 1, "color": 0}
KSAMPLER = {"seed": 1, "steps": 20, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
KSAMPLER |= {"model": ("CheckpointLoaderSimple", 0), "positive": ("CLIPTextEncode", 0), "negative": ("CLIPTextEncode", 0)}

MISTAKES = {
    # 1. A base that the method was not trained on.
    "base SD 1.5": base("v1-5-pruned-emaonly", "cross-attention dimension of 768 (Stable Diffusion 1.x), expected 1024"),
    "base SDXL": base("sd_xl_base_1.0", "cross-attention dimension of 2048 (Stable Diffusion XL), expected 1024"),
    "base SD 2.1 at 768 pixels": base("v2-1_768-ema-pruned", "v-prediction (SD 2.1 at 768 pixels), expected a model that predicts noise"),
    "InvSR on SD 1.5": invsr(
        "FewStepScheduler",
        {"model": ("CheckpointLoaderSimple", 0)},
        "model: found a cross-attention dimension of 768",
        "expected 1024",
        "Load",
        "SD-Turbo for InvSR",
        CheckpointLoaderSimple={"ckpt_name": "v1-5-pruned-emaonly.safetensors"},
    ),
    # 2. A file that is something else.
    "unsafe pickle": adapter("training_state.pkl", "Python objects (argparse.Namespace)", "expected tensors", "Use a safetensors file"),
    "GAN upscaler as adapter": adapter("RealESRGAN_x4plus.pth", "found a GAN", "models/upscale_models; expected an OSEDiff adapter", GET_ADAPTER),
    "LoRA as adapter": adapter("add_detail.safetensors", "found a LoRA for Stable Diffusion 2.x; expected an OSEDiff adapter", GET_ADAPTER),
    "predictor as adapter": adapter(
        "noise_predictor_sd_turbo_v5.pth", "found an InvSR noise predictor; expected an OSEDiff adapter", "Choose another file", GET_ADAPTER
    ),
    "adapter as predictor": invsr(
        "InvSRNoisePredictorLoader",
        {"noise_predictor_name": "osediff.pkl"},
        "osediff.pkl: found an OSEDiff adapter; expected an InvSR noise predictor. Choose another file",
        GET_PREDICTOR,
    ),
    "predictor as an adapter of any method": Mistake(
        "hypir_x4",
        "FewStepSRAdapterLoader",
        {"adapter_name": "osediff/noise_predictor_sd_turbo_v5.pth"},
        "FewStepSRAdapterLoader",
        ("found an InvSR noise predictor; expected an adapter of one of these methods: OSEDiff, PiSA-SR, HYPIR",),
    ),
    "no adapter under the step": Mistake(
        "hypir_x4",
        "FewStepSROneStep",
        {"model": ("CheckpointLoaderSimple", 0)},
        "FewStepSROneStep",
        ("model: found no adapter of a few-step method on it", "Put 'Load Few-Step SR Adapter' before"),
    ),
    "PiSA-SR under OSEDiff's step": osediff(
        "OSEDiffOneStep",
        {"model": ("FewStepSRAdapterLoader", 0)},
        "model: found PiSA-SR's adapter on it, expected OSEDiff's. Wire it into 'Few-Step SR One Step'",
        FewStepSRAdapterLoader={
            "model": ("CheckpointLoaderSimple", 0),
            "vae": ("CheckpointLoaderSimple", 2),
            "adapter_name": "pisasr/pisa_sr.pkl",
            "strength_model": 1.0,
            "strength_vae": 1.0,
        },
    ),
    # 3. A file that is not where the list is read from.
    "any method's file not downloaded": Mistake(
        "pisasr_fidelity_and_detail",
        "FewStepSRAdapterLoader",
        {"adapter_name": "pisasr/other.pkl"},
        "FewStepSRAdapterLoader",
        ("expected other.pkl", "pisa_sr.pkl is linked from github.com/csslc/PiSA-SR", "press R"),
    ),
    "file in another folder": adapter(
        "my_lora.safetensors", "models/osediff, expected my_lora", "models/loras/my_lora.safetensors: move it into that folder"
    ),
    "file not downloaded": adapter(
        "osediff_face.pkl", "models/osediff, expected osediff_face.pkl", GET_ADAPTER, "Download it into that folder, and press R"
    ),
    # 4. Steps and timesteps.
    "no steps": invsr("FewStepScheduler", {"steps": 0}, "Value 0 smaller than min of 1", "steps"),
    "start timestep of another method": invsr("FewStepScheduler", {"timesteps": "999"}, "timesteps: found [999], expected values from 250 down to 1"),
    "timesteps as a fraction": invsr("FewStepScheduler", {"timesteps": "0.5"}, "timesteps: found '0.5', expected whole numbers such as '250, 200"),
    "OSEDiff's sigmas under InvSR": invsr(
        "FewStepScheduler", {"method": "OSEDiff"}, "timestep 1000", "expected at most 250", "with method InvSR", blamed="InvSRStartState"
    ),
    # 5. A socket left open.
    "vae unconnected": osediff("OSEDiffLoader", {"vae": None}, "Required input is missing", "vae"),
    "model unconnected": osediff("OSEDiffOneStep", {"model": None}, "Required input is missing", "model"),
    # 6. Strength and guidance beyond what the widget allows, or without what it needs.
    "strength 100": osediff("OSEDiffLoader", {"strength_model": 100}, "Value 100.0 bigger than max of 10.0", "strength_model"),
    "cfg as for KSampler": osediff("OSEDiffOneStep", {"cfg": 7.0}, "cfg: found 7.0 without a negative input, expected 1", "Set it to 1"),
    # 7. An empty latent, as for making a picture from text.
    "empty latent, OSEDiff": osediff(
        "OSEDiffOneStep",
        {"latent": ("EmptyLatentImage", 0)},
        "latent: found an empty latent, expected the encoded",
        "Wire 'VAE Encode",
        EmptyLatentImage=EMPTY,
    ),
    "empty latent, InvSR": invsr(
        "InvSRStartState", {"latent": ("EmptyLatentImage", 0)}, "latent: found an empty latent", "Wire 'VAE Encode", EmptyLatentImage=EMPTY
    ),
    "empty latent in the sampler": invsr(
        "SamplerCustomAdvanced", {"latent_image": ("EmptyLatentImage", 0)}, "found an empty latent", "Wire the LATENT", EmptyLatentImage=EMPTY
    ),
    # 8. Another sampler, or noise given twice.
    "noise into KSampler": invsr(
        "FewStepSRVAEDecode",
        {"samples": ("KSampler", 0)},
        "Return type mismatch",
        "latent_image, received_type(NOISE) mismatch input_type(LATENT)",
        blamed="KSampler",
        KSampler=KSAMPLER | {"latent_image": ("InvSRStartState", 0)},
    ),
    "start state and noise": invsr(
        "SamplerCustomAdvanced",
        {"latent_image": ("InvSRStartState", 1)},
        "latent_image: found InvSR's start state, which holds this noise already, expected the latent",
        "Wire the LATENT",
        "'Disable Noise'",
    ),
    # 9. Masks and pictures that do not belong.
    "mask as a picture": osediff("ImageScaleBy", {"image": ("LoadImage", 1)}, "image, received_type(MASK) mismatch input_type(IMAGE)"),
    "another picture for the noise map": invsr(
        "InvSRStartState",
        {"image": ("EmptyImage", 0)},
        "image: found 64 x 200",
        "other proportions",
        "same picture",
        EmptyImage=TALL,
    ),
    "another picture's colours": invsr(
        "FewStepSRColorFix",
        {"reference": ("EmptyImage", 0), "method": "wavelet"},
        "reference: found 64 x 200 pixels, expected the aspect ratio of image, 200 x 148",
        "choose adain",
        EmptyImage=TALL,
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_the_page_says_what_to_do(server, mistake):
    node, message = server.mistake(mistake.prompt(server))
    assert node == mistake.blamed
    assert not [word for word in mistake.words if word not in message], message


def test_empty_folder(server):
    """3. again: the list itself is empty, since all files lie in models/checkpoints."""
    models, moved = server.base / "models", []
    for file in (models / "invsr").iterdir():
        moved.append(file.rename(models / "checkpoints" / file.name))
    try:
        name = "noise_predictor_sd_turbo_v5.pth"
        listed = server.get("/object_info/InvSRNoisePredictorLoader")["InvSRNoisePredictorLoader"]["input"]["required"]["noise_predictor_name"][1]
        assert listed["options"] == ["models/invsr is empty"]
        answers = [
            server.mistake(invsr("InvSRNoisePredictorLoader", {"noise_predictor_name": value}).prompt(server)) for value in (name, *listed["options"])
        ]
    finally:
        for file in moved:
            file.rename(models / "invsr" / file.name)
    for node, message in answers:
        assert node == "InvSRNoisePredictorLoader"
        assert (
            f"found no file in {models / 'invsr'}, expected {name}. It is at {models}" in message
            and "move it into that folder, and press R" in message
        )


ODD = {
    "strength 10 for 1.0": (
        osediff("OSEDiffLoader", {"strength_model": 10.0}),
        "Load OSEDiff: strength_model: found 10, expected 1 (0 to 2). Use 1",
    ),
    "the checkpoint's own MODEL": (
        osediff("OSEDiffOneStep", {"model": ("CheckpointLoaderSimple", 0)}),
        "OSEDiff One Step: model: found no OSEDiff adapter on it. Add Load OSEDiff before",
    ),
    "cfg 7": (
        osediff("OSEDiffOneStep", {"cfg": 7.0, "negative": ("CLIPTextEncode", 0)}),
        "OSEDiff One Step: cfg: found 7, expected 1 (to 2). Set it to 1",
    ),
    "as published": (osediff("OSEDiffOneStep", {"cfg": 1.0}), None),
}


@pytest.mark.parametrize(("odd", "warning"), ODD.values(), ids=ODD.keys())
def test_odd_settings_are_warned_of(server, odd, warning):
    before = len(server.log)
    prompt = odd.prompt(server)
    [enlarge] = [node for node in prompt.values() if node["class_type"] == "ImageScaleBy"]
    enlarge["inputs"]["scale_by"] = 1.0  # it is quicker
    server.run(prompt)
    log = server.log[before:]
    assert (warning in log) if warning else ("expected" not in log)


def test_alpha_and_batches_are_no_mistake(server):
    alpha = {"JoinImageWithAlpha": {"image": ("LoadImage", 0), "alpha": ("LoadImage", 1)}}
    batch = {"RepeatImageBatch": {"image": ("JoinImageWithAlpha", 0), "amount": 2}}
    prompt = osediff("ImageScaleBy", {"image": ("RepeatImageBatch", 0), "scale_by": 1.0}, **alpha, **batch).prompt(server)
    saved = [server.image(entry) for output in server.run(prompt)["outputs"].values() for entry in output["images"]]
    assert [(picture.size, picture.mode) for picture in saved] == [((50, 37), "RGB")] * 2


@pytest.fixture
def model(comfy):
    return toys.comfy_model(5)


def one_step(comfy, model):
    return comfy.run("OSEDiffOneStep", model=model, positive=toys.conditioning(5), latent={"samples": torch.ones(1, 4, 64, 96)})


def test_a_picture_beside_osediffs_noise(comfy, model):
    """8. again: OSEDiff's start is in the NOISE alone, which the sampler adds to the latent that it is given."""
    latent = {"samples": torch.ones(1, 4, 8, 8)}
    noise, blank = comfy.run("OSEDiffStartState", model=model, latent=latent).args
    noise.generate_noise(blank)
    with pytest.raises(ValueError, match="latent_image: found a latent with a picture, expected a blank one.* Wire the blank LATENT"):
        noise.generate_noise(latent)


@pytest.mark.slow
def test_far_too_large(comfy, model, monkeypatch):
    """10. One activation alone is larger than the device: 64 x 96 cells of 8 x 32 channels in float32 are 6 MiB."""
    from comfy import model_management

    monkeypatch.setattr(model_management, "get_total_memory", lambda *_: 5 * 2**20)
    with pytest.raises(ValueError, match=r"latent: found a picture of 768 x 512 pixels, .* expected one that fits .* Add 'Tiled Model"):
        one_step(comfy, model)
    one_step(comfy, comfy.run("FewStepSRTiledModel", model=model, tile_size=64)[0])


def test_out_of_memory(comfy, model):
    """10. again, found out by trying: ComfyUI takes it for what it is, and the page says more than its 'out of memory'."""
    from comfy import model_management

    def small_card(apply_model, inputs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    model.set_model_unet_function_wrapper(small_card)
    with pytest.raises(
        torch.cuda.OutOfMemoryError, match=r"latent: the picture does not fit into memory .* Add 'Tiled Model .* or upscale less"
    ) as caught:
        one_step(comfy, model)
    assert model_management.is_oom(caught.value)
