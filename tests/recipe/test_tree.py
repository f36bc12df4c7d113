"""Strategy: give every key of every section a right value, which must come back in the tree, and many wrong ones,
each of which must be one line naming the key by its path; misspell it; set it by an override. `KEYS` holds the values,
and a key of the tree that is missing there is an error. Then all ways in which two keys contradict each other, and
whatever plain values there are: they make a recipe that reads back equal, or one line."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_cpift import CpiftError
from peft_cpift.recipe.reading import parse_recipe, read_recipe, sections
from peft_cpift.recipe.tree import SECTIONS

NAN, INFINITE = float("nan"), float("inf")
NOT_COUNTS = (0, -1, 1.5, "many", None, True, [1])
NOT_SHARES = (0, -0.1, 1.1, NAN, "half", None, True)
NOT_TEXTS = (3, True, ["x"], {"x": 1})
NOT_SWITCHES = (2, "perhaps", None, [])
NOT_MAPPINGS = (3, "x", [1], {1: 2})


@dataclass(frozen=True)
class Key:
    """What a key takes, and what it does not."""

    right: Any
    wrong: tuple
    beside: dict[str, Any] = field(default_factory=dict)
    """What the right value needs elsewhere in the recipe, by paths."""


def optional(wrong: tuple) -> tuple:
    return tuple(value for value in wrong if value is not None)


TASK, HUB = "tasks.<task>", "tasks.<task>.hub"
OWN_DATA = {"data": None, "tasks.b.hub.name": "y"}
KEYS = {
    "model": Key("other/model", (*NOT_TEXTS, None)),
    "output": Key("elsewhere", (3, None, ["x"])),
    "revision": Key("v1", NOT_TEXTS),
    "dtype": Key("bfloat16", ("int8", None, 16)),
    "trust_remote_code": Key(True, NOT_SWITCHES),
    "data": Key("rows", (3, ["x"])),
    "prompt": Key("Q: {{ prompt }}\n", (*NOT_TEXTS, None, "", "no place", "{{ prompt", "{{ prompt }}{{ other }}")),
    "chat_template": Key("model", NOT_TEXTS),
    "seed": Key(7, (-1, 1.5, 2**32, "x", None, True)),
    "tuner": Key("full", ("lora", 3, None, [1], {1: 2})),
    "training": Key({"learning_rate": 1e-3}, NOT_MAPPINGS),
    f"{TASK}.prompt": Key("{{ q }}", (*NOT_TEXTS, "", "{{ q", "{% include 'x' %}", "{{ q | nonsense }}")),
    f"{TASK}.completion": Key("{{ a }}", (*NOT_TEXTS, "", "{% if %}")),
    f"{TASK}.messages": Key("turns", NOT_TEXTS, {"chat_template": "model"}),
    f"{TASK}.text": Key("{{ text }}", (*NOT_TEXTS, "", "{{")),
    f"{TASK}.train_samples": Key(10, optional(NOT_COUNTS)),
    f"{TASK}.test_samples": Key(1, optional(NOT_COUNTS)),
    f"{TASK}.weight": Key(0.5, (0, -1, NAN, INFINITE, "much", None, True)),
    f"{TASK}.metric": Key("exact_match", ("accuracy", None, 3)),
    f"{TASK}.answer": Key("=(.*)", NOT_TEXTS, {f"{TASK}.metric": "exact_match"}),
    f"{TASK}.choices": Key(["x", "y"], ("x", [1], [True], {"x": 1}), {f"{TASK}.metric": "choice"}),
    f"{TASK}.language": Key("python", NOT_TEXTS, {f"{TASK}.metric": "codebleu"}),
    f"{HUB}.name": Key("user/rows", (*NOT_TEXTS, None)),
    f"{HUB}.subset": Key("main", NOT_TEXTS, {f"{HUB}.name": "x"}),
    f"{HUB}.revision": Key("v1", NOT_TEXTS, {f"{HUB}.name": "x"}),
    f"{HUB}.train": Key("train[:9]", (*NOT_TEXTS, None), {f"{HUB}.name": "x"}),
    f"{HUB}.test": Key("dev", (*NOT_TEXTS, None), {f"{HUB}.name": "x"}),
    f"{TASK}.files.train": Key("a.jsonl", (3, None), {**OWN_DATA, f"{TASK}.files.test": "x"}),
    f"{TASK}.files.test": Key("b.csv", (3, None), {**OWN_DATA, f"{TASK}.files.train": "x"}),
    "probe.training": Key({"max_steps": 3}, NOT_MAPPINGS),
    "core.percent": Key(0.5, (0, -1, 100.5, NAN, "x", None, True)),
    "core.importance": Key("second_moment", ("fisher", None, 3)),
    "core.scope": Key("tensor", ("layer", None, 3)),
    "core.exclude": Key(["*embed*"], ("*embed*", [3], None)),
    "grouping.threshold": Key(0, (-0.1, 1.1, NAN, "x", None, True)),
    "grouping.order": Key([["b"], ["a"]], ("sorted", None, 3, ["a", "b"], [["a"], [3]])),
    "grouping.helps": Key([["a", "b"]], ("guessed", 3, ["ab"], [["a"]]), {"grouping.order": "dependency"}),
    "fusion.start": Key("pretrained", (*NOT_TEXTS, None)),
    "fusion.start_weight": Key(0, (-1, NAN, INFINITE, "x", None, True)),
    "fusion.conflict": Key("mean", ("first", None)),
    "fusion.space": Key("delta", ("logits", None)),
    "fusion.omega": Key(1, (-0.1, 1.1, NAN, "x", True)),
    "fusion.training": Key({"max_steps": 3}, NOT_MAPPINGS),
    "integration.schedule": Key("mixed", ("all", None)),
    "integration.calibration_fraction": Key(1, NOT_SHARES),
    "integration.dynamic_regions": Key(True, NOT_SWITCHES),
    "integration.training": Key({"max_steps": 3}, NOT_MAPPINGS),
    "baselines.multi_task": Key(False, NOT_SWITCHES),
    "baselines.random_stages": Key(2, optional(NOT_COUNTS)),
    "baselines.heuristic_stages": Key([["b", "a"]], ("a", ["a", "b"], [[1]])),
    "baselines.merge": Key(["ties", "linear"], ("ties", ["slerp"], None)),
    "baselines.density": Key(1, NOT_SHARES),
    "baselines.training": Key({"learning_rate": 0.1}, NOT_MAPPINGS),
    "evaluation.batch_size": Key(1, NOT_COUNTS),
    "evaluation.max_length": Key(2, (1, 2.5, "x", None, True)),
    "evaluation.max_new_tokens": Key(1, NOT_COUNTS),
    "evaluation.lm_eval.tasks": Key(["arc_easy"], ([], "arc_easy", [1], None)),
    "evaluation.lm_eval.limit": Key(5, optional(NOT_COUNTS), {"evaluation.lm_eval.tasks": ["x"]}),
    "evaluation.lm_eval.num_fewshot": Key(0, (-1, 0.5, "x", True), {"evaluation.lm_eval.tasks": ["x"]}),
    "evaluation.lm_eval.include_path": Key("own", (3, ["x"]), {"evaluation.lm_eval.tasks": ["x"]}),
    "report.picture": Key(False, NOT_SWITCHES),
    "push.repository": Key("me/it", (*NOT_TEXTS, None, "it", "me/it/b", "me/..", "me/a--b", "me/-a", "me/a\n")),
    "push.private": Key(True, NOT_SWITCHES, {"push.repository": "me/it"}),
    "push.base_model": Key("me/base", NOT_TEXTS, {"push.repository": "me/it"}),
}


def minimal() -> dict:
    return {"model": "m", "output": "o", "data": "d", "tasks": {"a": {}, "b": {}}}


def put(tree: dict, path: str, value: Any) -> dict:
    """A copy of a recipe's tree with one key more; `<task>` is task `a`."""
    tree = copy.deepcopy(tree)
    *sections, last = path.replace("<task>", "a").split(".")
    inner = tree
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[last] = value
    return tree


def with_key(path: str, value: Any) -> dict:
    """A recipe with a key, and what that needs beside it."""
    tree = minimal()
    for other, needed in KEYS[path].beside.items():
        tree = put(tree, other, needed)
    return put(tree, path, value)


def get(values: Any, path: str) -> Any:
    """A key's value in a parsed recipe."""
    for part in path.replace("<task>", "a").split("."):
        values = values[part] if isinstance(values, dict) else getattr(values, part)
    return values


def refused(tree: Any) -> str:
    with pytest.raises(CpiftError) as caught:
        parse_recipe(tree)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else json.loads(json.dumps(value))


def test_every_key_of_the_tree_is_here():
    paths = {f"{path}.{one.name}".lstrip(".") for path, section in sections() for one in dataclasses.fields(section)}
    inner = {path.removesuffix(".<task>") for path, _ in sections()}
    assert KEYS.keys() == paths - inner
    assert {path for path, _ in sections() if path and "." not in path} == {*SECTIONS, "push"}


@pytest.mark.parametrize("path", KEYS)
def test_a_right_value_comes_back(path):
    recipe = parse_recipe(with_key(path, KEYS[path].right))
    assert plain(get(recipe, path)) == KEYS[path].right
    assert parse_recipe(recipe.to_dict()) == recipe
    without = minimal()
    for other, needed in KEYS[path].beside.items():
        without = put(without, other, needed)
    try:
        default = get(parse_recipe(without), path)
    except (CpiftError, AttributeError):  # it is required, or its section is not there by itself
        return
    assert plain(default) != KEYS[path].right, "the right value should not be the default"


WRONG = [(path, value) for path, key in KEYS.items() for value in key.wrong]


@pytest.mark.parametrize(("path", "value"), WRONG, ids=[f"{path}={value!r:.20}" for path, value in WRONG])
def test_a_wrong_value_is_one_line_naming_the_key(path, value):
    message = refused(with_key(path, value))
    assert f"'{path.replace('<task>', 'a')}" in message
    *_, section, name = ["", *path.replace("<task>", "a").split(".")]
    assert section in message
    assert name in message


def misspelt(word: str) -> set[str]:
    places = range(len(word))
    return {
        *(word[:i] + word[i + 1 :] for i in places),
        *(word[:i] + word[i + 1 : i + 2] + word[i] + word[i + 2 :] for i in places),
        *(word[:i] + word[i] + word[i:] for i in places),
        word.upper(),
        word.replace("_", "-"),
    } - {word}


@pytest.mark.parametrize("path", KEYS)
def test_a_misspelt_key_is_told_the_nearest(path):
    *section, name = path.split(".")
    for wrong in misspelt(name):
        message = refused(put_misspelt(path, wrong))
        said = ".".join([*section, wrong]).replace("<task>", "a")
        assert f"unknown key '{said}': did you mean '{name}'?" in message


def put_misspelt(path: str, wrong: str) -> dict:
    section = path.rpartition(".")[0]
    tree = minimal()
    for other, needed in KEYS[path].beside.items():
        tree = put(tree, other, needed)
    return put(tree, f"{section}.{wrong}".lstrip("."), KEYS[path].right)


@pytest.mark.parametrize(("path", "section"), [(path, section) for path, section in sections() if path])
def test_a_misspelt_section_is_told_the_nearest(path, section):
    path = path.removesuffix(".<task>")
    parent, _, name = path.rpartition(".")
    for wrong in misspelt(name):
        message = refused(put(minimal(), f"{parent}.{wrong}".lstrip("."), {}))
        assert f"did you mean '{name}'?" in message, wrong


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("threshold", "grouping.threshold"),
        ("tasks.a.percent", "core.percent"),
        ("answer", "tasks.<task>.answer"),
        ("grouping.schedule", "integration.schedule"),
        ("core.repository", "push.repository"),
    ],
)
def test_a_key_in_the_wrong_section_is_told_the_right_one(path, known):
    assert f"unknown key '{path}': did you mean '{known}'?" in refused(put(minimal(), path, 1))


def test_a_key_like_no_other():
    assert refused({**minimal(), "zzzzzz": 1}) == "unknown key 'zzzzzz': remove it"


@pytest.mark.parametrize("path", KEYS)
def test_an_override_reaches_the_key(path, tmp_path):
    right = with_key(path, KEYS[path].right)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(put(right, path, KEYS[path].wrong[0])))
    override = f"{path.replace('<task>', 'a')}={json.dumps(KEYS[path].right)}"
    assert read_recipe(file, [override]) == parse_recipe(right)


@pytest.mark.parametrize("section", [*SECTIONS, "training", "push", "tasks.<task>", "data", "core.exclude"])
def test_what_has_nothing_in_it_is_as_if_it_were_not_there(section):
    tree = put(minimal(), section, None)
    if section in ("data", "core.exclude"):
        assert section.rpartition(".")[2] in refused(tree)  # but only sections, and what may be null
    else:
        assert parse_recipe(tree) == parse_recipe(minimal())


@pytest.mark.parametrize("section", ["probe", "fusion", "integration", "baselines"])
def test_training_fields_with_nothing_in_them(section):
    assert parse_recipe(put(minimal(), f"{section}.training", None)) == parse_recipe(minimal())


@pytest.mark.parametrize("section", [path.removesuffix(".<task>") for path, _ in sections() if path])
@pytest.mark.parametrize("value", [3, "x", [1], True])
def test_a_section_holds_keys(section, value):
    assert f"'{section.replace('<task>', 'a')}'" in refused(put(minimal(), section, value))


@pytest.mark.parametrize("key", ["model", "output", "tasks"])
def test_what_every_recipe_needs(key):
    tree = minimal()
    del tree[key]
    assert refused(tree) == f"missing key '{key}'"


@pytest.mark.parametrize(
    ("path", "beside"),
    [
        (f"{HUB}.name", {HUB: {"subset": "x"}}),
        (f"{TASK}.files.train", {f"{TASK}.files.test": "x"}),
        (f"{TASK}.files.test", {f"{TASK}.files.train": "x"}),
        ("evaluation.lm_eval.tasks", {"evaluation.lm_eval.limit": 3}),
        ("push.repository", {"push.private": True}),
    ],
)
def test_what_a_section_needs(path, beside):
    tree = minimal()
    for other, value in beside.items():
        tree = put(tree, other, value)
    assert refused(tree) == f"missing key '{path.replace('<task>', 'a')}'"


CHOICE = {"metric": "choice", "choices": ["x"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{HUB}.name": "x", f"{TASK}.files": {"train": "x", "test": "y"}}, "'tasks.a': 'hub' and 'files' are two"),
        ({f"{TASK}.prompt": "x", f"{TASK}.text": "y"}, "'tasks.a': 'prompt' and 'completion', 'messages', and 'text'"),
        ({f"{TASK}.completion": "x", f"{TASK}.messages": "y"}, "exclude each other: keep one form"),
        ({f"{TASK}.messages": "x", f"{TASK}.text": "y"}, "exclude each other: keep one form"),
        ({f"{TASK}.text": "x", f"{TASK}.metric": "exact_match"}, "'tasks.a': plain 'text' has no prompt to answer"),
        ({f"{TASK}.metric": "choice"}, "'tasks.a': metric 'choice' and 'choices' go together"),
        ({f"{TASK}.choices": ["x"]}, "'tasks.a': metric 'choice' and 'choices' go together"),
        ({f"{TASK}.metric": "codebleu"}, "'tasks.a': metric 'codebleu' and 'language' go together"),
        ({f"{TASK}.language": "python"}, "'tasks.a': metric 'codebleu' and 'language' go together"),
        ({TASK: {**CHOICE, "language": "c"}}, "'tasks.a': metric 'codebleu' and 'language' go together"),
        ({f"{TASK}.answer": "(x)"}, "'tasks.a': 'answer' is for metric 'exact_match' only"),
        ({TASK: {**CHOICE, "answer": "(x)"}}, "'tasks.a': 'answer' is for metric 'exact_match' only"),
        ({TASK: {"metric": "exact_match", "answer": "x"}}, "'tasks.a': 'answer' has no group"),
        ({TASK: {"metric": "exact_match", "answer": "("}}, "'answer' is not a regular expression: missing"),
        ({TASK: {"metric": "exact_match", "answer": "(a{99999999999})"}}, "'answer' is not a regular expression"),
        ({TASK: {"metric": "exact_match", "answer": "(" * 5000 + ")" * 5000}}, "'answer' is not a regular expression"),
        ({"prompt": "{{ prompt }}" + "{% for x in y %}" * 30 + "{% endfor %}" * 30}, "'prompt': is too deeply nested"),
        ({"prompt": "{{" + "(" * 3000 + "prompt" + ")" * 3000 + "}}"}, "'prompt': is too deeply nested"),
        ({"prompt": "{{ prompt }}{% include 'x' %}"}, "'prompt': takes in another template"),
        ({f"{TASK}.text": "{% extends x %}"}, "'tasks.a.text': takes in another template"),
        ({"grouping.order": "dependency"}, "'grouping': order 'dependency' and 'helps' go together"),
        ({"grouping.helps": "measured"}, "'grouping': order 'dependency' and 'helps' go together"),
        ({"grouping": {"order": "dependency", "helps": [["a", "c"]]}}, "grouping.helps names 'c', but the tasks are"),
        ({"grouping.order": [["a"]]}, "grouping.order lists ['a'], but the tasks are ['a', 'b']"),
        ({"grouping.order": []}, "grouping.order lists [], but"),
        ({"grouping.order": [["a", "b"], ["a"]]}, "grouping.order lists ['a', 'a', 'b'], but"),
        ({"grouping.order": [["a"], [], ["b"]]}, "grouping.order has an empty stage"),
        ({"baselines.heuristic_stages": [["a", "c"]]}, "baselines.heuristic_stages lists ['a', 'c'], but the tasks"),
        ({"baselines.heuristic_stages": [["a", "b"], []]}, "baselines.heuristic_stages has an empty stage"),
        ({"baselines.random_stages": 3}, "baselines.random_stages is more than the 2 tasks"),
        ({"baselines.merge": ["ties", "linear", "ties"]}, "'baselines': 'merge' lists ties twice"),
        ({"integration": {"dynamic_regions": True, "schedule": "mixed"}}, "'integration': 'dynamic_regions' are for"),
        ({"integration": {"dynamic_regions": True, "schedule": "none"}}, "they need schedule 'staged'"),
        ({"fusion.omega": 0.5, f"{TASK}.weight": 2}, "fusion.omega fixes what tasks.a.weight would decide"),
        ({"fusion": {"omega": 0.5, "start_weight": 0}}, "fusion.omega fixes what fusion.start_weight would decide"),
        ({"tasks": {"a": {}}}, "'tasks': there is nothing to fuse with fewer than two tasks"),
        ({"tasks": {}}, "'tasks': there is nothing to fuse"),
        ({"tasks": {"../a": {}, "b": {}}}, "'tasks.../a': is no name of a task, after which files are named: up to"),
        ({"tasks": {"b c/d": {}, "b": {}}}, "up to 100 letters, digits, '.', '_' and '-', the first one a letter"),
        ({"tasks": {1: {}, "b": {}}}, "'tasks.1': a key is a text: quote it, as in '1':"),
        ({"tasks": {"average": {}, "b": {}}}, "have a column 'average' over all tasks: give the task 'average'"),
        ({"tasks": {"a": {}, "A": {}}}, "'tasks': 'a' and 'A' would share their files on some disks: rename one"),
        ({f"{TASK}.files": {"train": "x", "test": "y"}}, "'data' is read in place of 'tasks.a.files': give one of"),
        ({"data": None}, "task 'a' has no data: give tasks.a.hub or tasks.a.files"),
        ({"core": {1: 2}}, "'core.1': Keys should be strings"),
        ({"training": {"a": [{None: 1}]}}, "'training.a.0.None': a key is a text: quote it"),
        ({"tuner": {"rank_pattern": {1: 2}}}, "'tuner.rank_pattern.1': a key is a text: quote it, as in '1':"),
    ],
)
def test_keys_that_contradict_each_other(change, message):
    tree = minimal()
    for path, value in change.items():
        tree = put(tree, path, value)
    assert message in refused(tree)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (f"{TASK}.metric", "exactmatch", "or 'codebleu', got 'exactmatch': did you mean 'exact_match'?"),
        (f"{TASK}.metric", "CHOICE", "got 'CHOICE': did you mean 'choice'?"),
        ("grouping.order", "dependncy", "got 'dependncy': did you mean 'dependency'?"),
        ("baselines.merge", ["dare-ties"], "'baselines.merge.0': Input should be 'linear'"),
        ("baselines.merge", ["dare-ties"], "got 'dare-ties': did you mean 'dare_ties'?"),
        ("core.scope", "zzz", "'core.scope': Input should be 'global' or 'tensor', got 'zzz'"),
        ("grouping.order", 3, "'grouping.order': Input should be a valid list, got 3"),
        ("grouping.order", ["a"], "'grouping.order.0': Input should be a valid list, got 'a'"),
        ("tuner", "lora", "'tuner': is full, or a PEFT configuration {peft_type: LORA, ...}, got 'lora'"),
        ("core", 2, "'core': is a section with the keys percent, importance, scope, exclude, got 2"),
        ("push", "foo/bar", "'push': is a section with the keys repository, private, base_model, got 'foo/bar'"),
        (f"{TASK}.hub", "x", "'tasks.a.hub': is a section with the keys name, subset, revision, train, test, got 'x'"),
        ("push.repository", "foo", "'push.repository': is not of the form user/name, got 'foo'"),
    ],
)
def test_a_wrong_value_is_said_once_with_the_right_ones(path, value, said):
    message = refused(put(minimal(), path, value))
    assert message.endswith(said) or message.startswith(said)
    assert "; " not in message


def test_a_folder_of_data_stands_in_for_the_hub():
    assert parse_recipe(put(minimal(), f"{HUB}.name", "x")).data == Path("d")


def test_messages_need_a_chat_template_unless_rows_are_given_as_prompts():
    tree = minimal() | {"tasks": {"a": {"messages": "m", "hub": {"name": "x"}}, "b": {"hub": {"name": "y"}}}}
    parse_recipe(tree)
    assert "task 'a' has messages, which need a chat_template" in refused(tree | {"data": None})
    parse_recipe(tree | {"data": None, "chat_template": "model"})


def test_several_mistakes_are_all_named():
    wrong = {"core": {"percent": 0, "scop": "tensor"}, "seeed": 1, "tasks": {"a": {"metric": "x"}, "b": 3}}
    message = refused({"output": "o", "data": "d", **wrong})
    for part in (
        "missing key 'model'",
        "'core.percent'",
        "unknown key 'core.scop': did you mean 'scope'?",
        "unknown key 'seeed': did you mean 'seed'?",
        "'tasks.a.metric'",
        "'tasks.b'",
    ):
        assert part in message


def test_defaults_are_the_papers():
    recipe = parse_recipe(minimal())
    assert recipe.core.percent == 1.0
    assert recipe.core.importance == "update"
    assert recipe.grouping.threshold == 0.1
    assert recipe.grouping.order == "random"
    assert recipe.fusion.start == "multi_stage"
    assert recipe.fusion.space == "weights"
    assert recipe.integration.schedule == "staged"
    assert recipe.tuner == {"peft_type": "PROPULSION"}


@pytest.mark.parametrize("tree", [None, 3, "x", [], [{}]])
def test_what_is_no_mapping(tree):
    assert "Input should be a dictionary" in refused(tree)


@pytest.mark.parametrize("key", ["a\nb", "[key]", "list[1]", "dict[x", "\ud800", "", "a/b", "x" * 1000, "\u2028"])
def test_odd_names_of_keys_are_one_line(key):
    for tree in ({**minimal(), key: 1}, put(minimal(), "core", {key: 1}), put(minimal(), "tasks", {key: {}, "b": {}})):
        assert refused(tree)


NAMES = sorted({name for path in KEYS for name in path.split(".") if name != "<task>"} | {"a", "b", "tasks"})
TEXTS = st.sampled_from([*NAMES, "", "{{ prompt }}", "{{", "(", "(x)", "measured", "1e3", "me/x"]) | st.text(
    max_size=4
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS
PLAIN = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(TEXTS, inner, max_size=4)
        | st.dictionaries(SCALARS, inner, max_size=2)
    ),
    max_leaves=12,
)


def one_line_or_equal(tree: Any) -> None:
    try:
        recipe = parse_recipe(tree)
    except CpiftError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
    else:
        assert parse_recipe(recipe.to_dict()) == recipe


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(PLAIN)
def test_whatever_plain_values_there_are(tree):
    one_line_or_equal(tree)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.sampled_from(sorted(KEYS)).flatmap(
            lambda path: st.tuples(
                st.just(path),
                st.sampled_from([KEYS[path].right] * 4 + list(KEYS[path].wrong)) | PLAIN,
                st.booleans(),
            )
        ),
        max_size=5,
    )
)
def test_whatever_is_put_into_a_recipe(changes):
    tree = minimal()
    for path, value, with_beside in changes:
        for other, needed in {**(KEYS[path].beside if with_beside else {}), path: value}.items():
            try:
                tree = put(tree, other, needed)
            except (AttributeError, TypeError):  # an earlier change made its section something else
                continue
    one_line_or_equal(tree)
