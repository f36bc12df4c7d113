"""Strategy: write files that hold YAML's traps and look at what comes out: the values that YAML 1.2 gives, or one line
with the file and the place. Overrides likewise."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from peft_cpift import CpiftError
from peft_cpift.recipe.reading import parse_recipe, read_recipe, write_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
MINIMAL = "model: m\noutput: o\ndata: d\ntasks: {a: {}, b: {}}\n"


def minimal() -> dict:
    return {"model": "m", "output": "o", "data": "d", "tasks": {"a": {}, "b": {}}}


@pytest.fixture
def read(tmp_path):
    """Read the minimal recipe with more text at its end, and overrides."""

    def read(more: str | bytes = "", *overrides: str):
        file = tmp_path / "recipe.yaml"
        file.write_bytes(MINIMAL.encode() + (more if isinstance(more, bytes) else more.encode()))
        return read_recipe(file, overrides)

    return read


@pytest.fixture
def refused(read):
    """The one line with which that fails."""

    def refused(more: str | bytes = "", *overrides: str) -> str:
        with pytest.raises(CpiftError) as caught:
            read(more, *overrides)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    return refused


def test_a_file_reads_as_its_values(read):
    assert read("core: {percent: 0.5}\nseed: 3\n") == parse_recipe(minimal() | {"core": {"percent": 0.5}, "seed": 3})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("5e3", 5e3),
        ("1E+2", 1e2),
        ("-1.5e-3", -1.5e-3),
        (".5", 0.5),
        ("1.", 1.0),
        ("12", 12),
        ("-3", -3),
        ("1_000", 1000),
        ("0", 0),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        # These are something else than texts in YAML 1.1.
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("Off", "Off"),
        ("y", "y"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("0x1F", "0x1F"),
        ("2024-01-01", "2024-01-01"),
        ("2024-13-45", "2024-13-45"),
        ("=", "="),
        # And these are texts anyway.
        ("e3", "e3"),
        ("1e", "1e"),
        (".", "."),
        ("1.2.3", "1.2.3"),
        ("'1e-3'", "1e-3"),
        ('"true"', "true"),
        ("trueish", "trueish"),
    ],
)
def test_plain_words_are_what_they_look_like(read, text, value):
    found = read(f"training: {{x: {text}}}\n").training["x"]
    assert found == value
    assert type(found) is type(value)
    assert read("", f"training.x={text}").training == {"x": value}
    assert read(f"training:\n  x: {text}\n").training == {"x": value}


def test_not_a_number(read):
    assert math.isnan(read("training: {x: .nan}\n").training["x"])


def test_choices_of_yes_and_no(read):
    assert read("", "tasks.a={metric: choice, choices: [yes, no]}").tasks["a"].choices == ["yes", "no"]


def test_anchors_and_merges(read):
    recipe = read(
        "training: &all {learning_rate: 1e-3, max_steps: 5}\n"
        "probe: {training: *all}\n"
        "fusion: {training: {<<: *all, max_steps: 7}}\n"
        "integration: {training: {<<: [*all, {x: 1}]}}\n"
    )
    assert recipe.probe.training == {"learning_rate": 1e-3, "max_steps": 5}
    assert recipe.fusion.training == {"learning_rate": 1e-3, "max_steps": 7}
    assert recipe.integration.training == {"learning_rate": 1e-3, "max_steps": 5, "x": 1}


def test_an_override_changes_one_of_the_places_of_an_anchor(read):
    text = "training: &all {max_steps: 5}\nprobe: {training: *all}\n"
    recipe = read(text, "probe.training.max_steps=7")
    assert recipe.probe.training == {"max_steps": 7}
    assert recipe.training == {"max_steps": 5}


def test_merges_are_no_duplicates_in_whatever_order_they_are_read(read):
    text = "training: {x: {y: &a {<<: &c {k: 1}, k: 2}}}\nprobe: {training: {<<: *a}}\n"
    assert read(text).probe.training == {"k": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "key 'seed' is given twice, line 6"),
        ("core: {percent: 1, percent: 2}\n", "key 'percent' is given twice, line 5"),
        ("'seed': 1\nseed: 2\n", "key 'seed' is given twice"),
        ("core: [\n", "is not YAML"),
        ("core: }\n", "is not YAML"),
        ("\tseed: 1\n", r"found character '\\t' that cannot start any token, line 5"),
        ("seed:\t1\n", r"found character '\\t' that cannot start any token, line 5"),
        ("core:\n  percent: 1\n scope: tensor\n", "line 7"),
        ("seed: *none\n", "found undefined alias 'none', line 5"),
        ("training: &a {x: *a}\n", "recursive node"),
        ("training: &a [*a]\n", "recursive node"),
        ("training: {<<: 3}\n", "expected a mapping or list of mappings"),
        ("? [a]\n: 1\n", "unhashable key, line 5"),
        ("? {a: 1}\n: 1\n", "unhashable key, line 5"),
        ("---\nmodel: x\n", "found another document, line 5"),
        ("seed: " + "9" * 5000 + "\n", "is not YAML: Exceeds the limit"),
        ("training: {x: " + "[" * 3000 + "]" * 3000 + "}\n", "recursion"),
        ("seed: !!python/object/apply:os.getcwd []\n", "'tag:yaml.org,2002:python/object/apply:os.getcwd' is a tag"),
        ("seed: !!bool maybe\n", "'tag:yaml.org,2002:bool' is a tag: remove it, line 5"),
        ("revision: !!timestamp x\n", "is a tag"),
        ("training: !!set {a}\n", "is a tag"),
        ("model: !!binary aGk=\n", "is a tag"),
        ("training: {x: ! y}\n", "'!' is a tag"),
        ("training: !own [1]\n", "'!own' is a tag"),
        ("model: \x07\n", "unacceptable character"),
        ("1: x\n", "'1': Keys should be strings"),
        ("true: y\n", "Keys should be strings"),
        ("null: y\n", "'None': Keys should be strings"),
        ("2.5: y\n", "'2.5': Keys should be strings"),
        ("on: y\n", "unknown key 'on'"),
        ("core: {1: 2}\n", "'core.1': Keys should be strings"),
        ("? 'a\n\n  b'\n: 1\n", "unknown key 'a b'"),
        ("seed: true\n", "'seed': Input should be a valid integer, got True"),
        ('seed: "3"\n', "'seed': Input should be a valid integer, got '3'"),
        ("trust_remote_code: yes\n", "'trust_remote_code': Input should be a valid boolean, got 'yes'"),
        ('core: {percent: "10"}\n', "'core.percent': Input should be a valid number, got '10'"),
        ("core: {percent: true}\n", "'core.percent': Input should be a valid number, got True"),
    ],
)
def test_traps(refused, text, message):
    assert re.search(message, refused(text))


@pytest.mark.parametrize("text", ["- a\n", "", "# nothing\n", "3\n", "~\n", "---\n", "text\n"])
def test_files_that_hold_no_mapping(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(CpiftError, match=r"recipe .*r\.yaml is (empty|not a mapping of keys to values): write one by"):
        read_recipe(tmp_path / "r.yaml")


def test_an_empty_file_is_called_so(tmp_path):
    (tmp_path / "r.yaml").touch()
    with pytest.raises(CpiftError, match=r"r\.yaml is empty: write one by cpift init; one in a run's folder is"):
        read_recipe(tmp_path / "r.yaml")


def test_files_that_cannot_be_read(tmp_path, refused):
    with pytest.raises(CpiftError, match=r"cannot read recipe .*none\.yaml: .*No such file"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(CpiftError, match=r"cannot read recipe .*: .*Is a directory"):
        read_recipe(tmp_path)
    assert "cannot read recipe" in refused("model: café\n".encode("latin-1"))
    (tmp_path / "wide.yaml").write_bytes(MINIMAL.encode("utf-16"))
    with pytest.raises(CpiftError, match=r"cannot read recipe .*wide\.yaml: 'utf-8' codec"):
        read_recipe(tmp_path / "wide.yaml")


@pytest.mark.parametrize("line", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_marks_and_ends_of_lines(tmp_path, line, mark):
    (tmp_path / "r.yaml").write_bytes(
        mark + (MINIMAL + "prompt: |\n  {{ prompt }}\n  é").encode().replace(b"\n", line)
    )
    assert read_recipe(tmp_path / "r.yaml") == parse_recipe(minimal() | {"prompt": "{{ prompt }}\né"})


def test_a_large_file_is_read_in_no_time(tmp_path):
    tasks = {f"t{i}": {"weight": 2.0} for i in range(2000)}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(minimal() | {"tasks": tasks}))
    assert len(read_recipe(tmp_path / "r.yaml").tasks) == 2000


def test_what_is_written_reads_back_equal(tmp_path):
    recipe = parse_recipe(
        minimal()
        | {"core": {"percent": 1e-5}, "tuner": "full", "grouping": {"order": [["b", "a"]]}, "revision": "2024-01-01"}
        | {"training": {"learning_rate": 1e-7, "bf16": True, "x": [None, "yes", "010", "1:30", "true", ""]}}
    )
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    assert read_recipe(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "tree"),
    [
        ("core.percent=0.5", {"core": {"percent": 0.5}}),
        ("core={percent: 0.5}", {"core": {"percent": 0.5}}),
        ("core=", {}),
        ("tuner=full", {"tuner": "full"}),
        ("training.learning_rate=1e-3", {"training": {"learning_rate": 1e-3}}),
        ("prompt=Q {{ prompt }}", {"prompt": "Q {{ prompt }}"}),
        ("model=a=b", {"model": "a=b"}),
        ("model='1'", {"model": "1"}),
        ("evaluation.lm_eval.tasks=[x]", {"evaluation": {"lm_eval": {"tasks": ["x"]}}}),
        ("push.repository=me/x", {"push": {"repository": "me/x"}}),
        ("grouping.order=[[b], [a]]", {"grouping": {"order": [["b"], ["a"]]}}),
    ],
)
def test_overrides(read, override, tree):
    assert read("", override) == parse_recipe(minimal() | tree)


def test_later_overrides_win_and_sections_with_nothing_in_them_can_be_filled(read):
    assert read("core:\n", "core.percent=2", "core.scope=tensor", "core.percent=3") == parse_recipe(
        minimal() | {"core": {"percent": 3, "scope": "tensor"}}
    )


def test_overrides_reach_tasks_with_dots_in_their_names(tmp_path):
    tasks = {"logiqa-2.0": {}, "logiqa-2": {"weight": 3.0}, "a.b": None}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(minimal() | {"tasks": tasks}))
    found = read_recipe(
        tmp_path / "r.yaml",
        ["tasks.logiqa-2.0.weight=2", "tasks.logiqa-2.metric=loss", "tasks.a.b={weight: 4}", "tasks.a.b.weight=5"],
    ).tasks
    assert {name: task.weight for name, task in found.items()} == {"logiqa-2.0": 2, "logiqa-2": 3, "a.b": 5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("core.percent", "'core.percent' is not of the form key=value"),
        ("=1", "'=1' is not of the form key=value"),
        ("a\nb", "'a b' is not of the form key=value"),
        ("", "'' is not of the form key=value"),
        ("model.name=x", "'model.name=x': 'model' has no keys below it"),
        ("tasks.a.weight.x=1", "'weight' has no keys below it"),
        ("core.percent=[", "the value of 'core.percent' is not YAML"),
        ("core.percent=!!bool maybe", "is a tag"),
        ("prompt={{ promt }}", """; put a text in quotes of its own: 'prompt="{{ promt }}"'"""),
        ("core.exclude=*embed*", """; put a text in quotes of its own: 'core.exclude="*embed*"'"""),
        ("core.percent=" + "[" * 3000, "the value of 'core.percent' is not YAML"),
        ("core.percentage=1", "unknown key 'core.percentage': did you mean 'percent'?"),
        ("seed = 3", "unknown key 'seed ': did you mean 'seed'?"),
        ("core..percent=1", "unknown key 'core.'"),
        (".core=1", "unknown key ''"),
        ("core.percent=", "'core.percent': Input should be a valid number, got None"),
        ("core=3", "'core': is a section with the keys percent, importance, scope, exclude, got 3"),
        ("tasks.a.b.hub=x", "unknown key 'tasks.a.b'"),
    ],
)
def test_wrong_overrides(refused, override, message):
    assert message in refused("", "tasks.a.weight=1", override)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.text(alphabet="ab:-[]{}&*!?|>'\"%@#,.\t\n\r 0159exyn~=<\x85\u2028\ufeff", max_size=30) | st.text(max_size=20)
)
def test_whatever_text_there_is(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(MINIMAL + text, encoding="utf-8", errors="surrogatepass")
    for overrides in ([], [text], [f"training.x={text}"]):
        try:
            recipe = read_recipe(file, overrides)
        except CpiftError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017
        else:
            assert parse_recipe(recipe.to_dict()).model


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.from_regex(r"[-+]?[0-9_]{0,3}[.]?[0-9]{1,4}([eE][-+]?[0-9]{1,5})?", fullmatch=True) | st.text(max_size=12))
@example("\x85")
@example("a\u2028b")
def test_what_is_written_is_read_back(tmp_path_factory, text):
    fields = {"run_name": text, "learning_rate": 1e-5, "max_steps": 10**7}
    recipe = parse_recipe(minimal() | {"revision": text, "training": fields, "seed": 7})
    file = tmp_path_factory.getbasetemp() / "written.yaml"
    file.write_text(write_recipe(recipe), encoding="utf-8")
    assert read_recipe(file).to_dict() == recipe.to_dict()
    # Other readers, of YAML 1.1, see the same.
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["revision"] == text


def test_a_commit_that_looks_like_a_number_stays_a_text(tmp_path):
    recipe = parse_recipe(minimal() | {"revision": "12e4567"})
    (tmp_path / "recipe.yaml").write_text(write_recipe(recipe))
    assert read_recipe(tmp_path / "recipe.yaml").revision == "12e4567"


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_recipes_that_come_along_are_valid(file):
    assert len(read_recipe(file).tasks) >= 2
