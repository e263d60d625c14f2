"""Restore Video: frame by frame what the stages on the graph give, and the rest of the file as it was."""

import importlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

av = pytest.importorskip("av", reason="PyAV is not installed (pip install av)")
TIME_BASE = Fraction(1, 600)
TIMES = (0, 40, 50, 60, 200, 220, 225)
"""Of the frames, in 1/600 s."""


@pytest.fixture(scope="module")
def demo(comfy):
    return {method: comfy.run("FewStepSRDemoLoader", method=method).args[:4] for method in ("OSEDiff", "InvSR")}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A pan with a tone, in FFV1, which changes nothing."""
    path = tmp_path_factory.mktemp("clips") / "clip.mkv"
    photo = np.asarray(Image.open(ROOT / "tests" / "data" / "photos" / "chelsea.png").convert("RGB").resize((41 + len(TIMES), 32)))
    with av.open(str(path), "w") as container:
        video = container.add_stream("ffv1", rate=24)
        video.width, video.height, video.pix_fmt, video.codec_context.time_base = 41, 32, "yuv444p", TIME_BASE
        sound = container.add_stream("aac", rate=48000)
        for i, time in enumerate(TIMES):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(photo[:, i : i + 41]), format="rgb24").reformat(format="yuv444p")
            frame.pts, frame.time_base = time, TIME_BASE
            container.mux(video.encode(frame))
        container.mux(video.encode())
        for start in range(0, 24000, 1024):
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            tone.rate, tone.pts = 48000, start
            container.mux(sound.encode(tone))
        container.mux(sound.encode())
    return path


def video_of(path: Path):
    return importlib.import_module("comfy_api.latest").InputImpl.VideoFromFile(str(path))


def read(path: Path):
    return importlib.import_module("fewstep_sr.video.frames").Clip(path).read()


def frames_of(path: str) -> tuple[list[Fraction], np.ndarray]:
    with av.open(path) as container:
        found = [(frame.pts * frame.time_base, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return [time for time, _ in found], np.stack([picture for _, picture in found])


def restore(comfy, demo, method, video, **options):
    model, vae, positive, predictor = demo[method]
    extra = {"noise_predictor": predictor, "color_fix": "wavelet"} if method == "InvSR" else {}
    return comfy.run("FewStepSRVideo", video=video, model=model, positive=positive, vae=vae, **extra, **options)[0]


def on_the_graph(comfy, demo, method, image):
    model, vae, positive, predictor = demo[method]
    enlarged = comfy.run("ImageScaleBy", image=image, upscale_method="bicubic", scale_by=2.0)[0]
    latent = comfy.run("FewStepSRVAEEncode", pixels=enlarged, vae=vae)[0]
    if method == "OSEDiff":
        latent = comfy.run("FewStepSROneStep", model=model, positive=positive, latent=latent)[0]
    else:
        sigmas = comfy.run("FewStepScheduler", model=model)[0]
        noise, _ = comfy.run("InvSRStartState", noise_predictor=predictor, image=image, latent=latent, sigmas=sigmas).args
        guider = comfy.run("BasicGuider", model=model, conditioning=positive)[0]
        sampler = comfy.run("KSamplerSelect", sampler_name="euler")[0]
        latent = comfy.run("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent)[0]
    decoded = comfy.run("FewStepSRVAEDecode", samples=latent, vae=vae)[0]
    return comfy.run("FewStepSRColorFix", image=decoded, reference=image, method="adain" if method == "OSEDiff" else "wavelet")[0]


@pytest.mark.parametrize("method", ["OSEDiff", "InvSR"])
def test_frames_are_those_of_the_graph(comfy, demo, clip, method):
    """In groups of three of seven frames: times, sound and the odd side's last column, too."""
    result = restore(comfy, demo, method, video_of(clip), frames=3, crf=1.0)
    times, pictures = frames_of(result.get_stream_source())
    assert times == frames_of(str(clip))[0]
    assert pictures.shape == (7, 64, 82, 3)
    source = torch.cat([frame for *_, frame in read(clip)]).movedim(1, -1)
    expected = on_the_graph(comfy, demo, method, source).numpy() * 255
    assert np.abs(pictures - expected).mean() < 2.0  # 4:2:0
    with av.open(str(clip)) as before, av.open(result.get_stream_source()) as after:
        sounds = [[bytes(packet) for packet in container.demux(audio=0) if packet.size] for container in (before, after)]
    assert sounds[0] == sounds[1] != []


def test_a_part_and_what_was_never_a_file(comfy, demo, clip):
    """Trim Video's part alone is restored, and so are frames from memory."""
    whole = video_of(clip)
    part = restore(comfy, demo, "OSEDiff", whole.as_trimmed(50 / 600, 160 / 600, strict_duration=False))
    times, pictures = frames_of(part.get_stream_source())
    expected = on_the_graph(comfy, demo, "OSEDiff", torch.cat([frame for *_, frame in read(clip)])[2:5].movedim(1, -1)).numpy() * 255
    assert times == [0, Fraction(17, 1000), Fraction(250, 1000)] and np.abs(pictures - expected).mean() < 2.5  # at 50, 60 and 200 of 600
    with av.open(part.get_stream_source()) as container:
        sound = [float(packet.pts * packet.time_base) for packet in container.demux(audio=0) if packet.size]
    assert 0 <= sound[0] < 0.03 and 0.2 < sound[-1] < 0.28
    latest = importlib.import_module("comfy_api.latest")

    def made(width):
        components = latest.Types.VideoComponents(images=torch.rand(3, 16, width, 3), audio=None, frame_rate=Fraction(8))
        return latest.InputImpl.VideoFromComponents(components)

    assert frames_of(restore(comfy, demo, "OSEDiff", made(18)).get_stream_source())[1].shape == (3, 32, 36, 3)
    with pytest.raises(ValueError, match="video: found frames of 17 x 16 pixels that were never a file"):
        restore(comfy, demo, "OSEDiff", made(17))


def test_an_interrupt_leaves_nothing(comfy, demo, clip, monkeypatch):
    management = importlib.import_module("comfy.model_management")
    temporary = Path(importlib.import_module("folder_paths").get_temp_directory())
    before = set(temporary.iterdir())
    looks = []

    def stop():
        looks.append(1)
        if len(looks) > 20:
            raise management.InterruptProcessingException()

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(management.InterruptProcessingException):
        restore(comfy, demo, "OSEDiff", video_of(clip), frames=1)
    assert set(temporary.iterdir()) == before


def test_refused(comfy, demo, clip, tmp_path):
    model, vae, positive, predictor = demo["InvSR"]
    wired = {"video": video_of(clip), "model": model, "positive": positive, "vae": vae}
    with pytest.raises(ValueError, match="model: found no adapter of a few-step method"):
        comfy.run("FewStepSRVideo", **wired)
    with pytest.raises(ValueError, match="noise_predictor: found one, and OSEDiff's adapter"):
        comfy.run("FewStepSRVideo", **{**wired, "model": demo["OSEDiff"][0]}, noise_predictor=predictor)
    with pytest.raises(ValueError, match="frames: found 0"):
        comfy.run("FewStepSRVideo", **wired, noise_predictor=predictor, frames=0)
    (tmp_path / "no.mp4").write_text("no video")
    with pytest.raises(ValueError, match="video: it cannot be read as a video"):
        comfy.run("FewStepSRVideo", **{**wired, "video": video_of(tmp_path / "no.mp4")}, noise_predictor=predictor)


def test_an_adapter_for_each_image_is_refused(comfy, demo, clip):
    from types import SimpleNamespace

    s3diff = importlib.import_module("fewstep_sr.methods").METHODS["s3diff"]
    model = demo["OSEDiff"][0].clone()
    model.set_attachments("fewstep_sr_per_image", SimpleNamespace(method=s3diff))
    with pytest.raises(ValueError, match="model: found S3Diff's adapter, which is another one for each image.*--method s3diff"):
        comfy.run("FewStepSRVideo", video=video_of(clip), model=model, positive=demo["OSEDiff"][2], vae=demo["OSEDiff"][1])
