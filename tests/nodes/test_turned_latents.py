"""Core's nodes that flip, rotate, crop, resize, batch, save and load latents, between encode and decode: only padding is ever cropped."""

import pytest
import torch
from toys import picture, relative_error

SEED = 5
FLIPS = {"x-axis: vertically": (1,), "y-axis: horizontally": (2,)}


@pytest.fixture(scope="module")
def vae(comfy):
    return comfy.run("FewStepSRDemoLoader")[1]


@pytest.fixture(scope="module")
def latent(comfy, vae):
    """A photo of 100 x 148, padded to 104 x 152."""
    photo = comfy.run("FewStepSRDemoLoader")[4]
    image = comfy.run("ImageScale", image=photo, upscale_method="bicubic", width=148, height=100, crop="disabled")[0]
    return encode(comfy, vae, image)


def encode(comfy, vae, image):
    return comfy.run("FewStepSRVAEEncode", pixels=image, vae=vae)[0]


def decode(comfy, vae, latent):
    return comfy.run("FewStepSRVAEDecode", samples=latent, vae=vae)[0]


def whole(comfy, vae, latent):
    """All of a latent, padding too."""
    return comfy.run("FewStepSRVAEDecode", samples={"samples": latent["samples"]}, vae=vae)[0]


def restored(latent):
    """A latent as a sampler leaves it: nearly the encoded one."""
    samples = latent["samples"]
    noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(1))
    return {**latent, "samples": samples + 0.3 * samples.std() * noise}


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("method", FLIPS)
def test_flipped(comfy, vae, latent, method, sampled):
    flipped = comfy.run("LatentFlip", samples=latent, flip_method=method)[0]
    flipped = restored(flipped) if sampled else flipped
    rows = slice(4, None) if method.startswith("x") else slice(0, 100)
    columns = slice(4, None) if method.startswith("y") else slice(0, 148)
    assert torch.equal(decode(comfy, vae, flipped), whole(comfy, vae, flipped)[:, rows, columns])


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("rotation", ["none", "90 degrees", "180 degrees", "270 degrees"])
def test_rotated(comfy, vae, latent, rotation, sampled):
    rotated = comfy.run("LatentRotate", samples=latent, rotation=rotation)[0]
    rotated = restored(rotated) if sampled else rotated
    marked = torch.zeros(1, 4, 104, 152)
    marked[..., :100, :148] = 1
    inside = comfy.run("LatentRotate", samples={"samples": marked}, rotation=rotation)[0]["samples"][0, 0].bool()
    expected = whole(comfy, vae, rotated)[0][inside].reshape(1, *sorted((100, 148), reverse=rotation in ("90 degrees", "270 degrees")), 3)
    assert torch.equal(decode(comfy, vae, rotated), expected)


def test_turned_twice_is_upright(comfy, vae, latent):
    turned = latent
    for method in (*FLIPS, *FLIPS):
        turned = comfy.run("LatentFlip", samples=turned, flip_method=method)[0]
    assert torch.equal(decode(comfy, vae, turned), decode(comfy, vae, latent))


def test_a_square_that_was_transposed(comfy, vae):
    image = picture(SEED, 44, 47)
    square = encode(comfy, vae, image)
    rotated = comfy.run("LatentRotate", samples=square, rotation="90 degrees")[0]
    assert decode(comfy, vae, square).shape == (1, 44, 47, 3) and decode(comfy, vae, rotated).shape == (1, 47, 44, 3)


@pytest.mark.parametrize("image", [torch.full((1, 20, 30, 3), 0.4), torch.zeros(1, 3, 3, 3)], ids=["plain", "tiny"])
def test_a_picture_without_a_direction_lies_as_it_was(comfy, vae, image):
    latent = restored(encode(comfy, vae, image))
    height, width = image.shape[1:3]
    assert torch.equal(decode(comfy, vae, latent), whole(comfy, vae, latent)[:, :height, :width])


def test_another_picture_in_its_place_has_its_size(comfy, vae, latent):
    """A sampler that made something else of it: the padding is where it was."""
    other = {**latent, "samples": torch.randn_like(latent["samples"])}
    assert decode(comfy, vae, other).shape == (1, 100, 148, 3)


@pytest.mark.parametrize(
    ("node", "inputs", "shape"),
    [
        ("LatentCrop", {"width": 64, "height": 80, "x": 16, "y": 8}, (80, 64)),
        ("LatentCrop", {"width": 512, "height": 512, "x": 32, "y": 0}, (104, 120)),
        ("LatentUpscale", {"upscale_method": "bilinear", "width": 304, "height": 208, "crop": "disabled"}, (208, 304)),
        ("LatentUpscaleBy", {"upscale_method": "bilinear", "scale_by": 0.5}, (48, 80)),
        ("LatentCut", {"dim": "x", "index": 2, "amount": 9}, (104, 72)),
    ],
)
def test_resized_and_cropped_latents_are_decoded_whole_with_a_word(comfy, vae, latent, caplog, node, inputs, shape):
    changed = comfy.run(node, samples=latent, **inputs)[0]
    found = decode(comfy, vae, changed)
    assert found.shape == (1, *shape, 3) and torch.equal(found, whole(comfy, vae, changed))
    assert "it was resized or cropped since a picture of 148 x 100 pixels was encoded" in caplog.text


def test_a_picture_without_padding_needs_no_word(comfy, vae, caplog):
    latent = encode(comfy, vae, picture(SEED, 32, 48))
    cropped = comfy.run("LatentUpscaleBy", samples=latent, upscale_method="bilinear", scale_by=2.0)[0]
    assert decode(comfy, vae, cropped).shape == (1, 64, 96, 3) and "resized" not in caplog.text


def test_batches(comfy, vae, latent, caplog):
    """Taken out, repeated and composed batches keep the size; pictures of several sizes are decoded whole."""
    pictures = encode(comfy, vae, picture(SEED, 30, 45, batch=3))
    for changed, count in (
        (comfy.run("LatentFromBatch", samples=pictures, batch_index=1, length=2)[0], 2),
        (comfy.run("RepeatLatentBatch", samples=pictures, amount=2)[0], 6),
        (comfy.run("LatentComposite", samples_to=pictures, samples_from=latent, x=8, y=8)[0], 3),
        (comfy.run("LatentBlend", samples1=pictures, samples2=pictures, blend_factor=0.5)[0], 3),
    ):
        assert decode(comfy, vae, changed).shape == (count, 30, 45, 3)
    flipped = comfy.run(
        "LatentFlip", samples=comfy.run("LatentFromBatch", samples=pictures, batch_index=2, length=1)[0], flip_method="y-axis: horizontally"
    )
    assert torch.equal(decode(comfy, vae, flipped[0]), whole(comfy, vae, flipped[0])[:, :30, 3:])
    assert not caplog.text.count("VAE Decode")
    other = encode(comfy, vae, picture(SEED + 7, 32, 48))
    mixed = comfy.run("LatentBatch", samples1=pictures, samples2=other)[0]
    assert decode(comfy, vae, mixed).shape == (4, 32, 48, 3)
    assert "pictures of several encodes" in caplog.text


def test_what_core_drops_is_decoded_whole(comfy, vae, latent, tmp_path, monkeypatch):
    """Rebatch Latents and Save Latent keep the samples alone: there is nothing by which to crop."""
    [rebatched] = comfy.run("RebatchLatents", latents=[latent], batch_size=[1])[0]
    assert decode(comfy, vae, rebatched).shape == (1, 104, 152, 3)
    import folder_paths

    folder = f"{folder_paths.get_output_directory()}"
    comfy.run("SaveLatent", samples=latent, filename_prefix="turned")
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: folder)
    [loaded] = comfy.run("LoadLatent", latent="turned_00001_.latent")
    assert torch.equal(loaded["samples"], latent["samples"]) and decode(comfy, vae, loaded).shape == (1, 104, 152, 3)


def test_the_start_state_says_that_its_picture_was_turned(comfy, latent):
    model, _, _, predictor, photo = comfy.run("FewStepSRDemoLoader").args
    sigmas = comfy.run("FewStepScheduler", model=model, timesteps="100")[0]
    flipped = comfy.run("LatentFlip", samples=latent, flip_method="x-axis: vertically")[0]
    start = {"noise_predictor": predictor, "image": photo, "sigmas": sigmas}
    comfy.run("InvSRStartState", latent=latent, **start)
    with pytest.raises(ValueError, match="latent: it was flipped vertically since it was encoded"):
        comfy.run("InvSRStartState", latent=flipped, **start)


def test_latents_of_earlier_versions_have_their_size(comfy, vae, latent):
    """Without a thumbnail, as other nodes may make them."""
    plain = {"samples": latent["samples"], "fewstep_sr_size": (100, 148)}
    assert relative_error(decode(comfy, vae, plain), decode(comfy, vae, latent)) == 0
