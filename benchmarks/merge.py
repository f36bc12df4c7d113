"""Finding a core region and fusing five tasks, as whole processes: seconds and peak memory, beside other ways.

    python benchmarks/merge.py --mergekit BIN                       # everything; needs up to 17 GB of disk
    python benchmarks/merge.py --part core fuse --folder F --keep   # a piece, whose checkpoints the next one finds
    python benchmarks/merge.py --part growth --sizes 1B 2B          # adds rows to the table of sizes
    python benchmarks/merge.py --size tiny --sizes tiny --output F  # to see that it runs

Run it on Linux while nothing else runs. The checkpoints are random: a Llama's tensors in bfloat16, in shards of at
most 500 MB, and tasks that are the base plus small noise. `--mergekit` is the bin folder of an environment that has
mergekit; without it, its rows are left out. Nothing is fetched: the Hub is switched off in every process.

- core: the 1% of all coordinates that a task moved most. "naive" loads both checkpoints, joins all absolute
  differences in float32 and calls `torch.topk`.
- fuse: five tasks with their cores, and the checkpoint they began from. mergekit's multislerp reads the same six
  checkpoints; its slerp reads two, and stands beside ours of two tasks, which reads their base too.
- limit: a process without torch that reads the same checkpoints through one buffer of 8 MiB and writes as many bytes
  as ours. Its seconds are reading and writing alone; those of all others are whole processes, imports included.
- imports: what starting costs.
- growth: ours and the limit by the number of parameters, and straight lines through time and peak. Where memory or
  disk are too small for all tasks, the last ones are links to the first; "distinct tasks" says how many are not.

Every process runs once before anything is timed, and its output is checked: our core moved by the same amounts as the
naive one, and every merged checkpoint is finite, has all tensors, and lies as near to the base as the tasks do. Then
the inputs are read once, so that they come from the page cache, and each round runs every process once, in shuffled
order, after a sync; outputs are deleted. Figures are medians over the rounds and [range], ratios are formed within a
round, peaks are the highest of all rounds. GB and MB are powers of ten.

- peak: the highest of the process's RssAnon, seen every 5 ms, which is its memory beyond mapped files. "with files" is
  VmHWM, which also counts the mapped pages of a checkpoint, which the kernel can drop.
- CPU: seconds of all threads. "others": CPU seconds of all other processes meanwhile. "from disk": what did not come
  from the page cache. Both should be near 0, or the figures are no good.
"""

# Only the standard library here, and the rest in functions: the limit and the naive core must not pay for our imports.
from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import random
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "merge"
PARTS = ("imports", "core", "fuse", "growth")
CORE, FUSE, FUSE_TWO = "cpift core", "cpift fuse, five tasks", "cpift fuse, two tasks"
NAIVE, LIMIT, SLERP, MULTISLERP = "naive", "limit", "mergekit slerp, two models", "mergekit multislerp, five models"
TASKS = 5
BLOCK = 8 * 2**20

SIZES = {  # layers, width, inner width, vocabulary
    "tiny": (2, 64, 256, 500),
    "0.25B": (12, 1024, 4096, 51400),
    "0.5B": (17, 1280, 5120, 51400),
    "1B": (18, 1792, 7168, 51400),
    "2B": (28, 2048, 8192, 51400),
}

Samples = list[dict[str, dict[str, float]]]  # by round, then by process


def load_tuner_benchmark() -> Any:
    """The benchmark beside this one, for its tables and its description of the machine."""
    spec = importlib.util.spec_from_file_location("tuner", Path(__file__).parent / "tuner.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def list_shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape in a Llama whose output layer is tied to its embeddings."""
    layers, width, inner, vocabulary = SIZES[size]
    block = {f"self_attn.{part}_proj": (width, width) for part in "qkvo"}
    block |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    block |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    shapes = {f"model.layers.{i}.{part}.weight": block[part] for i in range(layers) for part in block}
    return {"model.embed_tokens.weight": (vocabulary, width), **shapes, "model.norm.weight": (width,)}


def count(size: str) -> int:
    """The number of parameters."""
    return sum(map(math.prod, list_shapes(size).values()))


def make_checkpoints(folder: Path, size: str, tasks: int, shard_bytes: int = 500_000_000) -> None:
    """Write `base` and `t0`, `t1`, ... into `folder`, with two shards in memory at most."""
    import torch
    from safetensors.torch import save_file

    shards, room = [], 0
    for name, shape in list_shapes(size).items():
        room -= 2 * math.prod(shape)
        if room < 0:
            shards.append({})
            room = shard_bytes - 2 * math.prod(shape)
        shards[-1][name] = shape
    files = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}
    layers, width, inner, vocabulary = SIZES[size]
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    config |= {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary}
    config |= {"num_attention_heads": width // 64, "num_key_value_heads": width // 64, "tie_word_embeddings": True}
    weight_map = {name: file for file, shapes in files.items() for name in shapes}
    models = ["base", *(f"t{task}" for task in range(tasks))]
    for model in models:
        (folder / model).mkdir(parents=True)
        (folder / model / "config.json").write_text(json.dumps(config), encoding="utf-8")
        index = {"metadata": {"total_size": 2 * count(size)}, "weight_map": weight_map}
        (folder / model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    for file, shapes in files.items():
        base = {}
        for model in models:
            drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
            if base:
                tensors = {name: noise.mul_(1e-3).add_(base[name]).bfloat16() for name, noise in drawn.items()}
            else:
                base = tensors = {
                    name: (0.02 * x if x.ndim > 1 else x.fill_(1)).bfloat16() for name, x in drawn.items()
                }
            save_file(tensors, folder / model / file, metadata={"format": "pt"})


@contextmanager
def checkpoints(folder: Path, size: str, keep: bool) -> Iterator[Path]:
    """Give a folder with `base`, `t0`, `t1`, ..., which is deleted afterwards unless it is complete and to be kept."""
    work = folder / size
    try:
        if not (work / "complete").exists():
            work.mkdir(parents=True)
            distinct = count_distinct(2 * count(size), shutil.disk_usage(work).free)
            make_checkpoints(work, size, distinct)
            for task in range(distinct, TASKS):
                shutil.copytree(work / f"t{task % distinct}", work / f"t{task}", copy_function=os.link)
            (work / "complete").touch()
        yield work
    finally:
        if not (keep and (work / "complete").exists()):
            shutil.rmtree(work, ignore_errors=True)


def count_distinct(size: int, disk: int) -> int:
    """How many tasks of `size` bytes fit on the disk and, with the base and a fusion, in the page cache."""
    distinct = min(TASKS, int(0.7 * memory_bytes() / size) - 2, int(0.9 * disk / size) - 2)
    if distinct < 1:
        raise SystemExit("memory or disk is too small for a base, a task and a fusion")
    return distinct


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def weight_files(*folders: str | Path) -> list[Path]:
    """The shards of checkpoints."""
    return [file for folder in folders for file in sorted(Path(folder).glob("*.safetensors"))]


def load_weights(folder: str | Path) -> dict[str, Any]:
    """The tensors of a checkpoint."""
    from safetensors.torch import load_file

    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def read_through(files: Sequence[Path], buffer: memoryview) -> None:
    """Read files from end to end into one buffer, block after block."""
    for file in files:
        with open(file, "rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def run_limit(output: str, size: str, *folders: str) -> None:
    """Read the checkpoints, write `size` bytes, and print the seconds of both."""
    buffer = memoryview(bytearray(BLOCK))
    start = time.perf_counter()
    read_through(weight_files(*folders), buffer)
    middle = time.perf_counter()
    left = int(size)
    with open(output, "wb", buffering=0) as handle:
        while left:
            left -= handle.write(buffer[:left])
    end = time.perf_counter()
    print(json.dumps({"read": middle - start, "write": end - middle, "seconds": end - start}))


def run_naive(output: str, base: str, task: str) -> None:
    """Find a core region as one would write it."""
    import torch
    from safetensors.torch import save_file

    before, after = load_weights(base), load_weights(task)
    moved = torch.cat([(after[name].float() - before[name].float()).abs().flatten() for name in before])
    top = torch.topk(moved, len(moved) // 100)
    save_file({"indices": top.indices, "values": top.values}, output)


def read_memory(process: int) -> tuple[int, int]:
    """A process's anonymous bytes, and the most bytes it ever had; zeros when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = dict(line.split(":", 1) for line in lines)
    anonymous, highest = (int(fields.get(name, "0").split()[0]) * 1024 for name in ("RssAnon", "VmHWM"))
    return anonymous, highest


def read_busy() -> float:
    """Seconds that all processors have worked since the machine started."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text(encoding="utf-8").split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def run_process(command: Sequence[str | Path]) -> tuple[dict[str, float], str]:
    """Run a process to its end; return what it took and what it printed. SystemExit if it fails."""
    os.sync()  # else what others wrote is written in this one's time
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        before = read_busy() - time.process_time()  # without the sampling
        start = time.perf_counter()
        process = subprocess.Popen([*map(str, command)], stdout=log, stderr=subprocess.STDOUT, env=environment)
        ended = os.pidfd_open(process.pid)
        anonymous = highest = 0
        while not select.select([ended], [], [], 0.005)[0]:
            anonymous, highest = map(max, (anonymous, highest), read_memory(process.pid))
        sample = {"seconds": time.perf_counter() - start, "anonymous": anonymous, "highest": highest}
        os.close(ended)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        printed = log.read()
    if process.returncode:
        raise SystemExit(f"{Path(command[0]).name} ended with {process.returncode}:\n{printed[-3000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    others = max(0.0, read_busy() - time.process_time() - before - cpu)
    return sample | {"cpu": cpu, "others": others, "from_disk": usage.ru_inblock * 512}, printed


def delete(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def run_rounds(
    commands: dict[str, list], rounds: int, output: Path, inputs: Sequence[Path], checks: dict[str, Callable[[], None]]
) -> Samples:
    """Run every command once and check its output, then time them, round by round in shuffled order."""
    for name, command in commands.items():
        delete(output)
        run_process(command)
        checks.get(name, lambda: None)()
    read_through(inputs, memoryview(bytearray(BLOCK)))
    shuffler, samples = random.Random(0), []
    for number in range(rounds):
        samples.append({})
        for name in shuffler.sample(list(commands), len(commands)):
            delete(output)
            sample, printed = run_process(commands[name])
            samples[-1][name] = sample | (json.loads(printed) if name == LIMIT else {})
            print(f"round {number + 1}, {name}: {samples[-1][name]['seconds']:.3f} s", file=sys.stderr)
    delete(output)
    return samples


def cpift(*arguments: str | Path) -> list:
    """The command line of this interpreter's `cpift`."""
    return [Path(sys.executable).with_name("cpift"), *arguments]


def core_command(work: Path, task: int, output: Path) -> list:
    """What finds a task's core."""
    return cpift("core", work / f"t{task}", "--base", work / "base", "-o", output, "--percent", "1")


def make_core(work: Path, task: int) -> Path:
    """Find a task's core before anything is timed; return its file."""
    file = work / f"core{task}"
    delete(file)
    run_process(core_command(work, task, file))
    return file


def measure_core(work: Path, rounds: int, others: bool = True) -> dict[str, Any]:
    """Find one task's core in every way; `others` false leaves out the naive one, and the check by it."""
    output, core, models = work / "output", make_core(work, 0), [work / "base", work / "t0"]
    limit = [sys.executable, __file__, "_limit", output, core.stat().st_size, *models]
    commands = {CORE: core_command(work, 0, output), LIMIT: limit}
    if others:
        commands[NAIVE] = [sys.executable, __file__, "_naive", output, *models]
    size = sum(file.stat().st_size for file in weight_files(*models))
    checks = {NAIVE: partial(check_core, core, output, *models)}
    samples = run_rounds(commands, rounds, output, weight_files(*models), checks)
    return {"reads": dict.fromkeys(commands, size), "rounds": samples}


def check_core(core: Path, naive: Path, base: Path, task: Path) -> None:
    """Stop unless the two cores moved by the same amounts; which of several equal ones is taken may differ."""
    import torch
    from safetensors.torch import load_file

    from peft_cpift import CoreRegion

    before, after = load_weights(base), load_weights(task)
    indices = CoreRegion.load(core).indices
    moved = [(after[name].float() - before[name].float()).abs().flatten()[index] for name, index in indices.items()]
    if not torch.equal(torch.cat(moved).sort().values, load_file(naive)["values"].sort().values):
        raise SystemExit("the core of cpift is not the naive one")


def fuse_command(work: Path, output: Path, tasks: int) -> list:
    """What fuses the first tasks."""
    folders = [f"t{task}={work / f't{task}'}" for task in range(tasks)]
    cores = [part for task in range(tasks) for part in ("--core", f"t{task}={work / f'core{task}'}")]
    return cpift("fuse", *folders, *cores, "--start", work / "base", "--pretrained", work / "base", "-o", output)


def mergekit_command(bin_folder: Path, work: Path, output: Path, method: str) -> list:
    """What merges with mergekit: `slerp` of two models, or `multislerp` of five."""
    config: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
    if method == "slerp":
        config |= {"base_model": str(work / "t0"), "parameters": {"t": 0.5}}
        config["models"] = [{"model": str(work / f"t{task}")} for task in range(2)]
    else:
        config |= {"base_model": str(work / "base"), "parameters": {"weight": 1 / TASKS}}
        config["models"] = [{"model": str(work / f"t{task}")} for task in range(TASKS)]
    file = work / f"{method}.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")  # which is YAML too
    # there is no tokenizer to copy, and writing a card is not merging
    return [bin_folder / "mergekit-yaml", file, output, "--quiet", "--no-copy-tokenizer", "--no-write-model-card"]


def measure_fuse(work: Path, rounds: int, others: bool = True, mergekit: Path | None = None) -> dict[str, Any]:
    """Fuse in every way; `others` false leaves ours of five tasks, and the limit."""
    output, models = work / "output", [work / "base", *(work / f"t{task}" for task in range(TASKS))]
    for task in range(TASKS):
        make_core(work, task)
    size = sum(file.stat().st_size for file in weight_files(work / "base"))
    limit = [sys.executable, __file__, "_limit", output, size, *models]
    commands = {FUSE: fuse_command(work, output, TASKS), LIMIT: limit}
    if others:
        commands[FUSE_TWO] = fuse_command(work, output, 2)
    if others and mergekit:
        commands[MULTISLERP] = mergekit_command(mergekit, work, output, "multislerp")
        commands[SLERP] = mergekit_command(mergekit, work, output, "slerp")
    checks = {name: partial(check_merged, output, *models) for name in commands if others and name != LIMIT}
    samples = run_rounds(commands, rounds, output, weight_files(*models), checks)
    read = {FUSE_TWO: 3, SLERP: 2}  # checkpoints
    return {"reads": {name: read.get(name, 6) * size for name in commands}, "rounds": samples}


def check_merged(*folders: Path) -> None:
    """Stop unless the first checkpoint has the tensors of the second, the base, and is as near to it as the tasks."""
    merged, base, *tasks = map(load_weights, folders)
    if {name: (x.shape, x.dtype) for name, x in merged.items()} != {
        name: (x.shape, x.dtype) for name, x in base.items()
    }:
        raise SystemExit("a merged checkpoint has other tensors than the base")
    squares = [0.0] * (1 + len(tasks))
    for name, tensor in base.items():
        for number, other in enumerate((merged, *tasks)):
            squares[number] += (other[name].float() - tensor.float()).square().sum().item()
    distance, *others = map(math.sqrt, squares)
    if not 0 < distance < 1.5 * max(others):  # false if anything is not a number
        raise SystemExit(f"a merged checkpoint is {distance} away from the base, the tasks are {others}")


def measure_imports(rounds: int) -> dict[str, Any]:
    """Start processes that do nothing."""
    commands = {f"import {name}": [sys.executable, "-c", f"import {name}"] for name in ("torch", "peft_cpift", "peft")}
    with tempfile.TemporaryDirectory() as folder:
        commands["cpift --help"] = cpift("--help")
        return {"rounds": run_rounds(commands, rounds, Path(folder) / "none", [], {})}


def spread(values: Sequence[float]) -> list[float]:
    """Median, lowest and highest."""
    return [statistics.median(values), min(values), max(values)]


def ratio(samples: Samples, name: str, other: str) -> list[float]:
    """The ratio of two processes' seconds, formed by round: its median and range."""
    return spread([by[name]["seconds"] / by[other]["seconds"] for by in samples])


def make_row(part: dict[str, Any], name: str, ours: Sequence[str] = ()) -> list[Any]:
    """One process's figures, and how long each of `ours` takes relative to it."""
    samples, reads = part["rounds"], part.get("reads")
    row: list[Any] = [spread([by[name]["seconds"] for by in samples])]
    row += [ratio(samples, one, name) if one != name else None for one in ours]
    if reads:  # what reads other checkpoints than the limit has another limit
        row.append(reads[name] / row[0][0] / 1e9)
        row.append(ratio(samples, name, LIMIT) if reads[name] == reads[LIMIT] else None)
    row += [statistics.median(by[name]["cpu"] for by in samples), max(by[name]["others"] for by in samples)]
    return row + [
        f"{max(by[name][key] for by in samples) / 1e6:,.0f}" for key in ("anonymous", "highest", "from_disk")
    ]


def make_page(report: dict[str, Any], table: Callable[..., str]) -> str:
    """The report as Markdown."""
    columns = ["CPU s", "others s", "peak MB", "with files MB", "from disk MB"]

    def facts(part: dict[str, Any]) -> str:
        return (
            "; ".join(f"{key} {value}" for key, value in (part["settings"] | part["machine"]).items() if value) + "\n"
        )

    sections = ["# Finding cores and fusing\n", "`benchmarks/merge.py` says what each word means.\n"]
    for key, ours in {"core": [CORE], "fuse": [FUSE, FUSE_TWO], "imports": []}.items():
        if part := report.get(key):
            head = [f"{one} / it" for one in ours] + ["GB/s read", "/ limit"] * bool(ours)
            rows = [[name, *make_row(part, name, ours)] for name in part["rounds"][0]]
            sections += [f"## {key.capitalize()}\n", facts(part), table(["", "s", *head, *columns], rows)]
        if part and ours:
            halves = [statistics.median(by[LIMIT][half] for by in part["rounds"]) for half in ("read", "write")]
            sections.append("The limit reads for {:.3f} s and writes for {:.3f} s.\n".format(*halves))
    growth = sorted(report.get("growth", {}).values(), key=lambda part: part["settings"]["parameters"])
    for key, ours in {"core": CORE, "fuse": FUSE}.items():
        sizes = [part["settings"]["parameters"] / 1e9 for part in growth]
        names = [f"{size:.3f}, {part['settings']['distinct tasks']}" for size, part in zip(sizes, growth, strict=True)]
        rows = [[name, *make_row(part[key], ours)] for name, part in zip(names, growth, strict=True)]
        if rows:
            head = ["billion parameters, distinct tasks", "s", "GB/s read", "/ limit", *columns]
            sections += [
                f"## Growth: {ours}\n",
                facts({"settings": {}, "machine": growth[-1]["machine"]}),
                table(head, rows),
            ]
        if len(rows) > 1:
            peaks = [max(by[ours]["anonymous"] for by in part[key]["rounds"]) / 1e6 for part in growth]
            lines = [statistics.linear_regression(sizes, values) for values in ([row[1][0] for row in rows], peaks)]
            figures = [number for line in lines for number in (line.intercept, line.slope)]
            text = "Straight lines: {:.2f} s + {:.2f} s, and {:,.0f} MB + {:,.0f} MB, per billion parameters.\n"
            sections.append(text.format(*figures))
    return "\n".join(sections)


def store(folder: Path, tuner: Any, key: str, result: dict[str, Any]) -> None:
    """Put one part's result, or one size's of growth, beside those that are there; write both files anew."""
    file = folder / "results.json"
    report = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if key in SIZES:
        report.setdefault("growth", {})[key] = result
    else:
        report[key] = result
    tuner.write_json(file, report)
    with tuner.complete_file(folder / "results.md") as temporary:
        temporary.write_text(make_page(report, tuner.table), encoding="utf-8")


def main() -> None:
    """Read the command line, measure, and store every part as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--size", choices=SIZES, default="0.25B", help="of the checkpoints for core and fuse")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES)[1:], help="for growth")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where checkpoints are made; default: a temporary folder")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints in --folder for another run")
    parser.add_argument("--mergekit", type=Path, help="bin folder of an environment with mergekit")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; other parts stay there")
    arguments = parser.parse_args()
    rounds, mergekit = arguments.rounds, arguments.mergekit
    tuner = load_tuner_benchmark()
    machine = tuner.describe_machine() | {"cores": os.cpu_count(), "memory": f"{memory_bytes() / 1e9:.0f} GB"}
    if mergekit:
        code = "from importlib.metadata import version as v; print(v('mergekit'), 'with torch', v('torch'))"
        machine["mergekit"] = run_process([mergekit / "python", "-c", code])[1].strip()
    elif "fuse" in arguments.part:
        print("without --mergekit its rows are left out", file=sys.stderr)

    def finish(key: str, result: dict[str, Any], work: Path | None = None) -> None:
        settings = {"rounds": rounds}
        if work:
            inodes = {file.stat().st_ino for file in work.glob("t?/model-00001*")}
            settings |= {"parameters": count(work.name), "distinct tasks": len(inodes)}
        store(arguments.output, tuner, key, result | {"settings": settings, "machine": machine})

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if "imports" in arguments.part:
            finish("imports", measure_imports(rounds))
        if {"core", "fuse"} & {*arguments.part}:
            with checkpoints(folder, arguments.size, arguments.keep) as work:
                if "core" in arguments.part:
                    finish("core", measure_core(work, rounds), work)
                if "fuse" in arguments.part:
                    finish("fuse", measure_fuse(work, rounds, mergekit=mergekit), work)
        for size in arguments.sizes if "growth" in arguments.part else ():
            with checkpoints(folder, size, arguments.keep) as work:
                parts = {"core": measure_core(work, rounds, False), "fuse": measure_fuse(work, rounds, False)}
                finish(size, parts, work)
    print((arguments.output / "results.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["_naive"]:
        run_naive(*sys.argv[2:])
    elif sys.argv[1:2] == ["_limit"]:
        run_limit(*sys.argv[2:])
    else:
        main()
