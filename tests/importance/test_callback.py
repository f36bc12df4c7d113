"""Strategy: train through the Trainer and SFTTrainer, and compare the file with the optimizer's own state, with an
undisturbed training where one was resumed, and with no callback at all where it must change nothing."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_cpift import CpiftError, ImportanceCallback, PropulsionConfig, find_core_region
from peft_cpift.importance import callback as module
from peft_cpift.isolation import callback as isolation


def make_trainer(tiny_model, rows, output, callbacks, **settings) -> Trainer:
    settings = {
        "max_steps": 5,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        **settings,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    return Trainer(model, TrainingArguments(str(output), **settings), train_dataset=rows, callbacks=callbacks)


def second_moments(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = trainer.optimizer.state
    return {name: state[p]["exp_avg_sq"].sqrt().bfloat16() for name, p in trainer.model.named_parameters()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_it_writes_what_the_optimizer_holds_in_the_end(tiny_model, rows, tmp_path):
    trainer = make_trainer(tiny_model, rows, tmp_path / "out", [ImportanceCallback()])
    trainer.train()
    found = load_file(tmp_path / "out" / "importance.safetensors")
    assert_equal(found, second_moments(trainer))
    trainer.save_model()
    region = find_core_region(tmp_path / "out", importance=tmp_path / "out" / "importance.safetensors")
    assert len(region) == region.total // 100
    assert region.importance == "second_moment"


def test_sft_of_an_adapter_into_a_file_of_ones_own(tiny_model, sums, tmp_path):
    config = PropulsionConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    args = SFTConfig(
        str(tmp_path / "out"),
        max_steps=3,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    file = tmp_path / "deep" / "sums.safetensors"
    SFTTrainer(
        model, args, train_dataset=sums, processing_class=tokenizer, callbacks=[ImportanceCallback(file)]
    ).train()
    model.save_pretrained(tmp_path / "adapter")
    assert load_file(file).keys() == load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_it_changes_nothing_in_the_training(tiny_model, rows, tmp_path):
    trained = []
    for callbacks in ([], [ImportanceCallback(tmp_path / "i.safetensors")]):
        trainer = make_trainer(tiny_model, rows, tmp_path, callbacks)
        trainer.train()
        trained.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    assert_equal(*trained)


def test_a_resumed_training_writes_what_the_undisturbed_one_does(tiny_model, rows, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tiny_model, rows, tmp_path / "whole", [ImportanceCallback()], **saving).train()
    expected = load_file(tmp_path / "whole" / "importance.safetensors")
    for step in (1, 4):
        trainer = make_trainer(tiny_model, rows, tmp_path / str(step), [ImportanceCallback()])
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_equal(load_file(tmp_path / str(step) / "importance.safetensors"), expected)


def test_without_the_optimizer_in_the_checkpoint_the_moment_begins_anew(tiny_model, rows, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3, "save_only_model": True, "adam_beta2": 0.9}
    make_trainer(tiny_model, rows, tmp_path / "whole", [ImportanceCallback()], **saving).train()
    trainer = make_trainer(tiny_model, rows, tmp_path / "again", [ImportanceCallback()], adam_beta2=0.9)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    states = trainer.optimizer.state.values()
    assert {int(state["step"]) for state in states} == {2}
    found = load_file(tmp_path / "again" / "importance.safetensors")
    assert_equal(found, second_moments(trainer))
    whole = load_file(tmp_path / "whole" / "importance.safetensors")
    assert any(not torch.equal(found[name], whole[name]) for name in whole)


class Steps(TrainerCallback):
    """Counts the optimizer steps."""

    count = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count = state.global_step


@pytest.mark.parametrize(("optim", "name"), [("sgd", "SGD"), ("adafactor", "Adafactor"), ("adagrad", "Adagrad")])
def test_an_optimizer_without_second_moment_is_refused_after_the_first_step(tiny_model, rows, tmp_path, optim, name):
    steps = Steps()
    trainer = make_trainer(tiny_model, rows, tmp_path, [steps, ImportanceCallback()], optim=optim)
    with pytest.raises(CpiftError, match=rf"\.{name} (keeps|has) no second moment"):
        trainer.train()
    assert steps.count == 1
    assert not list(tmp_path.glob("*.safetensors"))


def test_steps_that_were_skipped_are_not_the_first_one(tmp_path):
    """As fp16's loss scale skips them."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callback = ImportanceCallback(tmp_path / "i.safetensors")
    given = {"model": model, "optimizer": optimizer}
    optimizer.step_was_skipped = True
    callback.on_step_end(None, None, None, **given)
    optimizer.step_was_skipped = False
    with pytest.raises(CpiftError, match="SGD has no second moment"):
        callback.on_step_end(None, None, None, **given)


def test_only_the_first_step_is_looked_at(tiny_model, rows, tmp_path, monkeypatch):
    looked = []
    check = module.check_second_moment
    monkeypatch.setattr(module, "check_second_moment", lambda *given: looked.append(check(*given)))
    callback = ImportanceCallback()
    trainer = make_trainer(tiny_model, rows, tmp_path, [callback])
    trainer.train()
    assert len(looked) == 1
    make_trainer(tiny_model, rows, tmp_path, [callback]).train()  # another training with the same callback
    assert len(looked) == 2


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"distributed_type": DistributedType.MEGATRON_LM}, "does not support MEGATRON_LM"),
        ({"distributed_type": DistributedType.XLA}, "does not support XLA"),
        (
            {"distributed_type": DistributedType.FSDP, "fsdp_plugin": SimpleNamespace(fsdp_version=1)},
            "FSDP1, .*: set fsdp_version to 2",
        ),
    ],
)
def test_engines_that_the_isolation_refuses_are_refused_when_training_begins(monkeypatch, state, message):
    monkeypatch.setattr(module, "AcceleratorState", lambda: SimpleNamespace(**state))
    with pytest.raises(CpiftError, match=message):
        ImportanceCallback().on_train_begin(None, None, None)
    assert isolation.check_engine is module.check_engine


def test_checkpoints_do_not_keep_it(tiny_model, rows, tmp_path):
    """It has nothing to keep, and an entry of its own would bind checkpoints to it."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer(tiny_model, rows, tmp_path, [ImportanceCallback()], **saving).train()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert "ImportanceCallback" not in state["stateful_callbacks"]


def test_a_place_where_no_file_can_be_is_refused_before_training(tiny_model, rows, tmp_path):
    (tmp_path / "file").write_text("")
    for place, message in (
        (tmp_path, r"is a folder: name a file for the importance, such as .*importance.safetensors"),
        (
            tmp_path / "file" / "i.safetensors",
            r"i.safetensors cannot be written, .*: give the importance another place",
        ),
    ):
        steps = Steps()
        trainer = make_trainer(tiny_model, rows, tmp_path / "out", [steps, ImportanceCallback(place)])
        with pytest.raises(CpiftError, match=message):
            trainer.train()
        assert steps.count == 0
