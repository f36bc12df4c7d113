"""Strategy: train once without a break, checkpointing at every step; then resume from each checkpoint as another
process would, and compare the final weights and the logs with those of the undisturbed run bit by bit.

Then everything that may be wrong with a checkpoint is made wrong, and trainings are cut off where it hurts most: a
frozen value that drifted must never become one that is kept, without anyone being told.
"""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from peft_cpift import CoreIsolationCallback, CoreRegion, CpiftError, PropulsionConfig
from peft_cpift.isolation.names import saved_parameters

ADAPTERS = {
    "full": None,
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "propulsion": PropulsionConfig(target_modules=["q_proj", "v_proj"]),
}
FIGURES = ("cpift/frozen_fraction", "cpift/masked_grad_norm")
UP = "model.layers.1.mlp.up_proj.weight"


def load(folder, adapter: PeftConfig | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model if adapter is None else get_peft_model(model, adapter)


def region_of(model: nn.Module, start: int = 0, every: int = 7) -> CoreRegion:
    """Every seventh coordinate of what trains, each tensor once."""
    found = {id(p): (name, p) for name, p in reversed(saved_parameters(model).items()) if p.requires_grad}
    return CoreRegion(
        {name: torch.arange(start, p.numel(), every) for name, p in found.values()},
        {name: tuple(p.shape) for name, p in found.values()},
    )


def make_trainer(model, rows, output, callbacks, **settings) -> Trainer:
    settings = {
        "max_steps": 6,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        **settings,
    }
    return Trainer(model, TrainingArguments(str(output), **settings), train_dataset=rows, callbacks=callbacks)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in saved_parameters(model).items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)), f"{name} differs"


def frozen_values(values: dict[str, Tensor], region: CoreRegion) -> dict[str, Tensor]:
    return {name: values[name].flatten()[index] for name, index in region.indices.items()}


def figures(trainer: Trainer) -> list[tuple[float, ...]]:
    return [tuple(e[key] for key in ("loss", "grad_norm", *FIGURES)) for e in trainer.state.log_history if "loss" in e]


def tamper(checkpoint: Path, name: str, position: int, file: str = "model.safetensors") -> None:
    """Change the last bit of one value in a checkpoint."""
    tensors = load_file(checkpoint / file)
    tensors[name].view(-1).view(torch.int32)[position] ^= 1
    save_file(tensors, checkpoint / file, {"format": "pt"})


# --- an undisturbed run, and the same with a break ---


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("scheduled", [False, True], ids=["from-the-beginning", "schedule"])
def test_a_resumed_training_equals_the_undisturbed_one(tiny_model, rows, tmp_path, scheduled, adapter):
    """A second stage begins with step 3, so that the checkpoints lie before, exactly at and after its start."""
    model = load(tiny_model, ADAPTERS[adapter])
    a, b = region_of(model), region_of(model, start=1)
    before = values(model)

    def callback() -> CoreIsolationCallback:
        return CoreIsolationCallback({0: a, 3: b} if scheduled else a, verify="step")

    whole = make_trainer(model, rows, tmp_path, [callback()])
    whole.train()
    expected = values(model)
    assert_same(frozen_values(expected, a), frozen_values(before, a))
    for step in (2, 3, 4) if scheduled else (1, 5):
        again = load(tiny_model, ADAPTERS[adapter])
        trainer = make_trainer(again, rows, tmp_path / "again", [callback()], save_strategy="no")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "the checkpoint was written without core isolation")
            trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same(values(again), expected)
        assert figures(trainer) == figures(whole)
        fractions = [entry[2] for entry in figures(trainer)]
        assert (fractions[2] < fractions[3]) is scheduled


def test_a_training_resumed_twice(tiny_model, rows, tmp_path):
    model = load(tiny_model)
    a, b = region_of(model), region_of(model, start=1)
    make_trainer(model, rows, tmp_path / "whole", [CoreIsolationCallback({0: a, 3: b})]).train()
    expected = values(model)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    for step in (2, 4):  # each goes on from what the one before wrote
        model = load(tiny_model)
        output = tmp_path / f"from-{step}"
        trainer = make_trainer(model, rows, output, [CoreIsolationCallback({0: a, 3: b})])
        trainer.train(resume_from_checkpoint=str(checkpoint))
        checkpoint = output / "checkpoint-4"
        assert_same(values(model), expected)


def test_two_callbacks_resumed(tiny_model, rows, tmp_path):
    model = load(tiny_model)
    a, b = region_of(model), region_of(model, start=1)

    def callbacks() -> list[CoreIsolationCallback]:
        return [CoreIsolationCallback(a), CoreIsolationCallback({0: b, 3: region_of(model, start=2)})]

    before = values(model)
    make_trainer(model, rows, tmp_path, callbacks()).train()
    expected = values(model)
    assert_same(frozen_values(expected, a | b), frozen_values(before, a | b))
    for step in (2, 4):
        again = load(tiny_model)
        trainer = make_trainer(again, rows, tmp_path / "again", callbacks(), save_strategy="no")
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same(values(again), expected)


@pytest.mark.parametrize("position", [7, 8], ids=["first", "second"])
def test_of_two_callbacks_either_notices_a_changed_checkpoint(tiny_model, rows, tmp_path, position):
    model = load(tiny_model)
    callbacks = [CoreIsolationCallback(region_of(model, start=start)) for start in (0, 1)]
    make_trainer(model, rows, tmp_path, callbacks, max_steps=2).train()
    tamper(tmp_path / "checkpoint-1", UP, position)
    callbacks = [CoreIsolationCallback(region_of(model, start=start)) for start in (0, 1)]
    trainer = make_trainer(load(tiny_model), rows, tmp_path, callbacks)
    with pytest.raises(CpiftError, match=UP):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# --- the callback itself restored from the checkpoint ---


def test_a_callback_given_files_is_restored(tiny_model, rows, tmp_path):
    model = load(tiny_model)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for start, file in enumerate(files):
        region_of(model, start=start).save(file)
    callback = CoreIsolationCallback({0: files[0], 3: [str(files[1])]}, verify="step")
    make_trainer(model, rows, tmp_path / "out", [callback]).train()
    expected = values(model)
    for step in (2, 3, 4):
        again = load(tiny_model)
        given = CoreIsolationCallback(files[0])  # what the checkpoint says takes its place
        settings = {"restore_callback_states_from_checkpoint": True, "save_strategy": "no"}
        trainer = make_trainer(again, rows, tmp_path / "again", [given], **settings)
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        assert_same(values(again), expected)
        (restored,) = [cb for cb in trainer.callback_handler.callbacks if isinstance(cb, CoreIsolationCallback)]
        assert restored is not given
        assert restored.verify == "step"
        assert list(restored.schedule) == [0, 3]


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_callback_given_regions_in_memory_is_not_restored(tiny_model, rows, tmp_path, scheduled):
    model = load(tiny_model)
    region = region_of(model)
    region.save(tmp_path / "a.safetensors")
    frozen = {0: tmp_path / "a.safetensors", 1: [region]} if scheduled else region
    make_trainer(model, rows, tmp_path, [CoreIsolationCallback(frozen)], max_steps=1).train()
    trainer = make_trainer(
        load(tiny_model), rows, tmp_path, [CoreIsolationCallback(frozen)], restore_callback_states_from_checkpoint=True
    )
    with pytest.raises(
        CpiftError, match=r"given in memory.*leave restore_callback_states_from_checkpoint off"
    ) as error:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "\n" not in str(error.value)


# --- checkpoints that are not what they should be ---


@pytest.mark.parametrize(("adapter", "file"), [("full", "model.safetensors"), ("lora", "adapter_model.safetensors")])
def test_a_changed_frozen_value_is_refused_by_name_and_a_free_one_is_not(tiny_model, rows, tmp_path, adapter, file):
    model = load(tiny_model, ADAPTERS[adapter])
    region = region_of(model)
    make_trainer(model, rows, tmp_path, [CoreIsolationCallback(region)], max_steps=2).train()
    name = UP if adapter == "full" else "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    checkpoint = tmp_path / "checkpoint-1"

    def resume() -> None:
        trainer = make_trainer(
            load(tiny_model, ADAPTERS[adapter]), rows, tmp_path / "x", [CoreIsolationCallback(region)]
        )
        trainer.train(resume_from_checkpoint=str(checkpoint))

    tamper(checkpoint, name, 8, file)
    resume()
    tamper(checkpoint, name, 7, file)
    with pytest.raises(CpiftError, match=rf"of 1 tensors differ in the checkpoint.*first {name}: the") as error:
        resume()
    assert "\n" not in str(error.value)


def test_several_changed_tensors_are_counted_and_three_named(tiny_model, rows, tmp_path):
    model = load(tiny_model)
    region = region_of(model)
    make_trainer(model, rows, tmp_path, [CoreIsolationCallback(region)], max_steps=1).train()
    for name in list(region.indices)[:5]:
        tamper(tmp_path / "checkpoint-1", name, 0)
    trainer = make_trainer(load(tiny_model), rows, tmp_path, [CoreIsolationCallback(region)])
    with pytest.raises(CpiftError, match=r"of 5 tensors differ .* first (model\.\S+, ){2}model\.\S+: the"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_value_of_a_later_stage_may_not_change_after_its_start_either(tiny_model, rows, tmp_path):
    model = load(tiny_model)
    schedule = {0: region_of(model), 2: region_of(model, start=1)}
    make_trainer(model, rows, tmp_path, [CoreIsolationCallback(schedule)], max_steps=3).train()
    for step in (2, 3):
        tamper(tmp_path / f"checkpoint-{step}", UP, 8)
    make_trainer(load(tiny_model), rows, tmp_path / "x", [CoreIsolationCallback(schedule)], max_steps=3).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")  # not frozen yet: as good as any other value
    )
    trainer = make_trainer(load(tiny_model), rows, tmp_path / "x", [CoreIsolationCallback(schedule)])
    with pytest.raises(CpiftError, match=UP):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("other", ["fewer", "more", "others", "one tensor less", "later stage"])
def test_other_regions_than_those_of_the_checkpoint_are_refused(tiny_model, rows, tmp_path, other):
    model = load(tiny_model)
    region = region_of(model)
    make_trainer(model, rows, tmp_path, [CoreIsolationCallback(region)], max_steps=2).train()
    given = {
        "fewer": region_of(model, every=14),
        "more": region_of(model) | region_of(model, start=1),
        "others": region_of(model, start=1),
        "one tensor less": CoreRegion({n: i for n, i in region.indices.items() if n != UP}, region.shapes),
        "later stage": {0: region, 1: region_of(model, start=1)},
    }[other]
    trainer = make_trainer(load(tiny_model), rows, tmp_path, [CoreIsolationCallback(given)])
    with pytest.raises(CpiftError, match="written with other frozen coordinates") as error:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("save", ["no", "steps"])
def test_a_checkpoint_from_before_core_isolation_warns_and_goes_on(tiny_model, rows, tmp_path, save):
    make_trainer(load(tiny_model), rows, tmp_path, [], max_steps=2).train()
    model = load(tiny_model)
    region = region_of(model)
    trainer = make_trainer(model, rows, tmp_path, [CoreIsolationCallback(region)], max_steps=4, save_strategy=save)
    with pytest.warns(UserWarning, match="written without core isolation"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    kept = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert_same(frozen_values(values(model), region), frozen_values(kept, region))
    assert not torch.equal(values(model)[UP], kept[UP])


# --- one callback in several trainings ---


def test_a_second_training_with_the_same_callback_is_not_taken_for_a_resume(tiny_model, rows, tmp_path):
    model = load(tiny_model)
    region = region_of(model)
    callback = CoreIsolationCallback({0: region, 2: region_of(model, start=1)})
    trainer = make_trainer(model, rows, tmp_path, [callback], max_steps=3)
    trainer.train()
    first = values(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)  # between trainings a model may change as it likes
    before = values(model)
    trainer.train()
    after = values(model)
    assert_same(frozen_values(after, region), frozen_values(before, region))
    assert not torch.equal(after[UP], before[UP])
    assert not torch.equal(frozen_values(after, region)[UP], frozen_values(first, region)[UP])
    late = region_of(model, start=1)
    assert not torch.equal(frozen_values(after, late)[UP], frozen_values(before, late)[UP]), "frozen from step 2 only"


def test_after_another_model_the_same_callback_holds_the_new_one(tiny_model, rows, tmp_path):
    region = region_of(load(tiny_model))
    callback = CoreIsolationCallback(region)
    make_trainer(load(tiny_model), rows, tmp_path, [callback], max_steps=2).train()
    other = load(tiny_model)
    for parameter in other.parameters():
        parameter.data.mul_(0.5)
    before = values(other)
    make_trainer(other, rows, tmp_path, [callback], max_steps=2).train()
    assert_same(frozen_values(values(other), region), frozen_values(before, region))


# --- trainings that are cut off ---


class CutOffError(Exception):
    pass


class CutsOff(TrainerCallback):
    """Raises once, at a given event of the second step."""

    def __init__(self, event: str):
        self.armed = True
        setattr(self, event, self.raise_once)

    def raise_once(self, args, state, control, **kwargs):
        if self.armed and state.global_step >= 1:
            self.armed = False
            raise CutOffError


EVENTS = ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log", "on_save"]


@pytest.mark.parametrize("event", EVENTS)
def test_a_training_that_was_cut_off_begins_again_with_the_first_values(tiny_model, rows, tmp_path, event):
    model = load(tiny_model)
    region, before = region_of(model), values(model)
    trainer = make_trainer(model, rows, tmp_path, [CoreIsolationCallback(region), CutsOff(event)], max_steps=3)
    with pytest.raises(CutOffError):
        trainer.train()
    trainer.train()
    after = values(model)
    assert_same(frozen_values(after, region), frozen_values(before, region))
    assert not torch.equal(after[UP], before[UP])
    # Neither training holds on to anything when the second is over.
    model.zero_grad()
    model(**{key: torch.tensor([row[key] for row in rows[:4]]) for key in rows[0]}).loss.backward()
    assert model.model.layers[1].mlp.up_proj.weight.grad.flatten()[region.indices[UP]].all()


def cut_off_inside_a_step(model, rows, output, callback) -> Trainer:
    """Stop a training after the second update of the weights, before anything that hangs on the step."""
    trainer = make_trainer(model, rows, output, [callback], max_steps=3)
    trainer.create_optimizer()
    steps = []

    def stop(*_) -> None:
        steps.append(1)
        if len(steps) == 2:
            raise CutOffError

    # Registered before the callback's own hook, so that it runs first.
    trainer.optimizer.register_step_post_hook(stop)
    with pytest.raises(CutOffError):
        trainer.train()
    return trainer


def test_values_that_drifted_when_a_step_was_cut_off_are_not_kept(tiny_model, rows, tmp_path):
    model = load(tiny_model)
    region, before = region_of(model), values(model)
    trainer = cut_off_inside_a_step(model, rows, tmp_path, CoreIsolationCallback(region))
    assert not torch.equal(frozen_values(values(model), region)[UP], frozen_values(before, region)[UP]), "no drift"
    with pytest.raises(CpiftError, match=r"core isolation was broken.* cut off: load the weights"):
        trainer.train()


def test_nor_are_they_at_a_second_try(tiny_model, rows, tmp_path):
    model = load(tiny_model)
    region, before = region_of(model), values(model)
    trainer = cut_off_inside_a_step(model, rows, tmp_path, CoreIsolationCallback(region))
    for _ in range(2):
        with pytest.raises(CpiftError, match="core isolation was broken"):
            trainer.train()
    model.load_state_dict(before)
    make_trainer(model, rows, tmp_path, [CoreIsolationCallback(region)], max_steps=2).train()
    assert_same(frozen_values(values(model), region), frozen_values(before, region))


def test_a_step_that_was_cut_off_says_nothing_about_another_model(tiny_model, rows, tmp_path):
    model = load(tiny_model)
    callback = CoreIsolationCallback(region_of(model))
    cut_off_inside_a_step(model, rows, tmp_path, callback)
    other = load(tiny_model)
    before = values(other)
    make_trainer(other, rows, tmp_path, [callback], max_steps=2).train()
    assert_same(frozen_values(values(other), region_of(other)), frozen_values(before, region_of(other)))


def test_a_step_that_was_cut_off_is_made_good_by_the_checkpoint_before(tiny_model, rows, tmp_path):
    model = load(tiny_model)
    region, before = region_of(model), values(model)
    trainer = cut_off_inside_a_step(model, rows, tmp_path, CoreIsolationCallback(region))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.state.global_step == 3
    assert_same(frozen_values(values(model), region), frozen_values(before, region))


def test_a_training_cut_off_in_a_later_stage_is_resumed_from_before_it(tiny_model, rows, tmp_path):
    model = load(tiny_model)
    schedule = {0: region_of(model), 2: region_of(model, start=1)}

    class Stops(CutsOff):
        def raise_once(self, args, state, control, **kwargs):
            if state.global_step >= 3:
                super().raise_once(args, state, control, **kwargs)

    trainer = make_trainer(model, rows, tmp_path, [CoreIsolationCallback(schedule), Stops("on_step_begin")])
    with pytest.raises(CutOffError):
        trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_after_a_refused_checkpoint_a_good_one_is_taken(tiny_model, rows, tmp_path):
    model = load(tiny_model)
    callback = CoreIsolationCallback(region_of(model))
    make_trainer(model, rows, tmp_path, [callback], max_steps=2).train()
    tamper(tmp_path / "checkpoint-2", UP, 7)
    trainer = make_trainer(model, rows, tmp_path / "again", [callback], max_steps=3)
    with pytest.raises(CpiftError, match=UP):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_callback_that_never_trained_again_does_not_hold_a_model_that_others_train(tiny_model, rows, tmp_path):
    """What a training that was cut off left on the parameters must go with its trainer."""
    model = load(tiny_model)
    cut_off_inside_a_step(model, rows, tmp_path, CoreIsolationCallback(region_of(model)))
    gc.collect()
    before = values(model)
    make_trainer(model, rows, tmp_path / "other", [], max_steps=1, save_strategy="no").train()
    frozen = frozen_values(values(model), region_of(model))
    assert (frozen[UP] != frozen_values(before, region_of(model))[UP]).all()


# --- what a checkpoint keeps ---


def state_file(output: Path, step: int) -> Path:
    return output / f"checkpoint-{step}" / "trainer_state.json"


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@pytest.mark.parametrize("frozen", [lambda m: region_of(m), lambda m: {0: region_of(m), 2: region_of(m, start=1)}])
def test_the_trainers_state_stays_json_and_small(tiny_model, rows, tmp_path, frozen: Callable):
    model = load(tiny_model)
    make_trainer(model, rows, tmp_path, [CoreIsolationCallback(frozen(model))]).train()
    sizes = []
    for step in range(1, 7):
        state = json.loads(state_file(tmp_path, step).read_text(), parse_constant=refuse_constant)
        ours = state["stateful_callbacks"]["CoreIsolationCallback"]
        assert ours.keys() == {"args", "attributes"}
        assert ours["args"] == {"frozen": None, "verify": "end"}
        prints = ours["attributes"]["fingerprints"]
        assert prints.keys() == region_of(model).indices.keys()
        assert all(len(p) == 33 and p[16] == ":" and int(p.replace(":", ""), 16) for p in prints.values())
        sizes.append(len(json.dumps(ours)))
    assert len(set(sizes)) == 1
    assert sizes[0] < 150 * len(region_of(model).indices)


def test_the_size_does_not_depend_on_how_much_is_frozen(tiny_model, rows, tmp_path):
    sizes = set()
    for every in (2, 16):
        model = load(tiny_model)
        callback = CoreIsolationCallback(region_of(model, every=every))
        make_trainer(model, rows, tmp_path / str(every), [callback], max_steps=1).train()
        state = json.loads(state_file(tmp_path / str(every), 1).read_text())
        sizes.add(len(json.dumps(state["stateful_callbacks"])))
    assert len(sizes) == 1


def test_of_a_region_file_the_checkpoint_keeps_the_path(tiny_model, rows, tmp_path):
    model = load(tiny_model)
    file = tmp_path / "a.safetensors"
    region_of(model).save(file)
    make_trainer(model, rows, tmp_path, [CoreIsolationCallback({0: file, 5: [str(file)]})], max_steps=1).train()
    state = json.loads(state_file(tmp_path, 1).read_text())
    arguments = state["stateful_callbacks"]["CoreIsolationCallback"]["args"]
    assert arguments == {"frozen": {"0": [str(file)], "5": [str(file)]}, "verify": "end"}


class Renamed(CoreIsolationCallback):
    """The callback as a user may have derived it meanwhile."""


def test_a_tampered_checkpoint_is_refused_by_a_callback_of_another_name(tiny_model, rows, tmp_path):
    model = load(tiny_model)
    region = region_of(model)
    make_trainer(model, rows, tmp_path, [CoreIsolationCallback(region)], max_steps=2).train()
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    tensors = load_file(file)
    tensors[UP].view(-1)[region.indices[UP][0]] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CpiftError, match="the checkpoint was changed"):
        make_trainer(load(tiny_model), rows, tmp_path, [Renamed(region)], max_steps=4).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


class Counter(TrainerCallback, ExportableState):
    """Another callback with a state, which has no attributes."""

    def state(self) -> dict:
        return {"args": {}}


def test_the_states_of_other_callbacks_do_not_matter(tiny_model, rows, tmp_path):
    region = region_of(load(tiny_model))
    for resume in (None, str(tmp_path / "checkpoint-2")):
        trainer = make_trainer(load(tiny_model), rows, tmp_path, [Counter(), CoreIsolationCallback(region)])
        trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step > 2
