"""The model card says how to load the adapter, and what its authors wrote stays theirs.

Cards are compared as text with what stood there before, and their front matter as YAML. That the lines of the card
load the adapter, from a folder and from a Hub, is tested in `test_loading.py`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import get_peft_model
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from safetensors.torch import save_file

from peft_cpift.errors import CpiftError
from peft_cpift.propulsion import PropulsionConfig
from peft_cpift.propulsion.card import add_loading_section, update_card

HEADING = "## How to load this adapter"
SECTION = re.compile(r"<!-- peft_cpift: written.*?<!-- peft_cpift: end -->", re.DOTALL)
CARD = """---
language: en
license: mit
# a comment
model-index:
- name: mine
  results:
  - task:
      type: text-generation
    dataset:
      name: sums
      type: sums
    metrics:
    - type: accuracy
      value: 0.5
tags:
- zeta
- propulsion
- alpha
own key: 7
---
# Mine

```text
## not a heading
```

Text.

## First

- [ ] 100% \\1

## Second
"""


def adapter_folder(folder: Path, task: str | None = "CAUSAL_LM", base: str | None = "gpt2", **settings) -> Path:
    """What the card is made from, without a model."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "PROPULSION", "task_type": task, "base_model_name_or_path": base} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"z": torch.ones(1)}, folder / "adapter_model.safetensors")
    return folder


def write(folder: Path, text: str) -> None:
    (folder / "README.md").write_bytes(text.encode())


def read(folder: Path) -> str:
    return (folder / "README.md").read_bytes().decode()


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def body(text: str) -> str:
    return text.split("---", 2)[2].lstrip("\r\n")


def snippet(text: str) -> str:
    found = re.findall(r"```python\n(import peft_cpift.*?)```", text, flags=re.DOTALL)
    assert len(found) == 1
    return found[0]


def test_saving_writes_the_section_once_and_keeps_what_others_wrote(make_llama, tmp_path):
    model = get_peft_model(make_llama(), PropulsionConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    first = read(tmp_path)
    assert first.count(HEADING) == 1
    assert first.index(HEADING) < first.index("## Model Details")
    assert {"propulsion", "peft-cpift", "transformers"} <= set(front_matter(first)["tags"])

    edited = first.replace("## Model Details", "## My own words").replace("pip install", "never install")
    write(tmp_path, edited)
    model.save_pretrained(tmp_path)
    assert body(read(tmp_path)) == body(first).replace("## Model Details", "## My own words")
    assert front_matter(read(tmp_path)) == front_matter(first)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_front_matter_and_text_stay(tmp_path, newline):
    write(adapter_folder(tmp_path, base="C:\\1\\model"), CARD.replace("\n", newline))
    add_loading_section(tmp_path)
    text = read(tmp_path)
    assert front_matter(text) == front_matter(CARD) | {"tags": ["zeta", "propulsion", "alpha", "peft-cpift"]}
    assert (text.count("\n") == text.count("\r\n")) == (newline == "\r\n")
    before, after = SECTION.split(body(text).replace("\r\n", "\n"))
    assert before + after.removeprefix("\n\n") == body(CARD)
    assert before.endswith("Text.\n\n")

    add_loading_section(tmp_path)
    assert read(tmp_path) == text


@pytest.mark.parametrize(
    "text", [None, "", "Text without an end of line", "---\n---\n", "---\ntags: [one]\n---\nText\n"]
)
def test_every_card_gets_the_section(tmp_path, text):
    adapter_folder(tmp_path)
    if text is not None:
        write(tmp_path, text)
    for _ in range(2):
        add_loading_section(tmp_path)
        card = read(tmp_path)
        assert card.count(HEADING) == 1
        assert front_matter(card)["tags"] == (["one"] if text and "one" in text else []) + ["propulsion", "peft-cpift"]
        assert text is None or text.split("---\n")[-1] in card
    assert front_matter(card).get("library_name") == ("peft" if text is None else None)


def test_a_section_whose_end_was_deleted_takes_no_other_text_with_it(tmp_path):
    write(adapter_folder(tmp_path), CARD)
    add_loading_section(tmp_path)
    begin = SECTION.search(read(tmp_path))[0].splitlines()[0]
    write(tmp_path, CARD.replace("# Mine", f"# Mine\n{begin}"))
    for _ in range(3):
        add_loading_section(tmp_path)
    text = read(tmp_path)
    assert all(line in text for line in body(CARD).splitlines())
    assert text.count(HEADING) == 1


def test_each_adapter_has_a_card_beside_its_weights(make_llama, tmp_path):
    model = get_peft_model(make_llama(), PropulsionConfig(task_type="CAUSAL_LM"), adapter_name="one")
    model.add_adapter("two", PropulsionConfig())
    model.save_pretrained(tmp_path)
    assert HEADING not in read(tmp_path)  # there is nothing to load from the folder itself
    assert all(HEADING in read(tmp_path / name) for name in ("one", "two"))


def test_a_bare_configuration_leaves_the_card_of_a_project_alone(tmp_path):
    write(tmp_path, "# A project\n")
    PropulsionConfig().save_pretrained(tmp_path)
    assert read(tmp_path) == "# A project\n"


def test_a_configuration_that_is_saved_before_the_weights_gets_a_card(tmp_path):
    PropulsionConfig().save_pretrained(tmp_path)  # as transformers' save_pretrained does
    assert HEADING in read(tmp_path)


@pytest.mark.parametrize("task", MODEL_TYPE_TO_PEFT_MODEL_MAPPING)
def test_the_task_chooses_the_class(tmp_path, task):
    add_loading_section(adapter_folder(tmp_path, task))
    lines = snippet(read(tmp_path)).splitlines()
    assert lines[0].startswith("import peft_cpift")
    name = lines[1].removeprefix("from peft import ")
    assert lines[-1] == f"model = {name}.from_pretrained(adapter)"
    assert getattr(peft, name)._target_peft_class is MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]


@pytest.mark.parametrize(
    ("settings", "last"),
    [
        (
            {"auto_mapping": {"parent_library": "transformers.models.gpt2"}},
            "model = AutoPeftModel.from_pretrained(adapter)",
        ),
        (
            {"auto_mapping": {"parent_library": "transformersque"}},
            "model = PeftModel.from_pretrained(base_model, adapter)",
        ),
        ({"auto_mapping": None}, "model = PeftModel.from_pretrained(base_model, adapter)"),
        ({"task": "CAUSAL_LM", "base": None}, "model = PeftModel.from_pretrained(base_model, adapter)"),
        ({"task": "CAUSAL_LM", "base": ""}, "model = PeftModel.from_pretrained(base_model, adapter)"),
    ],
)
def test_without_a_task_or_a_base_model_the_reader_is_asked_for_it(tmp_path, settings, last):
    add_loading_section(adapter_folder(tmp_path, **{"task": None} | settings))
    code = snippet(read(tmp_path))
    compile(code, "card", "exec")
    assert code.splitlines()[-1] == last
    assert ("base_model = ..." in code) == ("base_model," in last)
    assert ("gpt2" in read(tmp_path)) == ("base" not in settings)


@pytest.mark.parametrize(
    ("task", "head", "arguments"),
    [
        ("SEQ_CLS", {"score.weight": (5, 4)}, "adapter, num_labels=5"),
        ("TOKEN_CLS", {"classifier.weight": (3, 4), "classifier.bias": (3,)}, "adapter, num_labels=3"),
        (
            "SEQ_CLS",
            {"classifier.dense.weight": (4, 4), "classifier.out_proj.weight": (7, 4)},
            "adapter, num_labels=7",
        ),
        ("SEQ_CLS", {"score.weight": (5, 4), "classifier.weight": (3, 4)}, "adapter"),
        ("CAUSAL_LM", {"score.weight": (5, 4)}, "adapter"),
    ],
)
def test_the_saved_head_tells_the_number_of_labels(tmp_path, task, head, arguments):
    adapter_folder(tmp_path, task)
    tensors = {f"base_model.model.{name}": torch.zeros(shape) for name, shape in head.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    add_loading_section(tmp_path)
    assert snippet(read(tmp_path)).splitlines()[-1].endswith(f".from_pretrained({arguments})")


def test_an_interrupted_write_leaves_the_old_card(tmp_path, monkeypatch):
    write(adapter_folder(tmp_path), CARD)

    def save(self, path):
        Path(path).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(ModelCard, "save", save)
    with pytest.raises(OSError, match="disk full"):
        add_loading_section(tmp_path)
    assert read(tmp_path) == CARD
    assert len(list(tmp_path.iterdir())) == 3


def damage(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            lambda f: damage(adapter_folder(f), "adapter_config.json", "{,"),
            "/adapter_config.json is not JSON .*save the",
        ),
        (lambda f: damage(adapter_folder(f), "adapter_config.json", "[]"), "is not a Propulsion adapter"),
        (lambda f: adapter_folder(f, peft_type="LORA"), "is not a Propulsion adapter .*peft_type='LORA'"),
        (lambda f: damage(f, "adapter_model.bin", ""), "has no adapter_config.json; name the folder"),
        (lambda f: damage(adapter_folder(f), "README.md", "---\n- a\n---\n"), "front matter of .*README.md .*mend"),
        (lambda f: damage(adapter_folder(f), "README.md", "---\na: [\n---\n"), "front matter of .*README.md .*mend"),
        (
            lambda f: damage(adapter_folder(f, "SEQ_CLS"), "adapter_model.safetensors", ""),
            "safetensors cannot be read",
        ),
        (lambda f: f, "holds no adapter weights; name the folder"),
        (lambda f: "no/such/folder", "^no/such/folder is neither a folder nor a repository"),
        (lambda f: "no/repository", "^no/repository is neither .*check the name, the connection"),  # offline
    ],
)
def test_what_is_no_adapter_is_refused_in_one_line(tmp_path, prepare, message):
    adapter = prepare(tmp_path)
    with pytest.raises(CpiftError, match=message) as error:
        update_card(adapter)
    assert "\n" not in str(error.value)


def test_a_card_that_another_program_overwrote_is_mended(make_llama, tmp_path):
    get_peft_model(make_llama(), PropulsionConfig()).save_pretrained(tmp_path)
    write(tmp_path, CARD)
    update_card(tmp_path)
    assert HEADING in read(tmp_path)
