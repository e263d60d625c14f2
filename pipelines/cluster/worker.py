"""What runs on a GPU of the cluster: a loaded pipeline, through which blocks of pictures go."""

import logging
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fewstep_sr.video.formats import is_video

from ..batch import Written, meets_all, reason
from ..done import settings_to_record
from ..jobs import Job
from ..pictures.record import make_record
from ..pictures.write import output_error
from ..settings import Settings
from .files import fetch, is_remote, open_address, put
from .listing import Item


@dataclass(frozen=True)
class Row:
    """What became of a picture: bytes of its result and notes on it, or the reason why there is none."""

    item: Item
    bytes: int = 0
    notes: tuple[str, ...] = ()
    error: str | None = None


class Worker:
    """An actor. Nothing is loaded before :meth:`start`, whose error reaches the driver as it is."""

    def __init__(self, settings: Settings):
        self.settings = settings

    def start(self) -> None:
        from accelerate import PartialState

        from ..upscale import Upscaler, find_files

        logging.getLogger("pipelines").setLevel(logging.WARNING)
        state = PartialState(cpu=self.settings.device == "cpu")
        self.upscaler = Upscaler(self.settings, *find_files(self.settings, state), state, self._record)

    def _record(self, job: Job) -> str:
        return make_record(settings_to_record(self.settings, job.target), job.source)

    def work(self, block: Sequence[Item]) -> list[Row]:
        """Restore pictures. Those of other file systems are fetched, and put back, while others are at work.

        Raises:
            OutputError, RuntimeError: the output cannot be written, or the GPU has failed: no other picture would fare better here.
        """
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(4) as pool:
            sources = [pool.submit(fetch, item.source, Path(folder, f"{number}")) for number, item in enumerate(block)]
            put_back: list[Row | Future[Row]] = []
            for number, (item, source) in enumerate(zip(block, sources, strict=True)):
                try:
                    _require_picture(item)
                    target = Path(folder, f"{number}.result", PurePosixPath(item.target).name) if is_remote(item.target) else Path(item.target)
                    written = self.upscaler.work(Job(source.result(), target))
                except Exception as error:  # whatever is wrong with one picture, the others are done
                    if meets_all(error):
                        raise
                    put_back.append(Row(item, error=reason(error)))
                else:
                    put_back.append(pool.submit(_put_back, item, written))
            return [row.result() if isinstance(row, Future) else row for row in put_back]


def _require_picture(item: Item) -> None:
    if is_video(Path(item.source)):
        raise ValueError("it is a video, expected pictures. Do videos without --ray, a machine for each.")
    if item.source == item.target:
        raise ValueError("the result would replace the picture itself. Give another folder with -o.")


def _put_back(item: Item, written: Written) -> Row:
    if is_remote(item.target):
        filesystem, path = open_address(item.target)
        try:
            put(filesystem, written.path.read_bytes(), path)
        except OSError as error:
            raise output_error(Path(item.target), error) from error
    return Row(item, written.bytes, written.notes)
