"""Strategy: one of these scripts is started per process, and does what the command line does, or tries the processes'
functions alone.

It judges nothing. Each process has a log of its own, notes its id for the test, shows where it is if it hangs, and can
be told to kill itself, or all, at its n-th change of the run's folder.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

FOLDER, RANK = Path(os.environ["WORKER_FOLDER"]), int(os.environ.get("RANK", "0"))


def die(everybody: bool) -> None:
    """End at once, in the way that leaves no time to tidy up."""
    if everybody:
        for process in [os.getppid(), *(int(file.read_text()) for file in FOLDER.glob("*.pid"))]:
            if process != os.getpid():
                os.kill(process, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def watch(last: int, everybody: bool) -> None:
    """Die at the `last` change of the folder of the run by this process."""
    seen = 0

    def look(event: str, arguments: tuple) -> None:
        nonlocal seen
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if not (writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")):
            return
        if str(arguments[0]).startswith(str(FOLDER / "run")):
            seen += 1
            if seen == last:
                die(everybody)

    sys.addaudithook(look)


def fail() -> None:
    """Meet, in this process alone, what is wrong with the data."""
    from peft_cpift import CpiftError
    from peft_cpift.data import tasks

    def load_tasks(*_):
        raise CpiftError("here alone")

    tasks.load_tasks = load_tasks


def slow_down_checkpoints() -> None:
    """Let the last process write its part late, and say whether a checkpoint was complete before that."""
    from transformers import Trainer, TrainerState

    save, complete = Trainer._save_rng_state, TrainerState.save_to_json

    def save_late(self, output_dir):
        time.sleep(0.15 * RANK)
        save(self, output_dir)

    def say_complete(self, json_path):
        parts = sorted(file.name for file in Path(json_path).parent.glob("rng_state*"))
        print("checkpoint:", *parts, flush=True)
        complete(self, json_path)

    Trainer._save_rng_state, TrainerState.save_to_json = save_late, say_complete


def command_line(arguments: list[str]) -> None:
    """Do what `cpift` does, and say which engine trained in the end."""
    from accelerate.state import AcceleratorState
    from distributed_worker import fsdp2, prepare_deepspeed

    from peft_cpift.cli import main

    slow_down_checkpoints()
    if os.environ.get("WORKER_DIES") == f"fails{RANK}":
        fail()
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        prepare_deepspeed()
    sys.argv = ["cpift", *arguments]
    with fsdp2(False) if "ACCELERATE_USE_FSDP" in os.environ else nullcontext():
        try:
            main()
        finally:
            if "distributed_type" in AcceleratorState._shared_state:
                print("engine:", AcceleratorState._shared_state["distributed_type"].name, flush=True)


def functions() -> None:
    """Try the functions that processes share, where training's own patience would be over."""
    from accelerate import PartialState

    from peft_cpift import CpiftError
    from peft_cpift.processes import is_main, on_main, output_folder, part, say, share

    PartialState(cpu=True, timeout=timedelta(seconds=2))
    print("waited for", on_main(lambda: time.sleep(4) or RANK), flush=True)
    print("shared", share(f"from {RANK}"), is_main(), flush=True)
    say("said")
    for error in (CpiftError("of mine"), OSError(28, "no space"), RuntimeError("unknown")):
        try:
            on_main(lambda error=error: (_ for _ in ()).throw(error))
        except (CpiftError, OSError, RuntimeError) as caught:
            print("caught", repr(caught), flush=True)
    with output_folder(FOLDER / "made") as folder:
        print("folder is the one itself:", folder == FOLDER / "made", flush=True)
        if is_main():
            (folder / "file").touch()
    part()


def main() -> None:
    """Get ready, and do what the arguments say."""
    (FOLDER / f"{RANK}.pid").write_text(str(os.getpid()))
    log = os.open(FOLDER / f"{RANK}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.dump_traceback_later(100, exit=True)
    who, _, at = os.environ.get("WORKER_DIES", "").partition(":")
    if who in (str(RANK), f"all{RANK}"):
        watch(int(at), who.startswith("all"))
    if sys.argv[1:] == ["functions"]:
        functions()
    else:
        command_line(sys.argv[1:])


if __name__ == "__main__":
    main()
