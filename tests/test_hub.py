"""Strategy: push small runs over HTTP to the loopback Hub, most of them made by hand and two by the pipeline, and look
there at what came: the files byte by byte, the card's front matter by YAML alone, and the model by executing the
card's lines in a process that has nothing but the Hub. Pushing and loading have fresh processes.

What is refused before the network is asked for is tested in the tests' own process, which is offline.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from peft_cpift import CoreRegion, CpiftError, PropulsionConfig, find_core_region
from peft_cpift.hub import push_run
from peft_cpift.hub.card import Subject, model_card
from peft_cpift.pipeline.run import run
from peft_cpift.pipeline.settings import PROPULSION_LEARNING_RATE
from peft_cpift.recipe.reading import parse_recipe

TASKS = ("sums", "larger", "letters")
SECRET = "hf_" + "aB3" * 11
UNWELCOME = b"a picture that the store of large files refuses"


def model_scores(name: str, number: float, tokens: int | None = None) -> dict:
    scores = {task: {"loss": number + i, "score": (number + i) / 10} for i, task in enumerate(TASKS)}
    return {
        "name": name,
        "average": number,
        "scores": scores,
        "lm_eval": None,
        "training": tokens and {"tokens": tokens},
    }


def make_report(tuner: dict | str, model: str, cores: dict[str, CoreRegion]) -> dict:
    """A report as a run writes it, where the numbers of each model differ."""
    hub = {"name": "org/sums", "subset": "main", "revision": None, "train": "train", "test": "test[:9]"}
    return {
        "format": 1,
        "recipe": {
            "model": model,
            "output": "run",
            "data": None,
            "revision": None,
            "dtype": "auto",
            "trust_remote_code": False,
            "seed": 7,
            "tuner": tuner,
            "core": {"percent": 2.5, "scope": "global", "exclude": []},
            "grouping": {"threshold": 0.15, "order": "difficulty", "helps": None},
            "fusion": {"start": "multi_stage"},
            "integration": {"schedule": "staged"},
            "tasks": {
                "sums": {"hub": hub, "files": None, "metric": "exact_match"},
                "larger": {"hub": {**hub, "name": "json"}, "files": None, "metric": "choice"},
                "letters": {"hub": {**hub, "name": "org/local"}, "files": None, "metric": "loss"},
            },
        },
        "versions": {"device": "CPU", "peft-cpift": "0.1.0"},
        "settings": {"probe": {"learning_rate": 0.02}, "integration": {"learning_rate": 0.004}},
        "cores": {task: {"size": len(core), "total": core.total, "tensors": {}} for task, core in cores.items()},
        "groups": [["letters"], ["sums", "larger"]],
        "fusion": {"folds": 9, "linear_folds": 2},
        "models": [
            model_scores("base", 0.5),
            *(model_scores(f"probe {task}", 1.0, 100) for task in cores),
            model_scores("stage 1/2", 1.5, 20),
            model_scores("final", 3.25, 3),
            model_scores("multi-task", 2.0, 1234),
        ],
        "sequences": [
            {"method": "CPI-FT", "start": "fused", "stages": [{"model": "stage 1/2"}, {"model": "final"}]},
        ],
        "methods": [{"method": "multi-task", "model": "multi-task"}, {"method": "CPI-FT", "model": "final"}],
        "warnings": [],
    }


def make_run(folder: Path, tiny_model: Path, kind: str, base: str) -> Path:
    """A run's folder, with much in it that is nobody's business. `base` is what the recipe calls the model."""
    config = {
        "propulsion": PropulsionConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        "lora": LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"),
    }.get(kind)

    def save(name: str, seed: int) -> None:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        model = model if config is None else get_peft_model(model, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if seed and parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) / 50)
        model.save_pretrained(folder / name)
        if config is not None:
            file = folder / name / "adapter_config.json"
            named = {"base_model_name_or_path": base}
            named |= {"loftq_config": {"weights": "/home/alice/weights"}} if kind == "lora" else {}
            file.write_text(json.dumps(json.loads(file.read_text()) | named))

    cores = {}
    for seed, name in enumerate(("start", *TASKS, "final")):
        save(f"probes/{name}" if name in TASKS else name, seed)
        if name in TASKS:
            cores[name] = find_core_region(folder / "probes" / name, folder / "start", percent=2.5)
            cores[name].save(folder / "cores" / f"{name}.safetensors")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder / "final")
    shown = Path(base).name if base.startswith("/") else base
    # what was trained in float32 on a branch is loaded in the same way
    way = {"propulsion": {"revision": "main", "dtype": "float32", "trust_remote_code": True}}.get(kind, {})
    report = make_report({"peft_type": kind.upper()} if config else "full", shown, cores)
    if shown != base:
        way = {"data": "rows"}  # in place of the tasks' own
    report["recipe"] |= way
    whole = {**report["recipe"], "model": base, "output": str(folder)}
    texts = {
        "recipe.yaml": yaml.safe_dump(whole),
        "report/report.json": json.dumps(report),
        "report/index.html": "<html></html>",
        "report/report.png": "a picture",
        "report/report.md": "not asked for",
        "final/README.md": f"an old card that names {folder}",
        "final/.hidden.json": "{}",
        "final/model.safetensors.part": "half",
        "final/training_args.bin": "pickled",
        "final/importance.safetensors": "what a core was found by",
        "final/checkpoint-3/trainer_state.json": "{}",
        "cores/.sums.safetensors.12.part": "half",
        "final.part/config.json": "{}",
        "steps/final.json": "{}",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory) -> Path:
    """Runs of every kind, and some that must be refused."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in ("propulsion", "whole"):
        make_run(folder / kind, tiny_model, kind, "me/tiny")
    make_run(folder / "local", tiny_model, "lora", str(tiny_model))
    make_run(folder / "local-whole", tiny_model, "whole", str(tiny_model))
    (folder / "local-whole" / "report" / "report.png").unlink()
    (folder / "org" / "local").mkdir(parents=True)  # where the process works, so that its name means this folder
    for name in ("own-token", "token", "unwelcome"):
        shutil.copytree(folder / "propulsion", folder / name)
    for name, token in (("own-token", "hf_loopback"), ("token", SECRET)):
        file = folder / name / "report" / "report.json"
        report = json.loads(file.read_text())
        report["recipe"]["training"] = {"hub_token": token}
        file.write_text(json.dumps(report))
    (folder / "unwelcome" / "report" / "report.png").write_bytes(UNWELCOME)
    return folder


# In the order given; the key names the push, and the first value is the token.
PUSHES = {
    "propulsion": ("hf_loopback", "propulsion", "me/propulsion", {}),
    "whole": ("hf_loopback", "whole", "me/whole", {}),
    "named": ("hf_loopback", "local", "me/named", {"base_model": "me/tiny"}),
    "local whole": ("hf_loopback", "local-whole", "me/local-whole", {"private": False}),
    "private": ("hf_loopback", "propulsion", "me/private", {"private": True}),
    "again": ("hf_loopback", "propulsion", "me/private", {}),
    "never opened": ("hf_loopback", "propulsion", "me/private", {"private": False}),
    "still private": ("hf_loopback", "propulsion", "me/private", {"private": True}),
    "public": ("hf_loopback", "propulsion", "me/was-public", {"private": True}),
    "local": ("hf_loopback", "local", "me/local", {}),
    "unknown base": ("hf_loopback", "local", "me/local", {"base_model": "me/nothing"}),
    "bad base": ("hf_loopback", "local", "me/local", {"base_model": "../tiny"}),
    "token": ("hf_loopback", "token", "me/token", {}),
    "own token": ("hf_loopback", "own-token", "me/token", {}),
    "unwelcome": ("hf_loopback", "unwelcome", "me/unwelcome", {}),
    "not mine": ("hf_loopback", "propulsion", "stranger/theirs", {}),
    "new, not mine": ("hf_loopback", "propulsion", "stranger/new", {}),
    "nobody": ("", "propulsion", "me/nobody", {}),
    "wrong token": ("hf_wrong", "propulsion", "me/nobody", {}),
}
PUSH = """
import json, os, sys
from peft_cpift import CpiftError
from peft_cpift.hub import push_run
results = {}
for key, (token, run, repository, settings) in json.loads(sys.argv[1]).items():
    os.environ["HF_TOKEN"] = token
    try:
        results[key] = push_run(run, repository, **settings)
    except CpiftError as error:
        results[key] = f"refused: {error}"
print(json.dumps(results))
"""


def start(code: str, environment: dict[str, str], argument: object, folder: Path) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, json.dumps(argument)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def pushed(runs, hub, tmp_path_factory) -> dict[str, str]:
    """What `push_run` returned or raised for each push, and all that the process printed."""
    hub.datasets |= {"org/sums", "org/local"}
    hub.unwelcome |= {UNWELCOME}
    earlier = ("adapter_config.json", "model-00001-of-00002.safetensors", "cores/old.safetensors", "cores/notes.md")
    hub.commit("me/whole", dict.fromkeys((*earlier, "models/old.safetensors", "NOTES.md"), b"earlier"))
    hub.commit("me/was-public", {})
    hub.commit("stranger/theirs", {})
    home = tmp_path_factory.mktemp("home")
    done = start(PUSH, hub.environment(home), PUSHES, runs)
    left = b"".join(file.read_bytes() for file in home.rglob("*") if file.is_file())
    return json.loads(done.stdout.splitlines()[-1]) | {"printed": done.stdout + done.stderr, "left": repr(left)}


def front_matter(hub, repository: str) -> dict:
    return yaml.safe_load(card(hub, repository).split("---\n")[1])


def card(hub, repository: str) -> str:
    return hub.files(repository)[1]["README.md"].decode()


def snippet(text: str) -> str:
    (lines,) = re.findall(r"```python\n(.*?)\n```", text, flags=re.DOTALL)
    return lines


# What arrives


@pytest.mark.parametrize("kind", ["propulsion", "whole"])
def test_one_commit_has_the_files_of_the_run_and_no_others(pushed, runs, hub, kind):
    history = hub.commits[f"me/{kind}"]
    assert len(history) == 2  # the repository's own beginning is the first
    sha, files = history[-1]
    assert pushed[kind] == f"{hub.endpoint}/me/{kind}/commit/{sha}"
    weights = {
        "propulsion": {"adapter_model.safetensors"},
        "whole": {"model.safetensors", "generation_config.json", "config.json"},
    }[kind]
    same = weights | {"tokenizer.json", "tokenizer_config.json"}
    for name in same:
        assert files[name] == (runs / kind / "final" / name).read_bytes(), name
    beside = {f"cores/{task}.safetensors" for task in TASKS}
    beside |= {"report/report.png", "report/index.html", "report/report.json"}
    for name in beside:
        assert files[name] == (runs / kind / name).read_bytes(), name
    made = {"README.md", "recipe.yaml"} | ({"adapter_config.json"} if kind == "propulsion" else set())
    kept = {"models/old.safetensors", "NOTES.md", "cores/notes.md"} if kind == "whole" else set()
    assert files.keys() == same | beside | made | kept


def test_no_local_path_leaves_the_machine(pushed, runs, hub):
    for repository in ("me/propulsion", "me/whole", "me/named", "me/local-whole"):
        for name, content in hub.files(repository)[1].items():
            assert b"/tmp" not in content, (repository, name)
            assert b"alice" not in content, (repository, name)
            assert str(runs).encode() not in content, (repository, name)
    recipe = yaml.safe_load(hub.files("me/named")[1]["recipe.yaml"])
    expected = json.loads((runs / "local/report/report.json").read_text())["recipe"]
    expected["tasks"]["letters"]["hub"]["name"] = "local"  # a folder where the process works, and no data set then
    assert recipe == expected


def test_large_files_were_put_and_verified(pushed, runs, hub):
    content = (runs / "propulsion" / "final" / "adapter_model.safetensors").read_bytes()
    digest = next(digest for digest, stored in hub.objects.items() if stored == content)
    assert digest in hub.verified


def test_the_base_model_is_named_in_the_configuration(pushed, runs, hub):
    own = json.loads((runs / "propulsion/final/adapter_config.json").read_text())
    assert json.loads(hub.files("me/propulsion")[1]["adapter_config.json"]) == own
    local = json.loads((runs / "local/final/adapter_config.json").read_text())
    assert json.loads(hub.files("me/named")[1]["adapter_config.json"]) == local | {
        "base_model_name_or_path": "me/tiny",
        "loftq_config": {"weights": "weights"},
    }


# The card


def test_the_front_matter_says_what_it_is(pushed, hub):
    common = {"pipeline_tag": "text-generation", "datasets": ["org/sums"], "base_model": "me/tiny"}
    expected = {
        "propulsion": {
            **common,
            "base_model_relation": "adapter",
            "library_name": "peft",
            "tags": ["peft", "propulsion", "cpi-ft", "peft-cpift", "trl"],
        },
        "named": {
            "pipeline_tag": "text-generation",
            "base_model": "me/tiny",
            "base_model_relation": "adapter",
            "library_name": "peft",
            "tags": ["peft", "cpi-ft", "peft-cpift", "trl"],
        },
        "whole": {
            **common,
            "base_model_relation": "finetune",
            "library_name": "transformers",
            "tags": ["cpi-ft", "peft-cpift", "trl"],
        },
    }
    for name, data in expected.items():
        front = front_matter(hub, f"me/{name}")
        assert front.pop("model-index")[0]["name"] == name
        assert front == data
    front = front_matter(hub, "me/local-whole")  # of which no base model is on the Hub
    assert not {"base_model", "base_model_relation", "datasets"} & front.keys()
    assert "`model`, fine-tuned as a whole on 3 tasks" in card(hub, "me/local-whole")


def test_the_model_index_has_the_results_own_scores(pushed, hub):
    (entry,) = front_matter(hub, "me/propulsion")["model-index"]
    sums, larger, letters = entry["results"]
    generation = {"type": "text-generation"}
    assert sums["task"] == generation | {"name": "sums"}
    assert sums["dataset"] == {"name": "org/sums", "type": "org/sums", "config": "main", "split": "test[:9]"}
    assert larger["dataset"] == {"name": "larger", "type": "larger"}  # `json` is no data set on the Hub
    loss = "held-out loss in nats per token"
    assert sums["metrics"] == [
        {"type": "exact_match", "value": 0.325, "name": "sums: exact match", "verified": False},
        {"type": "loss", "value": 3.25, "name": f"sums: {loss}", "verified": False},
    ]
    assert larger["metrics"][0] == {
        "type": "accuracy",
        "value": 0.425,
        "name": "larger: likeliest choice",
        "verified": False,
    }
    assert letters["metrics"] == [{"type": "loss", "value": 5.25, "name": f"letters: {loss}", "verified": False}]


def test_the_text_has_scores_settings_sources_and_the_picture(pushed, hub):
    text = card(hub, "me/propulsion")
    for line in (
        "| method | model of the run | average | sums (exact match) | larger (likeliest choice) | "
        "letters (exp(-loss)) | tokens of its trainings |",
        "| base model | base | 0.50 | 0.50 | 1.50 | 2.50 | 0 |",
        "| CPI-FT | final | 3.25 | 3.25 | 4.25 | 5.25 | 323 |",
        "| multi-task | multi-task | 2.00 | 2.00 | 3.00 | 4.00 | 1,234 |",
        "| core, p | 2.5% (global) |",
        "| grouping, tau | 0.15 |",
        "| order of groups | difficulty |",
        "| groups | letters, then sums + larger |",
        "| tuner | PROPULSION |",
        "| learning rates | probe 0.02, integration 0.004 |",
        "| seed | 7 |",
    ):
        assert line in text.splitlines()
    assert "## Warnings" not in text
    assert "all else is interpolated along the sphere (2 of 9 times linearly). Then the groups are trained one" in text
    assert "A Propulsion adapter for `me/tiny`, trained on 3 tasks: `sums`, `larger`, `letters`." in text
    assert "stage 2/2" not in text  # no method's result
    assert "](https://arxiv.org/abs/2508.21741)" in text
    assert "](https://arxiv.org/abs/2409.10927)" in text
    assert re.search(r"^!\[.*\]\(report/report.png\)$", text, flags=re.MULTILINE)
    assert "![" not in card(hub, "me/local-whole")  # which has no picture
    assert "report/report.png" not in hub.files("me/local-whole")[1]


@pytest.fixture
def report(runs) -> dict:
    """The report of a run whose result is an adapter."""
    return json.loads((runs / "propulsion" / "report" / "report.json").read_text())


def test_a_field_that_an_earlier_report_has_not_is_left_out(report):
    del report["settings"]["probe"]["learning_rate"]
    subject = Subject(repository="me/run", report=report, peft_type="PROPULSION", base="me/tiny")
    assert "| learning rates | integration 0.004 |" in str(model_card(subject))
    report["settings"] = {}
    assert "learning rates" not in str(model_card(subject))


def test_the_card_says_by_what_the_cores_were_chosen(report):
    def text() -> str:
        return str(model_card(Subject(repository="me/run", report=report, peft_type="PROPULSION", base="me/tiny")))

    for given in ({}, {"importance": "update"}):  # earlier reports say nothing of it
        report["recipe"]["core"] |= given
        assert "calls the coordinates\nthat moved most the task's core." in text()
        assert "# the coordinates that this task moved most\n" in text()
        assert "| core by | update |" in text()
    report["recipe"]["core"] |= {"importance": "second_moment"}
    assert (
        "calls the coordinates\nwith the largest gradients (the optimizer's second moment; the paper takes" in text()
    )
    assert "# the coordinates that matter most to this task\n" in text()
    assert "| core by | second moment of the gradients |" in text()


def test_names_break_neither_tables_nor_lines(report):
    odd = 'it\'s "a" | `b`'
    report["recipe"] |= {"revision": odd, "model": odd, "trust_remote_code": False}
    report["recipe"]["fusion"]["start"] = odd
    report["versions"]["device"] = "<b>"
    report["warnings"] = ["no two <tasks> share a core"]
    report["recipe"]["integration"]["schedule"] = "none"
    report["fusion"] = {"folds": 9, "linear_folds": 9}
    text = str(model_card(Subject(repository="me/__run__", report=report, peft_type="PROPULSION", base="me/tiny")))
    assert r"""| fusion starts from | it's "a" \| \`b\` |""" in text.splitlines()
    assert r"# \_\_run\_\_" in text.splitlines()
    assert "- no two &lt;tasks&gt; share a core" in text.splitlines()[-1]
    assert "all else is interpolated, here all of it linearly. Nothing was trained after that." in text
    assert "<b>" not in text
    calls = [node for node in ast.walk(ast.parse(snippet(text))) if isinstance(node, ast.Call) and node.keywords]
    assert [{k.arg: ast.literal_eval(k.value) for k in call.keywords} for call in calls] == [
        {"revision": odd, "dtype": "float32"}
    ]
    report["recipe"]["tuner"] = "full"
    whole = str(model_card(Subject(repository="me/run", report=report, peft_type=None, base=None)))
    assert f"`` {odd} ``, fine-tuned as a whole on 3 tasks" in whole


# From the recipe to the Hub


@pytest.mark.parametrize("kind", ["PROPULSION", "LORA"])
def test_a_run_as_the_pipeline_makes_it(kind, tree, tiny_model, hub, tmp_path):
    """Without a learning rate of its own; the card's lines are executed with what came, in place of the names."""
    training = {"max_steps": 2, "per_device_train_batch_size": 4, "disable_tqdm": True}
    tree |= {"tuner": {"peft_type": kind, "target_modules": ["q_proj"]}, "training": training}
    tree |= {"fusion": {"start": "pretrained"}, "baselines": {"multi_task": False}}
    tree["integration"] = {"schedule": "mixed" if kind == "PROPULSION" else "none"}
    tree["evaluation"]["max_new_tokens"] = 1
    folder = run(parse_recipe(tree))
    adapter = kind == "PROPULSION"
    settings = {"base_model": "me/tiny"} if adapter else {}
    name = f"me/real-{kind.lower()}"
    call = {kind: ("hf_loopback", str(folder), name, settings)}
    done = start(PUSH, hub.environment(tmp_path / "home"), call, tmp_path)
    assert json.loads(done.stdout.splitlines()[-1])[kind].startswith(hub.endpoint), done.stdout
    files, text = hub.files(name)[1], card(hub, name)
    assert ("adapter_config.json" in files) == adapter
    assert ("config.json" in files) != adapter
    for path, content in files.items():
        assert str(tree["output"]).encode() not in content, path
        assert str(tiny_model).encode() not in content, path
        assert str(tree["data"]).encode() not in content, path
    rate = PROPULSION_LEARNING_RATE if adapter else SFTConfig.learning_rate
    rates = f"probe {rate:g}, integration {rate:g}" if adapter else f"probe {rate:g}"
    assert f"| learning rates | {rates} |" in text.splitlines()
    assert f"| tuner | {kind} |" in text.splitlines()
    what = "A Propulsion adapter for `me/tiny`, trained on 3 tasks"
    if not adapter:
        what = "`model` with the changes of LORA adapters fused into its weights: a whole model, trained on 3 tasks"
    assert what in text
    assert front_matter(hub, name)["library_name"] == ("peft" if adapter else "transformers")
    for path, content in files.items():
        (tmp_path / "came" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "came" / path).write_bytes(content)
    lines = snippet(text).replace(repr(name), repr(str(tmp_path / "came"))).replace("'me/tiny'", repr(str(tiny_model)))
    names: dict = {}
    exec(lines, names)
    ids = names["tokenizer"]("1+2=3", return_tensors="pt")
    expected = AutoModelForCausalLM.from_pretrained(tiny_model if adapter else folder / "final")
    expected = PeftModel.from_pretrained(expected, folder / "final") if adapter else expected
    with torch.no_grad():
        assert torch.equal(names["model"].eval()(**ids).logits, expected.eval()(**ids).logits)
    assert names["core"].indices.keys() == CoreRegion.load(folder / "cores" / "sums.safetensors").indices.keys()


# Who may see and write


def test_private_repositories_are_made_and_stay_private(pushed, hub):
    assert {name for name in hub.private if name in hub.commits} == {"me/private"}
    for key in ("private", "again", "never opened", "still private"):
        assert pushed[key].startswith(f"{hub.endpoint}/me/private/commit/")


def test_nothing_private_goes_to_a_public_repository(pushed, hub):
    assert pushed["public"].startswith("refused: me/was-public exists and is public: make it private")
    assert hub.files("me/was-public")[1] == {}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("local", "the adapter's base model 'model' is not on the Hub.*--base-model"),
        ("unknown base", "base model 'me/nothing' is not on the Hub"),
        ("bad base", "base model '../tiny' is not on the Hub"),
        ("token", "report/report.json holds an access token, so nothing was pushed: take the token out"),
        ("own token", "report/report.json holds an access token"),
        ("unwelcome", "the Hub did not take me/unwelcome.*report/report.png"),
        ("not mine", r"the Hub did not take stranger/theirs \(403\).*hf auth login"),
        ("new, not mine", r"the Hub did not take stranger/new \(403\).*hf auth login"),
        ("nobody", r"the Hub did not take me/nobody \(401\).*hf auth login"),
        ("wrong token", r"the Hub did not take me/nobody \(401\).*hf auth login"),
    ],
)
def test_refusals_are_one_line_and_commit_nothing(pushed, hub, key, message):
    assert re.match(f"refused: {message}", pushed[key]), pushed[key]
    assert "\n" not in pushed[key]
    repository = PUSHES[key][2]
    assert repository not in hub.commits or hub.files(repository)[1] == {}


def test_no_token_is_printed_or_kept(pushed, hub):
    contents = [content for history in hub.commits.values() for _, files in history for content in files.values()]
    for token in ("hf_loopback", "hf_wrong", SECRET):
        assert token not in json.dumps(pushed)
        assert not any(token.encode() in content for content in contents)


# Loading

LOAD = """
import json, sys
import torch
results = {}
for repository, lines in json.loads(sys.argv[1]).items():
    names = {}
    exec(lines, names)
    model, core = names["model"], names["core"]
    ids = names["tokenizer"]("1+2=3", return_tensors="pt")
    with torch.no_grad():
        results[repository] = {
            "logits": model.eval()(**ids).logits,
            "core": {name: index.clone() for name, index in core.indices.items()},
        }
from peft_cpift import CoreRegion, CpiftError

def refusal(*arguments, **settings):
    try:
        CoreRegion.from_pretrained(*arguments, **settings)
    except CpiftError as error:
        return str(error)

results["unknown task"] = refusal("me/propulsion", "chess")
results["no cores"] = refusal("me/tiny", "sums")
results["unknown repository"] = refusal("me/nothing", "sums")
results["unknown revision"] = refusal("me/propulsion", "sums", revision="v2")
results["private"] = len(CoreRegion.from_pretrained("me/private", "sums"))
results["private, nobody"] = refusal("me/private", "larger", token=False)
results["old"] = refusal("me/whole", "old")
results["no name"] = refusal("me/../..", "sums")
torch.save(results, "loaded.pt")
"""


@pytest.fixture(scope="module")
def loaded(pushed, runs, hub, tmp_path_factory) -> dict:
    """What the lines of the cards load in a fresh process, and what `from_pretrained` refuses there."""
    folder = tmp_path_factory.mktemp("elsewhere")
    snippets = {name: snippet(card(hub, f"me/{name}")) for name in ("propulsion", "named", "whole", "local-whole")}
    start(LOAD, hub.environment(folder / "home"), snippets, folder)
    return torch.load(folder / "loaded.pt")


def test_the_cards_lines_load_the_base_model_as_it_was_trained(pushed, hub):
    lines = snippet(card(hub, "me/propulsion")).splitlines()
    loading = (
        "AutoModelForCausalLM.from_pretrained('me/tiny', revision='main', dtype='float32', trust_remote_code=True)"
    )
    assert f"base = {loading}" in lines
    assert "base = AutoModelForCausalLM.from_pretrained('me/tiny')" in snippet(card(hub, "me/named")).splitlines()


@pytest.mark.parametrize(
    ("name", "run"),
    [("propulsion", "propulsion"), ("named", "local"), ("whole", "whole"), ("local-whole", "local-whole")],
)
def test_the_cards_lines_load_what_the_run_made(loaded, runs, tiny_model, name, run):
    final = runs / run / "final"
    if (final / "adapter_config.json").exists():
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        plain = base.eval()
        ids = AutoTokenizer.from_pretrained(final)("1+2=3", return_tensors="pt")
        with torch.no_grad():
            assert not torch.equal(plain(**ids).logits, loaded[name]["logits"])
        model = PeftModel.from_pretrained(base, final).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(final).eval()
        ids = AutoTokenizer.from_pretrained(final)("1+2=3", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, loaded[name]["logits"])
    core = CoreRegion.load(runs / run / "cores" / "sums.safetensors")
    assert loaded[name]["core"].keys() == core.indices.keys()
    for tensor, index in core.indices.items():
        assert torch.equal(loaded[name]["core"][tensor], index)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("unknown task", "me/propulsion has no core region of a task 'chess': it has larger, letters, sums$"),
        ("no cores", "me/tiny has no core region of a task 'sums': it has none"),
        ("old", "me/whole has no core region of a task 'old': it has larger, letters, sums$"),
        (
            "unknown repository",
            "cannot read cores/sums.safetensors of me/nothing, which is no folder .*check the name",
        ),
        ("unknown revision", "cannot read cores/sums.safetensors of me/propulsion"),
        ("private, nobody", "cannot read cores/larger.safetensors of me/private.*hf auth login"),
        ("no name", "cannot read cores/sums.safetensors of me/../.., which is no folder"),
    ],
)
def test_a_region_that_is_not_there_is_refused_in_one_line(loaded, key, message):
    assert re.match(message, loaded[key]), loaded[key]
    assert "\n" not in loaded[key]


def test_a_private_region_is_read_with_the_owners_token(loaded, runs):
    assert loaded["private"] == len(CoreRegion.load(runs / "propulsion" / "cores" / "sums.safetensors"))


# Refused before the network is asked for


@pytest.mark.parametrize("part", ["final", "cores", "recipe.yaml", "report/report.json", "report/index.html"])
def test_an_incomplete_run_is_refused(runs, tmp_path, part):
    run = shutil.copytree(runs / "propulsion", tmp_path / "run")
    (run / part).rename(run / "moved")
    with pytest.raises(CpiftError, match=rf"run has no {part}/?: finish the run with `cpift run`"):
        push_run(run, "me/run")


def test_a_run_with_a_damaged_part_is_refused(runs, tmp_path):
    run = shutil.copytree(runs / "whole", tmp_path / "run")

    def refused(match: str) -> None:
        with pytest.raises(CpiftError, match=match) as caught:
            push_run(run, "me/run")
        assert "\n" not in str(caught.value)

    weights = run / "final" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-8])
    refused("run/final is not complete, finish the run with `cpift run`: .*model.safetensors")
    weights.write_bytes(content)
    (run / "cores" / "sums.safetensors").unlink()
    refused("run has no cores/sums.safetensors: finish the run")
    (run / "recipe.yaml").write_text("model: [")
    shutil.copy(runs / "whole" / "cores" / "sums.safetensors", run / "cores")
    refused("cannot read .*recipe.yaml")
    (run / "recipe.yaml").write_text("a text")
    refused("recipe.yaml is not a run's recipe")
    (run / "report" / "report.json").write_text(json.dumps({"format": 2}))
    refused("report.json is of format 2, and this version reads format 1")
    (run / "report" / "report.json").write_text("[]")
    refused("report.json is of format None")


@pytest.mark.parametrize(
    ("repository", "message"),
    [
        ("run", "'run' is no name of a repository: give it as user/name"),
        ("me/a/b", "'me/a/b' is no name of a repository: give it as user/name"),
        ("me/..", "'me/..' is no name"),
        ("me/run", "cannot push to me/run while HF_HUB_OFFLINE is set"),
    ],
)
def test_a_repository_that_cannot_be_is_refused(runs, repository, message):
    with pytest.raises(CpiftError, match=re.escape(message)):
        push_run(runs / "propulsion", repository)


def test_a_hub_that_is_not_there_is_an_error_of_one_line(runs, hub, tmp_path):
    calls = {"gone": ("hf_loopback", str(runs / "propulsion"), "me/gone", {})}
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = start(PUSH, hub.environment(tmp_path / "home") | nowhere, calls, tmp_path)
    message = json.loads(done.stdout.splitlines()[-1])["gone"]
    assert message.startswith("refused: the Hub did not take me/gone, ")
    assert "check the name and the connection" in message
    assert "\n" not in message
