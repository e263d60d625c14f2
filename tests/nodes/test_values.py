"""Values that no widget gives but a saved workflow, a link or the API can: a sentence of bounded length, and never a black picture."""

import os
import time

import pytest
import torch
import toys
from toys import conditioning, picture

from fewstep_sr.image.color import fix_color

SEED = 5
NAN, INF = float("nan"), float("inf")
LOADERS = {"OSEDiffLoader": "osediff_name", "InvSRNoisePredictorLoader": "noise_predictor_name", "DAPETaggerLoader": "tagger_name"}
NO_NAMES = [
    7,
    1.5,
    True,
    ["a.pkl"],
    {"a": 1},
    b"a.pkl",
    "",
    "..",
    "../../etc/passwd",
    "a\0b",
    "\ud800.pkl",
    "x" * 1_000_000,
    "猫.pkl",
    ["x" * 1_000_000],
]


@pytest.fixture(scope="module")
def base(comfy):
    return toys.comfy_model(SEED), toys.comfy_vae(SEED)


@pytest.mark.parametrize("node", LOADERS)
@pytest.mark.parametrize("name", NO_NAMES, ids=lambda name: ascii(name)[:20])
def test_a_name_that_is_none(comfy, node, name):
    answer = comfy.nodes[node].validate_inputs(**{LOADERS[node]: name})
    assert isinstance(answer, str) and "found" in answer and "expected" in answer and len(answer) < 2000
    answer.encode("utf-8")
    assert isinstance(comfy.nodes[node].fingerprint_inputs(**{LOADERS[node]: name}), list)


@pytest.mark.parametrize("node", LOADERS)
@pytest.mark.parametrize("name", NO_NAMES, ids=lambda name: ascii(name)[:20])
def test_a_name_that_a_link_brings(comfy, base, node, name):
    """Past ``validate_inputs``, which is not asked about links."""
    inputs = {"model": base[0], "vae": base[1]} if node == "OSEDiffLoader" else {}
    with pytest.raises(ValueError, match=f"^{LOADERS[node]}: found .*expected") as found:
        comfy.run(node, **inputs, **{LOADERS[node]: name})
    assert len(str(found.value).encode()) < 2000


def test_what_links_bring_past_the_widgets(comfy, base):
    latent, image, long = {"samples": torch.ones(1, 4, 4, 4)}, picture(1, 16, 16), "x" * 1_000_000
    step = {"model": base[0], "positive": conditioning(SEED), "latent": latent}
    encode = {"pixels": image, "vae": base[1]}
    for node, inputs, words in (
        ("OSEDiffOneStep", {**step, "timestep": 1000}, "timestep: found 1000, expected a number from 0 to 999"),
        ("OSEDiffOneStep", {**step, "timestep": -1}, "timestep: found -1"),
        ("OSEDiffOneStep", {**step, "timestep": NAN}, "timestep: found nan"),
        ("OSEDiffOneStep", {**step, "timestep": "999"}, "timestep: found 999"),
        ("FewStepSRTiledModel", {"model": base[0], "tile_size": 1}, "tile_size: found 1, expected a number from 16 to 1024"),
        ("FewStepSRTiledModel", {"model": base[0], "overlap": None}, "overlap: found None"),
        ("FewStepSRTiledModel", {"model": base[0], "batch": 0}, "batch: found 0, expected a number from 1 to 64"),
        ("FewStepSRVAEEncode", {**encode, "tile_size": None}, "tile_size: found None, expected 0 or a multiple of 64"),
        ("FewStepSRVAEEncode", {**encode, "tile_size": long}, "tile_size: found x.*expected 0 or"),
        ("FewStepSRVAEEncode", {**encode, "posterior": long}, "posterior: found x.*expected mean or sample"),
        ("FewStepSRVAEEncode", {**encode, "posterior": "sample", "seed": 2**64}, "seed: found 18446744073709551616, expected a whole number from 0"),
        ("FewStepSRVAEEncode", {**encode, "posterior": "sample", "seed": long}, "seed: found 'x.*expected a whole number"),
        ("FewStepScheduler", {"model": base[0], "method": long}, "method: found x.*expected .*InvSR"),
        ("FewStepScheduler", {"model": base[0], "method": ["InvSR"]}, "method: found .'InvSR'.*expected"),
        ("FewStepSRDemoLoader", {"method": long}, "method: found x.*expected .*InvSR"),
    ):
        with pytest.raises(ValueError, match=words) as found:
            comfy.run(node, **inputs)
        assert len(str(found.value)) < 400


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30, "1", None, True])
def test_numbers_that_are_none(comfy, base, value):
    torch.save(toys.osediff_checkpoint(SEED, rank=2), comfy.folder("osediff") / "values.pkl")
    latent = {"samples": torch.ones(1, 4, 4, 4)}
    image = picture(1, 16, 16)
    for node, name, inputs in (
        ("FewStepSRColorFix", "strength", {"image": image, "reference": image}),
        ("OSEDiffLoader", "strength_model", {"model": base[0], "vae": base[1], "osediff_name": "values.pkl"}),
        ("OSEDiffLoader", "strength_vae", {"model": base[0], "vae": base[1], "osediff_name": "values.pkl"}),
        ("OSEDiffOneStep", "cfg", {"model": base[0], "positive": conditioning(SEED), "negative": conditioning(SEED), "latent": latent}),
        ("DAPETagger", "threshold", {"tagger": None, "image": image}),
    ):
        with pytest.raises(ValueError, match=f"{name}: found .*expected a number from") as found:
            comfy.run(node, **inputs, **{name: value})
        assert len(str(found.value)) < 300


@pytest.mark.parametrize("text", ["\ud83d", "x" * 1_000_000, 7, None, ["a"]], ids=["half a character", "a million", "number", "nothing", "list"])
def test_texts_that_are_none(comfy, base, text):
    for node, name, inputs in (
        ("FewStepScheduler", "timesteps", {"model": base[0]}),
        ("DAPETagger", "exclude", {"tagger": None, "image": picture(1, 16, 16)}),
        ("DAPETagger", "prefix", {"tagger": None, "image": picture(1, 16, 16)}),
        ("DAPETagger", "suffix", {"tagger": None, "image": picture(1, 16, 16)}),
    ):
        with pytest.raises(ValueError, match=f"{name}: found .*expected") as found:
            comfy.run(node, **inputs, **{name: text})
        assert len(str(found.value).encode()) < 300


@pytest.mark.parametrize("text", ["9" * 3000, "250, " * 20_000, "250 " + "1" * 4000, ", ".join(map(str, range(250, 0, -1))) + ", 5"])
def test_many_timesteps_are_answered_briefly(comfy, base, text):
    with pytest.raises(ValueError, match="timesteps: found") as found:
        comfy.run("FewStepScheduler", model=base[0], timesteps=text)
    assert len(str(found.value)) < 500


def signed(image):
    return image * 2 - 1


@pytest.mark.parametrize("image", [signed(picture(1, 24, 24)), signed(picture(1, 24, 24) * 0.25 + 0.3), torch.full((1, 8, 8, 3), -0.2)])
def test_images_scaled_to_minus_one(comfy, base, image):
    for node, name, inputs in (
        ("FewStepSRVAEEncode", "pixels", {"vae": base[1]}),
        ("FewStepSRColorFix", "image", {"reference": picture(1, 24, 24)}),
        ("FewStepSRColorFix", "reference", {"image": picture(1, 24, 24)}),
        ("DAPETagger", "image", {"tagger": None}),
        ("FewStepSRFillTransparent", "image", {}),
    ):
        with pytest.raises(ValueError, match=rf"{name}: found values from -.*expected \[0, 1\]: this image is scaled to \[-1, 1\]"):
            comfy.run(node, **inputs, **{name: image})


def test_bright_images_scaled_to_minus_one(comfy):
    """Few values are negative, enlargement makes some larger than 1, and Color Fix, which keeps a decoder's overshoot, refuses them, too."""
    bright = picture(1, 24, 24) ** 0.1
    bright[:, 4:10, 4:10] = 0.2
    enlarged = comfy.run("ImageScaleBy", image=signed(bright), upscale_method="bicubic", scale_by=4.0)[0]
    assert (enlarged < -0.1).float().mean() < 0.2 and enlarged.max() > 1
    with pytest.raises(ValueError, match=r"image: found values from -.*this image is scaled to \[-1, 1\]"):
        comfy.run("FewStepSRColorFix", image=enlarged, reference=bright)


def test_a_decoders_overshoot(comfy, base):
    """HYPIR's colour fix comes before its clamp: Color Fix keeps what the decoder gave, where other nodes ask for a clamp."""
    decoded, farther = ((picture(2, 24, 24) - 0.5) * contrast + 0.5 for contrast in (2.7, 4.0))
    reference = picture(3, 24, 24)
    for image in (decoded, farther):
        fixed = comfy.run("FewStepSRColorFix", image=image, reference=reference, method="wavelet")[0]
        content, colors = (each.movedim(-1, 1) for each in (image, reference))
        assert torch.equal(fixed.movedim(-1, 1), fix_color(content, colors, "wavelet"))
    for node, name, inputs in (
        ("FewStepSRVAEEncode", "pixels", {"vae": base[1]}),
        ("FewStepSRColorFix", "reference", {"image": decoded}),
        ("FewStepSRQuality", "image", {"reference": reference}),
    ):
        with pytest.raises(ValueError, match=rf"{name}: found values from -.*overshoots as a decoder's output does. Switch clamp on"):
            comfy.run(node, **inputs, **{name: decoded})


def test_decoded_images_of_any_contrast_are_told_from_minus_one(comfy):
    """A decoder's overshoot on both sides alike, however much is below 0, and single dark spots far below are no sign of another scale."""
    reference = picture(1, 48, 40)
    generator = torch.Generator().manual_seed(0)
    random, contrasty = (torch.randn(1, 48, 40, 3, generator=generator) * deviation + mean for deviation, mean in ((0.6, 0.4), (0.9, 0.3)))
    random, contrasty = random.clamp(-1.9, 2.9), contrasty.clamp(-0.9, 1.9)
    assert (contrasty < -0.1).float().mean() > 0.25
    spotted = reference.clone() * 0.9
    spotted[:, 10:13, 10:13] = -0.8
    for image in (random, contrasty, spotted):
        fixed = comfy.run("FewStepSRColorFix", image=image, reference=reference, method="wavelet")[0]
        content, colors = (each.movedim(-1, 1) for each in (image, reference))
        assert torch.equal(fixed.movedim(-1, 1), fix_color(content, colors, "wavelet"))
    bright = reference**0.2
    for image, colors in ((reference, reference), (bright, bright), (picture(4, 48, 40), reference)):
        with pytest.raises(ValueError, match=r"image: found values from -.*this image is scaled to \[-1, 1\]"):
            comfy.run("FewStepSRColorFix", image=signed(image), reference=colors, method="wavelet")
    with pytest.raises(ValueError, match="overshoots as a decoder's output does"):
        comfy.run("FewStepSRQuality", image=contrasty, reference=reference)


@pytest.mark.parametrize("method", ["bicubic", "lanczos", "bilinear", "area"])
@pytest.mark.parametrize("scale", [1.3, 2.0, 4.0, 7.7])
def test_enlarged_pictures_are_no_such(comfy, method, scale):
    """The strongest overshoot that enlargement can make: single white and black pixels, and checks."""
    from fewstep_sr.image.pixels import require_pixel_values  # noqa: F401  (the check below it)

    checks = comfy.module(".nodes.checks")
    cell = torch.arange(16)
    for pattern in ((cell[:, None] + cell) % 2, (cell[:, None] % 2) * (cell % 2), (torch.rand(16, 16) > 0.5).long()):
        image = pattern.float()[None, :, :, None].expand(-1, -1, -1, 3)
        enlarged = comfy.run("ImageScaleBy", image=image, upscale_method=method, scale_by=scale)[0]
        checks.require_image(enlarged, "image")


def test_color_fix_is_never_black(comfy):
    for image in (torch.zeros(1, 8, 8, 3), torch.ones(1, 8, 8, 3), picture(1, 8, 8), picture(1, 8, 8) * 1e-20, picture(1, 1, 1)):
        for reference in (torch.full((1, 8, 8, 3), 0.5), picture(2, 8, 8)):
            for method in ("adain", "wavelet", "ycbcr", "lab", "luma"):
                fixed = comfy.run("FewStepSRColorFix", image=image, reference=reference, method=method)[0]
                assert fixed.isfinite().all() and fixed.min() >= 0 and fixed.max() <= 1
                if method not in ("ycbcr", "luma"):  # which keep the brightness
                    assert abs(fixed.mean() - reference.mean()) < 0.35


def test_a_file_written_over_is_seen_and_only_then(comfy):
    names = {"OSEDiffLoader": ("osediff", "osediff_name"), "InvSRNoisePredictorLoader": ("invsr", "noise_predictor_name")}
    names["DAPETaggerLoader"] = ("dape", "tagger_name")
    for node, (folder, widget) in names.items():
        file = comfy.folder(folder) / "written_over.pth"
        file.write_bytes(b"one")
        (comfy.folder(folder) / "another.pth").write_bytes(b"a")
        ask = comfy.nodes[node].fingerprint_inputs
        chosen = {widget: file.name} | ({"dape_name": "none"} if folder == "dape" else {})
        first, wired = ask(**chosen), ask(**{widget: None})
        (comfy.folder(folder) / "another.pth").write_bytes(b"another one's content")
        assert ask(**chosen) == first and ask(**{widget: None}) != wired
        stat = file.stat()
        file.write_bytes(b"two")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
        assert ask(**chosen) != first
        changed = ask(**chosen)
        file.read_bytes()
        time.sleep(0.01)
        assert ask(**chosen) == changed
    # The tagger's own companions count too.
    ask = comfy.nodes["DAPETaggerLoader"].fingerprint_inputs
    first = ask(tagger_name="written_over.pth", dape_name="auto")
    for name in ("ram_tag_list.txt", "DAPE.pth"):
        file = comfy.folder("dape") / name
        assert not file.exists()
        try:
            file.write_text("x")
            assert ask(tagger_name="written_over.pth", dape_name="auto") != first
        finally:
            file.unlink()


def frames(**ends):
    """A prompt as the server hands it to a node: encode, one step, decode, colour, a video."""
    node = lambda kind, **inputs: {"class_type": kind, "inputs": inputs}  # noqa: E731
    return {
        "e": node("FewStepSRVAEEncode", pixels=["u", 0], vae=["l", 1]),
        "o": node("OSEDiffOneStep", latent=["e", 0]),
        "d": node("FewStepSRVAEDecode", samples=["o", 0], vae=["l", 1]),
        "c": node("FewStepSRColorFix", image=["d", 0], reference=["u", 0]),
        **ends,
    }


VIDEO = {"class_type": "CreateVideo", "inputs": {"images": ["c", 0], "fps": 8}}


@pytest.mark.parametrize(
    ("ends", "refused"),
    [
        ({"v": VIDEO}, True),
        ({"v": VIDEO, "s": {"class_type": "SaveVideo", "inputs": {"video": ["v", 0], "format": "mp4", "codec": "h264"}}}, True),
        ({"v": VIDEO, "s": {"class_type": "SaveVideo", "inputs": {"video": ["v", 0], "format": "auto", "format.codec": "av1"}}}, False),
        ({"i": {"class_type": "SaveImage", "inputs": {"images": ["c", 0]}}}, False),
        (
            {"r": {"class_type": "ImageScaleBy", "inputs": {"image": ["c", 0]}}, "v": {"class_type": "CreateVideo", "inputs": {"images": ["r", 0]}}},
            False,
        ),
    ],
    ids=["video", "H.264", "AV1", "image", "resized after"],
)
@pytest.mark.parametrize(("height", "width"), [(31, 44), (30, 45), (30, 44)])
def test_odd_frames_are_refused_before_the_work(comfy, base, ends, refused, height, width):
    from comfy_api.latest import io

    prompt = frames(**ends)
    encode, decode = (type(node, (comfy.nodes[node],), {"hidden": None}) for node in ("FewStepSRVAEEncode", "FewStepSRVAEDecode"))
    encode.hidden = io.HiddenHolder.from_dict({io.Hidden.prompt: prompt, io.Hidden.unique_id: "e"})
    decode.hidden = io.HiddenHolder.from_dict({io.Hidden.prompt: prompt, io.Hidden.unique_id: "d"})
    image, latent = picture(1, height, width), {"samples": torch.ones(1, 4, 4, 6), "fewstep_sr_size": (height, width)}
    for run in (lambda: encode.execute(image, base[1]), lambda: decode.execute(latent, base[1])):
        if refused and (height % 2 or width % 2):
            with pytest.raises(ValueError, match=f"found frames of {width} x {height} pixels for Create Video, expected even sides"):
                run()
        else:
            with torch.inference_mode():
                run()
