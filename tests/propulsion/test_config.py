"""What the configuration accepts, what it refuses and in which words, and that copies of it are equal."""

from __future__ import annotations

import copy
import pickle

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


@pytest.mark.parametrize("target_modules", [None, "attention", ["q_proj"]])
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
