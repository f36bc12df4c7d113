"""Strategy: one training of a few steps for each of TRL's trainers, PEFT's methods and the Trainer's settings, with
every seventh coordinate of every trained tensor frozen; compared bit by bit, and the others must have moved.

What gets logged is compared with figures that are computed without the package: a count of coordinates, and the
gradient that autograd gives on the same batch. Schedules are watched by a callback that copies the model at each step.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterable
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import BEMACallback, SFTConfig, SFTTrainer

from peft_cpift import CoreIsolationCallback, CoreRegion, CpiftError, NoEffectWarning, PropulsionConfig, freeze_core
from peft_cpift.isolation.names import saved_parameters

# TRL's experimental trainers say at every import that they may change.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

QUERY_AND_VALUE = ["q_proj", "v_proj"]
COMMON = {
    "max_steps": 3,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "per_device_train_batch_size": 4,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}
FIGURES = {"cpift/frozen_fraction", "cpift/masked_grad_norm"}


def load(folder, adapter: PeftConfig | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model if adapter is None else get_peft_model(model, adapter)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, each tensor once, by its saved name."""
    found = {}
    for name, parameter in saved_parameters(model).items():
        if parameter.requires_grad and not any(parameter is other for other in found.values()):
            found[name] = parameter
    return found


def region_of(parameters: dict[str, Tensor], start: int = 0, every: int = 7) -> CoreRegion:
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    indices = {name: torch.arange(start, p.numel(), every) for name, p in parameters.items() if p.numel() > start}
    return CoreRegion(indices, shapes)


def snapshot(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach().flatten().clone() for name, parameter in parameters.items()}


def split(region: CoreRegion, name: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """(the frozen entries, the others)."""
    frozen = torch.zeros(values.numel(), dtype=torch.bool)
    frozen[region.indices.get(name, torch.empty(0, dtype=torch.long))] = True
    return values[frozen], values[~frozen]


def assert_same_bits(a: Tensor, b: Tensor, name: str) -> None:
    assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"a frozen coordinate of {name} changed"


def check(region: CoreRegion, before: dict[str, Tensor], after: dict[str, Tensor], share: float = 0.9) -> None:
    for name, old in before.items():
        (old_frozen, old_free), (frozen, free) = split(region, name, old), split(region, name, after[name])
        assert_same_bits(old_frozen, frozen, name)
        moved = (old_free != free).float().mean() if free.numel() else 1.0
        assert moved >= share, f"only {moved:.0%} of the free coordinates of {name} moved"


def make_sft_trainer(folder, data, output, model, callbacks, *, trainer=SFTTrainer, eval_dataset=None, **settings):
    return trainer(
        model=model,
        args=SFTConfig(str(output), **{**COMMON, **settings}),
        train_dataset=data,
        eval_dataset=eval_dataset,
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=callbacks,
    )


def run_and_check(folder, data, output, model, *, before_ours=(), after_ours=(), share=0.9, **settings) -> Trainer:
    parameters = trained(model)
    assert parameters
    region, before = region_of(parameters), snapshot(parameters)
    callbacks = [*before_ours, CoreIsolationCallback(region, verify="step"), *after_ours]
    trainer = make_sft_trainer(folder, data, output, model, callbacks, **settings)
    trainer.train()
    check(region, before, snapshot(parameters), share)
    return trainer


# --- TRL's trainers ---


def reward(completions: list[str], **_) -> list[float]:
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


SAMPLING = {"num_generations": 2, "max_completion_length": 4}
TRAINERS = {
    "DPO": ("preferences", {}, {}),
    "KTO": ("judged", {}, {}),
    "Reward": ("preferences", {}, {}),
    "GRPO": ("prompts", SAMPLING, {"reward_funcs": reward}),
    "RLOO": ("prompts", SAMPLING, {"reward_funcs": reward}),
    "ORPO": ("preferences", {"max_length": 32}, {}),
    "CPO": ("preferences", {"max_length": 32}, {}),
    "OnlineDPO": ("prompts", {"max_new_tokens": 4}, {"reward_funcs": reward}),
    "Distillation": ("prompts", {"max_completion_length": 4}, {}),
}
EXPERIMENTAL = {"OnlineDPO": "online_dpo"}


def find_trainer(name: str) -> tuple[type[Trainer], type[TrainingArguments]]:
    """A trainer of TRL's and its settings, in the module where the installed version has them."""
    modules = ["trl", f"trl.experimental.{EXPERIMENTAL.get(name, name.lower())}"]
    if name == "Distillation":  # which wanted other data while it was experimental
        modules.pop()
    for module in modules:
        if importlib.util.find_spec(module) is not None:
            home = importlib.import_module(module)
            if hasattr(home, f"{name}Trainer"):
                return getattr(home, f"{name}Trainer"), getattr(home, f"{name}Config")
    pytest.skip(f"this version of TRL has no {name}Trainer")


@pytest.fixture(scope="module")
def preference_data(sums) -> dict[str, Dataset]:
    rows = [(row["prompt"], row["completion"], row["completion"][::-1] + "=") for row in sums.select(range(16))]
    return {
        "preferences": Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows]),
        "judged": Dataset.from_list(
            [{"prompt": p, "completion": (r, c)[i % 2], "label": bool(i % 2)} for i, (p, c, r) in enumerate(rows)]
        ),
        "prompts": Dataset.from_list([{"prompt": p} for p, _, _ in rows]),
    }


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=4, target_modules=QUERY_AND_VALUE)], ids=["full", "lora"])
@pytest.mark.parametrize("name", TRAINERS)
def test_trl_trainers(tiny_model, preference_data, tmp_path, name, adapter):
    kind, config = find_trainer(name)
    data, settings, arguments = TRAINERS[name]
    torch.manual_seed(0)
    if name == "Reward":
        model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    else:
        model = load(tiny_model)
    if name == "Distillation":
        arguments = {"teacher_model": load(tiny_model)}
        for parameter in arguments["teacher_model"].parameters():  # a teacher of other opinion
            parameter.data.mul_(1.5)
    if adapter is not None:
        model = get_peft_model(model, adapter)
    parameters = trained(model)
    region, before = region_of(parameters), snapshot(parameters)
    trainer = kind(
        model=model,
        args=config(str(tmp_path), **{**COMMON, **settings}),
        train_dataset=preference_data[data],
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
        callbacks=[CoreIsolationCallback(region, verify="step")],
        **arguments,
    )
    trainer.train()
    check(region, before, snapshot(parameters))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    assert all(entry["cpift/masked_grad_norm"] >= 0 for entry in logged)
    assert any(entry["cpift/masked_grad_norm"] > 0 for entry in logged)


# --- PEFT's methods ---

ADAPTERS = {
    "lora": LoraConfig(r=4, target_modules=QUERY_AND_VALUE),
    "dora": LoraConfig(r=4, target_modules=QUERY_AND_VALUE, use_dora=True),
    "rslora": LoraConfig(r=4, target_modules=QUERY_AND_VALUE, use_rslora=True),
    "experts": LoraConfig(r=4, target_parameters=["mlp.down_proj.weight"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": VeraConfig(r=4, target_modules=QUERY_AND_VALUE),
    "boft": BOFTConfig(boft_block_size=4, target_modules=QUERY_AND_VALUE),
    "oft": OFTConfig(oft_block_size=4, target_modules=QUERY_AND_VALUE),
    "layer-norm": LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]),
    "lokr": LoKrConfig(r=4, target_modules=QUERY_AND_VALUE),
    "loha": LoHaConfig(r=4, target_modules=QUERY_AND_VALUE),
    "hra": HRAConfig(r=4, target_modules=QUERY_AND_VALUE),
    "fourier": FourierFTConfig(n_frequency=20, target_modules=QUERY_AND_VALUE),
    "vb-lora": VBLoRAConfig(r=4, num_vectors=8, vector_length=8, topk=2, target_modules=QUERY_AND_VALUE),
    "tokens": TrainableTokensConfig(token_indices=[3, 5, 7], target_modules=["embed_tokens"]),
    "lora-and-tokens": LoraConfig(r=4, target_modules=QUERY_AND_VALUE, trainable_token_indices=[3, 5]),
    "modules-to-save": LoraConfig(r=4, target_modules=QUERY_AND_VALUE, modules_to_save=["input_layernorm", "norm"]),
    "propulsion-and-norms": PropulsionConfig(target_modules=QUERY_AND_VALUE, modules_to_save=["input_layernorm"]),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_methods(tiny_model, sums, tmp_path, name):
    model = load(tiny_model, ADAPTERS[name])
    names = {id(p) for p in saved_parameters(model).values()}
    assert all(id(p) in names for p in model.parameters() if p.requires_grad), "a trained tensor has no saved name"
    # BOFT uses an upper triangle only, and VB-LoRA picks a few vectors of its bank for each layer.
    share = {"boft": 0.7, "vb-lora": 0.5}.get(name, 0.9)
    parameters = trained(model)
    region, before = region_of(parameters), snapshot(parameters)
    callback = CoreIsolationCallback(region, verify="step")
    train_plainly(tiny_model, equal_rows(tiny_model, sums), tmp_path, model, [callback])
    check(region, before, snapshot(parameters), share)


def bias_model(folder) -> nn.Module:
    config = AutoModelForCausalLM.from_pretrained(folder).config
    config.attention_bias = True
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def test_biases_alone(tiny_model, sums, tmp_path):
    model = bias_model(tiny_model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".bias"))
    assert len(trained(model)) == 8
    run_and_check(tiny_model, sums, tmp_path, model, share=0.5)  # softmax takes no notice of the keys' biases


def test_biases_that_lora_trains_too(tiny_model, sums, tmp_path):
    model = get_peft_model(bias_model(tiny_model), LoraConfig(r=4, target_modules=["q_proj"], bias="lora_only"))
    assert sum(name.endswith("bias") for name in trained(model)) == 2
    run_and_check(tiny_model, sums, tmp_path, model)


class AllocatesRanks(TrainerCallback):
    """Does after each optimizer step what AdaLoRA asks of a training loop."""

    def on_optimizer_step(self, args, state, control, *, model, **kwargs):
        model.base_model.update_and_allocate(state.global_step)


def adalora(folder) -> nn.Module:
    config = AdaLoraConfig(
        target_modules=QUERY_AND_VALUE, init_r=4, target_r=1, total_step=6, tinit=1, tfinal=1, deltaT=1
    )
    model = load(folder, config)
    for name, parameter in model.named_parameters():
        if "lora_E" in name:  # zero at first, where pruning would not show
            parameter.data.fill_(0.1)
    return model


def test_adalora_prunes_ranks_beside_frozen_directions(tiny_model, sums, tmp_path):
    """The allocator sets entries of lora_E to zero, so that these cannot be frozen, while lora_A and lora_B can."""
    model = adalora(tiny_model)
    ranks = [p for name, p in trained(model).items() if name.endswith("lora_E")]
    parameters = {name: p for name, p in trained(model).items() if not name.endswith("lora_E")}
    region, before = region_of(parameters), snapshot(parameters)
    callbacks = [CoreIsolationCallback(region, verify="step"), AllocatesRanks()]
    make_sft_trainer(tiny_model, sums, tmp_path, model, callbacks, max_steps=6).train()
    check(region, before, snapshot(parameters))
    assert sum(p.count_nonzero() for p in ranks) == len(ranks), "as many ranks are left as asked for"


def test_adalora_that_prunes_a_frozen_rank_is_noticed(tiny_model, sums, tmp_path):
    model = adalora(tiny_model)
    parameters = {name: p for name, p in trained(model).items() if name.endswith("lora_E")}
    callbacks = [CoreIsolationCallback(region_of(parameters, every=1), verify="step"), AllocatesRanks()]
    with pytest.raises(RuntimeError, match=r"of '.*lora_E' changed"):
        make_sft_trainer(tiny_model, sums, tmp_path, model, callbacks, max_steps=6).train()


@pytest.mark.xfail(
    strict=True,
    raises=CpiftError,
    reason="PEFT saves copies of what is left after pruning, and no parameter has a name",
)
def test_adalora_that_has_been_pruned_trains_again(tiny_model, sums, tmp_path):
    model = adalora(tiny_model)
    region = region_of({name: p for name, p in trained(model).items() if name.endswith("lora_A")})
    callbacks = [CoreIsolationCallback(region), AllocatesRanks()]
    trainer = make_sft_trainer(tiny_model, sums, tmp_path, model, callbacks, max_steps=6)
    trainer.train()
    trainer.train()


def test_the_adapter_that_is_active_is_held_and_the_other_left_alone(tiny_model, sums, tmp_path):
    model = load(tiny_model, LoraConfig(r=4, target_modules=QUERY_AND_VALUE))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["k_proj"]))
    model.set_adapter("second")
    first = {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}
    assert sum(".k_proj." in name for name in trained(model)) == 4
    run_and_check(tiny_model, sums, tmp_path, model)
    now = dict(model.named_parameters())
    assert first
    assert all(torch.equal(now[name], values) for name, values in first.items())


# --- settings of the Trainer, and wrappers ---


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("adapter", [None, ADAPTERS["lora"]], ids=["full", "lora"])
def test_gradient_checkpointing(tiny_model, sums, tmp_path, adapter, reentrant):
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    run_and_check(tiny_model, sums, tmp_path, load(tiny_model, adapter), **settings)


@pytest.mark.parametrize("adapter", [None, ADAPTERS["lora"]], ids=["full", "lora"])
def test_a_compiled_model(tiny_model, sums, tmp_path, adapter):
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 2}
    run_and_check(tiny_model, sums, tmp_path, load(tiny_model, adapter), **settings)


@pytest.mark.slow
def test_a_model_compiled_to_native_code(tiny_model, sums, tmp_path):
    run_and_check(tiny_model, sums, tmp_path, load(tiny_model), torch_compile=True, torch_compile_backend="inductor")


def test_embedding_noise(tiny_model, sums, tmp_path):
    run_and_check(tiny_model, sums, tmp_path, load(tiny_model), neftune_noise_alpha=5.0)


def test_data_parallel_in_a_plain_loop(tiny_model):
    model = load(tiny_model)
    parameters = trained(model)
    region, before = region_of(parameters), snapshot(parameters)
    wrapped = nn.DataParallel(model)  # without a GPU it passes calls on, and puts "module." before the names
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2, weight_decay=0.1)
    ids = torch.arange(3, 11).view(1, -1)
    with freeze_core(wrapped, optimizer, region):
        for _ in range(3):
            optimizer.zero_grad()
            wrapped(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    check(region, before, snapshot(parameters))


@pytest.mark.parametrize("adapter", [None, ADAPTERS["lora"]], ids=["full", "lora"])
def test_the_best_model_is_loaded_at_the_end(tiny_model, sums, tmp_path, adapter):
    trainer = run_and_check(
        tiny_model,
        sums,
        tmp_path,
        load(tiny_model, adapter),
        eval_dataset=sums.select(range(8)),
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # a high loss is the best here, so that the best is not the last
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
    )
    assert trainer.state.best_global_step == 1


def test_a_best_model_that_may_be_from_before_a_later_stage_is_refused(tiny_model, sums, tmp_path):
    model = load(tiny_model)
    callback = CoreIsolationCallback({0: region_of(trained(model)), 2: region_of(trained(model), start=1)})
    trainer = make_sft_trainer(
        tiny_model,
        sums,
        tmp_path,
        model,
        [callback],
        eval_dataset=sums.select(range(8)),
        load_best_model_at_end=True,
        greater_is_better=True,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
    )
    with pytest.raises(CpiftError, match="load_best_model_at_end"):
        trainer.train()


def test_evaluation_with_a_schedule_free_optimizer(tiny_model, sums, tmp_path):
    """To evaluate, it moves the weights to their average, and back to go on."""
    run_and_check(
        tiny_model,
        sums,
        tmp_path,
        load(tiny_model),
        optim="schedule_free_adamw",
        lr_scheduler_type="constant",
        eval_dataset=sums.select(range(8)),
        eval_strategy="steps",
        eval_steps=1,
        max_steps=4,
    )


# --- averages of the weights ---


class Averages(TrainerCallback):
    """Keeps an average of the weights, computes with it during evaluations, and leaves it in the model at the end."""

    def __init__(self, model: nn.Module, average=None):
        self.model = model
        self.averaged = AveragedModel(model, multi_avg_fn=average or get_ema_multi_avg_fn(0.5))
        self.kept: list[Tensor] | None = None

    def put(self, values: Iterable[Tensor]) -> None:
        for parameter, value in zip(self.model.parameters(), values, strict=True):
            parameter.data.copy_(value)

    def on_step_end(self, args, state, control, **kwargs):
        self.averaged.update_parameters(self.model)
        if control.should_evaluate:
            self.kept = [p.detach().clone() for p in self.model.parameters()]
            self.put(self.averaged.module.parameters())

    def on_evaluate(self, args, state, control, **kwargs):
        self.put(self.kept)

    def on_train_end(self, args, state, control, **kwargs):
        self.put(self.averaged.module.parameters())


@torch.no_grad()
def inexact_average(averages: list[Tensor], values: list[Tensor], _count) -> None:
    """An average that is kept in a smaller dtype, so that it differs from the numbers even where these are equal."""
    for average, value in zip(averages, values, strict=True):
        average.lerp_(value, 0.5).copy_(average.bfloat16())


@pytest.mark.parametrize("side", ["before_ours", "after_ours"])
def test_an_average_that_is_swapped_in(tiny_model, sums, tmp_path, side):
    """The average of equal numbers is that number in torch's formula, so that even what is left there holds."""
    model = load(tiny_model)
    averages = Averages(model)
    settings = {"eval_dataset": sums.select(range(8)), "eval_strategy": "steps", "eval_steps": 1}
    run_and_check(tiny_model, sums, tmp_path, model, **{side: [averages]}, **settings)
    assert averages.kept is not None
    assert not torch.equal(averages.kept[0], model.model.embed_tokens.weight), "the average was not left in the model"


def test_an_average_that_rounds_is_noticed_at_the_end(tiny_model, sums, tmp_path):
    model = load(tiny_model)
    with pytest.raises(RuntimeError, match="core isolation was broken"):
        run_and_check(tiny_model, sums, tmp_path, model, before_ours=[Averages(model, inexact_average)])


@pytest.mark.parametrize("side", ["before_ours", "after_ours"])
def test_trls_own_average(tiny_model, sums, tmp_path, side):
    callback = BEMACallback(update_freq=1, lag=1)
    run_and_check(tiny_model, sums, tmp_path, load(tiny_model), **{side: [callback]})
    assert callback.running_model is not None


# --- what is logged ---


class Recorder(TrainerCallback):
    """Keeps the logs as a reporter gets them, and the model as it is when each step begins."""

    def __init__(self, model: nn.Module | None = None):
        self.model = model
        self.logs: list[dict] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        if self.model is not None:
            self.weights.append({name: p.detach().clone() for name, p in self.model.named_parameters()})

    def on_log(self, args, state, control, *, logs, **kwargs):
        self.logs.append(dict(logs))


def equal_rows(folder, sums, count: int = 8) -> list[dict]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(row["prompt"] + row["completion"], padding="max_length", max_length=8) for row in sums]
    return [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows[:count]]


def train_plainly(folder, rows, output, model, callbacks, *, insert_first=None, **settings) -> Trainer:
    args = TrainingArguments(str(output), **{**COMMON, "max_grad_norm": 0.0, **settings})
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows, callbacks=callbacks, processing_class=None)
    if insert_first is not None:  # the line that the callback's docstring gives
        trainer.callback_handler.callbacks.insert(0, trainer.pop_callback(insert_first))
    trainer.train()
    return trainer


def frozen_gradient_norm(folder, rows, weights: dict[str, Tensor], region: CoreRegion) -> float:
    model = load(folder)
    model.load_state_dict(weights, strict=False)
    model(**{key: torch.tensor([row[key] for row in rows]) for key in rows[0]}).loss.backward()
    squares = [split(region, name, p.grad.flatten())[0].double().square().sum() for name, p in trained(model).items()]
    return math.sqrt(sum(squares))


@pytest.mark.parametrize(
    ("strategy", "batch", "accumulation"), [("steps", 8, 1), ("steps", 2, 4), ("epoch", 8, 1), ("epoch", 2, 4)]
)
def test_the_figures_are_right_and_in_every_log_entry_of_the_training(
    tiny_model, sums, tmp_path, strategy, batch, accumulation
):
    """Each step sees all eight rows, so that the order in which they come makes no difference."""
    model, rows = load(tiny_model), equal_rows(tiny_model, sums)
    region = region_of(trained(model))
    recorder = Recorder(model)
    trainer = train_plainly(
        tiny_model,
        rows,
        tmp_path,
        model,
        [CoreIsolationCallback(region), recorder],
        logging_strategy=strategy,
        eval_strategy="epoch",
        max_steps=-1,
        num_train_epochs=3,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fraction = sum(len(index) for index in region.indices.values()) / total
    for entries in (trainer.state.log_history, recorder.logs):
        of_training = [entry for entry in entries if "loss" in entry]
        assert len(of_training) == 3
        for entry, weights in zip(of_training, recorder.weights, strict=True):
            assert entry["cpift/frozen_fraction"] == fraction
            norm = frozen_gradient_norm(tiny_model, rows, weights, region)
            assert entry["cpift/masked_grad_norm"] == pytest.approx(norm, rel=1e-4)
        others = [entry for entry in entries if "loss" not in entry]
        assert sum("eval_loss" in entry for entry in others) == 3
        assert not any(FIGURES & entry.keys() for entry in others)


def test_the_norm_is_that_of_the_last_step_alone(tiny_model, sums, tmp_path):
    model, rows = load(tiny_model), equal_rows(tiny_model, sums)
    region, recorder = region_of(trained(model)), Recorder(model)
    callbacks = [CoreIsolationCallback(region), recorder]
    trainer = train_plainly(
        tiny_model, rows, tmp_path, model, callbacks, per_device_train_batch_size=8, max_steps=4, logging_steps=2
    )
    norms = [e["cpift/masked_grad_norm"] for e in trainer.state.log_history if "loss" in e]
    expected = [frozen_gradient_norm(tiny_model, rows, recorder.weights[step], region) for step in (1, 3)]
    assert norms == pytest.approx(expected, rel=1e-4)


def test_the_fraction_is_of_the_trained_coordinates_alone(tiny_model, sums, tmp_path):
    model = load(tiny_model, ADAPTERS["lora"])
    region = region_of(trained(model))
    trainer = make_sft_trainer(tiny_model, sums, tmp_path, model, [CoreIsolationCallback(region)], max_steps=1)
    trainer.train()
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert total < sum(p.numel() for p in model.parameters()) / 2
    assert trainer.state.log_history[0]["cpift/frozen_fraction"] == len(region) / total


def test_a_tied_tensor_that_a_region_names_twice_counts_once(tiny_model, sums, tmp_path):
    model = load(tiny_model)
    weights = model.state_dict()  # has the embedding under both names, as a region that is found in memory
    region = region_of(weights, every=1)
    trainer = make_sft_trainer(tiny_model, sums, tmp_path, model, [CoreIsolationCallback(region)], max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["cpift/frozen_fraction"] == 1.0


def test_a_parameter_without_a_gradient_in_the_last_step_adds_nothing_to_the_norm():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    region = region_of(dict(model.named_parameters()), every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with freeze_core(model, optimizer, region) as frozen:
        model["a"](torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert frozen.masked_grad_norm() == 2.0
        optimizer.zero_grad()
        (3 * model["b"](torch.ones(1, 2))).sum().backward()
        optimizer.step()
        assert frozen.masked_grad_norm() == 6.0


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_reporter_among_the_default_callbacks_sees_the_figures_after_the_documented_line(
    tiny_model, sums, tmp_path, strategy
):
    model, rows = load(tiny_model), equal_rows(tiny_model, sums)
    reporter = Recorder()
    callback = CoreIsolationCallback(region_of(trained(model)))
    # The Trainer puts its default callbacks, reporters among them, before those that it is given.
    train_plainly(
        tiny_model,
        rows,
        tmp_path,
        model,
        [reporter, callback],
        insert_first=callback,
        logging_strategy=strategy,
        max_steps=2,
        per_device_train_batch_size=8,
    )
    logged = [logs for logs in reporter.logs if "loss" in logs]
    assert len(logged) == 2
    assert all(logs.keys() >= FIGURES for logs in logged)


class AsksForALog(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = True


def test_a_log_that_a_later_callback_asks_for_has_the_figures_of_its_own_step(tiny_model, sums, tmp_path):
    model, rows = load(tiny_model), equal_rows(tiny_model, sums)
    region, recorder = region_of(trained(model)), Recorder(model)
    callbacks = [CoreIsolationCallback(region), recorder, AsksForALog()]
    settings = {"per_device_train_batch_size": 8, "max_steps": 4, "logging_steps": 2}
    trainer = train_plainly(tiny_model, rows, tmp_path, model, callbacks, **settings)
    norms = [e.get("cpift/masked_grad_norm") for e in trainer.state.log_history if "loss" in e]
    expected = [frozen_gradient_norm(tiny_model, rows, weights, region) for weights in recorder.weights]
    assert norms == pytest.approx(expected, rel=1e-4)


# --- schedules ---


class Watcher(TrainerCallback):
    """Copies what trains after each step; [0] is from before the first."""

    def __init__(self, parameters: dict[str, Tensor]):
        self.parameters = parameters
        self.after = [snapshot(parameters)]

    def on_step_end(self, args, state, control, **kwargs):
        self.after.append(snapshot(self.parameters))


@pytest.mark.parametrize("adapter", [None, ADAPTERS["lora"]], ids=["full", "lora"])
def test_a_schedule_freezes_each_stage_at_its_step(tiny_model, sums, tmp_path, adapter):
    model = load(tiny_model, adapter)
    parameters = trained(model)
    a, b = region_of(parameters), region_of(parameters, start=1)
    watcher = Watcher(parameters)
    callback = CoreIsolationCallback({0: a, 3: [b]})
    trainer = make_sft_trainer(tiny_model, sums, tmp_path, model, [callback, watcher], max_steps=6)
    trainer.train()
    check(a, watcher.after[0], watcher.after[3])
    check(a | b, watcher.after[3], watcher.after[6])
    for name in b.indices:
        moved = split(b, name, watcher.after[0][name])[0] != split(b, name, watcher.after[3][name])[0]
        assert moved.float().mean() > 0.9, f"{name} was frozen before its time"
    fractions = [e["cpift/frozen_fraction"] for e in trainer.state.log_history if "loss" in e]
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert fractions == [len(a) / total] * 3 + [(len(a) + len(b)) / total] * 3


def test_a_schedule_may_begin_late_and_out_of_order(tiny_model, sums, tmp_path):
    model = load(tiny_model)
    parameters = trained(model)
    a, b = region_of(parameters), region_of(parameters, start=1)
    watcher = Watcher(parameters)
    callback = CoreIsolationCallback({2: b, 1: a})
    make_sft_trainer(tiny_model, sums, tmp_path, model, [callback, watcher], max_steps=3).train()
    check(CoreRegion({}, {}), watcher.after[0], watcher.after[1])
    check(a, watcher.after[1], watcher.after[2])
    check(a | b, watcher.after[2], watcher.after[3])


def test_string_keys_as_a_checkpoint_keeps_them(tiny_model, tmp_path):
    region_of(trained(load(tiny_model))).save(tmp_path / "a.safetensors")
    file = str(tmp_path / "a.safetensors")
    callback = CoreIsolationCallback({"0": file, "12": [tmp_path / "a.safetensors"]})
    assert list(callback.schedule) == [0, 12]
    assert callback.state()["args"] == {"frozen": {"0": [file], "12": [file]}, "verify": "end"}
    again = CoreIsolationCallback(**callback.state()["args"])
    assert again.state() == callback.state()
    assert again.schedule == {0: [file], 12: [file]}


class Deletes(TrainerCallback):
    """Takes a region's file away once its stage has begun."""

    def __init__(self, step: int, file):
        self.step, self.file = step, file

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.file.unlink()


def test_a_region_is_read_once_its_stage_begins_and_not_again(tiny_model, sums, tmp_path):
    model = load(tiny_model)
    files = {0: tmp_path / "a.safetensors", 1: tmp_path / "b.safetensors"}
    for start, file in files.items():
        region_of(trained(model), start).save(file)
    callbacks = [CoreIsolationCallback(files), Deletes(1, files[0]), Deletes(2, files[1])]
    train_plainly(tiny_model, equal_rows(tiny_model, sums), tmp_path, model, callbacks, max_steps=4)


@pytest.mark.parametrize("key", [-1, True, 1.5, "x", "-1", "1.0", None, (0,)], ids=repr)
def test_keys_that_are_no_steps_are_refused(key):
    region = CoreRegion({"w": torch.tensor([0])}, {"w": (2,)})
    with pytest.raises(CpiftError, match="optimizer steps, 0 or later") as error:
        CoreIsolationCallback({key: region})
    assert repr(key) in str(error.value)


@pytest.mark.parametrize("frozen", [[], {}, {0: []}], ids=repr)
def test_no_region_at_all_is_refused_at_once(frozen):
    with pytest.raises(CpiftError, match="no region to freeze"):
        CoreIsolationCallback(frozen)


def test_a_step_that_is_named_twice_is_refused():
    region = CoreRegion({"w": torch.tensor([0])}, {"w": (2,)})
    with pytest.raises(CpiftError, match="each once: got 5"):
        CoreIsolationCallback({"5": region, 5: region})


def test_a_stage_after_the_end_of_the_training_warns(tiny_model, sums, tmp_path):
    model = load(tiny_model)
    region = region_of(trained(model))
    callbacks = [CoreIsolationCallback({0: region, 2: region})]
    with pytest.warns(NoEffectWarning, match="frozen from step 2 on never are: the training ends at 2"):
        train_plainly(tiny_model, equal_rows(tiny_model, sums), tmp_path, model, callbacks, max_steps=2)


def test_the_figure_of_a_step_after_a_skipped_one_is_its_own():
    """As after an overflow under fp16, where the optimizer's step is not called."""
    model = nn.Linear(2, 1, bias=False)
    callback = CoreIsolationCallback(region_of(dict(model.named_parameters()), every=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = SimpleNamespace(global_step=0, max_steps=9, stateful_callbacks={}, log_history=[{}])
    args = SimpleNamespace(load_best_model_at_end=False)
    callback.on_train_begin(args, state, None, model=model, optimizer=optimizer)
    for factor in (float("inf"), 1.0):
        callback.on_step_begin(args, state, None, optimizer=optimizer)
        (factor * model(torch.tensor([[3.0, 4.0]]))).sum().backward()
    callback.on_log(args, state, None, logs={"loss": 1.0, "learning_rate": 0.1})
    assert state.log_history[-1]["cpift/masked_grad_norm"] == 5.0


def test_a_region_file_that_is_missing_is_refused_at_once_in_any_stage(tmp_path):
    region = CoreRegion({"w": torch.tensor([0])}, {"w": (2,)})
    with pytest.raises(CpiftError, match=r"nowhere\.safetensors"):
        CoreIsolationCallback({0: region, 9: tmp_path / "nowhere.safetensors"})


@pytest.mark.parametrize("wrong", ["name", "shape"])
def test_a_later_stage_that_does_not_fit_is_refused_when_the_training_begins(tiny_model, sums, tmp_path, wrong):
    model = load(tiny_model)
    if wrong == "name":
        late = CoreRegion({"elsewhere.weight": torch.tensor([0])}, {"elsewhere.weight": (2,)})
    else:
        late = CoreRegion({"model.norm.weight": torch.tensor([0])}, {"model.norm.weight": (4, 4)})
    recorder = Recorder(model)
    callback = CoreIsolationCallback({0: region_of(trained(model), start=1), 100: late})
    trainer = make_sft_trainer(tiny_model, sums, tmp_path, model, [callback, recorder], max_steps=2)
    with pytest.raises(CpiftError, match=r"elsewhere\.weight|'model\.norm\.weight'"):
        trainer.train()
    assert not recorder.weights


# --- when the check is done ---


class Meddler(TrainerCallback):
    """Writes to a frozen coordinate at the end of one step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, *, model, **kwargs):
        if state.global_step == self.step:
            model.model.layers[1].mlp.up_proj.weight.data.view(-1)[7] += 1


def test_a_check_at_each_step_finds_at_the_next_one_who_meddled(tiny_model, sums, tmp_path):
    model = load(tiny_model)
    callback = CoreIsolationCallback(region_of(trained(model)), verify="step")
    trainer = make_sft_trainer(tiny_model, sums, tmp_path, model, [callback, Meddler(2)], max_steps=5)
    with pytest.raises(RuntimeError, match=r"1 of 55 frozen coordinates of 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("settings", [{}, {"save_strategy": "steps", "save_steps": 2}], ids=["end", "checkpoint"])
def test_without_a_check_at_each_step_the_checkpoint_or_the_end_finds_it(tiny_model, sums, tmp_path, settings):
    model = load(tiny_model)
    callback = CoreIsolationCallback(region_of(trained(model)))
    last = 2 if settings else 3
    trainer = make_sft_trainer(tiny_model, sums, tmp_path, model, [callback, Meddler(last)], **settings)
    with pytest.raises(RuntimeError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' changed"):
        trainer.train()
    assert trainer.state.global_step == last


def test_what_changed_before_a_stage_is_found_and_not_frozen_with_it(tiny_model, sums, tmp_path):
    """A new stage notes the values of all that is frozen anew, so that a changed one would be kept from then on."""
    model = load(tiny_model)
    schedule = {0: region_of(trained(model)), 2: region_of(trained(model), start=1)}
    trainer = make_sft_trainer(
        tiny_model, sums, tmp_path, model, [CoreIsolationCallback(schedule), Meddler(2)], max_steps=5
    )
    with pytest.raises(RuntimeError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' changed"):
        trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("verify", ["nonsense", "", None, True])
def test_other_times_to_check_are_refused(verify):
    with pytest.raises(CpiftError, match=f"verify must be 'end' or 'step', got {verify!r}"):
        CoreIsolationCallback(CoreRegion({}, {}), verify=verify)


def test_the_gradient_scalers_factor_is_taken_out_of_the_norm():
    """As under fp16 on a GPU: gradients are multiplied by a factor that the step itself may change."""
    model = nn.Linear(2, 1, bias=False)
    callback = CoreIsolationCallback(region_of(dict(model.named_parameters()), every=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = SimpleNamespace(global_step=0, max_steps=9, stateful_callbacks={}, log_history=[{}])
    control = SimpleNamespace(should_log=True)
    args = SimpleNamespace(load_best_model_at_end=False)
    callback.on_train_begin(args, state, control, model=model, optimizer=optimizer)
    scale = [8.0]
    scaled = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: scale[0]))
    callback.on_step_begin(None, state, control, optimizer=scaled)
    (8.0 * model(torch.tensor([[3.0, 4.0]]))).sum().backward()
    optimizer.step()
    scale[0] = 4.0
    callback.on_log(None, state, control, logs={"loss": 1.0, "learning_rate": 0.1})
    assert state.log_history[-1]["cpift/masked_grad_norm"] == 5.0
