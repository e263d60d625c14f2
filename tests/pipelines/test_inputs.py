"""What users hand to a pipeline: right, or a sentence."""

import numpy as np
import pipeline_toys
import pytest
import torch
import toys
from PIL import Image
from toys import gaussian, picture

from pipelines import OSEDiffPipeline
from pipelines.inputs import to_batch, to_generators, to_texts

IMAGE = picture(3, 24, 17).movedim(-1, 1)
PIL = Image.fromarray((IMAGE[0].movedim(0, -1).numpy() * 255).astype(np.uint8))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.save(toys.osediff_checkpoint(3, 4), folder / "adapter.pkl")
    pipeline = OSEDiffPipeline(**pipeline_toys.components(3, None))
    pipeline.load_osediff(folder / "adapter.pkl")
    return pipeline


def restore(pipeline, image, **kwargs):
    return pipeline(image, **{"prompt_embeds": gaussian(3, "prompt_embeds", (1, 77, 64)), "scale": 1, "output_type": "pt"} | kwargs).images


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ([], "found an empty list"),
        ((), "found an empty list"),
        (None, "found NoneType, expected a PIL image"),
        ("cat.png", "found str, expected a PIL image, a tensor or a NumPy array. Open files with PIL.Image.open"),
        ([PIL, "cat.png"], r"image\[1\]: found str"),
        ([PIL, PIL.resize((30, 20))], "several sizes, 17 x 24 and \\(number 1\\) 30 x 20"),
        ([IMAGE[0], IMAGE[0, :, :9]], "several sizes"),
        (IMAGE * 2 - 1, r"expected \[0, 1\]. Turn \[-1, 1\] into it by image / 2 \+ 0.5"),
        (IMAGE * 0.6 - 0.3, r"found values from -0\..*expected \[0, 1\]"),
        (IMAGE * 255, "Divide 8-bit values by 255"),
        ((IMAGE * 255).byte(), "found torch.uint8 values, expected floating-point ones"),
        (np.asarray(PIL), "found uint8 values"),
        (torch.full((1, 3, 8, 8), float("nan")), "not numbers"),
        (IMAGE[:, :1], r"found shape \(1, 1, 24, 17\)"),
        (torch.zeros(0, 3, 8, 8), r"found shape \(0, 3, 8, 8\)"),
        (torch.zeros(24, 17), r"found shape \(24, 17\)"),
        (np.asarray(PIL).astype(object), "found object values"),
        (IMAGE.to_sparse(), "sparse, nested or without values"),
        (IMAGE.to("meta"), "sparse, nested or without values"),
    ],
)
def test_what_is_no_batch(image, words):
    with pytest.raises(ValueError, match=words):
        to_batch(image)


def test_what_is_one():
    assert torch.equal(to_batch(IMAGE), IMAGE)
    for image in ([PIL, PIL], (PIL, PIL), [to_batch(PIL), to_batch(PIL)], [to_batch(PIL)[0]] * 2, np.stack([np.asarray(PIL) / 255.0] * 2)):
        assert torch.allclose(to_batch(image), to_batch(PIL).expand(2, -1, -1, -1), atol=1e-6)
    for dtype in (">f4", ">f8", np.float16, np.longdouble):
        assert torch.allclose(to_batch((np.asarray(PIL) / 255).astype(dtype)), to_batch(PIL), atol=1e-3)
    overshot = torch.zeros(1, 3, 16, 16)
    overshot[..., 8:] = 1
    overshot = torch.nn.functional.interpolate(overshot, scale_factor=4, mode="bicubic")  # below 0 and above 1 beside the edge
    assert overshot.min() < -0.05 and torch.equal(to_batch(overshot), overshot)


def test_prompts_and_generators():
    one, two = torch.Generator(), torch.Generator()
    assert to_generators(None, 3) is None and to_generators(one, 3) == [one] and to_generators([one, two], 2) == [one, two]
    assert to_texts("a", "prompt", 3) == ["a"] and to_texts(["a", "b"], "prompt", 2) == ["a", "b"]
    for call, words in (
        (lambda: to_generators([one, two], 3), "generator: found 2, expected 1 or 3, as many as images"),
        (lambda: to_generators([], 1), "generator: found 0, expected 1,"),
        (lambda: to_generators(12345, 1), "generator: found int, expected torch.Generator"),
        (lambda: to_generators([one, None], 2), "generator: found NoneType"),
        (lambda: to_texts(["a", "b"], "prompt", 1), "prompt: found 2, expected 1, as many as images"),
        (lambda: to_texts([], "negative_prompt", 2), "negative_prompt: found 0, expected 1 or 2"),
        (lambda: to_texts(None, "prompt", 1), "prompt: found NoneType, expected text"),
        (lambda: to_texts(["a", 3], "prompt", 2), "prompt: found int, expected text"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"scale": float("nan")}, "scale: found nan"),
        ({"scale": float("inf")}, "scale: found inf"),
        ({"scale": 0}, "scale: found 0"),
        ({"scale": "4"}, "scale: found '4', expected a finite number above 0"),
        ({"scale": None}, "scale: found None"),
        ({"prompt_embeds": [torch.zeros(1, 77, 64)]}, "prompt_embeds: found list, expected a tensor"),
        ({"negative_prompt_embeds": np.zeros((1, 77, 64)), "guidance_scale": 2.0}, "negative_prompt_embeds: found ndarray, expected a tensor"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "generator: found 2, expected 1,"),
        ({"prompt_embeds": torch.zeros(77, 64)}, r"prompt_embeds: found shape \(77, 64\)"),
        ({"prompt_embeds": torch.zeros(2, 77, 64)}, "prompt: found 2, expected 1, as many as images"),
    ],
)
def test_a_pipeline_says_so(pipeline, kwargs, words):
    with pytest.raises(ValueError, match=words):
        restore(pipeline, IMAGE, **kwargs)


def test_a_phones_photo_is_upright(pipeline, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    PIL.save(tmp_path / "phone.png", exif=exif)
    turned = restore(pipeline, Image.open(tmp_path / "phone.png"))
    assert turned.shape[-2:] == (17, 24)
    assert torch.allclose(turned, restore(pipeline, PIL.transpose(Image.Transpose.ROTATE_270)), atol=1e-5)


def test_grey_stays_grey(pipeline):
    for image in (PIL.convert("L"), PIL.convert("L").convert("RGB"), IMAGE[:, :1].expand(-1, 3, -1, -1)):
        result = restore(pipeline, image)
        assert (result.amax(1) - result.amin(1)).max() < 1e-6
    both = restore(pipeline, torch.cat([IMAGE, IMAGE[:, :1].expand(-1, 3, -1, -1)]))
    assert (both[0].amax(0) - both[0].amin(0)).max() > 0.01 and (both[1].amax(0) - both[1].amin(0)).max() < 1e-6
