"""A watch over the folders into which a training writes checkpoints: which are complete, and which is measured next."""

from __future__ import annotations

import glob
import os
import stat
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event

from avss_dist.core.errors import AvssError, RunFailed, StorageFull, first_names
from avss_dist.core.text import count_of
from avss_dist.core.watch_end import WatchEnd
from avss_dist.models.checkpoint.locate import natural_key
from avss_dist.models.checkpoint.written import FileState, file_state, file_states, missing_part
from avss_dist.runs.events import LOG_SECONDS
from avss_dist.runs.job_file import RunSpec

SETTLE_SECONDS = 2.0  # in which the files of a complete folder must not change, before it is taken
MOST_NAMED = 20  # folders of a kind that are named at the end


@dataclass(frozen=True)
class Arrival:
    """The runs of a checkpoint that a watch has found. Without runs, the watch has ended.

    Attributes:
        note: a sentence for people, or an empty text.
    """

    specs: tuple[RunSpec, ...] = ()
    note: str = ""


@dataclass
class _Folder:
    """Record of a folder that may become a checkpoint to measure.

    Attributes:
        specs: runs of the folder.
        files: states of its files at the last look.
        since: when these states were seen first, by ``time.monotonic``.
        missing: what it lacks to be complete; an empty text if it is complete.
    """

    specs: tuple[RunSpec, ...]
    files: tuple[FileState, ...] = ()
    since: float = 0.0
    missing: str = ""

    @property
    def path(self) -> str:
        """Path of the folder, as the glob has it."""
        return self.specs[0].model

    def is_settled(self, at: float) -> bool:
        """Whether it is complete, and its files have not changed for `SETTLE_SECONDS`."""
        return not self.missing and at - self.since >= SETTLE_SECONDS

    def is_settling(self, at: float) -> bool:
        """Whether it is complete, and its files have changed a moment ago."""
        return not self.missing and not self.is_settled(at)


@dataclass
class FolderWatch:
    """A watch over the folders that globs match.

    The thread that calls `take` owns all fields. Another thread may call `close`, and `explain` for runs that `take`
    has returned.

    Args:
        specs: runs whose model is a glob of folders.
        end: end of the watch; None watches until `close`.
        seconds: time between two looks at the folders.
    """

    specs: Sequence[RunSpec]
    end: WatchEnd | None = None
    seconds: float = 10.0
    _closed: Event = field(default_factory=Event)
    _folders: dict[str, _Folder] = field(default_factory=dict)  # by path, without those that are taken
    _taken: dict[str, tuple[FileState, ...]] = field(default_factory=dict)  # files of taken folders, by path
    _times_taken: Counter[str] = field(default_factory=Counter)  # by path
    _missed: set[str] = field(default_factory=set)  # folders that were complete, and went before they were taken
    _said_at: float = -LOG_SECONDS

    @property
    def globs(self) -> str:
        """The globs, separated by commas."""
        return ", ".join(dict.fromkeys(spec.model for spec in self.specs))

    def describe(self) -> str:
        """Return sentences that say what is watched, and when the watch ends."""
        text = f"Watching {self.globs}: a look every {self.seconds:g} s."
        if self.end and self.end.minutes:
            text += f" It ends after {self.end.minutes:g} min in which nothing is written."
        if self.end and self.end.checkpoints:
            text += f" It ends after {count_of(self.end.checkpoints, 'checkpoint')}."
        return text

    def close(self) -> None:
        """End the watch: `take` returns."""
        self._closed.set()

    def take(self) -> Arrival:
        """Wait for a complete checkpoint that was not taken yet, and return its runs: those of the newest one."""
        quiet_since = time.monotonic()
        has_waited = False
        while not self._closed.is_set() and not self._has_enough():
            at = time.monotonic()
            if self._look(at):
                quiet_since = at
            settled = [folder for folder in self._folders.values() if folder.is_settled(at)]
            is_settling = any(folder.is_settling(at) for folder in self._folders.values())
            # One that has just come is newer than those that wait, and can be taken in a moment.
            if settled and (has_waited or not is_settling):
                return self._take_newest(settled)
            has_waited = True
            seconds = self.seconds
            if is_settling:
                seconds = SETTLE_SECONDS
            elif self.end and self.end.minutes:
                quiet_seconds = 60 * self.end.minutes - (at - quiet_since)
                if quiet_seconds <= 0:
                    break
                seconds = min(seconds, quiet_seconds)
            self._closed.wait(seconds)
        return Arrival()

    def _has_enough(self) -> bool:
        """Whether as many checkpoints were taken as the end of the watch says."""
        if self.end is None or self.end.checkpoints is None:
            return False
        return self._times_taken.total() >= self.end.checkpoints

    def _take_newest(self, settled: Sequence[_Folder]) -> Arrival:
        """Take the folder that was written last. Of those that were there at the first look, names decide."""
        newest = max(settled, key=lambda folder: (folder.since, natural_key(Path(folder.path).name), folder.path))
        del self._folders[newest.path]
        self._times_taken[newest.path] += 1
        times = self._times_taken[newest.path]
        specs = []
        for spec in newest.specs:
            self._taken[spec.model] = newest.files
            if times > 1:
                spec = replace(spec, name=f"{spec.name}, written again ({times})")
            specs.append(spec)
        note = ""
        waiting = len(settled) - 1
        if waiting and time.monotonic() - self._said_at >= LOG_SECONDS:
            self._said_at = time.monotonic()
            note = f"{count_of(waiting, 'complete checkpoint')} waiting; the newest is first: {newest.path}"
        return Arrival(tuple(specs), note)

    def _look(self, at: float) -> bool:
        """Look at all folders. Returns whether one has come, or was written to, since the last look."""
        specs_by_path = self._match()
        for path in self._folders.keys() - specs_by_path.keys():
            if not self._folders.pop(path).missing:
                self._missed.add(path)
        has_changed = False
        for path, specs in specs_by_path.items():
            if self._is_taken(path):
                continue
            self._missed.discard(path)
            folder = self._folders.setdefault(path, _Folder(specs))
            folder.missing = missing_part(Path(path), pickles=specs[0].settings.allow_pickle)
            files = folder.files
            try:
                files = file_states(Path(path))
            except OSError as error:
                folder.missing = f"it cannot be read ({error.strerror})"
            if files != folder.files:
                folder.files = files
                folder.since = at
                has_changed = True
        return has_changed

    def _match(self) -> dict[str, tuple[RunSpec, ...]]:
        """Return the runs of each folder that the globs match, by path.

        A folder that a glob matches by two paths, one of which is a link, is there by the other path.
        """
        specs_by_folder: dict[tuple[int, int], tuple[RunSpec, ...]] = {}
        for spec in self.specs:
            matched: set[tuple[int, int]] = set()
            # Links come last, and are left out if their targets are there.
            for path in sorted(
                glob.iglob(str(Path(os.path.expanduser(spec.model))), recursive=True), key=os.path.islink
            ):
                folder = _folder_number(path)
                if folder is None or folder in matched:
                    continue
                matched.add(folder)
                specs_by_folder[folder] = (*specs_by_folder.get(folder, ()), spec_of_folder(spec, path))
        return {specs[0].model: specs for specs in specs_by_folder.values()}

    def _is_taken(self, path: str) -> bool:
        """Whether a folder was taken and not written again. The file system is asked for one file of weights."""
        for file in self._taken.get(path, ()):
            if file.path.endswith((".safetensors", ".distcp")):
                return _is_unchanged(file)
        return False

    def explain(self, spec: RunSpec, error: AvssError) -> AvssError:
        """Return the error that ended a run, or one that says that its checkpoint was deleted or written again."""
        files = self._taken.get(spec.model, ())
        if isinstance(error, StorageFull) or all(_is_unchanged(file) for file in files):
            return error
        happened = "deleted"
        if all(os.path.exists(file.path) for file in files):
            happened = "written again"
        explained = RunFailed(
            f"'{spec.model}' was {happened} while it was measured.",
            "Have the training keep its checkpoints for longer, or measure fewer rows.",
        )
        explained.__cause__ = error
        return explained

    def remarks(self) -> Iterator[str]:
        """Yield sentences on the folders that were not taken."""
        if self._missed:
            yield f"Deleted before their turn: {_names(self._missed)}."
        complete = [path for path, folder in self._folders.items() if not folder.missing]
        if complete:
            yield f"Complete, and not measured: {_names(complete)}."
        incomplete = [folder for folder in self._folders.values() if folder.missing]
        incomplete.sort(key=lambda folder: natural_key(folder.path))
        for folder in incomplete[:MOST_NAMED]:
            yield f"{folder.path} is not complete: {folder.missing}."


def _folder_number(path: str) -> tuple[int, int] | None:
    """Return the numbers of the device and the inode of a folder, or None for all else."""
    with suppress(OSError):
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            return status.st_dev, status.st_ino
    return None


def _is_unchanged(file: FileState) -> bool:
    """Whether a file is as it was."""
    with suppress(OSError):
        return file_state(file.path) == file
    return False


def _names(paths: Sequence[str] | set[str]) -> str:
    """Return the first of some paths, in natural order."""
    return first_names(sorted(paths, key=natural_key), MOST_NAMED)


def spec_of_folder(spec: RunSpec, path: str) -> RunSpec:
    """Return the run of a folder that the glob of a specification matches."""
    title = path + spec.title.removeprefix(spec.model)
    name = title + spec.name.removeprefix(spec.title)
    return replace(spec, model=path, title=title, name=name)
