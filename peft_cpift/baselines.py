"""Merge checkpoints or adapters of several tasks by the usual baselines, to compare the fusion with."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from peft_cpift.checkpoint.reader import ADAPTER_WEIGHTS, MODEL_WEIGHTS
from peft_cpift.checkpoint.writer import MAX_SHARD_BYTES, check_free, complete_folder, write_json, write_tensors
from peft_cpift.errors import CpiftError
from peft_cpift.fusion.inputs import Folder, Inputs, open_own, output_dtypes
from peft_cpift.fusion.output import carry_over, check_overwritten, check_room
from peft_cpift.fusion.rule import Rule

REPORT = "baseline.json"
METHODS = {"linear": "task_arithmetic", "ties": "ties", "dare_linear": "dare_linear", "dare_ties": "dare_ties"}


def merge_baseline(
    tasks: Mapping[str, Folder],
    method: str = "linear",
    *,
    pretrained: Folder,
    output: Folder,
    weights: Mapping[str, float] | None = None,
    density: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Merge the fine-tuned parameters of several tasks and write a folder that `from_pretrained` loads.

    The result is theta_0 plus the merged task vectors w_n (theta_n - theta_0), each tensor by itself:

        "linear"       their sum: with the default weights, the average of the tasks
        "ties"         of each, the floor(density * size) largest in magnitude; the mean of those with their sum's sign
        "dare_linear"  of each, entries taken with the probability density and divided by it; then their sum
        "dare_ties"    taken likewise; then the mean of those with their sum's sign

    The merging is PEFT's (`peft.utils.merge_utils`, loaded by the first call). So TIES trims each tensor by itself,
    where its paper trims the whole model at once; weights do not count for the sign, and equal weights w give w times
    the mean. Arithmetic is in float32, or in float64 where a tensor is. One tensor at a time is in memory, but whole:
    for N tasks it takes up to 6 (N + 1) times its size in that dtype (measured).

    Args:
        tasks: name -> folder of the task's checkpoint, or of its adapter if that can be fused by its own tensors.
        method: one of the above.
        pretrained: folder of theta_0; for adapters, the adapter saved before training. Its configuration and tokenizer
            files are carried over, and its integers. Messages about tensors that do not fit call it the start.
        output: the folder to write; it appears when it is complete, with the settings in `baseline.json`.
        weights: name -> w_n > 0; default 1 / N each for the sums, 1 each for the means.
        density: the share that is kept, in (0, 1]; for all but `"linear"`.
        seed: what DARE drops follows from it, the tensor's name, and the task's place among the tasks.
        overwrite: replace an existing `output`, if it is an earlier baseline.
        progress: called with a number of bytes after each tensor that was read.

    Raises:
        CpiftError: names, shapes, dtypes or adapter settings differ, an adapter cannot be fused by its tensors, a
            setting is out of range, a value is not finite or does not fit its dtype, or the disk has no room.

    Source: task arithmetic (arXiv 2212.04089), TIES (arXiv 2306.01708) and DARE (arXiv 2311.03099), as in PEFT.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file, save_file
        >>> runs = Path(tempfile.mkdtemp())
        >>> for name in "012":
        ...     (runs / name).mkdir()
        ...     save_file({"w": torch.tensor([float(name)])}, runs / name / "model.safetensors")
        >>> merge_baseline({"a": runs / "1", "b": runs / "2"}, pretrained=runs / "0", output=runs / "average")
        >>> load_file(runs / "average" / "model.safetensors")["w"]
        tensor([1.5000])
    """
    output = Path(output)
    check_free(output, overwrite=overwrite)
    check_overwritten(output, [pretrained, *tasks.values()], REPORT)
    _check_settings(tasks, method, weights, density, seed)
    if weights is None:
        weights = dict.fromkeys(tasks, 1.0 if method.endswith("ties") else 1 / len(tasks))
    inputs = open_own(pretrained, tasks, None)
    dtypes = output_dtypes(inputs, None)
    check_room(output, sum(inputs.start.bytes(name) for name in dtypes))
    from peft.utils import merge_utils  # takes seconds

    merge, options = getattr(merge_utils, METHODS[method]), {} if density is None else {"density": density}
    factors = torch.tensor([weights[task] for task in tasks], dtype=torch.float64)

    def merged(name: str) -> list[Tensor]:
        if not dtypes[name].is_floating_point:
            return [inputs.start[name].reshape(-1)]
        before, vectors = _task_vectors(inputs, name)
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # torch.manual_seed would reach the GPUs' generators too, which nobody puts back.
            torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little"))
            warnings.filterwarnings("ignore", "The density")  # of 1, which prunes nothing
            result = (before + merge(vectors, factors.to(before.dtype), **options)).to(dtypes[name])
        if not bool(result.double().isfinite().all()):
            raise CpiftError(f"tensor '{name}' has a merged value that {dtypes[name]} cannot hold: lower the weights")
        (progress or (lambda count: None))((1 + len(tasks)) * inputs.start.bytes(name))
        return [result.reshape(-1)]

    with complete_folder(output, overwrite=overwrite) as folder:
        layout = {name: (inputs.start.shapes[name], dtype) for name, dtype in dtypes.items()}
        file, limit = (ADAPTER_WEIGHTS, None) if inputs.start.adapter_config else (MODEL_WEIGHTS, MAX_SHARD_BYTES)
        write_tensors(folder, layout, merged, file, max_shard_bytes=limit)
        carry_over(inputs.files, folder)
        folders = {"pretrained": Path(pretrained).resolve().name}
        folders["tasks"] = {task: Path(folder).resolve().name for task, folder in tasks.items()}
        settings = {"method": method, "weights": dict(weights), "density": density, "seed": seed}
        write_json(folder / REPORT, {**folders, **settings})


def _task_vectors(inputs: Inputs, name: str) -> tuple[Tensor, list[Tensor]]:
    """Theta_0 of a tensor, and how far each task moved it."""
    whole = []
    for label, source in [("pretrained", inputs.start), *inputs.tasks.items()]:
        stored = source[name]
        whole.append(stored.to(torch.float64 if stored.dtype == torch.float64 else torch.float32))
        if not bool(whole[-1].isfinite().all()):
            raise CpiftError(f"tensor '{name}' has a value that is not finite in '{label}': that training diverged")
    return whole[0], [tuned - whole[0] for tuned in whole[1:]]


def _check_settings(tasks: Mapping, method: str, weights: Mapping | None, density: object, seed: object) -> None:
    if not tasks:
        raise CpiftError("there is no task to merge")
    if method not in METHODS:
        raise CpiftError(f"unknown method '{method}': use one of {', '.join(METHODS)}")
    if method == "linear" and density is not None:
        raise CpiftError("method 'linear' keeps everything: leave density out")
    if method != "linear" and not (isinstance(density, int | float) and 0 < density <= 1):
        raise CpiftError(f"method '{method}' needs a density in (0, 1], got {density!r}")
    if not isinstance(seed, int):
        raise CpiftError(f"seed must be an integer, got {seed!r}")
    Rule(weights).check(tasks)
