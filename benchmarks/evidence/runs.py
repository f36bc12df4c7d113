"""Runs of a study, each stored under its settings, so that a table can be computed in pieces.

A study lists the settings of all runs that it wants. `compute` makes those that its file does not have yet, in several
processes, and writes each result down as soon as it is there. So a study can be stopped at any time and started again,
on another machine too, and further settings can be added later. Files of two machines are joined by `cat a b > c`.

The file has one JSON object a line, sorted by settings: `settings`, `result`, `seconds`, `machine` and `commit`.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from peft_cpift.checkpoint import complete_file

PACKAGES = ("torch", "transformers", "peft")
CHECKOUT = Path(__file__).parents[2]
CODE = ("*.py", "*.yaml")  # results, which are written meanwhile, are no part of it
Settings = dict[str, Any]


def key(settings: Settings) -> str:
    """Settings as text: equal settings give equal text, whatever their order."""
    return json.dumps(settings, sort_keys=True, ensure_ascii=False)


def load(file: Path) -> list[dict[str, Any]]:
    """All runs of a file; of those with equal settings the last. An absent file has none."""
    if not file.exists():
        return []
    runs = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return list({key(run["settings"]): run for run in runs}.values())


def save(file: Path, run: dict[str, Any]) -> None:
    """Add a run to a file, in place of one with the same settings."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        runs = {key(other["settings"]): other for other in [*load(file), run]}
        lines = [json.dumps(runs[settings], sort_keys=True, ensure_ascii=False) + "\n" for settings in sorted(runs)]
        with complete_file(file) as partial:
            partial.write_text("".join(lines), encoding="utf-8")


def machine() -> str:
    """Where a run is made, and with what."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    return ", ".join([device, *(f"{package} {version(package)}" for package in PACKAGES)])


@cache
def commit(folder: Path = CHECKOUT) -> str | None:
    """The commit of the code when this process began, "+" behind it if files differ; None where git knows of none."""
    if not shutil.which("git"):
        return None
    git = partial(subprocess.run, cwd=folder, capture_output=True, text=True)
    head, changes = git(["git", "rev-parse", "--short", "HEAD"]), git(["git", "status", "--porcelain", "--", *CODE])
    return head.stdout.strip() + "+" * bool(changes.stdout) if head.returncode == 0 else None


def compute(
    file: Path,
    wanted: Iterable[Settings],
    work: Callable[[Settings], dict[str, Any]],
    *,
    workers: int,
    threads: int = 1,
) -> None:
    """Make the runs that `file` does not have yet, in the order in which they are wanted.

    Args:
        file: where results go.
        wanted: settings, of JSON's types, that say all that a result depends on.
        work: makes one run's result, of JSON's types; a function of a module, as it runs in other processes.
        workers: processes side by side; 0 works in this one.
        threads: of PyTorch's, in each.

    Raises:
        whatever `work` raises; what was complete before is kept.
    """
    done = {key(run["settings"]) for run in load(file)}
    missing = list({key(settings): settings for settings in wanted if key(settings) not in done}.values())
    print(f"{file.name}: {len(missing)} runs to make, {len(done)} there", flush=True)
    if not workers:
        for settings in missing:
            save(file, _measure(work, settings))
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        futures = [pool.submit(_measure, work, settings) for settings in missing]
        try:
            for count, future in enumerate(as_completed(futures), start=1):
                run = future.result()
                save(file, run)
                print(f"{count}/{len(missing)} {run['seconds']:.0f} s {key(run['settings'])}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _measure(work: Callable[[Settings], dict[str, Any]], settings: Settings) -> dict[str, Any]:
    start = time.perf_counter()
    result = work(settings)
    return {
        "settings": settings,
        "result": result,
        "seconds": round(time.perf_counter() - start, 2),
        "machine": machine(),
        "commit": commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
