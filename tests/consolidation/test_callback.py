"""Strategy: train through the Trainer with the callback, and in a plain loop with the optimizer that the Trainer made;
resume, and end where an undisturbed training does; refuse what cannot be right before anything is trained."""

from __future__ import annotations

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_cpift import ConsolidationCallback, CpiftError, ImportanceCallback, PropulsionConfig
from peft_cpift.consolidation import callback as module


@pytest.fixture(scope="module")
def learned(tiny_model, rows, tmp_path_factory):
    """A folder with a model that has learned something, and what mattered to it."""
    folder = tmp_path_factory.mktemp("learned")
    trainer = make_trainer(tiny_model, rows[:20], folder, [ImportanceCallback()])
    trainer.train()
    trainer.save_model()
    return folder


def make_trainer(model, rows, output, callbacks, **settings) -> Trainer:
    settings = {
        "max_steps": 6,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        **settings,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model)
    return Trainer(model, TrainingArguments(str(output), **settings), train_dataset=rows, callbacks=callbacks)


class Recorder(TrainerCallback):
    """Keeps the learning rate of every step, and counts them."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, *, optimizer, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


def values(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum((one[name] - other[name]).double().square().sum().item() for name in one)


def test_the_pull_follows_the_trainers_schedule(learned, rows, tmp_path):
    """What AdamW does in each step is taken from copies of its tensors, and pulled by hand."""
    recorder, moves = Recorder(), []

    class Moves(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
            moves.append(model.model.embed_tokens.weight.detach().clone())

        def on_optimizer_step(self, args, state, control, *, model, **kwargs):
            moves.append(model.model.embed_tokens.weight.detach().clone())

    # Put before the pull, this one sees what AdamW alone did.
    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, *, model, optimizer, **kwargs):
            inner = optimizer.optimizer
            handle = inner.register_step_post_hook(
                lambda *_: moves.append(model.model.embed_tokens.weight.detach().clone())
            )
            inner._optimizer_step_post_hooks.move_to_end(handle.id, last=False)

    pull = ConsolidationCallback(learned / "importance.safetensors", strength=0.4)
    trainer = make_trainer(learned, rows, tmp_path, [pull, Watch(), recorder, Moves()])
    anchor = trainer.model.model.embed_tokens.weight.detach().clone()
    importance = load_file(learned / "importance.safetensors")
    mean = torch.cat([tensor.double().square().flatten() for tensor in importance.values()]).mean()
    weight = (importance["model.embed_tokens.weight"].double().square() / mean).bfloat16().float()
    trainer.train()
    assert recorder.rates[:3] == [0.0, 5e-3, 1e-2]
    assert 0 < recorder.rates[-1] < 1e-2
    pulled = 0.0
    for rate, (before, stepped, after) in zip(recorder.rates, zip(*[iter(moves)] * 3, strict=True), strict=True):
        expected = anchor + (stepped - anchor) / (1 + 0.4 * rate / 1e-2 * weight)
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-7)
        pulled = max(pulled, (after - stepped).abs().max().item())
        assert rate == 0 or not torch.equal(before, stepped)
    assert pulled > 1e-3


def test_it_keeps_what_is_trained_nearer_and_lets_go(learned, rows, tmp_path):
    start = values(make_trainer(learned, rows, tmp_path, []))
    file = learned / "importance.safetensors"
    ends = {}
    for strength in (None, 0.1, 10.0):
        callbacks = [] if strength is None else [ConsolidationCallback(file, strength=strength)]
        trainer = make_trainer(learned, rows, tmp_path, callbacks)
        trainer.train()
        ends[strength] = distance(values(trainer), start)
        assert not trainer.optimizer.optimizer._optimizer_step_post_hooks
    assert 0 < ends[10.0] < ends[0.1] < ends[None]


def test_sft_of_an_adapter_that_trains_on(tiny_model, sums, tmp_path):
    config = PropulsionConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    args = {"max_steps": 3, "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no"}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def train(output, callback):
        trainer = SFTTrainer(
            model,
            SFTConfig(str(output), learning_rate=1e-2, disable_tqdm=True, **args),
            train_dataset=Dataset.from_list(list(sums)),
            processing_class=tokenizer,
            callbacks=[callback],
        )
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        return distance({n: trainer.model.get_parameter(n).detach() for n in before}, before)

    assert train(tmp_path / "first", ImportanceCallback()) > 0
    file = tmp_path / "first" / "importance.safetensors"
    free = train(tmp_path / "second", TrainerCallback())
    held = train(tmp_path / "third", ConsolidationCallback(file, strength=10.0))
    assert 0 < held < free


def test_a_resumed_training_ends_where_an_undisturbed_one_does(learned, rows, tmp_path):
    file = learned / "importance.safetensors"
    once = make_trainer(
        learned, rows, tmp_path / "a", [ConsolidationCallback(file)], save_strategy="steps", save_steps=3
    )
    once.train()
    again = make_trainer(learned, rows, tmp_path / "b", [ConsolidationCallback(file, anchor=learned)])
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for name, tensor in values(once).items():
        assert torch.equal(values(again)[name], tensor), name

    steps = Recorder()
    refused = make_trainer(learned, rows, tmp_path / "c", [steps, ConsolidationCallback(file)])
    with pytest.raises(CpiftError, match=r"resumed has left the values .*: give ConsolidationCallback .* anchor="):
        refused.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert not steps.rates


def test_wrong_arguments_are_refused_when_it_is_made(learned, tmp_path):
    (tmp_path / "none.safetensors").write_bytes((learned / "model.safetensors").read_bytes())
    for arguments, message in (
        ((tmp_path / "nowhere",), "no importance file"),
        ((tmp_path / "none.safetensors",), "is no importance file"),
        (([],), "there is no importance"),
    ):
        with pytest.raises(CpiftError, match=message):
            ConsolidationCallback(*arguments)
    with pytest.raises(CpiftError, match="strength must be a number above 0"):
        ConsolidationCallback(learned / "importance.safetensors", strength=0)
    with pytest.raises(CpiftError, match="nowhere"):
        ConsolidationCallback(learned / "importance.safetensors", anchor=tmp_path / "nowhere")


def test_a_training_after_one_that_was_cut_off_is_pulled_once(learned, rows, tmp_path):
    class CutOff(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    file = learned / "importance.safetensors"
    callback = ConsolidationCallback(file)
    trainer = make_trainer(learned, rows, tmp_path, [callback, CutOff()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    left = trainer.optimizer.optimizer
    assert left._optimizer_step_post_hooks
    trainer.remove_callback(CutOff)
    trainer.train()
    assert not left._optimizer_step_post_hooks
    assert not trainer.optimizer.optimizer._optimizer_step_post_hooks


def test_it_does_not_begin_in_the_middle(learned, rows, tmp_path):
    late = ConsolidationCallback(learned / "importance.safetensors")

    class Late(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.add_callback(late)

    trainer = make_trainer(learned, rows, tmp_path, [Late()])
    with pytest.raises(CpiftError, match="added to a training that had begun: add it before"):
        trainer.train()


def test_another_models_importance_is_refused_before_the_first_step(learned, tiny_model, rows, tmp_path):
    steps = Recorder()
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model), PropulsionConfig(target_modules=["q_proj"])
    )
    trainer = make_trainer(learned, rows, tmp_path, [steps, ConsolidationCallback(learned / "importance.safetensors")])
    trainer.model = trainer.model_wrapped = model
    with pytest.raises(CpiftError, match=r"the model has not .* tensors of .*importance.safetensors, first"):
        trainer.train()
    assert not steps.rates


def test_engines_that_isolation_refuses(learned, rows, tmp_path, monkeypatch):
    state = type("State", (), {"distributed_type": DistributedType.MEGATRON_LM})
    monkeypatch.setattr(module, "AcceleratorState", state)
    trainer = make_trainer(learned, rows, tmp_path, [ConsolidationCallback(learned / "importance.safetensors")])
    with pytest.raises(CpiftError, match="does not support MEGATRON_LM"):
        trainer.train()
