"""Steps of a run: each is done once, is noted with what it was made from, and is found again by a later run.

A step makes one thing in the run's folder and is called by its path there: `probes/maths`, `fused`. What it makes
appears when it is complete; its note, `steps/<path>.json`, is written last and is what counts. So a run that was
killed at any moment goes on from the last step with a note.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from peft_cpift.checkpoint.writer import remove, remove_leftovers, write_json
from peft_cpift.errors import CpiftError
from peft_cpift.processes import is_main, on_main, share


@dataclass(frozen=True)
class Step:
    """One thing to make."""

    path: str
    """Where it appears in the run's folder, if it is a file or folder; unique in any case."""
    stage: str
    """The stage of the command line that it belongs to."""
    make: Callable[[], dict[str, Any]]
    """Makes it, replacing what is there, and returns what is to be remembered of it, as plain values. All processes of
    a distributed run call it together."""
    settings: Mapping[str, Any]
    """All that its result depends on, besides other steps, as plain values."""
    after: tuple[str, ...] = ()
    """The steps whose results it uses."""
    leaves_file: bool = True
    """Whether there is anything at `path`; else its note is all of it."""
    holds: tuple[str, ...] = ()
    """Files that must be in the folder at `path` and are no part of `settings`: to want one less is no change."""


class Steps:
    """The steps that are done in a run's folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.results: dict[str, dict[str, Any]] = {}
        """What was returned by the steps done or found in this run."""

    def read(self, path: str) -> dict[str, Any] | None:
        """A step's note, or None if it is not done.

        Raises:
            CpiftError: the note is damaged.
        """
        file = self._note(path)
        try:
            note = json.loads(file.read_text(encoding="utf-8"))
            return {key: note[key] for key in ("id", "stage", "settings", "after", "result", "files", "seconds")}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise CpiftError(f"{file} is not a step's note: remove it, and the step is done again") from error

    def stale(self, steps: Iterable[Step]) -> dict[str, str]:
        """The steps that are done but not as these say: path -> the reason, in words."""
        reasons: dict[str, str] = {}
        missing = set()
        for step in steps:
            note = self.read(step.path)
            if note is None:
                missing.add(step.path)
                continue
            ids = {path: (self.read(path) or {}).get("id") for path in step.after}
            if changed := _differences(note["settings"], _plain(step.settings)):
                reasons[step.path] = f"{', '.join(changed[:3])} changed"
            elif upstream := [path for path in step.after if path in reasons or path in missing]:
                reasons[step.path] = f"after {upstream[0]}"
            elif note["after"] != ids:
                reasons[step.path] = "what it was made from changed"
            elif lacking := [name for name in step.holds if name not in note["files"]]:
                reasons[step.path] = f"it has no {lacking[0]}"
            elif step.leaves_file and (damage := self._damage(step.path, note["files"])):
                reasons[step.path] = damage
        return reasons

    def notes(self) -> dict[str, dict[str, Any]]:
        """Every note there is, by its step's path."""
        files = (self.folder / "steps").rglob("*.json")
        paths = sorted(file.relative_to(self.folder / "steps").as_posix().removesuffix(".json") for file in files)
        return {path: note for path in paths if (note := self.read(path)) is not None}

    def forget(self, paths: Sequence[str]) -> None:
        """Remove steps and what they made.

        Raises:
            CpiftError: another run is at one of them; nothing is removed.
        """
        with ExitStack() as locks:
            for path in paths:
                locks.enter_context(self.lock(path, wait=False))
            for path in paths:
                self._note(path).unlink(missing_ok=True)  # first: none must be left without its result
                self._clear(path)

    def run(self, step: Step) -> dict[str, Any]:
        """What the step returned, now or in an earlier run; made by all processes together if it is not done.

        If another run is making it, this waits for it.
        """
        note = on_main(lambda: self.read(step.path))
        if note is None:
            with self.lock(step.path) if is_main() else nullcontext():
                note = on_main(lambda: self.read(step.path))
                if note is None:
                    note = self._make(step)
        elif is_main():
            self._remove_work(step.path)  # in case it was killed between its note and this
        self.results[step.path] = note["result"]
        return note["result"]

    def _make(self, step: Step) -> dict[str, Any]:
        """Do a step and note it."""
        if is_main():
            self._clear(step.path, but_work=True)
        began = time.perf_counter()
        result = step.make()
        note = None
        if is_main():
            note = {
                "id": uuid.uuid4().hex,
                "stage": step.stage,
                "settings": _plain(step.settings),
                "after": {path: self.read(path)["id"] for path in step.after},
                "result": _plain(result),
                "files": self._sizes(step.path) if step.leaves_file else {},
                "seconds": time.perf_counter() - began,
            }
            write_json(self._note(step.path), note)
            self._remove_work(step.path)
        return share(note)

    def _sizes(self, path: str) -> dict[str, int]:
        """The files of a step's result, by their places in its folder, and how large they are, in bytes."""
        result = self.folder / path
        files = [result] if result.is_file() else [file for file in result.rglob("*") if file.is_file()]
        return {file.relative_to(result).as_posix(): file.stat().st_size for file in sorted(files)}

    def _damage(self, path: str, files: Mapping[str, int]) -> str | None:
        """What is missing or cut off of a step's result, in words."""
        if not (self.folder / path).exists():
            return "it is gone"
        found = self._sizes(path)
        for name, size in files.items():
            if name not in found:
                return f"{name} is gone"
            # Of text there may be reasons to change it: a card is for its reader to write.
            if found[name] != size and (name == "." or name.endswith(".safetensors")):
                return "it is damaged" if name == "." else f"{name} is damaged"
        return None

    def work(self, path: str) -> Path:
        """The folder for a step's unfinished work, which is removed when the step is done."""
        return self.folder / "checkpoints" / path

    def _clear(self, path: str, *, but_work: bool = False) -> None:
        """Remove what a step made, or left half made when it was killed."""
        for file in (self.folder / path, self._note(path)):
            remove_leftovers(file)
            remove(file)
        if not but_work:
            self._remove_work(path)

    def _remove_work(self, path: str) -> None:
        work = self.work(path)
        remove(work)
        for parent in work.parents[: len(Path(path).parts)]:  # `checkpoints` itself with the last one
            if not parent.is_dir():
                break
            try:
                parent.rmdir()
            except OSError:  # other work is in it, or it is a link of the user's own
                break

    @contextmanager
    def lock(self, path: str, *, wait: bool = True) -> Iterator[None]:
        """Keep other runs from a step; the system takes the lock back when this process ends in any way.

        Raises:
            CpiftError: another run is at the step, and this is not to wait for it.
        """
        file = self.folder / "steps" / f".{path.replace('/', '-')}.lock"
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise CpiftError(
                    f"another run is at {path} in {self.folder}: wait for it or stop it, and start again"
                ) from None
            print(f"{path}: another run is at it, waiting", flush=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _note(self, path: str) -> Path:
        return self.folder / "steps" / f"{path}.json"


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    return json.loads(json.dumps(values, default=str))


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The keys whose values differ, with the sections that they stand in."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [path or "settings"]
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        found += _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    return found
