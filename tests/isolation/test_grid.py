"""Strategy: train a tiny model through transformers' Trainer under every combination of optimizer, weight decay,
clipping, accumulation, dtype and tuner, each once undisturbed and once resumed half-way, and compare bit patterns.

A witness looks at the gradients after clipping and at the optimizer's state before its first step, where a fault would
be repaired before the end. Optimizers beyond the grid, and loss scaling, are tried in a plain loop. Last, single parts
of the isolation are taken out to show what each is for: the frozen coordinates must then move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torchao.optim
from accelerate.optimizer import AcceleratedOptimizer
from bitsandbytes import optim as bitsandbytes
from peft import LoraConfig, get_peft_model
from schedulefree import AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_cpift import CoreIsolationCallback, CoreRegion, PropulsionConfig, freeze_core
from peft_cpift.isolation.freeze import FrozenCore
from peft_cpift.isolation.names import saved_parameters
from peft_cpift.isolation.optimizer_state import CleanState

STEPS, HALF = 4, 2
MAX_NORM = 0.02  # below every gradient norm of these models, so that every step is clipped
TOKENS, WIDTH, INNER = 16, 16, 512  # INNER * 8 = 4096 is the size from which bitsandbytes keeps 8-bit state
COPIES = ("z", "ax", "master_param")  # state that holds the parameter's own values
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for matrices and AdamW for vectors, behind one set of groups and one state, as a Trainer wants it."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float):
        parameters = list(parameters)
        matrices = [p for p in parameters if p.ndim == 2]
        vectors = [p for p in parameters if p.ndim != 2]
        settings = {"lr": lr, "weight_decay": weight_decay}
        self.inner = [torch.optim.Muon(matrices, **settings)]
        if vectors:
            self.inner.append(torch.optim.AdamW(vectors, **settings))
        super().__init__([group for inner in self.inner for group in inner.param_groups], {})

    def step(self, closure=None) -> None:
        for inner, group in zip(self.inner, self.param_groups, strict=True):
            inner.state, inner.param_groups = self.state, [group]  # anew, since loading a state replaces both
            inner.step()


def make_sgd(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay)


# The name in TrainingArguments, or how to make it; and a learning rate at which most bfloat16 entries move.
OPTIMIZERS: dict[str, tuple[str | Callable, float]] = {
    "adamw": ("adamw_torch_fused", 0.01),
    "sgd": (make_sgd, 1.0),
    "adafactor": ("adafactor", 0.01),
    "adamw8bit": ("adamw_8bit", 0.01),
    "muon": (MuonAndAdamW, 0.05),
    "schedulefree": ("schedule_free_adamw", 0.01),
}
TUNERS = ["full", "lora", "propulsion"]


@dataclass(frozen=True)
class Case:
    """One cell of the grid."""

    optimizer: str
    decay: float
    clip: bool
    accumulate: int
    dtype: torch.dtype
    tuner: str

    def __str__(self) -> str:
        decay = "decay" if self.decay else "nodecay"
        clip = "clip" if self.clip else "noclip"
        dtype = "fp32" if self.dtype == torch.float32 else "bf16"
        return f"{self.optimizer}-{decay}-{clip}-accumulate{self.accumulate}-{dtype}-{self.tuner}"

    @property
    def learning_rate(self) -> float:
        lr = OPTIMIZERS[self.optimizer][1]
        if self.tuner == "propulsion":  # whose scale is a high power of z
            return lr / 100
        # By so much, about, clipping makes these gradients smaller; the other optimizers do not depend on their size.
        return lr * 25 if self.optimizer == "sgd" and self.clip else lr


GRID = [
    Case(*cell)
    for cell in product(OPTIMIZERS, [0.0, 0.1], [False, True], [1, 2], [torch.float32, torch.bfloat16], TUNERS)
]


class TinyModel(nn.Module):
    """A bigram language model: the loss of the next token given the present one."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        nn.init.normal_(self.embed.weight, std=0.3)  # small enough to move in bfloat16
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, TOKENS)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.down(torch.tanh(self.up(self.embed(ids))))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())}


def make_rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(TOKENS, (33,), generator=generator) for _ in range(64)]
    return [{"ids": row[:-1], "labels": row[1:]} for row in rows]


ROWS = make_rows()


def make_model(tuner: str = "full", dtype: torch.dtype = torch.float32, autocast: bool = True) -> nn.Module:
    """The model with the same weights each time; adapters are float32 unless `autocast` is off, as PEFT makes them."""
    torch.manual_seed(0)
    model = TinyModel().to(dtype)
    if tuner == "lora":
        config = LoraConfig(r=8, init_lora_weights=False, target_modules=["up", "down"])
        return get_peft_model(model, config, autocast_adapter_dtype=autocast)
    if tuner == "propulsion":  # eight vectors make z of `up` large enough for 8-bit state
        config = PropulsionConfig(target_modules=["up", "down"], num_vectors=8, init_weights=False)
        return get_peft_model(model, config)
    return model


def make_region(model: nn.Module) -> CoreRegion:
    """Every seventh coordinate of every trained tensor."""
    parameters = {name: p for name, p in saved_parameters(model).items() if p.requires_grad}
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    return CoreRegion({name: torch.arange(3, p.numel(), 7) for name, p in parameters.items()}, shapes)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().flatten().clone() for name, p in saved_parameters(model).items() if p.requires_grad}


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(INTEGERS[tensor.element_size()])


def frozen_mask(region: CoreRegion, name: str) -> Tensor:
    mask = torch.zeros(math.prod(region.shapes[name]), dtype=torch.bool)
    mask[region.indices[name]] = True
    return mask


class Witness(TrainerCallback):
    """Looks at each gradient as the optimizer gets it, and at the state with which the training begins."""

    def __init__(self, region: CoreRegion, clip: bool):
        self.region, self.clip = region, clip
        self.steps = 0

    def on_step_begin(self, args, state, control, *, model, optimizer, **kwargs):
        if self.steps == 0:
            check_state(model, optimizer.optimizer, self.region)

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
        square = 0.0
        for name, parameter in saved_parameters(model).items():
            if name in self.region.indices:
                gradient = parameter.grad.flatten()
                assert not gradient[frozen_mask(self.region, name)].any(), f"{name}: a frozen gradient was not zeroed"
                square += gradient.double().square().sum().item()
        if self.clip:  # had the frozen gradients been part of the clipped norm, less of it would be left
            assert math.sqrt(square) == pytest.approx(MAX_NORM, rel=0.01)
        self.steps += 1


def train(
    model: nn.Module,
    case: Case,
    output: Path,
    callbacks: list[TrainerCallback],
    resume: Path | None = None,
    **settings,
) -> Trainer:
    optimizer, _ = OPTIMIZERS[case.optimizer]
    own = not isinstance(optimizer, str)
    args = TrainingArguments(
        str(output),
        **{
            "optim": "adamw_torch_fused" if own else optimizer,
            "learning_rate": case.learning_rate,
            "lr_scheduler_type": "constant",
            "weight_decay": case.decay,
            "max_grad_norm": MAX_NORM if case.clip else 0.0,
            "gradient_accumulation_steps": case.accumulate,
            "per_device_train_batch_size": 4,
            "max_steps": STEPS,
            "save_steps": HALF,
            "logging_strategy": "no",
            "remove_unused_columns": False,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            **settings,
        },
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = (optimizer(trained, case.learning_rate, case.decay), None) if own else (None, None)
    trainer = Trainer(
        model, args, train_dataset=ROWS, eval_dataset=ROWS[:8], callbacks=callbacks, optimizers=optimizers
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def check_parameters(model: nn.Module, before: dict[str, Tensor], region: CoreRegion, share: float = 0.9) -> None:
    """Frozen coordinates have the bits of `before`; of the others at least `share` have moved."""
    for name, now in snapshot(model).items():
        frozen = frozen_mask(region, name)
        assert torch.equal(bits(now[frozen]), bits(before[name][frozen])), f"a frozen coordinate of {name} moved"
        assert now.isfinite().all(), f"{name} diverged"
        moved = (now != before[name])[~frozen].float().mean().item()
        assert moved >= share, f"{name}: only {moved:.0%} of the free coordinates moved"


def check_state(model: nn.Module, optimizer: torch.optim.Optimizer, region: CoreRegion) -> None:
    """The elementwise state of frozen coordinates is as if they had never been trained."""
    for (name, key), (parameter, values) in elementwise_state(model, optimizer).items():
        if name in region.indices:
            now = values[:, frozen_mask(region, name)]
            copied = parameter.detach().flatten()[frozen_mask(region, name)].expand_as(now)
            expected = copied.to(now.dtype) if key in COPIES else torch.full_like(now, initial_state(key, optimizer))
            assert torch.equal(now, expected), f"{key} of {name} is not clean"


def elementwise_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[tuple, tuple[nn.Parameter, Tensor]]:
    """(parameter's name, state's name) -> the parameter and the state, decoded, a column for each coordinate."""
    found = {}
    for name, parameter in saved_parameters(model).items():
        state = optimizer.state.get(parameter, {})
        for key, tensor in state.items():
            # Two averages in one tensor, as AdEMAMix keeps them, have a dimension more. Others are steps or factors.
            if torch.is_tensor(tensor) and tensor.shape[-parameter.ndim :] == parameter.shape:
                found[name, key] = parameter, decode(state, key).reshape(-1, parameter.numel())
    return found


def decode(state: dict[str, Tensor], key: str) -> Tensor:
    tensor = state[key]
    if tensor.dtype == torch.uint8 and f"qmap{key[-1]}" in state:  # bitsandbytes
        return state[f"qmap{key[-1]}"][tensor.long()]
    if type(tensor) is not Tensor and hasattr(tensor, "dequantize"):  # torchao
        return tensor.dequantize()
    return tensor.clone()


def initial_state(key: str, optimizer: torch.optim.Optimizer) -> float:
    """What a coordinate's state is before its first step."""
    settings = {"sum": "initial_accumulator_value", "step_size": "lr"}
    return optimizer.defaults.get(settings[key], 0.0) if key in settings else 0.0


def unwrap(trainer: Trainer) -> torch.optim.Optimizer:
    return trainer.optimizer.optimizer


def check_same(model: nn.Module, other: nn.Module) -> None:
    expected = snapshot(other)
    for name, now in snapshot(model).items():
        assert torch.equal(bits(now), bits(expected[name])), f"{name} differs"


def spoil(model: nn.Module) -> nn.Module:
    """Overwrite what is trained, so that a resumed training has it from the checkpoint alone."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(0.5)
    return model


@pytest.fixture(autouse=True)
def no_overrides_of_earlier_tests():
    """bitsandbytes keeps, for the whole process, which parameters are exempt from 8 bits by `id`, which recurs."""
    bitsandbytes.GlobalOptimManager.get_instance().initialize()


@pytest.mark.filterwarnings("ignore:.*learning rate.*too large for Propulsion", "ignore:weight_decay=0.1 pulls z")
@pytest.mark.parametrize("case", GRID, ids=str)
def test_frozen_coordinates_hold_and_a_resumed_training_is_exact(case, tmp_path):
    model = make_model(case.tuner, case.dtype)
    region, before = make_region(model), snapshot(model)
    share = 0.9 if case.dtype == torch.float32 else 0.5
    witness = Witness(region, case.clip)
    trainer = train(model, case, tmp_path, [CoreIsolationCallback(region, verify="step"), witness])
    assert witness.steps == STEPS
    check_parameters(model, before, region, share)
    check_state(model, unwrap(trainer), region)

    resumed = spoil(make_model(case.tuner, case.dtype))
    witness = Witness(region, case.clip)
    callbacks = [CoreIsolationCallback(region, verify="step"), witness]
    again = train(resumed, case, tmp_path, callbacks, resume=tmp_path / f"checkpoint-{HALF}")
    assert witness.steps == STEPS - HALF
    # torch casts Adafactor's float32 averages to the parameter's dtype when it loads them: see the test below.
    if not (case.optimizer == "adafactor" and case.dtype == torch.bfloat16 and case.tuner == "full"):
        check_same(resumed, model)
    check_parameters(resumed, before, region, share)
    check_state(resumed, unwrap(again), region)

    if case.optimizer == "adamw8bit":
        check_that_a_state_is_8bit(unwrap(trainer))
    if case.optimizer == "schedulefree":  # evaluation and the final model are averages with z
        unwrap(trainer).eval()
        check_parameters(model, before, region, share)


def check_that_a_state_is_8bit(optimizer: torch.optim.Optimizer) -> None:
    codes = [state[key] for state in optimizer.state.values() for key in ("state1", "state2")]
    assert any(code.dtype == torch.uint8 for code in codes)


BASIC = Case("adamw", 0.1, True, 1, torch.float32, "full")


def test_adafactor_itself_does_not_resume_exactly_in_bfloat16(tmp_path):
    """Which is why the grid compares only its frozen coordinates there."""
    case = replace(BASIC, optimizer="adafactor", dtype=torch.bfloat16)
    models = [make_model(dtype=torch.bfloat16) for _ in range(2)]
    train(models[0], case, tmp_path, [])
    train(models[1], case, tmp_path, [], resume=tmp_path / f"checkpoint-{HALF}")
    with pytest.raises(AssertionError, match="differs"):
        check_same(*models)


def test_bfloat16_adapters_are_resumed_in_float32_and_hold_their_values(tmp_path):
    """The Trainer loads adapters in float32, with or without our callback, so that only frozen values can agree."""
    case = replace(BASIC, dtype=torch.bfloat16, tuner="lora")
    for isolated in (False, True):
        models = [make_model("lora", torch.bfloat16, autocast=False) for _ in range(2)]
        region, before = make_region(models[0]), snapshot(models[0])
        for model, resume in zip(models, (None, tmp_path / f"checkpoint-{HALF}"), strict=True):
            train(model, case, tmp_path, [CoreIsolationCallback(region)] if isolated else [], resume)
        assert {now.dtype for now in snapshot(models[0]).values()} == {torch.bfloat16}
        assert {now.dtype for now in snapshot(models[1]).values()} == {torch.float32}
    check_parameters(models[0], before, region, share=0.5)
    check_parameters(models[1], {name: values.float() for name, values in before.items()}, region)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resuming_from_an_unfrozen_checkpoint_warns_and_holds_its_values(tmp_path, optimizer):
    case = replace(BASIC, optimizer=optimizer)
    unfrozen, resume = train_unfrozen(case, tmp_path)
    model = make_model()
    region = make_region(model)
    callbacks = [CoreIsolationCallback(region, verify="step"), Witness(region, case.clip)]
    with pytest.warns(UserWarning, match="written without core isolation"):
        trainer = train(spoil(model), case, tmp_path, callbacks, resume, save_strategy="no")
    check_parameters(model, unfrozen, region)
    check_state(model, unwrap(trainer), region)


@pytest.mark.filterwarnings("ignore:the checkpoint was written without core isolation")
def test_a_training_resumed_from_an_unfrozen_checkpoint_saves_checkpoints(tmp_path):
    _, resume = train_unfrozen(BASIC, tmp_path)
    model = make_model()
    train(model, BASIC, tmp_path, [CoreIsolationCallback(make_region(model))], resume)
    assert (tmp_path / f"checkpoint-{STEPS}").is_dir()


def train_unfrozen(case: Case, output: Path) -> tuple[dict[str, Tensor], Path]:
    """Train the first half without isolation; return the values that the checkpoint has, and its path."""
    model = make_model(case.tuner, case.dtype)
    train(model, case, output, [], max_steps=HALF)
    return snapshot(model), output / f"checkpoint-{HALF}"


def test_evaluation_with_schedule_free_averages_leaves_frozen_coordinates_alone(tmp_path):
    """Evaluating moves the parameters to the average and back, and a checkpoint after it holds the average."""
    case = replace(BASIC, optimizer="schedulefree")
    models = [make_model(), spoil(make_model())]
    region, before = make_region(models[0]), snapshot(models[0])
    for model, resume in zip(models, (None, tmp_path / f"checkpoint-{HALF}"), strict=True):
        callback = CoreIsolationCallback(region, verify="step")
        trainer = train(model, case, tmp_path, [callback], resume, eval_strategy="steps", eval_steps=1)
        check_parameters(model, before, region)
        check_state(model, unwrap(trainer), region)
    check_same(*models)


def leave_out_restoring(monkeypatch) -> None:
    monkeypatch.setattr(FrozenCore, "restore", lambda self: None)
    monkeypatch.setattr(FrozenCore, "verify", lambda self: None)


def leave_out_cleaning(monkeypatch) -> None:
    monkeypatch.setattr(CleanState, "write_moments", lambda self: None)
    monkeypatch.setattr(CleanState, "write_copies", lambda self: None)


def count_moved(model: nn.Module, before: dict[str, Tensor], region: CoreRegion) -> int:
    moved = {name: bits(now) != bits(before[name]) for name, now in snapshot(model).items()}
    return sum(int(moved[name][index].sum()) for name, index in region.indices.items())


@pytest.mark.parametrize(
    ("optimizer", "decay", "moves"),
    [
        pytest.param("adamw", 0.0, False, id="adamw-nodecay"),  # the control: here the mask would do
        pytest.param("adamw", 0.1, True, id="adamw-decay"),
        pytest.param("sgd", 0.1, True, id="sgd-coupled-decay"),
        pytest.param("adamw8bit", 0.1, True, id="adamw8bit-decay"),
        pytest.param("schedulefree", 0.1, True, id="schedulefree-decay"),
        pytest.param("muon", 0.0, True, id="muon-nodecay"),
    ],
)
def test_without_restoring_the_mask_holds_only_what_nothing_else_moves(tmp_path, monkeypatch, optimizer, decay, moves):
    leave_out_restoring(monkeypatch)
    case = replace(BASIC, optimizer=optimizer, decay=decay)
    model = make_model()
    region, before = make_region(model), snapshot(model)
    train(model, case, tmp_path, [CoreIsolationCallback(region), Witness(region, case.clip)])
    moved = count_moved(model, before, region)
    assert moved > len(region) // 2 if moves else moved == 0


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adamw8bit", "muon", "schedulefree"])
@pytest.mark.filterwarnings("ignore:the checkpoint was written without core isolation")
def test_without_cleaning_and_restoring_a_stale_state_moves_masked_coordinates(tmp_path, monkeypatch, optimizer):
    case = replace(BASIC, optimizer=optimizer, decay=0.0)
    unfrozen, resume = train_unfrozen(case, tmp_path)
    region = make_region(make_model())
    moved = []
    for leave_out in (lambda _: None, leave_out_restoring, leave_out_cleaning):
        leave_out(monkeypatch)
        model = make_model()
        train(model, case, tmp_path, [CoreIsolationCallback(region)], resume, save_strategy="no")
        moved.append(count_moved(model, unfrozen, region))
    assert moved[0] == 0
    assert moved[2] > len(region) // 2
    if optimizer != "muon":  # whose update of an entry needs neither its gradient nor its momentum
        assert moved[1] == 0


class MasterSGD(torch.optim.Optimizer):
    """SGD that steps on a copy of the weights, as optimizers do that keep float32 copies of bfloat16 weights."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                master = self.state[parameter].setdefault("master_param", parameter.detach().float().clone())
                master.sub_(parameter.grad + group["weight_decay"] * master, alpha=group["lr"])
                parameter.copy_(master)


DECAY = 0.1
PLAIN: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw-forloop": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=DECAY, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=DECAY, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=DECAY, fused=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=DECAY, amsgrad=True),
    "adam-forloop": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=DECAY, foreach=False),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=DECAY, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=DECAY),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01, weight_decay=DECAY),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01, weight_decay=DECAY),
    "sgd-forloop": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=DECAY, foreach=False),
    "sgd-foreach-nesterov": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, weight_decay=DECAY, nesterov=True, foreach=True
    ),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=DECAY, fused=True),
    "sgd-master": lambda p: MasterSGD(p, lr=0.1, weight_decay=DECAY),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1, weight_decay=DECAY, t0=1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0, weight_decay=DECAY),
    "rmsprop-centered": lambda p: torch.optim.RMSprop(p, lr=0.001, weight_decay=DECAY, momentum=0.9, centered=True),
    "adagrad-initial": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=DECAY, initial_accumulator_value=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=DECAY),
    "lion8bit": lambda p: bitsandbytes.Lion8bit(p, lr=0.001, weight_decay=DECAY),
    "paged-lion8bit": lambda p: bitsandbytes.PagedLion8bit(p, lr=0.001, weight_decay=DECAY),
    "paged-adamw8bit": lambda p: bitsandbytes.PagedAdamW8bit(p, lr=0.01, weight_decay=DECAY),
    "adam8bit": lambda p: bitsandbytes.Adam8bit(p, lr=0.01, weight_decay=DECAY),
    "sgd8bit": lambda p: bitsandbytes.SGD8bit(p, lr=0.1, momentum=0.9, weight_decay=DECAY),
    "rmsprop8bit": lambda p: bitsandbytes.RMSprop8bit(p, lr=0.001, weight_decay=DECAY),
    "ademamix8bit": lambda p: bitsandbytes.AdEMAMix8bit(p, lr=0.01, weight_decay=DECAY),
    "sgd-schedulefree": lambda p: SGDScheduleFree(p, lr=0.5, weight_decay=DECAY),
    "radam-schedulefree": lambda p: RAdamScheduleFree(p, lr=0.01, weight_decay=DECAY),
    "torchao-adamw8bit": lambda p: torchao.optim.AdamW8bit(p, lr=0.01, weight_decay=DECAY),
    "torchao-adam8bit": lambda p: torchao.optim.Adam8bit(p, lr=0.01, weight_decay=DECAY),
    "torchao-adamw4bit": lambda p: torchao.optim.AdamW4bit(p, lr=0.01, weight_decay=DECAY),
    "torchao-adamw-fp8": lambda p: torchao.optim.AdamWFp8(p, lr=0.01, weight_decay=DECAY),
}
HISTORIES = {"new": 0, "stale": 2}  # steps before the freezing
PLAIN_STEPS = 6  # after which RAdam's warm-up is over
on_cpu = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def faulty(reason: str) -> pytest.MarkDecorator:
    """Marks what the package is known not to reach; a test that begins to pass fails, so that the mark goes."""
    return pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    """`count` clipped steps."""
    if hasattr(optimizer, "train"):  # schedule-free
        optimizer.train()
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its steps, which takes seconds
        for row in ROWS[:count]:
            optimizer.zero_grad()
            model(row["ids"][None], row["labels"][None])["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


def begin(optimizer: str, history: str) -> tuple[nn.Module, torch.optim.Optimizer, CoreRegion]:
    model = make_model()
    made = PLAIN[optimizer](list(model.parameters()))
    take_steps(model, made, HISTORIES[history])
    return model, made, make_region(model)


@on_cpu
@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("name", PLAIN)
def test_every_optimizer_keeps_the_bits(name, history):
    model, optimizer, region = begin(name, history)
    before = snapshot(model)
    with freeze_core(model, optimizer, region):
        take_steps(model, optimizer, PLAIN_STEPS)
    check_parameters(model, before, region)


NOT_CLEAN = {
    ("rprop", "stale"): "Rprop's step sizes of before stay",
    ("torchao-adamw4bit", "new"): "torchao's unsigned 4-bit code has no zero",
    ("torchao-adamw4bit", "stale"): "as above",
}


@on_cpu
@pytest.mark.parametrize(
    ("name", "history"),
    [
        pytest.param(*key, marks=faulty(NOT_CLEAN[key]) if key in NOT_CLEAN else (), id="-".join(key))
        for key in product(PLAIN, HISTORIES)
    ],
)
def test_every_optimizer_forgets_frozen_coordinates(name, history):
    model, optimizer, region = begin(name, history)
    with freeze_core(model, optimizer, region):
        check_state(model, optimizer, region)
        take_steps(model, optimizer, 1)
        check_state(model, optimizer, region)
        take_steps(model, optimizer, PLAIN_STEPS - 1)
        check_state(model, optimizer, region)


@on_cpu
@pytest.mark.parametrize("name", PLAIN)
def test_cleaning_leaves_the_state_of_the_other_coordinates_alone(name):
    model, optimizer, region = begin(name, "stale")
    before = elementwise_state(model, optimizer)
    with freeze_core(model, optimizer, region):
        after = elementwise_state(model, optimizer)
    assert after.keys() == before.keys()
    for (parameter, key), (_, values) in after.items():
        free = ~frozen_mask(region, parameter)
        assert torch.equal(values[:, free], before[parameter, key][1][:, free]), f"{key} of {parameter} changed"


def test_a_training_with_torchaos_8bit_state_is_resumed_exactly(tmp_path):
    """As it is without the callback."""
    models = [make_model(), spoil(make_model())]
    region = make_region(models[0])
    with torch.compiler.set_stance("force_eager"):
        for model, resume in zip(models, (None, tmp_path / f"checkpoint-{HALF}"), strict=True):
            train(model, BASIC, tmp_path, [CoreIsolationCallback(region)], resume, optim="adamw_torch_8bit")
    check_same(*models)


def test_the_8bit_optimizers_of_the_loop_keep_8bit_state():
    model, optimizer, _ = begin("lion8bit", "stale")
    assert optimizer.state[model.up.weight]["state1"].dtype == torch.uint8
    assert optimizer.state[model.embed.weight]["state1"].dtype == torch.float32


@pytest.mark.parametrize("wrapped", [False, True], ids=["scaler", "accelerate"])
@pytest.mark.parametrize(
    "name",
    [
        "adamw-forloop",
        "adamw-fused",
        "adam-forloop",
        "adam-fused",  # whose first step is skipped inside, where it shows a state at rest
        "sgd-forloop",
        "adagrad-initial",
    ],
)
def test_loss_scaling_with_skipped_steps(name, wrapped):
    model = make_model()
    region, before = make_region(model), snapshot(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = PLAIN[name](list(model.parameters()))
    stepped = AcceleratedOptimizer(optimizer, scaler=scaler) if wrapped else optimizer
    with freeze_core(model, stepped, region):
        for row, factor in zip(ROWS, (math.inf, 1.0, 1.0, math.inf, 1.0, 1.0), strict=False):
            start, scale = snapshot(model), scaler.get_scale()
            stepped.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = model(row["ids"][None], row["labels"][None])["loss"]
            scaler.scale(factor * loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if wrapped:
                stepped.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            skipped = math.isinf(factor)
            assert (scaler.get_scale() < scale) == skipped
            assert all(torch.equal(now, start[key]) == skipped for key, now in snapshot(model).items())
    check_parameters(model, before, region)
    check_state(model, optimizer, region)


def test_an_infinite_gradient_of_a_frozen_coordinate_skips_no_step():
    model = nn.Linear(3, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=DECAY, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with freeze_core(model, optimizer, CoreRegion({"weight": torch.tensor([1])}, {"weight": (1, 3)})):
        scaler.scale(model(torch.tensor([[1.0, math.inf, 1.0]])).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 8.0
    assert (model.weight != before).tolist() == [[True, False, True]]


def test_state_that_begins_to_drift_after_the_first_step_is_cleaned():
    """As weight decay on a schedule makes it."""
    model, optimizer, region = begin("sgd-forloop", "new")
    with freeze_core(model, optimizer, region):
        optimizer.param_groups[0]["weight_decay"] = 0.0
        take_steps(model, optimizer, 1)
        optimizer.param_groups[0]["weight_decay"] = DECAY
        take_steps(model, optimizer, 1)
    check_state(model, optimizer, region)


def test_schedule_free_averages_hold_when_the_learning_rate_begins_at_zero(tmp_path):
    """The Trainer's default schedule, linear with warm-up, begins so."""
    model = make_model()
    region, before = make_region(model), snapshot(model)
    case = replace(BASIC, optimizer="schedulefree")
    warmup = {"lr_scheduler_type": "linear", "warmup_steps": 2, "save_strategy": "no"}
    trainer = train(model, case, tmp_path, [CoreIsolationCallback(region)], **warmup)
    unwrap(trainer).eval()
    check_parameters(model, before, region, share=0.5)


@faulty("lerp_ makes +0.0 of -0.0, between the steps")
def test_schedule_free_averages_hold_minus_zero():
    model, region = make_model(), make_region(make_model())
    index = region.indices["up.weight"]
    model.up.weight.data.view(-1)[index] = -0.0
    optimizer = AdamWScheduleFree(model.parameters(), lr=0.01)
    frozen = FrozenCore(model, region)
    frozen.attach(optimizer)
    take_steps(model, optimizer, 1)
    optimizer.eval()
    optimizer.train()
    assert model.up.weight.detach().flatten()[index].signbit().all()


def test_nadams_product_of_momenta_is_left_alone():
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.NAdam(model.parameters())
    for _ in range(2):
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
    product_before = optimizer.state[model.weight]["mu_product"].item()
    with freeze_core(model, optimizer, CoreRegion({"weight": torch.tensor([0])}, {"weight": (1, 1)})):
        assert optimizer.state[model.weight]["mu_product"].item() == product_before
