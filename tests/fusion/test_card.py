"""Strategy: read the card as the Hub does, look for what it must not give away, and run its example.

The examples run in this process with FOLDER replaced by the folder, for a language model and for a Propulsion adapter
of one, and what they load is compared with the files.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from peft_cpift import CoreRegion
from peft_cpift.fusion.card import write_card
from peft_cpift.fusion.report import FusionReport, TensorFusion

SETTINGS = {
    "start": "theta",
    "tasks": {"maths": "probe-maths", "code": "probe-code"},
    "weights": None,
    "omega": 0.5,
    "overrides": {"*.embed*": {"omega": 0.0}},
    "merged": None,
    "rank": None,
}
REPORT = FusionReport(
    {"w": TensorFusion([0.5, 0.1], [False, True], core=12_345, conflicts=1_234), "v": TensorFusion([None], [True])}
)


def make_card(folder: Path, *, adapter: dict | None = None, model: dict | None = None, settings=SETTINGS) -> str:
    for name, content in (("adapter_config.json", adapter), ("config.json", model)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    write_card(folder, settings, REPORT)
    return (folder / "README.md").read_text(encoding="utf-8")


def snippet(text: str) -> str:
    return re.search(r"```python\n(.*?)\n```", text, re.DOTALL)[1]


def test_what_was_fused_and_how(tmp_path):
    text = make_card(tmp_path, model={"architectures": ["LlamaForCausalLM"]})
    assert "# Fusion of maths, code\n" in text
    for row in ("| (start) | `theta` |", "| maths | `probe-maths` |", "| code | `probe-code` |"):
        assert f"\n{row}\n" in text
    assert text.index("(start)") < text.index("| maths") < text.index("| code")
    assert "12,345 coordinates were transplanted, 1,234 of them in the cores of\nseveral tasks" in text
    assert "of 3 interpolations 2 were linear" in text
    shown = json.loads(re.search(r"```json\n(.*?)\n```", text, re.DOTALL)[1])
    assert shown == {key: SETTINGS[key] for key in ("weights", "omega", "overrides", "merged", "rank")}


def test_what_stands_for_adapters(tmp_path):
    merged = SETTINGS | {"merged": "llama"}
    text = make_card(tmp_path, model={}, settings=merged)
    assert "Adapters were merged into `llama`" in text
    assert "LoRA" not in text
    report = FusionReport(REPORT.tensors, {"w": 0.25, "v": 0.125})
    write_card(tmp_path, merged | {"rank": 8}, report)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "LoRA adapter of rank 8, which loses up to 25.0% of a weight's change" in text


def test_the_front_of_a_model(tmp_path):
    make_card(tmp_path, model={"architectures": ["LlamaForCausalLM"]})
    front = ModelCard.load(tmp_path / "README.md").data
    assert front.library_name == "transformers"
    assert front.tags == ["cpi-ft", "merge", "peft-cpift"]
    assert front.base_model is None


@pytest.mark.parametrize(("peft_type", "tags"), [("PROPULSION", ["propulsion"]), ("IA3", [])])
def test_the_front_of_an_adapter(tmp_path, peft_type, tags):
    make_card(tmp_path, adapter={"peft_type": peft_type, "base_model_name_or_path": "meta/llama"})
    front = ModelCard.load(tmp_path / "README.md").data
    assert front.library_name == "peft"
    assert front.tags == ["cpi-ft", "merge", "peft-cpift", *tags]
    assert front.base_model == "meta/llama"


@pytest.mark.parametrize("base", [None, ""])
def test_an_adapter_that_names_no_model(tmp_path, base):
    make_card(tmp_path, adapter={"peft_type": "IA3", "base_model_name_or_path": base})
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("form", ["absolute", "relative", "home"])
def test_a_path_is_not_named(tmp_path, monkeypatch, form, gone):
    """Nor that of a folder which is no longer there, or was on another machine: the Hub would take it for a model."""
    base = tmp_path / "secret" / "place" / "llama"
    if not gone:
        base.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    name = {"absolute": str(base), "relative": "./secret/place/llama", "home": "~/secret/place/llama"}[form]
    text = make_card(tmp_path, adapter={"peft_type": "PROPULSION", "base_model_name_or_path": name})
    assert "secret" not in text
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None


def test_names_that_yaml_and_markdown_would_read_otherwise(tmp_path):
    settings = SETTINGS | {"tasks": {"a: b": "x", "- é #": "y"}}
    make_card(tmp_path, model={}, settings=settings)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers"
    assert "# Fusion of a: b, - é #" in card.text


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ({"peft_type": "IA3", "task_type": "SEQ_CLS"}, "AutoPeftModelForSequenceClassification"),
        ({"peft_type": "IA3", "task_type": "CAUSAL_LM"}, "AutoPeftModelForCausalLM"),
        ({"peft_type": "IA3", "task_type": "SEQ_2_SEQ_LM"}, "AutoPeftModelForSeq2SeqLM"),
        ({"peft_type": "IA3", "task_type": "TOKEN_CLS"}, "AutoPeftModelForTokenClassification"),
        ({"peft_type": "IA3", "task_type": "QUESTION_ANS"}, "AutoPeftModelForQuestionAnswering"),
        ({"peft_type": "IA3", "task_type": "FEATURE_EXTRACTION"}, "AutoPeftModelForFeatureExtraction"),
        ({"peft_type": "PROPULSION", "task_type": None}, "AutoPeftModel"),
    ],
)
def test_the_class_that_loads_an_adapter(tmp_path, adapter, expected):
    import peft

    code = snippet(make_card(tmp_path, adapter=adapter))
    assert hasattr(peft, expected)
    assert f"from peft import {expected}\n\nmodel = {expected}.from_pretrained(" in code
    assert ("import peft_cpift" in code) == (adapter["peft_type"] == "PROPULSION")


@pytest.mark.parametrize("model", [{}, {"architectures": None}, {"architectures": []}, None])
def test_a_model_that_does_not_say_what_it_is(tmp_path, model):
    assert "from transformers import AutoModel\n" in snippet(make_card(tmp_path, model=model))


def run_snippet(folder: Path):
    code = snippet((folder / "README.md").read_text())
    assert code.count("FOLDER") == 1
    variables: dict = {}
    exec(code.replace("FOLDER", str(folder)), variables)
    return variables["model"]


@pytest.mark.parametrize("tied", [False, True])
def test_the_example_of_a_language_model_runs(tmp_path, llamas, fuse_quietly, read_model, tied):
    folder = llamas / f"tied-{tied}"
    fuse_quietly(
        tasks={"maths": folder / "maths"},
        cores={"maths": CoreRegion({}, {})},
        start=folder / "start",
        output=tmp_path / "fused",
    )
    assert str(folder) not in (tmp_path / "fused" / "README.md").read_text()
    model = run_snippet(tmp_path / "fused")
    assert type(model).__name__ == "LlamaForCausalLM"
    state = model.state_dict()
    for name, tensor in read_model(tmp_path / "fused").items():
        assert torch.equal(state[name], tensor)


def test_the_example_of_a_propulsion_adapter_runs(tmp_path, tiny_model, fuse_quietly, read_model, bits):
    from peft import get_peft_model
    from transformers import LlamaForCausalLM

    from peft_cpift import PropulsionConfig

    for stage in ("start", "maths", "code"):
        config = PropulsionConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_model), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "propulsion_z" in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / stage)
    fuse_quietly(
        tasks={task: tmp_path / task for task in ("maths", "code")},
        cores={task: CoreRegion({}, {}) for task in ("maths", "code")},
        start=tmp_path / "start",
        output=tmp_path / "fused",
        space="delta",
    )
    text = (tmp_path / "fused" / "README.md").read_text()
    assert str(tmp_path) not in text
    assert str(tiny_model) not in text
    loaded = run_snippet(tmp_path / "fused")
    vectors = {n.replace(".default", ""): p.detach() for n, p in loaded.named_parameters() if "propulsion_z" in n}
    fused = read_model(tmp_path / "fused")
    assert vectors.keys() == fused.keys()
    assert {name: bits(vector) for name, vector in vectors.items()} == {name: bits(t) for name, t in fused.items()}
