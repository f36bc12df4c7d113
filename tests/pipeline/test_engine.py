"""Strategy: set what the launcher would set for each engine, and see what is refused; test_processes.py trains with
what is not."""

from __future__ import annotations

import gc
import json
import os
import weakref

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTConfig

from peft_cpift import CpiftError
from peft_cpift.pipeline import train as training
from peft_cpift.pipeline.engine import KeepsDtypes, check_engine, engine, gather_state, whole_models
from peft_cpift.pipeline.run import Run
from peft_cpift.recipe.reading import parse_recipe

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}


@pytest.fixture(autouse=True)
def no_engine(monkeypatch):
    """Nothing of a launcher's before a test, nor after it."""
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("environment", "training", "message"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "asks for Megatron-LM, which is not supported"),
        (
            {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "FSDP_VERSION": "2"},
            {},
            "asks for parallelism_config, which is not supported",
        ),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "FSDP1, .* set fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "FSDP1, .* set fsdp_version: 2"),
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            {},
            "mixed precision 'bf16' and the recipe for 'no': set training.bf16 to true in the recipe, or set mixed",
        ),
        (
            {"ACCELERATE_MIXED_PRECISION": "fp16"},
            {"bf16": True},
            "mixed precision 'fp16' and the recipe for 'bf16': set training.fp16",
        ),
        (
            {"ACCELERATE_MIXED_PRECISION": "fp8"},
            {"bf16": True},
            "'fp8' and the recipe for 'bf16': set mixed_precision",
        ),
        (
            DEEPSPEED | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"},
            {},
            "ds gradient_accumulation_steps=3 vs hf gradient_accumulation_steps=1; write 'auto' there",
        ),
        (
            DEEPSPEED | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"},
            {},
            "DeepSpeed's offload_optimizer to NVMe is not supported: set its device to cpu",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(monkeypatch, tree, environment, training, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    tree["training"] |= training
    tree["data"] = "nowhere"  # not looked at
    with pytest.raises(CpiftError, match=message):
        Run(parse_recipe(tree))


@pytest.mark.parametrize(
    ("environment", "training", "name"),
    [
        ({}, {}, "DDP"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, {"bf16": True}, "DDP"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"bf16": True}, "DDP"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {}, "FSDP"),
        (DEEPSPEED, {"gradient_accumulation_steps": 3}, "DeepSpeed"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {"bf16": True}, "DeepSpeed"),
    ],
)
def test_what_can_work_is_let_pass(monkeypatch, tmp_path, environment, training, name):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    check_engine(SFTConfig(str(tmp_path), use_cpu=True, **{"bf16": False, **training}))
    assert engine() == name


def test_a_configuration_file_of_deepspeed_is_checked_too(monkeypatch, tmp_path):
    config = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}, "train_batch_size": "auto"}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    for name, value in (DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CpiftError, match="offload_param to NVMe"):
        check_engine(SFTConfig(str(tmp_path), use_cpu=True, bf16=False))


def test_models_are_whole_in_spite_of_the_engine(monkeypatch, tmp_path):
    for name, value in (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert args.deepspeed_plugin is not None
    assert is_deepspeed_zero3_enabled()
    with whole_models():
        assert not is_deepspeed_zero3_enabled()
        assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


def test_a_cast_by_the_engine_stops_the_training(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    callback = KeepsDtypes(model)
    callback.on_train_begin(None, None, None, model=model)
    with pytest.raises(CpiftError, match=r"holds 'model.embed_tokens.weight' in bfloat16, .* dtype to bfloat16, or"):
        callback.on_train_begin(None, None, None, model=model.bfloat16())


def test_a_whole_model_is_not_gathered(tiny_model):
    assert gather_state(AutoModelForCausalLM.from_pretrained(tiny_model)) is None


@pytest.fixture
def train(tree, tiny_model, sums, tmp_path):
    """A function that trains the tiny model on sums."""

    def call(rows: Dataset = sums, **settings):
        recipe = parse_recipe({**tree, "tuner": "full"})
        (tmp_path / "out").mkdir()
        settings = {"bf16": False, "report_to": [], "disable_tqdm": True, "max_steps": 1} | settings
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        return training.train(recipe, tokenizer, tiny_model, rows, settings, tmp_path / "out", tmp_path / "work")

    return call


def test_a_trained_model_is_let_go(monkeypatch, train):
    models = []

    def load(*args, **kwargs):
        model = load_model(*args, **kwargs)
        models.append(weakref.ref(model))
        return model

    load_model = training.load_model
    monkeypatch.setattr(training, "load_model", load)
    monkeypatch.setattr(gc, "isenabled", gc.isenabled)
    gc.disable()
    try:
        train(use_cpu=True)
        assert [model() for model in models] == [None]
    finally:
        gc.enable()


def test_a_process_trains_on_one_device(monkeypatch, train):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    done = train(max_steps=-1, num_train_epochs=1, per_device_train_batch_size=16)
    assert (done.steps, done.examples) == (4, 64)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("rows", [4, 17, 64])
def test_rows_are_counted(tmp_path, accumulation, rows, drop_last):
    args = SFTConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=accumulation,
        dataloader_drop_last=drop_last,
    )
    batches = list(torch.utils.data.DataLoader(range(rows), batch_size=3, drop_last=drop_last))
    seen = steps = 0
    for _ in range(3):
        for start in range(0, len(batches), accumulation):
            steps += 1
            seen += sum(map(len, batches[start : start + accumulation]))
            assert training._rows_seen(steps, rows, args) == seen
