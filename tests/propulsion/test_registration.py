"""Every way PEFT looks a method up, seen from this process and from fresh ones.

What replaces classes runs in a subprocess, and what breaks an enum has one of its own, so that no other test sees it.
"""

from __future__ import annotations

import copy
import enum
import pickle
import subprocess
import sys

import pytest
from peft import PeftType, mapping

from peft_cpift.propulsion import PropulsionConfig, PropulsionModel, register_propulsion, registration


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)


def assert_registered() -> None:
    member = PeftType.PROPULSION
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["PROPULSION"] is PropulsionConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[member] is PropulsionModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING[member] == "propulsion_"
    assert member not in mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING


def test_the_member_is_like_any_other():
    member = PeftType.PROPULSION
    assert member is PeftType("PROPULSION") is PeftType["PROPULSION"]
    assert (member, member.name, member.value) == ("PROPULSION", "PROPULSION", "PROPULSION")
    assert isinstance(member, str)
    assert list(PeftType).count(member) == 1
    assert "PROPULSION" in PeftType.__members__
    assert repr(member) == "<PeftType.PROPULSION: 'PROPULSION'>"
    assert hash(member) == hash(PeftType("PROPULSION"))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_the_member_survives_copies(duplicate):
    assert duplicate(PeftType.PROPULSION) is PeftType.PROPULSION


def test_registering_again_changes_nothing():
    size = len(PeftType)
    register_propulsion()
    register_propulsion()
    assert len(PeftType) == size
    assert_registered()


def test_reload_and_second_import_replace_the_classes():
    done = run(
        "import importlib, sys\n"
        "from peft import PeftType, mapping\n"
        "import peft_cpift.propulsion as p\n"
        "size = len(PeftType)\n"
        "importlib.reload(p.config); importlib.reload(p.layer); importlib.reload(p.model); importlib.reload(p)\n"
        "assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING['PROPULSION'] is p.PropulsionConfig is p.config.PropulsionConfig\n"
        "assert mapping.PEFT_TYPE_TO_TUNER_MAPPING['PROPULSION'] is p.PropulsionModel is p.model.PropulsionModel\n"
        "old = p.PropulsionConfig\n"
        "[sys.modules.pop(m) for m in list(sys.modules) if m.startswith('peft_cpift')]\n"
        "import peft_cpift.propulsion as q\n"
        "assert q.PropulsionConfig is not old\n"
        "assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING['PROPULSION'] is q.PropulsionConfig\n"
        "assert len(PeftType) == size\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_propulsion_that_is_not_ours_is_left_alone(monkeypatch):
    monkeypatch.setattr(PeftType.PROPULSION, "owner", "peft")
    before = dict(mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
    with pytest.raises(RuntimeError, match="PEFT already has a method PROPULSION"):
        register_propulsion()
    assert before == mapping.PEFT_TYPE_TO_CONFIG_MAPPING


class Kind(str, enum.Enum):
    """An enum like `PeftType`, to be changed freely."""

    FIRST = "FIRST"


def test_adding_a_member_extends_every_table(monkeypatch):
    monkeypatch.setattr(registration, "PeftType", Kind)
    member = registration._add_member("SECOND")
    assert list(Kind) == ["FIRST", "SECOND"]
    assert Kind("SECOND") is Kind["SECOND"] is Kind.SECOND is member
    assert member._sort_order_ == 1


def test_a_changed_enum_is_noticed(monkeypatch):
    class Deaf(dict):
        def __setitem__(self, key, value):
            pass

    monkeypatch.setattr(registration, "PeftType", Kind)
    monkeypatch.setattr(Kind, "_value2member_map_", Deaf())
    with pytest.raises(RuntimeError, match="could not add THIRD"):
        registration._add_member("THIRD")


def test_a_pickled_config_opens_in_a_fresh_process(tmp_path):
    path = tmp_path / "config.pkl"
    path.write_bytes(pickle.dumps(PropulsionConfig(degree=25)))
    done = run(f"import pickle; print(pickle.load(open({str(path)!r}, 'rb')).degree)")
    assert done.stdout.strip() == "25", done.stderr
