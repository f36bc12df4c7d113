"""An adapter that was saved or pushed loads by every door of PEFT and transformers, from a folder and from a Hub.

What is loaded is compared with the logits before saving, bit for bit. All loading happens in fresh processes: the
import of the package registers Propulsion, and a process that has built an adapter has that behind it. To import torch
and transformers only a few times, one process pushes, one loads everything, and one begins without the import, then
runs what the model cards say. The Hub is a server on the loopback address.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from peft_cpift.propulsion import PropulsionConfig

IDS = 3 + torch.arange(16).reshape(2, 8)
LABELS = 3
# task -> base model and transformers' class; the last has no task type, so that PEFT notes the class itself
TASKS = {
    "CAUSAL_LM": ("llama", "AutoModelForCausalLM"),
    "SEQ_CLS": ("llama", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("llama", "AutoModelForTokenClassification"),
    "FEATURE_EXTRACTION": ("llama", "AutoModel"),
    "QUESTION_ANS": ("bert", "AutoModelForQuestionAnswering"),
    "SEQ_2_SEQ_LM": ("t5", "AutoModelForSeq2SeqLM"),
    "none": ("llama", "AutoModelForCausalLM"),
}
WAYS = ("PeftModel", "AutoPeftModel", "AutoModel", "load_adapter")
# the beginning of every process, and known to this one too
COMMON = f"""
import os, warnings
import torch, peft, transformers
TASKS, LABELS = {TASKS!r}, {LABELS}
IDS = 3 + torch.arange(16).reshape(2, 8)

def result(model):
    model.eval()
    decoder = {{"decoder_input_ids": IDS}} if model.config.is_encoder_decoder else {{}}
    with torch.no_grad():
        logits = model(input_ids=IDS, **decoder)[0]
    z = {{name: p.detach() for name, p in model.named_parameters() if "propulsion_z" in name}}
    return {{"logits": logits, "z": sorted(z.items()), "dtype": model.dtype}}

def classes(task):
    auto = TASKS[task][1]
    peft_class = "AutoPeftModel" if task == "none" else auto.replace("Auto", "AutoPeft")
    peft_class = "AutoPeftModelForFeatureExtraction" if auto == "AutoModel" else peft_class
    labels = {{"num_labels": LABELS}} if task in ("SEQ_CLS", "TOKEN_CLS") else {{}}
    return getattr(transformers, auto), getattr(peft, peft_class), labels

def ways(task, base, adapter):
    auto, auto_peft, labels = classes(task)
    def load_adapter():
        model = auto.from_pretrained(base, **labels)
        model.load_adapter(adapter)
        return model
    return {{
        "PeftModel": lambda: peft.PeftModel.from_pretrained(auto.from_pretrained(base, **labels), adapter),
        "AutoPeftModel": lambda: auto_peft.from_pretrained(adapter, **labels),
        "AutoModel": lambda: auto.from_pretrained(adapter, **labels),
        "load_adapter": load_adapter,
    }}
"""
PUSH = """
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from peft_cpift import PropulsionConfig
from peft_cpift.propulsion.card import update_card

def base():
    return transformers.AutoModelForCausalLM.from_pretrained("me/tiny")

def config(**settings):
    return PropulsionConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_weights=False, **settings)

results = {}
model = peft.get_peft_model(base(), config(degree=7))
results["me/peft"] = result(model)
model.push_to_hub("me/peft")
update_card("me/peft")
model.push_to_hub("me/peft")

model.add_adapter("other", config(degree=3))
model.set_adapter("other")
results["me/two"] = result(model)
model.push_to_hub("me/two")
update_card("me/labels")
try:
    update_card("me/missing")
except ValueError as error:
    results["refusal"] = str(error)

data = Dataset.from_list([{"prompt": f"{a}+1=", "completion": str(a + 1)} for a in range(8)])
arguments = SFTConfig(
    "trained", use_cpu=True, bf16=False, max_steps=2, learning_rate=1e-2, report_to=[], save_strategy="no",
    disable_tqdm=True, hub_model_id="me/trl",
)
tokenizer = transformers.AutoTokenizer.from_pretrained("me/tiny")
trainer = SFTTrainer(base(), arguments, train_dataset=data, processing_class=tokenizer, peft_config=config())
trainer.train()
results["me/trl"] = result(trainer.model)
trainer.push_to_hub()
update_card("me/trl")
torch.save(results, "pushed.pt")
"""
LOAD = """
import peft_cpift
results = {}

def attempt(case, load):
    print(case, flush=True)  # the last line names the case that failed
    results[case] = result(load())

for task, (base, _) in TASKS.items():
    for way, load in ways(task, os.path.abspath(base), os.path.abspath(task)).items():
        attempt((task, way), load)
for repository in ("me/peft", "me/trl"):
    for way, load in ways("CAUSAL_LM", "me/tiny", repository).items():
        attempt((repository, way), load)

auto, other = transformers.AutoModelForCausalLM, {"subfolder": "other"}
base = auto.from_pretrained("me/tiny")
attempt(("me/two", "PeftModel"), lambda: peft.PeftModel.from_pretrained(base, "me/two", **other))
attempt(("me/two", "AutoModel"), lambda: auto.from_pretrained("me/two", adapter_kwargs=other))

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    peft.PeftModel.from_pretrained(auto.from_pretrained("llama"), "incomplete")
results["warnings"] = [str(warning.message) for warning in caught]
results["missing"] = auto.from_pretrained("llama").load_adapter("incomplete").missing_keys
auto.from_pretrained("incomplete")  # reports to stderr
torch.save(results, "loaded.pt")
"""
WITHOUT_IMPORT = """
errors = {}
for way, load in ways("CAUSAL_LM", "me/tiny", "me/peft").items():
    try:
        load()
    except KeyError as error:
        errors[way] = repr(error)

results = {}
for name in ("me/peft", "me/trl", "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "none"):
    if os.path.isdir(name):
        os.chdir(name)
    namespace = {}
    with open(os.path.join(home, name.replace("/", "-") + ".snippet")) as file:
        exec(file.read(), namespace)
    results[name] = result(namespace["model"])
    os.chdir(home)
torch.save({"errors": errors, "results": results}, "snippets.pt")
"""


def run(code: str, folder: Path, environment: dict[str, str]) -> str:
    """Run the code in a new process, and return what it wrote to stderr."""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"home = {str(folder)!r}\n{COMMON}\n{code}"],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment | {"PYTHONPATH": root},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def snippet(card: str) -> str:
    found = re.findall(r"```python\n(import peft_cpift.*?)```", card, flags=re.DOTALL)
    assert len(found) == 1, card
    return found[0]


def assert_same(actual: dict | str, expected: dict) -> None:
    assert actual["dtype"] == expected["dtype"]
    assert torch.equal(actual["logits"], expected["logits"])
    assert len(actual["z"]) == len(expected["z"]) > 0
    for (_, mine), (_, theirs) in zip(actual["z"], expected["z"], strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Base models in bfloat16 and a folder for each task's adapter; what they compute lies in `saved.pt`."""
    folder = tmp_path_factory.mktemp("loading")
    torch.manual_seed(0)
    common = {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    t5 = {"vocab_size": 64, "num_layers": 2, "d_model": 16, "num_heads": 2, "d_kv": 8, "d_ff": 32}
    bases = {
        "llama": transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**common, intermediate_size=32, pad_token_id=0)
        ),
        "bert": transformers.BertModel(transformers.BertConfig(**common, intermediate_size=32)),
        "t5": transformers.T5ForConditionalGeneration(transformers.T5Config(**t5, decoder_start_token_id=0)),
    }
    for name, base in bases.items():
        base.to(torch.bfloat16).save_pretrained(folder / name)
    namespace: dict = {}
    exec(COMMON, namespace)
    results = {}
    for task, (base, auto) in TASKS.items():
        labels = namespace["classes"](task)[2]
        model = getattr(transformers, auto).from_pretrained(folder / base, **labels)
        config = PropulsionConfig(task_type=None if task == "none" else task, degree=7, init_weights=False)
        model = get_peft_model(model, config)
        results[task] = namespace["result"](model)
        model.save_pretrained(folder / task)
    torch.save(results, folder / "saved.pt")

    (folder / "incomplete").mkdir()
    for file in (folder / "CAUSAL_LM").iterdir():
        (folder / "incomplete" / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "CAUSAL_LM" / "adapter_model.safetensors")
    del weights["base_model.model.model.layers.1.self_attn.q_proj.propulsion_z"]
    save_file(weights, folder / "incomplete" / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def expected(folder, hub) -> dict:
    """What every adapter computed before it was saved or pushed."""
    hub.commit("me/labels", {file.name: file.read_bytes() for file in (folder / "SEQ_CLS").iterdir()})
    run(PUSH, folder, hub.environment(folder / "home"))
    return torch.load(folder / "saved.pt") | torch.load(folder / "pushed.pt")


@pytest.fixture(scope="module")
def loaded(folder, expected, hub) -> dict:
    """What a process computed that loaded them all."""
    stderr = run(LOAD, folder, hub.environment(folder / "other-home"))
    return torch.load(folder / "loaded.pt") | {"stderr": stderr}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("adapter", [*TASKS, "me/peft", "me/trl"])
def test_a_fresh_process_loads_it(loaded, expected, adapter, way):
    assert expected[adapter]["dtype"] == (torch.float32 if adapter.startswith("me/") else torch.bfloat16)
    assert_same(loaded[adapter, way], expected[adapter])


@pytest.mark.parametrize("way", ["PeftModel", "AutoModel"])
def test_an_adapter_in_a_subfolder_of_a_repository_loads(loaded, expected, way):
    saved = expected["me/two"]
    assert_same(loaded["me/two", way], saved | {"z": [(name, z) for name, z in saved["z"] if name.endswith(".other")]})


def test_a_missing_vector_is_not_passed_over_in_silence(loaded):
    name = "model.layers.1.self_attn.q_proj.propulsion_z.default"
    assert any("missing adapter keys" in message and name in message for message in loaded["warnings"])
    assert loaded["missing"] == {name}
    assert len(re.findall(rf"{re.escape(name)} *\| MISSING", loaded["stderr"])) == 2


def test_pushing_leaves_a_card_without_the_section_until_it_is_updated(expected, hub):
    def cards(repository: str) -> list[str]:
        return [files["README.md"].decode() for _, files in hub.commits[repository] if files]

    # PEFT takes the card that is on the Hub when it pushes again, TRL writes a new one
    assert ["import peft_cpift" in card for card in cards("me/peft")] == [False, True, True]
    assert ["import peft_cpift" in card for card in cards("me/trl")] == [False, True]
    for repository in ("me/peft", "me/trl"):
        before, after, *_ = cards(repository)
        kept = re.sub(r"<!-- peft_cpift: written.*<!-- peft_cpift: end -->\n\n", "", after, flags=re.DOTALL)
        assert kept.split("---", 2)[2] == before.split("---", 2)[2]
        assert "- peft-cpift\n" in kept
    files = hub.files("me/two")[1]
    assert b"import peft_cpift" not in files["README.md"]
    assert b"import peft_cpift" in files["other/README.md"]


def test_a_card_on_the_hub_names_the_repository_and_the_number_of_labels(expected, hub):
    before, after = (files["README.md"].decode() for _, files in hub.commits["me/labels"])
    for card, name in ((before, "."), (after, "me/labels")):
        assert f'adapter = "{name}"' in snippet(card)
        assert f"from_pretrained(adapter, num_labels={LABELS})" in snippet(card)


def test_a_card_on_the_hub_is_refused_in_one_line(expected):
    assert expected["refusal"].startswith("me/missing is neither a folder nor a repository whose card could be")
    assert "\n" not in expected["refusal"]


def test_the_cards_lines_load_it_and_without_them_the_method_is_unknown(folder, expected, hub):
    cards = {name: hub.files(name)[1]["README.md"].decode() for name in ("me/peft", "me/trl")}
    cards |= {task: (folder / task / "README.md").read_text() for task in TASKS}
    for name, card in cards.items():
        (folder / f"{name.replace('/', '-')}.snippet").write_text(snippet(card))
    run(WITHOUT_IMPORT, folder, hub.environment(folder / "third-home"))
    found = torch.load(folder / "snippets.pt")
    assert found["errors"] == dict.fromkeys(WAYS, "KeyError('PROPULSION')")
    assert len(found["results"]) == 6
    for name, actual in found["results"].items():
        assert_same(actual, expected[name])
