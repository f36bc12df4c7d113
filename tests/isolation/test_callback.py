"""Strategy: train a tiny model through TRL's SFTTrainer with everything on that moves an entry without a gradient
(AdamW, weight decay, momentum, clipping, accumulation), and compare the frozen coordinates bit by bit afterwards.

The same check is then run with the restoring, and with the gradient mask, taken out: it must fail each time.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_cpift import CoreIsolationCallback, CoreRegion, CpiftError, PropulsionConfig
from peft_cpift.isolation.freeze import FrozenCore
from peft_cpift.isolation.names import saved_parameters

TUNERS = {
    "full": (None, 1e-3),
    "propulsion": (PropulsionConfig(target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"), 1e-2),
    "lora": (LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"]), 1e-2),
    "ia3": (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), 1e-2),
}


def load(folder, tuner: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    config, _ = TUNERS[tuner]
    return model if config is None else get_peft_model(model, config)


def make_region(model) -> CoreRegion:
    """Every seventh coordinate of every tensor, under the names of the saved checkpoint."""
    parameters = saved_parameters(model)
    distinct = {id(p): name for name, p in reversed(parameters.items())}
    shapes = {name: tuple(parameters[name].shape) for name in distinct.values()}
    return CoreRegion({name: torch.arange(3, parameters[name].numel(), 7) for name in shapes}, shapes)


def train(model, folder, data, output, lr, callback, **settings):
    args = SFTConfig(
        output_dir=str(output),
        **{
            "max_steps": 6,
            "learning_rate": lr,
            "weight_decay": 0.1,
            "max_grad_norm": 0.5,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            **settings,
        },
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[callback],
    )
    trainer.train()
    return trainer


def check_isolated(model, before, region, trainer) -> None:
    for name, parameter in saved_parameters(model).items():
        if name not in region.indices:
            continue  # the second name of a tied tensor
        frozen = torch.zeros(parameter.numel(), dtype=torch.bool)
        frozen[region.indices[name]] = True
        now = parameter.detach().reshape(-1)
        assert torch.equal(now[frozen].view(torch.int32), before[name][frozen].view(torch.int32)), name
        moved = (now[~frozen] != before[name][~frozen]).float().mean()
        assert moved > 0.9, f"{name}: only {moved:.0%} of the free coordinates moved"
        state = trainer.optimizer.state[parameter]
        assert not state["exp_avg"].reshape(-1)[frozen].any(), f"{name}: the optimizer saw a frozen gradient"


def run_and_check(folder, data, output, tuner: str, **settings) -> None:
    model = load(folder, tuner)
    region = make_region(model)
    before = {name: p.detach().reshape(-1).clone() for name, p in saved_parameters(model).items()}
    trainer = train(model, folder, data, output, TUNERS[tuner][1], CoreIsolationCallback(region), **settings)
    check_isolated(model, before, region, trainer)


@pytest.mark.parametrize("tuner", TUNERS)
def test_frozen_coordinates_are_bit_identical_and_the_others_move(tiny_model, sums, tmp_path, tuner):
    run_and_check(tiny_model, sums, tmp_path, tuner)


def test_with_gradient_checkpointing_and_one_micro_batch(tiny_model, sums, tmp_path):
    run_and_check(tiny_model, sums, tmp_path, "full", gradient_checkpointing=True, gradient_accumulation_steps=1)


def test_without_the_restore_the_check_fails(tiny_model, sums, tmp_path, monkeypatch):
    monkeypatch.setattr(FrozenCore, "restore", lambda self: None)
    with pytest.raises(RuntimeError, match="core isolation was broken"):
        run_and_check(tiny_model, sums, tmp_path, "full")
    monkeypatch.setattr(FrozenCore, "verify", lambda self: None)
    with pytest.raises(AssertionError, match="embed_tokens"):
        run_and_check(tiny_model, sums, tmp_path, "full")


def test_the_mask_keeps_frozen_gradients_out_of_the_clipped_norm(tiny_model, sums, tmp_path, monkeypatch):
    """The same training without the mask shows the norm of the whole gradient, of which both parts are known."""

    def first_entry():
        model = load(tiny_model, "full")
        callback = CoreIsolationCallback(make_region(model))
        return train(model, tiny_model, sums, tmp_path, 1e-3, callback, logging_steps=1).state.log_history[0]

    masked = first_entry()
    monkeypatch.setattr(FrozenCore, "_mask", lambda self, held: lambda parameter: None)
    whole = first_entry()
    assert whole["cpift/masked_grad_norm"] == 0.0
    assert masked["grad_norm"] < 0.95 * whole["grad_norm"]
    parts = math.hypot(masked["grad_norm"], masked["cpift/masked_grad_norm"])
    assert parts == pytest.approx(whole["grad_norm"], rel=1e-5)


def test_works_under_the_plain_trainer_and_from_a_file(tiny_model, sums, tmp_path):
    model = load(tiny_model, "full")
    region = make_region(model)
    region.save(tmp_path / "core.safetensors")
    before = {name: p.detach().reshape(-1).clone() for name, p in saved_parameters(model).items()}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [tokenizer(row["prompt"] + row["completion"], padding="max_length", max_length=8) for row in sums]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    args = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=3,
        weight_decay=0.1,
        learning_rate=1e-3,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    callback = CoreIsolationCallback(tmp_path / "core.safetensors")
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[callback])
    trainer.train()
    check_isolated(model, before, region, trainer)


def test_one_callback_serves_two_trainings(tiny_model, sums, tmp_path):
    model = load(tiny_model, "propulsion")
    region = make_region(model)
    callback = CoreIsolationCallback(region)
    before = {name: p.detach().reshape(-1).clone() for name, p in saved_parameters(model).items()}
    for _ in range(2):
        trainer = train(model, tiny_model, sums, tmp_path, 1e-2, callback)
    check_isolated(model, before, region, trainer)


def test_the_active_adapter_is_the_one_that_is_frozen(tiny_model):
    model = load(tiny_model, "propulsion")
    model.add_adapter("second", TUNERS["propulsion"][0])
    model.set_adapter("second")
    name, parameter = next(iter(saved_parameters(model).items()))
    assert "second" not in name
    assert name.endswith("q_proj.propulsion_z")
    live = dict(model.named_parameters())
    assert parameter is live[f"{name}.second"]


def test_region_of_another_model_is_refused_when_training_begins(tiny_model, sums, tmp_path):
    region = CoreRegion({"transformer.h.0.w": torch.tensor([0])}, {"transformer.h.0.w": (4,)})
    with pytest.raises(CpiftError, match=r"first transformer\.h\.0\.w"):
        train(load(tiny_model, "full"), tiny_model, sums, tmp_path, 1e-3, CoreIsolationCallback(region))


def test_engines_that_keep_weights_elsewhere_are_refused(tiny_model, sums, tmp_path, monkeypatch):
    model = load(tiny_model, "full")
    plugin = SimpleNamespace(fsdp_version=1)
    for state, cause in (
        (SimpleNamespace(distributed_type=DistributedType.MEGATRON_LM), "does not support MEGATRON_LM"),
        (SimpleNamespace(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin), "set fsdp_version to 2"),
    ):
        monkeypatch.setattr("peft_cpift.isolation.callback.AcceleratorState", lambda state=state: state)
        with pytest.raises(CpiftError, match=cause):
            train(model, tiny_model, sums, tmp_path, 1e-3, CoreIsolationCallback(make_region(model)))


def test_a_file_that_is_no_region_is_refused_at_once(tmp_path):
    (tmp_path / "core.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CpiftError, match=r"core\.safetensors"):
        CoreIsolationCallback(tmp_path / "core.safetensors")


class Meddler(TrainerCallback):
    """Writes to a frozen coordinate after our callback has restored it."""

    def on_optimizer_step(self, args, state, control, *, model, **kwargs):
        if state.global_step == 0:
            model.model.layers[0].mlp.down_proj.weight.data.view(-1)[3] += 1
        else:
            model.model.layers[0].mlp.down_proj.weight.data.view(-1)[3] -= 1


def test_a_wrong_checkpoint_is_noticed_when_it_is_written(tiny_model, sums, tmp_path):
    model = load(tiny_model, "full")
    callback = CoreIsolationCallback(make_region(model))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    args = SFTConfig(
        str(tmp_path), max_steps=2, save_strategy="steps", save_steps=1, use_cpu=True, bf16=False, report_to=[]
    )
    trainer = SFTTrainer(model, args, train_dataset=sums, processing_class=tokenizer, callbacks=[callback, Meddler()])
    with pytest.raises(RuntimeError, match="core isolation was broken"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_adapters_that_have_no_saved_parameters_are_refused(tiny_model):
    region = CoreRegion({"w": torch.tensor([0])}, {"w": (1,)})
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    )
    with pytest.raises(CpiftError, match="prompt-learning"):
        FrozenCore(model, region)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(CpiftError, match="get_peft_model"):
        FrozenCore(model, region)


def test_frozen_embedding_under_an_adapter_is_no_part_of_it(tiny_model):
    config = PropulsionConfig(target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    assert all(name.endswith("propulsion_z") for name in saved_parameters(model))
