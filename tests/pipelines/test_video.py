"""Videos from file to file, on the miniature: what is in the container stays, and a run that was cut goes on."""

import os
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

pytest.importorskip("diffusers")

from fewstep_sr.methods import METHODS
from fewstep_sr.video import formats
from fewstep_sr.video.encoding import Encoding
from fewstep_sr.video.frames import SWSCALE, Clip, Colors
from fewstep_sr.video.segments import Segments
from pipelines.cli import main
from pipelines.jobs import list_jobs
from pipelines.video import run
from pipelines.video.pictures import PictureFrames

av = pytest.importorskip("av", reason="PyAV is not installed (pip install av)")

PHOTO = ROOT / "tests" / "data" / "photos" / "chelsea.png"
TIME_BASE = Fraction(1, 600)
VARIABLE = (0, 40, 50, 60, 200, 220, 225, 300, 310, 400)
"""Times of ten frames, in 1/600 s."""


def pictures(number=len(VARIABLE), size=(48, 36), grain=0.0) -> list[np.ndarray]:
    """A pan; with ``grain``, its standard deviation, the first picture again and again under it."""
    photo = np.asarray(Image.open(PHOTO).convert("RGB").resize((size[0] + number, size[1])))
    if not grain:
        return [np.ascontiguousarray(photo[:, i : i + size[0]]) for i in range(number)]
    draw = np.random.default_rng(1)
    return [(photo[:, : size[0]] + draw.normal(0, grain, (size[1], size[0], 3))).clip(0, 255).astype(np.uint8) for _ in range(number)]


def write_clip(
    path: Path,
    *,
    size=(48, 36),
    times=VARIABLE,
    pixel_format="yuv420p",
    colors=Colors(),
    codec="libx264",
    sound=True,
    subtitles=False,
    matrix=None,
    grain=0.0,
) -> Path:
    """A clip with a tone of a second, and (in Matroska) a line of text."""
    if subtitles and not hasattr(av.container.OutputContainer, "add_mux_stream"):
        pytest.skip("this PyAV writes no subtitles of its own")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options={"crf": "4"} if codec == "libx264" else {})
        stream.width, stream.height, stream.pix_fmt = *size, pixel_format
        context = stream.codec_context
        context.time_base, context.sample_aspect_ratio = TIME_BASE, Fraction(4, 3)
        context.colorspace, context.color_range, context.color_primaries, context.color_trc = (
            colors.matrix,
            colors.range,
            colors.primaries,
            colors.transfer,
        )
        audio = container.add_stream("aac", rate=48000) if sound else None
        if audio is not None:
            audio.metadata["language"] = "fra"
        if matrix is not None:
            stream.set_display_rotation(matrix)
        container.metadata["title"] = "Cat"
        container.metadata["comment"] = "my own"
        text = container.add_mux_stream("srt") if subtitles else None
        for time, picture in zip(times, pictures(len(times), size, grain), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format=pixel_format,
                dst_colorspace=colors.swscale if colors.matrix != 2 else 5,
                src_color_range=2,
                dst_color_range=colors.range or 1,
                interpolation=SWSCALE,
            )
            frame.pts, frame.time_base = time, TIME_BASE
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if text is not None:
            packet = av.Packet(b"A cat.")
            packet.stream, packet.time_base, packet.pts, packet.dts, packet.duration = text, Fraction(1, 1000), 100, 100, 300
            container.mux(packet)
        if audio is not None:
            tone = av.AudioFrame.from_ndarray((np.sin(np.arange(48000) / 20) * 8000).astype(np.int16)[None], format="s16", layout="mono")
            tone.rate, tone.pts = 48000, 0
            for part in av.AudioResampler("fltp", "stereo", 48000).resample(tone):
                container.mux(audio.encode(part))
            container.mux(audio.encode())
    return path


def decoded(path: Path) -> list:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def packets(path: Path, kind: str) -> list[tuple]:
    with av.open(str(path)) as container:
        streams = getattr(container.streams, kind)
        return [(float(p.pts * p.time_base), bytes(p)) for p in container.demux(streams[0]) if p.size]


def upscale(*words) -> int:
    return main(["upscale", *map(str, words), "--demo", "--scale", "2", "--device", "cpu"])


@pytest.fixture
def doubled(monkeypatch):
    """Pixels repeated in place of the networks, for what is about files alone."""
    from pipelines.upscale import Upscaler

    monkeypatch.setattr(Upscaler, "restore", lambda self, image: image.repeat_interleave(2, -1).repeat_interleave(2, -2))


def test_everything_of_the_container_stays(doubled, tmp_path, capsys):
    colors = Colors(9, 1, 9, 16)
    clip = write_clip(tmp_path / "clip.mkv", subtitles=True, colors=colors)
    assert upscale(clip, "-o", tmp_path / "out.mkv", "--segment", "4") == 0
    with av.open(str(tmp_path / "out.mkv")) as container:
        video, audio, text = container.streams
        assert (video.width, video.height, video.codec_context.name) == (96, 72, "h264")
        assert video.sample_aspect_ratio == Fraction(4, 3)
        context = video.codec_context
        assert (context.colorspace, context.color_range, context.color_primaries, context.color_trc) == (9, 1, 9, 16)
        assert audio.metadata["language"] == "fra" and text.type == "subtitle"
        metadata = {key.lower(): value for key, value in container.metadata.items()}
        assert metadata["title"] == "Cat" and metadata["comment"].startswith("my own\nComfyUI-FewStepSR ")
    assert packets(clip, "audio") == packets(tmp_path / "out.mkv", "audio")
    assert packets(clip, "subtitles") == packets(tmp_path / "out.mkv", "subtitles")
    assert not list(tmp_path.glob(".*")), "the segments are gone"


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="this system has no real-time priorities to ask for")
def test_encoders_take_no_real_time_priority(doubled, tmp_path):
    """As SVT-AV1 does where root runs it, in all its threads."""
    policies = lambda: {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")}  # noqa: E731
    before = policies()
    clip = write_clip(tmp_path / "clip.mkv", size=(64, 64), sound=False)
    assert upscale(clip, "-o", tmp_path / "out.webm") == 0
    assert policies() == before
    with av.open(str(tmp_path / "out.webm")) as container:
        assert container.streams.video[0].codec_context.name in ("av1", "libdav1d")
    assert [frame.time for frame in decoded(tmp_path / "out.webm")] == pytest.approx([frame.time for frame in decoded(clip)], abs=1e-3)


def test_damaged_sound_is_left_out_and_named(doubled, tmp_path, capsys):
    """A part of the packets is no AAC any more, which MP4 takes in another form than a transport stream has it."""
    clip = write_clip(tmp_path / "clip.ts")
    raw = bytearray(clip.read_bytes())
    headers = [place for place in range(len(raw)) if raw.startswith(b"\xff\xf1", place)]
    for place in headers[len(headers) // 3 : len(headers) // 2]:
        raw[place : place + 2] = b"\x12\x34"
    clip.write_bytes(raw)
    assert upscale(clip, "-o", tmp_path / "out.mp4") == 0
    assert "damaged packets of its stream (audio, aac) are left out" in capsys.readouterr().err
    assert len(packets(tmp_path / "out.mp4", "audio")) >= len(headers) // 2 and len(decoded(tmp_path / "out.mp4")) == len(VARIABLE)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("suffix", [".mp4", *(pytest.param(suffix, marks=pytest.mark.slow) for suffix in (".mkv", ".mov"))])
def test_variable_times_stay(doubled, tmp_path, suffix):
    """Over segments whose encoders each begin anew, with frames that are decoded in another order."""
    clip = write_clip(tmp_path / f"clip{suffix}", sound=False)
    assert upscale(clip, "-o", tmp_path / f"out{suffix}", "--segment", "4") == 0
    expected, found = decoded(clip), decoded(tmp_path / f"out{suffix}")
    assert [frame.time for frame in found] == pytest.approx([frame.time for frame in expected], abs=1e-9)
    for before, after in zip(expected, found, strict=True):  # each frame at its own time
        small = after.to_ndarray(format="rgb24")[::2, ::2].astype(int)
        assert np.abs(small - before.to_ndarray(format="rgb24")).mean() < 6


@pytest.mark.parametrize("suffix", [".mov", pytest.param(".mkv", marks=pytest.mark.slow)])
def test_prores(doubled, tmp_path, suffix):
    """Which the container of the other codecs' segments does not hold."""
    clip = write_clip(tmp_path / "clip.mov", sound=False)
    assert upscale(clip, "-o", tmp_path / f"out{suffix}", "--codec", "prores", "--segment", "4") == 0
    expected, found = decoded(clip), decoded(tmp_path / f"out{suffix}")
    assert [frame.time for frame in found] == pytest.approx([frame.time for frame in expected], abs=1e-9 if suffix == ".mov" else 1e-3)
    assert {frame.format.name for frame in found} == {"yuv422p10le"}
    for before, after in zip(expected, found, strict=True):
        small = after.to_ndarray(format="rgb24")[::2, ::2].astype(int)
        assert np.abs(small - before.to_ndarray(format="rgb24")).mean() < 6


def test_the_stream_ends_when_its_source_ends(doubled, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", sound=False)
    assert upscale(clip, "-o", tmp_path / "out.mp4", "--segment", "4") == 0
    ends = []
    for path in (clip, tmp_path / "out.mp4"):
        frame = decoded(path)[-1]
        with av.open(str(path)) as container:
            video = container.streams.video[0]
            ends.append((float(video.duration * video.time_base), frame.time + float(frame.duration * frame.time_base)))
    assert ends[1][0] == pytest.approx(ends[0][1], abs=1 / 1000)


@pytest.mark.parametrize("colors", [Colors(1, 1), Colors(1, 2), Colors(6, 1, 6, 6), Colors(9, 1, 9, 14), Colors(2, 0, 2, 2)])
def test_colours_stay(tmp_path, colors):
    """Read as what they are, written as what they were: a clip copied frame by frame has the pictures' colours, and names its matrix."""
    clip = Clip(write_clip(tmp_path / "clip.mp4", colors=colors, pixel_format="yuv444p", sound=False))
    written = Colors(6, 1, 2, 2) if colors.matrix == 2 else colors
    assert clip.colors == written  # a small clip that does not say is BT.601, and its result, which may be large, says so
    for (_, _, image), picture in zip(clip.read(), pictures(), strict=True):
        difference = image[0].permute(1, 2, 0).numpy() * 255 - picture
        assert np.abs(difference).mean() < 2.0 and np.abs(difference.mean((0, 1))).max() < (
            1.0 if colors.range == 2 else 0.5
        )  # swscale's own in full range


def test_sixteen_bits_of_white_and_black(tmp_path):
    """No offset in either direction: swscale counts white as 65280."""

    class Source:
        colors, time_base = Colors(), TIME_BASE

    ramp = torch.linspace(0, 1, 64).expand(3, 16, 64)
    for pixel_format, most in (("yuv444p", 1.0), ("yuv420p10le", 0.2)):
        frame = Encoding("h264", None, pixel_format, (64, 16), Source()).frame(ramp, 0, 1)
        luma = np.frombuffer(frame.planes[0], np.uint16 if "10" in pixel_format else np.uint8)
        luma = luma.reshape(16, -1)[0, :64] / (4 if "10" in pixel_format else 1)
        error = luma - (16 + 219 * ramp[0, 0].numpy())
        assert np.abs(error).max() < most and abs(error.mean()) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["h264", "hevc", "av1", "vp9"])
def test_the_same_frames_give_the_same_packets(tmp_path, codec):
    """So that a run that was cut ends in the file of one that was not. 144 pixels are 9 macroblocks: no multiple of what AVX-512 takes at once."""
    (tmp_path / "frames").mkdir()
    for i, picture in enumerate(pictures(40, (144, 128), grain=8)):
        Image.fromarray(picture).save(tmp_path / "frames" / f"{i}.png")
    source = PictureFrames(tmp_path / "frames", tuple(tmp_path / "frames" / f"{i}.png" for i in range(40)), Fraction(24))
    found = []
    for name in ("a", "b", "c"):
        segments = Segments(tmp_path / name, "")
        segments.write(((pts, duration, image[0]) for pts, duration, image in source.read()), Encoding(codec, None, "yuv420p", source.size, source))
        found.append(packets(segments.files[0], "video"))
    assert found[0] == found[1] == found[2]


def test_rotated_clips_become_upright(doubled, tmp_path):
    path = tmp_path / "clip.mp4"
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV writes no display matrix")
    write_clip(path, matrix=90, sound=False)
    clip = Clip(path)
    assert clip.size == (36, 48) and clip.sample_aspect_ratio == Fraction(3, 4)
    frame = decoded(path)[0]
    upright = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
    _, _, image = next(clip.read())
    assert np.abs(image[0].permute(1, 2, 0).numpy() * 255 - upright).mean() < 6
    assert upscale(path, "-o", tmp_path / "out.mp4") == 0
    found = decoded(tmp_path / "out.mp4")[0]
    assert (found.width, found.height, found.rotation) == (72, 96, 0)


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--codec", "hevc", "--pixel-format", "yuv420p10le"], ["--codec", "ffv1", "--pixel-format", "yuv444p"]])
def test_codecs_and_even_sides(tmp_path, words):
    """An odd side gets one more, which is its neighbour repeated."""
    clip = write_clip(tmp_path / "clip.mkv", size=(25, 19), pixel_format="yuv444p", times=(0, 25, 50), sound=False)
    out = tmp_path / "out.mkv"
    assert main(["upscale", str(clip), "-o", str(out), "--demo", "--scale", "3", *words]) == 0
    frames = decoded(out)
    assert [(frame.width, frame.height) for frame in frames] == [(76, 58)] * 3
    assert frames[0].format.name == ([*words, "yuv420p"][3] if words else "yuv420p")
    edge = frames[0].to_ndarray(format="rgb24")[:, -2:].astype(int)
    assert np.abs(edge[:, 0] - edge[:, 1]).mean() < 4


class Cut(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("after", [pytest.param(1, marks=pytest.mark.slow), 5, pytest.param(9, marks=pytest.mark.slow)])
def test_a_run_that_was_cut_goes_on_at_the_last_whole_segment(tmp_path, monkeypatch, after):
    from pipelines.upscale import Upscaler

    calls = []

    def restore(self, image):
        if len(calls) == limit:
            raise Cut
        calls.append(1)
        return image.repeat_interleave(2, -1).repeat_interleave(2, -2)

    monkeypatch.setattr(Upscaler, "restore", restore)
    monkeypatch.setattr(run, "fitting", lambda height, width: 1)
    clip = write_clip(tmp_path / "clip.mp4")
    limit = -1
    assert upscale(clip, "-o", tmp_path / "whole.mp4", "--segment", "3") == 0
    calls.clear()
    limit = after
    assert upscale(clip, "-o", tmp_path / "out.mp4", "--segment", "3") == 130
    assert not (tmp_path / "out.mp4").exists()
    limit = -1
    assert upscale(clip, "-o", tmp_path / "out.mp4", "--segment", "3") == 0
    assert len(calls) == after + 10 - after // 3 * 3
    for kind in ("video", "audio"):
        assert packets(tmp_path / "out.mp4", kind) == packets(tmp_path / "whole.mp4", kind)
    assert upscale(clip, "-o", tmp_path / "out.mp4", "--segment", "3") == 0  # named: done again, as a picture is
    assert len(calls) == after + 10 - after // 3 * 3 + 10


@pytest.mark.slow
def test_frames_go_through_the_networks_in_the_same_groups_after_a_cut(tmp_path, monkeypatch):
    """What goes through together changes the last bits: here, more than those."""
    from pipelines.upscale import Upscaler

    def restore(self, image):
        if limit and self.calls == limit:
            raise Cut
        self.calls += 1
        return image.repeat_interleave(2, -1).repeat_interleave(2, -2) * (1 - 0.1 * len(image))

    monkeypatch.setattr(Upscaler, "restore", restore)
    monkeypatch.setattr(Upscaler, "calls", 0, raising=False)
    monkeypatch.setattr(run, "fitting", lambda height, width: 2)
    clip = write_clip(tmp_path / "clip.mp4", sound=False)
    limit = 0
    assert upscale(clip, "-o", tmp_path / "whole.mp4", "--segment", "3") == 0
    limit = 2
    assert upscale(clip, "-o", tmp_path / "out.mp4", "--segment", "3") == 130
    limit = 0
    assert upscale(clip, "-o", tmp_path / "out.mp4", "--segment", "3") == 0
    assert packets(tmp_path / "out.mp4", "video") == packets(tmp_path / "whole.mp4", "video")


@pytest.mark.slow
@pytest.mark.parametrize("after", [2, 5, 8])
def test_steadied_frames_flicker_less_and_are_the_same_after_a_cut(doubled, tmp_path, monkeypatch, after):
    clip = write_clip(tmp_path / "clip.mkv", codec="ffv1", pixel_format="yuv444p", sound=False, grain=8)
    words = ("--segment", "3", "--codec", "ffv1", "--pixel-format", "yuv444p")
    assert upscale(clip, "-o", tmp_path / "plain.mkv", *words) == 0
    assert upscale(clip, "-o", tmp_path / "whole.mkv", *words, "--steady") == 0
    plain, steadied = ([frame.to_ndarray(format="rgb24").astype(int) for frame in decoded(tmp_path / f"{name}.mkv")] for name in ("plain", "whole"))
    assert np.array_equal(plain[0], steadied[0])
    flicker = [np.abs(frames[-1] - frames[-2]).mean() for frames in (plain, steadied)]
    assert flicker[1] < 0.4 * flicker[0]

    write = run.Segments.write

    def cut(self, frames, encoding):
        if len(self.pts) > after:
            raise Cut
        write(self, frames, encoding)

    monkeypatch.setattr(run.Segments, "write", cut)
    assert upscale(clip, "-o", tmp_path / "out.mkv", *words, "--steady") == 130
    monkeypatch.setattr(run.Segments, "write", write)
    assert upscale(clip, "-o", tmp_path / "out.mkv", *words, "--steady") == 0
    assert packets(tmp_path / "out.mkv", "video") == packets(tmp_path / "whole.mkv", "video")


@pytest.mark.slow
def test_steadied_frames_as_files(doubled, tmp_path):
    clip = write_clip(tmp_path / "clip.mkv", codec="ffv1", pixel_format="yuv444p", sound=False, grain=8)
    assert upscale(clip, "-o", tmp_path / "frames" / "%02d.png", "--steady") == 0
    sixth = tmp_path / "frames" / "06.png"
    expected = np.asarray(Image.open(sixth))
    assert upscale(clip, "-o", tmp_path / "plain" / "%02d.png") == 0
    assert not np.array_equal(expected, np.asarray(Image.open(tmp_path / "plain" / "06.png")))
    sixth.unlink()
    assert upscale(clip, "-o", tmp_path / "frames" / "%02d.png", "--steady") == 0
    assert np.array_equal(expected, np.asarray(Image.open(sixth)))
    assert upscale(tmp_path / "plain", "-o", tmp_path / "back.mkv", "--codec", "ffv1", "--pixel-format", "yuv444p", "--steady") == 0
    assert len(decoded(tmp_path / "back.mkv")) == 10


@pytest.mark.slow
def test_other_settings_begin_anew_and_done_ones_are_left(doubled, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    clips = [write_clip(tmp_path / "in" / f"{name}.mp4", times=(0, 25, 50)) for name in "ab"]
    assert upscale(*clips, "-o", tmp_path / "out") == 0
    assert upscale(*clips, "-o", tmp_path / "out") == 0
    assert "2 of 2 are done already" in capsys.readouterr().err
    assert upscale(*clips, "-o", tmp_path / "out", "--crf", "30") == 0
    assert "made with other settings" in capsys.readouterr().err
    segments = run.Segments(tmp_path / "c.mp4", "one")
    (segments.folder / "000000.nut").write_bytes(b"")
    assert run.Segments(tmp_path / "c.mp4", "two").anew and not (segments.folder / "000000.nut").exists()


@pytest.mark.slow
def test_frames_out_and_in(doubled, tmp_path, capsys):
    clip = write_clip(tmp_path / "clip.mkv", codec="ffv1", pixel_format="yuv444p", sound=False)
    assert upscale(clip, "-o", tmp_path / "frames" / "%04d.png") == 0
    names = sorted(path.name for path in (tmp_path / "frames").iterdir())
    assert names == [f"{i:04d}.png" for i in range(1, 11)]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "frames").iterdir()}
    (tmp_path / "frames" / "0003.png").unlink()
    assert upscale(clip, "-o", tmp_path / "frames" / "%04d.png") == 0
    assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path.name != "0003.png")
    assert (tmp_path / "frames" / "0003.png").is_file()

    for path in list(times):
        path.rename(path.with_name(f"{int(path.stem)}.png"))  # 10.png comes last
    assert upscale(tmp_path / "frames", "-o", tmp_path / "back.mp4", "--fps", "30000/1001") == 0
    frames = decoded(tmp_path / "back.mp4")
    assert [frame.time for frame in frames] == pytest.approx([i * 1001 / 30000 for i in range(10)], abs=1e-4)
    for frame, picture in zip(frames, pictures(), strict=True):
        assert np.abs(frame.to_ndarray(format="rgb24")[::4, ::4].astype(int) - picture).mean() < 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{clip}", "-o", "out.avi"], ".avi is not written"),
        (["{clip}", "-o", "{clip}"], "would replace the video itself"),
        (["{clip}", "-o", "out.png"], "out_%06d.png"),
        (["{clip}", "-o", "%.png"], "expected a pattern"),
        (["{clip}", "{clip}/../photo.png", "-o", "out.mp4"], "for videos and pictures"),
        (["{clip}", "-o", "out.webm", "--codec", "h264"], "ends in .mp4, .m4v, .mov, .mkv"),
        (["{clip}", "-o", "out.mp4", "--crf", "90"], "0 (best) to 51 for h264"),
        (["{clip}", "-o", "out.mov", "--codec", "prores", "--crf", "3"], "prores has one quality"),
        (["{clip}", "-o", "out.mp4", "--codec", "av1", "--pixel-format", "yuv444p"], "yuv420p or yuv420p10le for av1"),
        (["{clip}", "--fps", "0"], "--fps: found 0"),
        (["{clip}", "--segment", "0"], "--segment: found 0"),
        (["{clip}/../photo.png", "--steady"], "--steady: found pictures alone"),
        (["{clip}/..", "-o", "out", "--steady", "--watch"], "--steady: found --watch"),
        (["{clip}", "-o", "out", "--steady", "--ray"], "--steady: found --ray"),
    ],
)
def test_refused_before_any_work(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "tests" / "data" / "chelsea.png", tmp_path / "photo.png")
    clip = write_clip(tmp_path / "clip.mp4", times=(0, 25))
    words = [word.replace("{clip}/..", str(tmp_path)).replace("{clip}", str(clip)) for word in words]
    assert upscale(*words) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "photo.png"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("no video"), "cannot be read as a video"),
        (lambda path: path.write_bytes(b""), "cannot be read as a video"),
        (lambda path: path.write_bytes(write_clip(path).read_bytes()[:2000]), "cannot be read as a video"),
    ],
)
def test_a_file_that_is_no_video_is_named(tmp_path, capsys, make, message):
    make(tmp_path / "clip.mp4")
    assert upscale(tmp_path / "clip.mp4", "-o", tmp_path / "out.mp4") == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out.mp4").exists()


def test_subtitles_that_the_container_does_not_hold_are_said_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "Segments", lambda *_: pytest.fail("work was begun"))
    clip = write_clip(tmp_path / "clip.mkv", subtitles=True)
    assert upscale(clip, "-o", tmp_path / "out.mp4") == 1
    assert "does not go into .mp4. Give a name that ends in .mkv" in capsys.readouterr().err


def test_without_pyav_it_says_what_is_missing(tmp_path, capsys, monkeypatch):
    import sys

    clip = write_clip(tmp_path / "clip.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    assert upscale(clip, "-o", tmp_path / "out.mp4") == 1
    assert "pip install av" in capsys.readouterr().err


def test_names_of_results(tmp_path):
    for name in ("a.mp4", "b.avi"):
        (tmp_path / name).touch()
    jobs = list_jobs([str(tmp_path / "*.*")], tmp_path / "out", ".png")
    assert [job.target.name for job in jobs] == ["a.mp4", "b.mkv"] and all(job.is_video for job in jobs)
    with pytest.raises(FileNotFoundError, match="no images found"):
        list_jobs([str(tmp_path)], tmp_path / "out", None)  # videos in a folder are taken by their names alone


def test_every_codec_has_a_container_and_a_format():
    for key, codec in formats.CODECS.items():
        assert set(codec.containers) <= set(formats.CONTAINERS.values()) and set(codec.pixel_formats) <= set(formats.PIXEL_FORMATS), key


@pytest.mark.slow
def test_the_frames_are_the_pipelines(tmp_path):
    """Each frame is what the picture run makes of it: in groups, with one draw of noise."""
    from pipelines.demo import load_demo

    clip = write_clip(tmp_path / "clip.mkv", codec="ffv1", pixel_format="yuv444p", times=(0, 25, 50), sound=False)
    assert upscale(clip, "-o", tmp_path / "frames" / "%d.png") == 0
    pipeline, prompt_embeds = load_demo("invsr")
    for number, (_, _, image) in enumerate(Clip(clip).read(), 1):
        generator = torch.Generator().manual_seed(12345)
        (expected,) = pipeline(
            image, scale=2, color_fix="wavelet", prompt_embeds=prompt_embeds, generator=generator, output_type="pil", **METHODS["invsr"].demo.call
        ).images
        assert np.abs(np.asarray(expected).astype(int) - np.asarray(Image.open(tmp_path / "frames" / f"{number}.png"))).max() <= 1
