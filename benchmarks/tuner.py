"""What tuning costs beside a frozen model: bytes kept for backward, time of a step, and batches that mix adapters.

    python benchmarks/tuner.py                                  # float32 on the CPU; --threads 1 if others use it too
    python benchmarks/tuner.py --parts                          # also saved bytes by kind of layer
    python benchmarks/tuner.py --device cuda --dtype bfloat16   # a larger model; --compile for torch.compile
    python benchmarks/tuner.py --half                           # an experiment on q, k, o and down, see below
    python benchmarks/tuner.py --quick                          # a tiny model, to see that it runs; writes nothing

The model is a Llama with random weights; all methods start from the same ones and get the same tokens and loss. Every
linear layer of its blocks is adapted, not the output layer. The input embeddings require a gradient throughout, so
that all methods backpropagate through the whole model; the floor is the frozen model, which does this and no more.
"Naive" is `base(x) * z**k` as one would write it. (IA)³ scales outputs too, in every layer. Full fine-tuning trains
every weight. In bfloat16 the tuners of PEFT appear twice: with float32 adapters, PEFT's default and what "/ LoRA"
refers to, and with bfloat16.

- saved: bytes of the distinct storages that autograd keeps from forward to backward, as `saved_tensors_hooks` sees
  them. A storage counts once and whole, however many tensors share it, also if it is an input or output of a custom
  autograd function. The storages of the model's parameters and buffers do not count; `z**k` and the embedded input do.
- held: bytes that are still allocated after the forward pass while only its loss is kept. It also finds what a custom
  function keeps behind the hooks' back. On the CPU: storages that operators made (none where torch.compile hides
  them); on a GPU: growth of `torch.cuda.memory_allocated`. Parameters and buffers do not count.
- peak (GPU): `torch.cuda.max_memory_allocated` during one step, above what was allocated before it. The gradients
  that the step makes are in it, the weights are not.
- step: forward, loss, backward, with gradients at None before it, and no optimizer. Each round runs every method once,
  in shuffled order; a ratio is formed within a round, and the table gives the median over the rounds and [quartiles].
- mixed: inference on 32 rows, each with its own adapter (`adapter_names`), beside one adapter for all the rows.
  Timed alike; the floor is the model without adapters. "One token" has no cache of earlier tokens.

`--half` adds Propulsion with the outputs of q_proj, k_proj, o_proj and down_proj kept in bfloat16. What comes after
these layers keeps nothing of their outputs, so that Propulsion alone pays for them. Its gradients are
not checked, and only "held" counts these outputs.

Before anything is timed: all losses at the start agree with the floor's, all gradients are finite, the gradients of
Propulsion agree with the naive ones at z drawn from [0.98, 1.02] (within 1e-4 of their norm in float32; in bfloat16
the difference is only reported), and rows of a mixed batch agree with those of one adapter.
"""

from __future__ import annotations

import argparse
import copy
import gc
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

import peft_cpift
from peft_cpift import CpiftError, PropulsionConfig
from peft_cpift.checkpoint import complete_file
from peft_cpift.checkpoint.writer import write_json
from peft_cpift.propulsion import PropulsionLayer

RESULTS = Path(__file__).parent / "results" / "tuner"
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KEPT_BY_NOBODY_ELSE = ("q_proj", "k_proj", "o_proj", "down_proj")
FLOOR, NAIVE, IA3, LORA, PROPULSION, FULL = "floor", "naive", "(IA)³", "LoRA r=8", "Propulsion", "full fine-tuning"
HALF = "Propulsion, half kept"
DEGREE = 15
WARM_UP = 3


SIZES = {  # layers, width, inner width, heads, vocabulary; rows and tokens of a batch
    "tiny": (2, 64, 172, 4, 128, 2, 16),
    "small": (6, 512, 1376, 8, 2000, 4, 256),
    "large": (16, 2048, 5632, 16, 32000, 8, 1024),
}


class NaiveScale(nn.Module):
    """A linear layer times `z**degree`, left to autograd."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.z = nn.Parameter(torch.ones(linear.out_features, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the layer's output, in its own dtype."""
        y = self.linear(x)
        return y * (self.z**DEGREE).to(y.dtype)


def adapt(method: str, model: nn.Module, parts: Sequence[str] = PARTS) -> nn.Module:
    """Put a method on the frozen `model`, in place, and return what is to be called."""
    if method == NAIVE:
        for name, layer in list(model.model.named_modules()):
            if name.endswith(tuple(parts)):
                model.model.set_submodule(name, NaiveScale(layer))
    elif method == FULL:
        model.requires_grad_(True)
    elif method != FLOOR:
        tuner, _, dtype = method.partition(", ")
        if method == HALF:
            return keep_in_half(get_peft_model(model, make_config(PROPULSION, parts)))
        return get_peft_model(model, make_config(tuner, parts), autocast_adapter_dtype=not dtype)
    return model


def keep_in_half(model: nn.Module) -> nn.Module:
    """Let the layers whose output only Propulsion keeps hold it in bfloat16 until the backward pass."""

    def half(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: tensor.to(torch.bfloat16) if tensor.ndim > 2 else tensor, Tensor.float
            ):
                return forward(*args, **kwargs)

        return wrapped

    for layer in model.modules():
        if isinstance(layer, PropulsionLayer) and layer.module_name.endswith(KEPT_BY_NOBODY_ELSE):
            layer.forward = half(layer.forward)
    return model


def make_config(tuner: str, parts: Sequence[str] = PARTS, *, at_start: bool = True) -> PeftConfig:
    """Return a tuner's configuration; `at_start` false draws its parameters so that they have an effect."""
    common = {"target_modules": list(parts), "task_type": "CAUSAL_LM"}
    if tuner == LORA:
        return LoraConfig(**common, r=8, init_lora_weights=at_start)
    if tuner == IA3:
        return IA3Config(**common, feedforward_modules=[])
    return PropulsionConfig(**common, degree=DEGREE, init_weights=at_start)


class Method:
    """A model as one method tunes it, and the step that is measured."""

    def __init__(self, model: nn.Module, ids: Tensor, compiled: bool = False) -> None:
        self.model, self.ids = model.train(), ids
        self.call = torch.compile(model) if compiled else model
        self.trained = [p for p in model.parameters() if p.requires_grad]
        # a view like weight.T shares its parameter's storage
        self.own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the loss, and the embedded inputs, which require a gradient."""
        inputs = self.model.get_input_embeddings()(self.ids).requires_grad_()
        return self.call(inputs_embeds=inputs, labels=self.ids, use_cache=False).loss, inputs

    def step(self) -> tuple[Tensor, Tensor]:
        """Forward, loss and backward: what is timed."""
        loss, inputs = self.forward()
        loss.backward()
        return loss.detach(), inputs

    def clear(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad(set_to_none=True)

    def loss_and_gradients(self) -> tuple[float, list[Tensor]]:
        """Return the loss and all gradients; that of the inputs too, if the embeddings below them are frozen."""
        self.clear()
        loss, inputs = self.step()
        return loss.item(), [p.grad.float() for p in (*self.trained, inputs) if p.is_leaf]


def saved_bytes(method: Method) -> int:
    """Return the bytes of the distinct storages that one forward pass leaves to autograd, without the model's own."""
    storages: dict[int, int] = {}
    alive = []  # an address must not be given to another tensor while we count

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in method.own:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        method.forward()
    return sum(storages.values())


class _Made(TorchDispatchMode):
    """Remembers, weakly, the storage of every tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[StorageWeakRef, tuple[int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(result) if isinstance(t, Tensor)):
            self.storages[StorageWeakRef(storage)] = (storage.data_ptr(), storage.nbytes())
        return result


def held_bytes(method: Method) -> int | None:
    """Return the bytes still allocated after a forward pass whose loss alone is kept; None where nobody can tell."""
    gc.collect()
    if method.ids.is_cuda:
        before = torch.cuda.memory_allocated()
        loss = method.forward()[0]
        return torch.cuda.memory_allocated() - before
    if method.call is not method.model:
        return None
    with _Made() as made:
        loss = method.forward()[0]  # noqa: F841
    gc.collect()
    alive = {address: size for ref, (address, size) in made.storages.items() if not ref.expired()}
    return sum(size for address, size in alive.items() if address not in method.own)


def peak_bytes(method: Method) -> int | None:
    """Return how far one step raises the GPU's allocated memory; None on a CPU."""
    if not method.ids.is_cuda:
        return None
    method.clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    method.step()
    torch.cuda.synchronize()
    method.clear()
    return torch.cuda.max_memory_allocated() - before


def interleave(
    calls: dict[str, Callable[[], Any]], rounds: int, before: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Time every call once in each round, in shuffled order; return its seconds by round. `before` is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    shuffler = random.Random(0)
    synchronize = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    gc.collect()
    gc.disable()
    try:
        for number in range(-WARM_UP, rounds):
            for name in shuffler.sample(list(calls), len(calls)):
                before()
                synchronize()
                start = time.perf_counter()
                calls[name]()
                synchronize()
                if number >= 0:
                    seconds[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return seconds


def ratio(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return the median of the ratios by round, and the lower and upper quartile."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(times, others, strict=True)], method="inclusive")
    return [middle, low, high]


def check(methods: dict[str, Method]) -> float:
    """Make sure that the methods compute the same; return how far Propulsion's gradients are from the naive ones."""
    exact = methods[FLOOR].model.dtype == torch.float32
    floor, _ = methods[FLOOR].loss_and_gradients()
    for name, method in methods.items():
        loss, gradients = method.loss_and_gradients()
        if abs(loss - floor) > (1e-5 if exact else 1e-2) * floor:
            raise SystemExit(f"{name}: its loss at the start is {loss}, the floor's is {floor}")
        if not all(gradient.isfinite().all() for gradient in gradients):
            raise SystemExit(f"{name}: a gradient is not finite")
    naive, ours = methods[NAIVE], methods[PROPULSION]
    with torch.no_grad():
        for z, same in zip(ours.trained, naive.trained, strict=True):
            z.copy_(same.uniform_(0.98, 1.02))
    pairs = zip(ours.loss_and_gradients()[1], naive.loss_and_gradients()[1], strict=True)
    difference = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    if exact and not difference < 1e-4:
        raise SystemExit(f"the gradients of Propulsion and naive differ by {difference:.1e} relative to their norm")
    for z in (*ours.trained, *naive.trained):
        z.data.fill_(1)
    for method in methods.values():
        method.clear()
    return difference


def measure_steps(base: nn.Module, ids: Tensor, rounds: int, compiled: bool, half: bool) -> dict[str, Any]:
    """Measure bytes and time of every method's step."""
    low = "" if base.dtype == torch.float32 else f", {base.dtype}".replace("torch.", "")
    names = dict.fromkeys([FLOOR, NAIVE, IA3, IA3 + low, LORA, LORA + low, PROPULSION, *[HALF] * half, FULL])
    methods = {name: Method(adapt(name, copy.deepcopy(base)), ids, compiled) for name in names}
    difference = check(methods)
    rows = {}
    for name, method in methods.items():
        method.step()  # compiled and with the libraries' workspaces in place
        method.clear()
        rows[name] = {
            "trained": sum(p.numel() for p in method.trained),
            "saved_bytes": saved_bytes(method),
            "held_bytes": held_bytes(method),
            "peak_bytes": peak_bytes(method),
        }
    seconds = interleave(
        {name: method.step for name, method in methods.items()},
        rounds,
        before=lambda: [method.clear() for method in methods.values()],
    )
    for name, row in rows.items():
        row["seconds"] = statistics.median(seconds[name])
        row["to_floor"], row["to_lora"] = ratio(seconds[name], seconds[FLOOR]), ratio(seconds[name], seconds[LORA])
    return {"gradient_difference": difference, "methods": rows}


@torch.no_grad()
def measure_mixed(base: nn.Module, rounds: int, adapters: int = 32) -> dict[str, Any]:
    """Time inference with as many adapters as rows, and with one for all rows."""
    names = [f"adapter{i}" for i in range(adapters)]
    models = {}
    for tuner in (PROPULSION, LORA):
        model = get_peft_model(copy.deepcopy(base), make_config(tuner, at_start=False), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, make_config(tuner, at_start=False))
        models[tuner] = model.eval()
    result = {}
    for kind, tokens in {"prefill": 64, "one token": 1}.items():
        ids = torch.randint(base.config.vocab_size, (adapters, tokens), device=base.device)
        calls: dict[str, Callable[[], Any]] = {FLOOR: partial(base.eval(), input_ids=ids, use_cache=False)}
        for tuner, model in list(models.items()):
            one = partial(model, input_ids=ids, use_cache=False)
            mixed = partial(one, adapter_names=names)
            try:
                logits = mixed().logits.float()
            except CpiftError as error:
                print(f"{tuner} is left out of mixed batches: {error}")
                del models[tuner]
                continue
            for row in (adapters - 1, 0):  # ends with the first adapter active
                model.set_adapter(names[row])
                alone = one().logits[row].float()
                tolerance = 1e-4 if base.dtype == torch.float32 else 0.1
                if not (logits[row] - alone).norm() < tolerance * alone.norm():
                    raise SystemExit(f"{tuner}: row {row} of the mixed batch differs from its adapter alone")
            calls |= {f"{tuner}, one": one, f"{tuner}, mixed": mixed}
        seconds = interleave(calls, rounds)
        result[f"{kind} ({adapters} x {tokens})"] = {
            name: {
                "seconds": statistics.median(times),
                "to_floor": ratio(times, seconds[FLOOR]),
                "to_one": ratio(times, seconds[name.replace(", mixed", ", one")]),
            }
            for name, times in seconds.items()
        }
    return result


def measure_parts(base: nn.Module, ids: Tensor) -> dict[str, dict[str, int]]:
    """Count the bytes that adapting one kind of layer saves above the floor."""

    def saved(name: str, parts: Sequence[str]) -> int:
        return saved_bytes(Method(adapt(name, copy.deepcopy(base), parts), ids))

    floor = saved(FLOOR, PARTS)
    kinds = {part: (part,) for part in PARTS} | {"all": PARTS}
    methods = (NAIVE, IA3, LORA, PROPULSION)
    return {name: {kind: saved(name, parts) - floor for kind, parts in kinds.items()} for name in methods}


def describe_machine() -> dict[str, Any]:
    """Name the processors and the versions that a result depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "peft_cpift": peft_cpift.__version__,
    }


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table whose first column is text: None is a dash, a list a ratio with its quartiles."""

    def show(cell: Any) -> str:
        if isinstance(cell, list):
            return "{:.3f} [{:.3f}, {:.3f}]".format(*cell)
        return "-" if cell is None else f"{cell:,.2f}" if isinstance(cell, float) else str(cell)

    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(map(show, row))} |" for row in (head, marks, *rows)) + "\n"


def make_page(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""

    def mib(count: int | None) -> float | None:
        return None if count is None else count / 2**20

    methods = report["steps"]["methods"]
    facts = {**report["settings"], **report["machine"]}
    rows = []
    for name, row in methods.items():
        sizes = [row["saved_bytes"], row["saved_bytes"] - methods[FLOOR]["saved_bytes"]]
        sizes += [row["held_bytes"], row["peak_bytes"]]
        rows.append([name, row["trained"], *map(mib, sizes), 1e3 * row["seconds"], row["to_floor"], row["to_lora"]])
    head = ["method", "trained", "saved", "above floor", "held", "peak", "step", "step / floor", "step / LoRA"]
    sections = [
        "# Cost of tuning\n",
        "; ".join(f"{key} {value}" for key, value in facts.items() if value is not None) + "\n",
        "Sizes in MiB, times in ms, ratios as median [quartiles]; `benchmarks/tuner.py` says what each word means. "
        f"Gradients of Propulsion and naive: {report['steps']['gradient_difference']:.1e} apart, of their norm.\n",
        "## Training step\n",
        table(head, rows),
    ]
    for kind, forwards in report.get("mixed", {}).items():
        rows = [[name, 1e3 * row["seconds"], row["to_floor"], row["to_one"]] for name, row in forwards.items()]
        sections += [f"## Mixed batch, {kind}\n", table(["", "forward", "/ floor", "/ one adapter"], rows)]
    if "parts" in report:
        rows = [[name, *map(mib, counts.values())] for name, counts in report["parts"].items()]
        sections += ["## Saved above the floor, by the only layers adapted\n", table(["", *PARTS, "all"], rows)]
    return "\n".join(sections)


def main() -> None:
    """Read the command line, measure, print the page, and write it beside the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds; writes nothing by default")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the steps; leaves out mixed batches")
    parser.add_argument("--size", choices=SIZES, help="default: small on the CPU, large on a GPU")
    parser.add_argument("--rounds", type=int, help="default: 20; 3 with --quick")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's own, one for each physical core")
    parser.add_argument("--parts", action="store_true", help="also count saved bytes by kind of layer")
    parser.add_argument("--half", action="store_true", help="also an experiment with outputs kept in bfloat16")
    parser.add_argument("--output", type=Path, help="folder of the results; default: results/tuner beside this script")
    arguments = parser.parse_args()

    if arguments.rounds == 1:
        parser.error("--rounds 1 has no quartiles; give 2 or more")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rounds = arguments.rounds or (3 if arguments.quick else 20)
    name = arguments.size or ("tiny" if arguments.quick else "large" if arguments.device == "cuda" else "small")
    layers, width, intermediate, heads, vocabulary, *batch = SIZES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        attn_implementation="sdpa",
    )
    with torch.device(arguments.device):
        base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype)).requires_grad_(False)
        ids = torch.randint(vocabulary, batch)
    # dynamo counts the compiled versions of a forward method over all models of a class
    torch._dynamo.config.recompile_limit = 64

    settings = {key: getattr(arguments, key) for key in ("device", "dtype", "compile")}
    shape = f"{layers} layers, width {width} and {intermediate}, {heads} heads, vocabulary {vocabulary}"
    settings |= {"model": shape, "batch": "{} x {} tokens".format(*batch), "degree": DEGREE, "rounds": rounds}
    report = {
        "settings": settings,
        "machine": describe_machine(),
        "steps": measure_steps(base, ids, rounds, arguments.compile, arguments.half),
    }
    if not arguments.compile:
        report["mixed"] = measure_mixed(base, rounds)
    if arguments.parts:
        report["parts"] = measure_parts(base, ids)
    page = make_page(report)
    print(page)
    folder = arguments.output or (None if arguments.quick else RESULTS)
    if folder:
        stem = "-".join([name, arguments.device, arguments.dtype, *["compile"] * arguments.compile])
        write_json(folder / f"{stem}.json", report)
        with complete_file(folder / f"{stem}.md") as temporary:
            temporary.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
