"""What core isolation and consolidation cost a training step, beside nothing and beside the usual dense forms.

    python benchmarks/isolation.py                                  # float32 on the CPU, about 10 minutes
    python benchmarks/isolation.py --device cuda --dtype bfloat16   # a larger batch
    python benchmarks/isolation.py --quick                          # a tiny model, to see that it runs; writes nothing

Full fine-tuning of a Llama with random weights, AdamW with weight decay (fused, the Trainer's default), gradients
clipped. The frozen coordinates are drawn at random over all weights, which is the worst that a core can do to a cache.
Every method has its own copy of the model and optimizer; all start from the same weights and get the same tokens.

- free: nothing is frozen.
- ours: `FrozenCore`, which is what `CoreIsolationCallback` and `freeze_core` use. "ours, logged" also forms
  `cpift/masked_grad_norm` in every step, where a training does so when it logs.
- dense: a bool mask and a full copy for every parameter; `grad.mul_(mask)` before clipping, and `torch.where` with the
  copy after the step.
- consolidation: `Consolidation`, which is what `ConsolidationCallback` and `consolidate` use; of all coordinates.
- EWC: elastic weight consolidation as it is usually written, a quadratic penalty in the gradients before clipping,
  with a full copy, and the Fisher information in the parameters' dtype.

- step: forward, backward, clipping, optimizer. Each round runs every method once, in shuffled order; a ratio is formed
  within a round, and the table gives the median over the rounds and [quartiles].
- added: the calls that a method adds to a step, timed alone on the gradients of a real one, and divided by the median
  of the free step. It is finer than the ratio, whose noise is larger than what it measures; on a GPU it is the time
  until the kernels have run, which a step may hide.
- kept: bytes of the tensors that a method keeps from step to step, relative to those of the parameters.
- sync (GPU): whether a step of the method runs under `torch.cuda.set_sync_debug_mode("error")`.

Before anything is timed: after three steps frozen coordinates are the same to the bit, and ours and dense have moved
the others alike (within 1e-5 in float32), which the free ones have not; and both kinds of consolidation have come less
far than the free steps.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_cpift import CoreRegion
from peft_cpift.checkpoint import complete_file
from peft_cpift.checkpoint.writer import write_json
from peft_cpift.consolidation import Consolidation
from peft_cpift.isolation import FrozenCore

RESULTS = Path(__file__).parent / "results" / "isolation"
FREE, OURS, LOGGED, DENSE = "free", "ours", "ours, logged", "dense"
PULL, EWC = "consolidation", "EWC"
PERCENTS = (0.1, 0.3, 1.0, 3.0, 10.0)

SIZES = {  # layers, width, inner width, heads, vocabulary; rows and tokens of a batch
    "tiny": (2, 64, 172, 4, 128, 2, 16),
    "small": (12, 768, 2048, 12, 32000, 4, 128),
    "large": (12, 768, 2048, 12, 32000, 16, 1024),
}


def load_tuner_benchmark() -> Any:
    """The benchmark beside this one, for its interleaving, ratios and tables."""
    spec = importlib.util.spec_from_file_location("tuner", Path(__file__).parent / "tuner.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TUNER = load_tuner_benchmark()


def draw_region(model: nn.Module, percent: float) -> CoreRegion:
    """Draw floor(percent * D / 100) coordinates, in proportion to each tensor's size."""
    generator = torch.Generator().manual_seed(1)
    shapes, indices = {}, {}
    for name, parameter in model.named_parameters():
        shapes[name] = tuple(parameter.shape)
        count = math.floor(parameter.numel() * percent / 100)
        if count:
            indices[name] = torch.randperm(parameter.numel(), generator=generator)[:count].sort().values
    return CoreRegion(indices, shapes, percent)


class Training:
    """A model in training: nothing is frozen."""

    def __init__(self, base: nn.Module, ids: Tensor) -> None:
        self.model, self.ids = copy.deepcopy(base).train(), ids
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.1, fused=True)

    def backward(self) -> None:
        """Form the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()

    def before_clipping(self) -> None:
        """What the method does when the gradients are there."""

    def after_step(self) -> None:
        """What the method does when the optimizer has stepped."""

    def step(self) -> None:
        """One optimizer step: what is timed."""
        self.backward()
        self.before_clipping()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.after_step()

    def added(self) -> None:
        """What the method adds to a step, alone."""
        self.before_clipping()
        self.after_step()

    def kept(self) -> list[Tensor]:
        """The tensors that the method keeps from step to step."""
        return []


class Ours(Training):
    """Core isolation by hooks on the gradients and the optimizer."""

    def __init__(self, base: nn.Module, ids: Tensor, region: CoreRegion, logged: bool = False) -> None:
        super().__init__(base, ids)
        self.logged = logged
        self.frozen = FrozenCore(self.model, region)
        self.frozen.attach(self.optimizer)

    def after_step(self) -> None:
        """Form the figure that the callback logs."""
        if self.logged:
            self.frozen.masked_grad_norm()

    def added(self) -> None:
        """Call the hooks as autograd and the optimizer do."""
        for parameter in self.parameters:
            for hook in (parameter._post_accumulate_grad_hooks or {}).values():
                hook(parameter)
        for hook in self.optimizer._optimizer_step_post_hooks.values():
            hook(self.optimizer, (), {})
        self.after_step()

    def kept(self) -> list[Tensor]:
        """Positions, values and the last gradient of every frozen coordinate."""
        kept = [value for held in self.frozen._held for value in vars(held).values() if isinstance(value, Tensor)]
        return list({tensor.untyped_storage().data_ptr(): tensor for tensor in kept}.values())


class Dense(Training):
    """A bool mask and a full copy a parameter."""

    def __init__(self, base: nn.Module, ids: Tensor, region: CoreRegion) -> None:
        super().__init__(base, ids)
        self.masks, self.copies = [], []
        for name, parameter in self.model.named_parameters():
            mask = torch.ones(parameter.numel(), dtype=torch.bool)
            mask[region.indices.get(name, torch.empty(0, dtype=torch.int64))] = False
            self.masks.append(mask.view(parameter.shape).to(parameter.device))
            self.copies.append(parameter.detach().clone())

    @torch.no_grad()
    def before_clipping(self) -> None:
        """Zero the frozen gradients."""
        for parameter, mask in zip(self.parameters, self.masks, strict=True):
            parameter.grad.mul_(mask)

    @torch.no_grad()
    def after_step(self) -> None:
        """Write the frozen values back."""
        for parameter, mask, value in zip(self.parameters, self.masks, self.copies, strict=True):
            torch.where(mask, parameter, value, out=parameter.data)

    def kept(self) -> list[Tensor]:
        """Masks and copies."""
        return [*self.masks, *self.copies]


class Pulled(Training):
    """Consolidation by a hook on the optimizer, as hard as it gets within three steps."""

    def __init__(self, base: nn.Module, ids: Tensor) -> None:
        super().__init__(base, ids)
        self.pull = Consolidation(self.model, draw_importance(self.model), strength=1.0)
        self.pull.attach(self.optimizer)

    def added(self) -> None:
        """Call the hook as the optimizer does."""
        for hook in self.optimizer._optimizer_step_post_hooks.values():
            hook(self.optimizer, (), {})

    def kept(self) -> list[Tensor]:
        """A copy and a weight of every coordinate."""
        return [tensor for held in self.pull._held for tensor in (held.anchor, held.weight)]


class Elastic(Training):
    """A quadratic penalty's gradient."""

    def __init__(self, base: nn.Module, ids: Tensor) -> None:
        super().__init__(base, ids)
        self.copies = [parameter.detach().clone() for parameter in self.parameters]
        importance = draw_importance(self.model)
        self.weights = [importance[name].to(p.dtype).square() for name, p in self.model.named_parameters()]

    @torch.no_grad()
    def before_clipping(self) -> None:
        """Add the penalty's gradient."""
        for parameter, copied, weight in zip(self.parameters, self.copies, self.weights, strict=True):
            parameter.grad.addcmul_(parameter - copied, weight, value=10.0)

    def kept(self) -> list[Tensor]:
        """Copies and weights."""
        return [*self.copies, *self.weights]


def draw_importance(model: nn.Module) -> dict[str, Tensor]:
    """Random root mean squares of gradients."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(parameter.shape, generator=generator).bfloat16().to(parameter.device)
        for name, parameter in model.named_parameters()
    }


def check(methods: dict[str, Training], base: nn.Module, region: CoreRegion) -> None:
    """Take three steps, and make sure that the methods freeze what they should and train the rest alike."""
    for method in methods.values():
        for _ in range(3):
            method.step()
    start = dict(base.named_parameters())
    exact = base.dtype == torch.float32
    for name, index in region.indices.items():
        index = index.to(base.device)
        before = start[name].detach().flatten()[index]
        now = {kind: dict(method.model.named_parameters())[name].detach() for kind, method in methods.items()}
        for kind in (OURS, LOGGED, DENSE):
            if not torch.equal(now[kind].flatten()[index], before):
                raise SystemExit(f"{kind}: frozen coordinates of {name} moved")
        if torch.equal(now[FREE].flatten()[index], before):
            raise SystemExit(f"free: no coordinate of {name} moved")
        for kind in (PULL, EWC):
            if exact and not (now[kind] - start[name]).norm() < (now[FREE] - start[name]).norm():
                raise SystemExit(f"{kind}: {name} moved as far as without it")
        if exact and not (now[OURS] - now[DENSE]).abs().max() < 1e-5:
            raise SystemExit(f"ours and dense trained {name} differently")


def time_added(method: Training, repeats: int) -> float:
    """Return the median seconds of what a method adds to a step, on the gradients of a real one."""
    method.backward()
    wait = torch.cuda.synchronize if method.ids.is_cuda else lambda: None
    seconds = []
    for number in range(-3, repeats):
        wait()
        start = time.perf_counter()
        method.added()
        wait()
        if number >= 0:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def runs_without_sync(method: Training) -> bool | None:
    """Whether a step never makes the host wait for the GPU; None on a CPU."""
    if not method.ids.is_cuda:
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        method.added()
    except RuntimeError:
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def nbytes(tensors: list[Tensor]) -> int:
    """The bytes of all tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(base: nn.Module, ids: Tensor, rounds: int, percent: float) -> dict[str, Any]:
    """Compare the methods at one size of the core."""
    region = draw_region(base, percent)
    methods: dict[str, Training] = {
        FREE: Training(base, ids),
        OURS: Ours(base, ids, region),
        LOGGED: Ours(base, ids, region, logged=True),
        DENSE: Dense(base, ids, region),
        PULL: Pulled(base, ids),
        EWC: Elastic(base, ids),
    }
    check(methods, base, region)
    seconds = TUNER.interleave({name: method.step for name, method in methods.items()}, rounds)
    free = statistics.median(seconds[FREE])
    size = nbytes(list(base.parameters()))
    return {
        "frozen": len(region),
        "free_seconds": free,
        "methods": {
            name: {
                "seconds": statistics.median(seconds[name]),
                "to_free": TUNER.ratio(seconds[name], seconds[FREE]),
                "added_seconds": time_added(method, rounds),
                "kept": nbytes(method.kept()) / size,
                "no_sync": runs_without_sync(method),
            }
            for name, method in methods.items()
        },
    }


def measure_growth(base: nn.Module, ids: Tensor, repeats: int) -> dict[str, dict[str, float]]:
    """What ours and dense add at several sizes of the core."""
    rows = {}
    for percent in PERCENTS:
        region = draw_region(base, percent)
        row: dict[str, float] = {"frozen": len(region)}
        for name, kind in {OURS: Ours, DENSE: Dense}.items():
            method = kind(base, ids, region)
            method.step()
            row[f"{name}_seconds"] = time_added(method, repeats)
            row[f"{name}_kept"] = nbytes(method.kept()) / nbytes(method.parameters)
            del method
            gc.collect()
        rows[str(percent)] = row
    return rows


def make_page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    settings = "; ".join(f"{key} {value}" for key, value in (report["settings"] | report["machine"]).items() if value)
    free = report["step"]["free_seconds"]
    rows = [
        [
            name,
            row["seconds"] * 1e3,
            row["to_free"],
            row["added_seconds"] * 1e3,
            f"{row['added_seconds'] / free:.2%}",
            f"{row['kept']:.2%}",
            {None: None, True: "no", False: "yes"}[row["no_sync"]],
        ]
        for name, row in report["step"]["methods"].items()
    ]
    growth = [
        [
            f"{percent} %",
            f"{row['frozen']:,}",
            *(f"{row[f'{name}_seconds'] * 1e3:.2f}" for name in (OURS, DENSE)),
            *(f"{row[f'{name}_kept']:.2%}" for name in (OURS, DENSE)),
        ]
        for percent, row in report["growth"].items()
    ]
    return (
        f"# Cost of core isolation and consolidation\n\n{settings}\n\n{report['step']['frozen']:,} of "
        f"{report['parameters']:,} coordinates frozen. Times in ms, ratios as median [quartiles]; "
        "`benchmarks/isolation.py` says what each word means.\n\n"
        + TUNER.table(["method", "step", "step / free", "added", "added / free", "kept", "sync"], rows)
        + "\n## By the size of the core\n\n"
        + TUNER.table(["core", "frozen", "ours added", "dense added", "ours kept", "dense kept"], growth)
    )


def main() -> None:
    """Run the benchmark and write its report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--percent", type=float, default=1.0)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    size = "tiny" if options.quick else "large" if options.device.startswith("cuda") else "small"
    layers, width, inner, heads, vocabulary, rows, tokens = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=tokens,
        tie_word_embeddings=True,
    )
    base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).to(options.device)
    ids = torch.randint(vocabulary, (rows, tokens), device=options.device)
    rounds = 2 if options.quick else options.rounds
    report = {
        "settings": {
            "device": options.device,
            "dtype": options.dtype,
            "model": f"{layers} layers, width {width} and {inner}, {heads} heads, vocabulary {vocabulary}",
            "batch": f"{rows} x {tokens} tokens",
            "optimizer": "AdamW, fused",
            "rounds": rounds,
        },
        "parameters": sum(parameter.numel() for parameter in base.parameters()),
        "step": measure(base, ids, rounds, options.percent),
        "growth": measure_growth(base, ids, rounds),
        "machine": TUNER.describe_machine(),
    }
    page = make_page(report)
    print(page)
    if not options.quick:
        RESULTS.mkdir(parents=True, exist_ok=True)
        stem = f"{size}-{options.device.partition(':')[0]}-{options.dtype}"
        write_json(RESULTS / f"{stem}.json", report)
        with complete_file(RESULTS / f"{stem}.md") as temporary:
            temporary.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
