"""What the configuration accepts, what it refuses and in which words, and that copies of it are equal.

Every field is given every kind of wrong value: one of another type, one out of range, one nested. Each must be refused
as soon as the configuration is built, in one line that names the field. Files are written by the configuration itself
and then changed by hand, as another package or a user would.
"""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig, PeftType

from peft_cpift.propulsion import PropulsionConfig


def test_defaults():
    config = PropulsionConfig()
    assert config.peft_type is PeftType.PROPULSION
    assert (config.degree, config.target_modules, config.init_weights) == (15, None, True)


def test_lists_of_names_become_sets():
    config = PropulsionConfig(target_modules=["a", "b", "a"], exclude_modules=["c"])
    assert (config.target_modules, config.exclude_modules) == ({"a", "b"}, {"c"})


@pytest.mark.parametrize("degree", [0, -1, 15.0, True, "15", None])
def test_degree_must_be_a_positive_integer(degree):
    with pytest.raises(ValueError, match=r"^degree=.* is not an integer >= 1; set [^\n]*$"):
        PropulsionConfig(degree=degree)


@pytest.mark.parametrize("target_modules", ["all-linear", ".*q_proj"])
def test_block_indices_need_names(target_modules):
    with pytest.raises(ValueError, match="layers_to_transform has no effect"):
        PropulsionConfig(target_modules=target_modules, layers_to_transform=0)


@pytest.mark.parametrize("target_modules", [None, "attention", "blocks", "all", ["q_proj"]])
def test_block_indices_go_with_names_and_presets(target_modules):
    assert PropulsionConfig(target_modules=target_modules, layers_to_transform=0).layers_to_transform == 0


def test_pattern_needs_indices():
    with pytest.raises(ValueError, match="layers_pattern has no effect"):
        PropulsionConfig(layers_pattern="layers")


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_equal(duplicate):
    config = PropulsionConfig(target_modules=["q_proj"], degree=25, task_type="CAUSAL_LM")
    twin = duplicate(config)
    assert twin == config
    assert twin.peft_type is PeftType.PROPULSION


@pytest.mark.parametrize("reader", [PeftConfig, PropulsionConfig])
def test_saved_and_read_back(tmp_path, reader):
    config = PropulsionConfig(target_modules=["q_proj", "v_proj"], degree=25, layers_to_transform=[0, 2])
    config.save_pretrained(tmp_path)
    read = reader.from_pretrained(tmp_path)
    assert isinstance(read, PropulsionConfig)
    assert read == config


def test_every_choice_is_there_by_default():
    config = PropulsionConfig()
    assert (config.num_vectors, config.pooling, config.bias, config.degree_pattern) == (1, "mean", "none", {})
    for name in ("exclude_modules", "target_parameters", "fan_in_fan_out", "modules_to_save", "layers_to_transform"):
        assert getattr(config, name) is None
    assert config.written_by == "peft_cpift"


WRONG: dict[str, list[Any]] = {
    "target_modules": [5, ["a", 1], [""], {"a": 1}, "(", ["a", None]],
    "exclude_modules": [5, ["a", 1], [""], {"a": 1}, "["],
    "target_parameters": ["experts.up", 5, [1], [""], {"a": 1}],
    "modules_to_save": ["lm_head", 5, [1], [""], {"a": 1}],
    "degree_pattern": [None, ["a"], "a", {"a": 0}, {"a": 1.5}, {"a": True}, {"a": "2"}, {"(": 2}, {1: 2}],
    "num_vectors": [0, -1, 1.0, True, "2", None, [2]],
    "pooling": ["median", "", None, 1, ["mean"], True],
    "bias": ["lora_only", "", None, True, 1],
    "fan_in_fan_out": ["yes", "None", 2, []],
    "init_weights": ["gaussian", 1, 0, None, "True"],
    "inference_mode": [None, 1, "False"],
    "layers_to_transform": [-1, [-1], 1.5, [1.0], "0", [], True, (0, 1), [True], [0, None]],
    "trainable_token_indices": ["abc", 5, [-1], [1.5], [True], {"a": 5}, {"a": [-1]}, {1: [2]}],
    "layers_pattern": [5, [5], {"a": 1}],
    "task_type": ["NOPE", 5],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in WRONG.items() for value in values],
)
def test_a_wrong_value_is_refused_in_one_line_that_names_the_field(name, value):
    more = {"target_modules": ["a"]} if name.startswith("layers") else {}
    more |= {"layers_to_transform": [0]} if name == "layers_pattern" else {}
    with pytest.raises(ValueError, match=r"(?i)" + name.replace("_", ".")) as error:
        PropulsionConfig(**{name: value} | more)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) > len(name) + 20  # says more than the name


GOOD: dict[str, list[Any]] = {
    "target_modules": ["a", ["a"], ("a", "b"), {"a"}, "attention", "all", "all-linear", r".*\.(q|k)_proj"],
    "exclude_modules": ["a", ["a"], {"a"}, r".*\.0\..*"],
    "target_parameters": [["mlp.experts.down_proj"], ("a",)],
    "modules_to_save": [["lm_head"], {"a"}],
    "degree_pattern": [{"q_proj": 3, r".*\.1\..*": 1}],
    "num_vectors": [1, 2, 40],
    "pooling": ["mean", "max", "min", "l2"],
    "bias": ["none", "all", "propulsion_only"],
    "fan_in_fan_out": [None, True, False],
    "init_weights": [True, False],
    "layers_to_transform": [0, [0, 5]],
    "trainable_token_indices": [[0, 3], {"embed_tokens": [1]}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_a_good_value_survives_a_file(name, value, tmp_path):
    config = PropulsionConfig(**{name: value})
    listed = name in ("target_modules", "exclude_modules") and not isinstance(value, str)
    assert getattr(config, name) == (set(value) if listed else value)
    config.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    kept = getattr(read, name)
    assert (set(kept) if isinstance(value, (set, tuple)) else kept) == (
        set(value) if isinstance(value, (set, tuple)) else getattr(config, name)
    )


def test_indices_of_blocks_are_refused_where_nothing_would_count_them():
    with pytest.raises(ValueError, match="target_modules='all-linear'; give target_modules as a list of names"):
        PropulsionConfig(target_modules="all-linear", layers_to_transform=[1])


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    PropulsionConfig(target_modules=["q_proj"], degree=25).save_pretrained(tmp_path)
    return tmp_path / "adapter_config.json"


def change(path: Path, remove: tuple[str, ...] = (), **values: Any) -> None:
    content = json.loads(path.read_text())
    for name in remove:
        content.pop(name)
    path.write_text(json.dumps(content | values))


def test_a_file_says_who_wrote_it(saved):
    content = json.loads(saved.read_text())
    assert (content["peft_type"], content["written_by"]) == ("PROPULSION", "peft_cpift")
    assert content["degree"] == 25
    assert content["peft_version"]


@pytest.mark.parametrize("reader", [PeftConfig, PropulsionConfig])
def test_a_file_without_the_mark_is_another_packages(saved, reader):
    change(saved, remove=("written_by",))
    with pytest.raises(ValueError, match=r"written by another package, not by peft_cpift.*load it with the package"):
        reader.from_pretrained(saved.parent)


@pytest.mark.parametrize("reader", [PeftConfig, PropulsionConfig])
@pytest.mark.parametrize("writer", ["peft", "", None, 3])
def test_a_file_with_another_mark_is_refused(saved, reader, writer):
    change(saved, written_by=writer)
    with pytest.raises(ValueError, match="not by peft_cpift") as error:
        reader.from_pretrained(saved.parent)
    assert "\n" not in str(error.value)
    assert writer is None or not writer or str(writer) in str(error.value)


@pytest.mark.parametrize("name", ["degree", "num_vectors", "pooling", "bias", "target_modules"])
def test_a_wrong_value_in_a_file_is_refused(saved, name):
    change(saved, **{name: 0.5})
    with pytest.raises(ValueError, match=f"^{name}=0.5"):
        PeftConfig.from_pretrained(saved.parent)


def test_an_unknown_key_of_a_file_is_dropped_with_a_warning(saved):
    change(saved, temperature=3)
    with pytest.warns(UserWarning, match="temperature"):
        config = PeftConfig.from_pretrained(saved.parent)
    assert config.degree == 25
    assert not hasattr(config, "temperature")


def test_an_older_file_without_the_newer_fields_has_their_defaults(saved):
    change(saved, remove=("num_vectors", "pooling", "bias", "degree_pattern"))
    config = PeftConfig.from_pretrained(saved.parent)
    assert (config.num_vectors, config.pooling, config.bias, config.degree_pattern) == (1, "mean", "none", {})


def test_two_configurations_do_not_share_a_pattern():
    one, other = PropulsionConfig(), PropulsionConfig()
    one.degree_pattern["q_proj"] = 2
    assert other.degree_pattern == {}
