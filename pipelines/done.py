"""What a run finds in its results' places: results of the same settings, of others, and files that are not its own."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep_sr.files import require_room
from fewstep_sr.video.formats import CONTAINERS, is_video

from .jobs import Job
from .pictures.record import make_record, read_record, read_video_record, recorded_settings, same_result
from .settings import Settings

_LISTED = 5


@dataclass
class Results:
    """Looks at the results' places. Call it with a job: whether the job is done.

    A result is done where its own record names the same settings and source. A single file that the user has named is done again in any case.
    """

    settings: Settings
    jobs: Sequence[Job]
    unknown: list[Path] = field(default_factory=list)
    """Files without a record, which are left as they are."""
    other: list[tuple[Path, str]] = field(default_factory=list)
    """Results of other settings, which are done again, and what differs."""

    def record(self, job: Job) -> str:
        return make_record(settings_to_record(self.settings, job.target) | self._frames(job), job.source)

    def _frames(self, job: Job) -> dict[str, Any]:
        """What a video made of pictures depends on beside."""
        if not job.frames:
            return {}
        return {"fps": str(self.settings.fps), "frames": len(job.frames), "bytes": sum(path.stat().st_size for path in job.frames)}

    def __call__(self, job: Job) -> bool:
        """Raises OSError or ValueError where no result can be written there."""
        if self.settings.overwrite or not job.target.is_file() or job.target.stat().st_size == 0:
            self._require_room(job)
            return False
        found, wanted = (read_video_record if is_video(job.target) else read_record)(job.target), self.record(job)
        named = len(self.jobs) == 1 and job.named
        if found is None:
            if named:
                raise FileExistsError(f"{job.target} exists and was not made by this program. Give another name with -o, or --overwrite.")
            self.unknown.append(job.target)
            return True
        if not same_result(found, wanted):
            self.other.append((job.target, _difference(recorded_settings(found), recorded_settings(wanted))))
        elif not named:
            return True
        self._require_room(job)
        return False

    def _require_room(self, job: Job) -> None:
        try:
            require_room(job.target)
        except ValueError:  # about this name alone: the others are done, and it is reported with them
            if len(self.jobs) == 1:
                raise

    def report(self, done: int) -> None:
        """Say on stderr what was found."""
        if done:
            print(f"{done} of {len(self.jobs)} are done already and left as they are (--overwrite does them again).", file=sys.stderr)
        if self.unknown:
            print(f"{len(self.unknown)} of these hold no record of how they were made: {listed(self.unknown)}.", file=sys.stderr)
        if self.other:
            path, difference = self.other[0]
            if len(self.other) == 1:
                print(f"{path.name} was made with other settings and is done again: {difference}.", file=sys.stderr)
            else:
                print(f"{len(self.other)} were made with other settings and are done again ({path.name}: {difference}).", file=sys.stderr)


def settings_to_record(settings: Settings, target: Path) -> dict[str, Any]:
    """What a result depends on, by the command line's names. Of paths the names alone: results are passed on.

    Not the device and how its memory is used: machines of several kinds may share a folder.
    """
    record = {
        "method": settings.method.key,
        "scale": None if settings.sized else settings.scale,
        "long_side": settings.long_side,
        "short_side": settings.short_side,
        "megapixels": settings.megapixels,
        "seed": settings.seed,
        "tile": settings.tile,
        "color_fix": settings.color_fix or "none",
        "prompt": settings.prompt,
        "negative_prompt": settings.negative_prompt if settings.cfg != 1 else None,
        "cfg": settings.cfg,
        "dtype": settings.dtype,
        "demo": settings.demo or None,
        "base": _name(settings.base),
        "weights": _name(settings.weights),
        "decoder": _name(settings.decoder),
        "quality": settings.quality if target.suffix.lower() in (".jpg", ".jpeg", ".jpe", ".jfif", ".webp") else None,
        "steady": settings.steady or None,
        **{name: _name(value) for name, value in settings.options.items()},
    }
    if target.suffix.lower() in CONTAINERS:
        record |= {"codec": settings.codec, "crf": settings.crf, "pixel_format": settings.pixel_format}
    return {name: value for name, value in record.items() if value not in (None, (), [])}


def _name(value: Any) -> Any:
    """A path's last part, with the size of a file, which tells versions apart."""
    if isinstance(value, Path) or (isinstance(value, str) and ("/" in value or "\\" in value or Path(value).is_file())):
        path = Path(value).expanduser()
        return f"{path.name} ({path.stat().st_size} bytes)" if path.is_file() else path.name
    return value


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    changed = [f"{name} {old.get(name, '-')} -> {new.get(name, '-')}" for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return ", ".join(changed) or "another source"


def listed(paths: Sequence[Path]) -> str:
    """The names of a few files."""
    names = ", ".join(path.name for path in paths[:_LISTED])
    return names if len(paths) <= _LISTED else f"{names} and {len(paths) - _LISTED} more"
