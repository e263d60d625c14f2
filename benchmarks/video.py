"""Video: memory over a long clip, and runs that are killed and begun again.

    python benchmarks/video.py --minutes 10 --cuts 10

The clip is made of a photo of the tests, moved by a pixel a frame, under grain, 5 frames a second of 32 x 32 pixels, with a tone; the miniature enlarges it twice. Runs are ended
by SIGKILL at random moments, seeded, until one is whole, and compared with one that was left alone, packet for packet, in a lossless codec (FFV1), so that any bit of a frame counts,
or in the one that --codec names; every second one averages over time (--steady), as does the long clip.
"""

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
FPS, SIZE = 5, (32, 32)


def write_clip(path: Path, seconds: float) -> None:
    photo = np.asarray(Image.open(ROOT / "tests" / "data" / "photos" / "chelsea.png").convert("RGB").resize((SIZE[0] * 4, SIZE[1])))
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS)
        video.width, video.height = SIZE
        sound = container.add_stream("aac", rate=48000)
        draw = np.random.default_rng(1)
        for i in range(round(seconds * FPS)):
            picture = np.roll(photo, -i, 1)[:, : SIZE[0]] + draw.normal(0, 4, (SIZE[1], SIZE[0], 3))
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        step = 1024
        for start in range(0, round(seconds * 48000), step):
            tone = (np.sin(np.arange(start, start + step) / 20) * 0.2).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(np.stack([tone, tone]), format="fltp", layout="stereo")
            frame.rate, frame.pts = 48000, start
            container.mux(sound.encode(frame))
        container.mux(sound.encode())


def upscale(clip: Path, out: Path, words: list[str]) -> None:
    from pipelines.cli import main

    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (to the end)
    main(["upscale", str(clip), "-o", str(out), "--demo", "--scale", "2", "--device", "cpu", "--segment", "10", *words])


def start(clip: Path, out: Path, words: list[str]) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=upscale, args=(clip, out, words), daemon=True)
    process.start()
    return process


def content(path: Path) -> list[tuple]:
    with av.open(str(path)) as container:
        return [(packet.stream_index, packet.pts, packet.dts, bytes(packet)) for packet in container.demux() if packet.size]


def memory(folder: Path, minutes: float) -> None:
    clip, out = folder / "long.mp4", folder / "long_x2.mp4"
    write_clip(clip, 60 * minutes)
    begin, samples = time.monotonic(), []
    process = start(clip, out, ["--steady"])
    status = psutil.Process(process.pid)
    while process.is_alive():
        try:
            samples.append(status.memory_info().rss / 2**20)
        except psutil.NoSuchProcess:
            break
        process.join(0.5)
    tenths = [max(part) for part in np.array_split(np.array(samples), 10) if len(part)]
    frames = sum(1 for packet in content(out) if packet[0] == 0)
    print(f"{minutes:g} minutes, {frames} frames in {time.monotonic() - begin:.0f} s; greatest resident memory (MiB) in each tenth of the run:")
    print("  " + " ".join(f"{tenth:.0f}" for tenth in tenths))


def cuts(folder: Path, number: int, codec: str) -> None:
    encoding = ["--codec", codec, "--pixel-format", "yuv444p" if codec == "ffv1" else "yuv420p"]
    clip = folder / "short.mp4"
    write_clip(clip, 12)
    whole, seconds = {}, {}
    for steady, words in enumerate(([], ["--steady"])):
        begin = time.monotonic()
        start(clip, folder / f"whole_{steady}.mkv", [*words, *encoding]).join()
        whole[steady], seconds[steady] = content(folder / f"whole_{steady}.mkv"), time.monotonic() - begin
    assert whole[0] != whole[1]
    start(clip, folder / "again.mkv", encoding).join()
    print(f"two runs that are left alone: {'the same' if content(folder / 'again.mkv') == whole[0] else 'DIFFERENT'}", flush=True)
    draw, same, kills = random.Random(1), 0, 0
    for i in range(number):
        out, words, expected = folder / f"cut_{i}.mkv", ["--steady"] * (i % 2) + encoding, whole[i % 2]
        while True:
            process = start(clip, out, words)
            process.join(seconds[i % 2] * draw.uniform(0.2, 1.2))
            if not process.is_alive():
                break
            process.kill()
            process.join()
            kills += 1
            assert not out.exists() or content(out) == expected, "a half result is there"
        same += content(out) == expected
        left = [path.name for path in folder.iterdir() if path.name.startswith(f".cut_{i}")]
        print(
            f"run {i + 1}{' --steady' * (i % 2)}: {'the same' if content(out) == expected else 'DIFFERENT'}; left over: {left or 'nothing'}",
            flush=True,
        )
    print(f"{same} of {number} runs gave the uncut run's file, packet for packet, after {kills} kills in all ({seconds[0]:.1f} s uncut)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of the long clip; 0: not")
    parser.add_argument("--cuts", type=int, default=10, help="runs that are killed")
    parser.add_argument("--codec", default="ffv1", help="of the runs that are killed: ffv1, h264, hevc, av1 or vp9")
    parser.add_argument("--stub", action="store_true", help="pixels are repeated in place of the networks, whose memory is the same for each frame")
    arguments = parser.parse_args()
    import torch

    from pipelines.upscale import Upscaler  # once, for all the processes that are forked off

    if arguments.stub:
        Upscaler.restore = lambda self, image: image.repeat_interleave(2, -1).repeat_interleave(2, -2)

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.cuts:
            cuts(Path(folder), arguments.cuts, arguments.codec)
        if arguments.minutes:
            memory(Path(folder), arguments.minutes)


if __name__ == "__main__":
    main()
