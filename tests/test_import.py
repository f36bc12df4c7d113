"""Strategy: import in fresh processes, in every order in which a user may import this package and PEFT, and look at
what is loaded and what is registered.

Registration is looked up in PEFT's own tables before any name of this package is used, since using one registers too.
Loading PEFT takes seconds, so what can share a process does.
"""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import peft_cpift

TRAINING = {"accelerate", "datasets", "peft", "transformers", "trl"}
# the beginning of every process
COMMON = """
import sys

def registered():
    mapping = sys.modules["peft.mapping"]
    member = sys.modules["peft"].PeftType.__members__.get("PROPULSION")
    if member not in mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
        return False
    from peft_cpift import PropulsionConfig, PropulsionModel
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[member] is PropulsionConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[member] is PropulsionModel
    return True
"""
# the end of a process that has loaded an adapter of which every scale is 0.5
SCALES = """
scales = [p for name, p in model.named_parameters() if "propulsion_z" in name]
assert scales and all((z == 0.5).all() for z in scales)
"""


def run(code: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", COMMON + code], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory) -> Path:
    """A folder with a Propulsion adapter of which every scale is 0.5."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        peft_cpift.PropulsionConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "propulsion_z" in name:
                parameter.fill_(0.5)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def test_the_package_itself_loads_nothing_and_is_quiet():
    output = run(
        "before = set(sys.modules)\n"
        "import peft_cpift\n"
        "from peft_cpift import CpiftError, NoEffectWarning\n"
        "assert set(peft_cpift.__all__) <= set(dir(peft_cpift))\n"
        "assert not hasattr(peft_cpift, 'nonsense')\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert new - set(sys.stdlib_module_names) <= {'peft_cpift'}, new\n",
        *("-W", "error"),
    )
    assert output == ""


def test_looking_for_peft_finds_it_and_loads_nothing(tmp_path):
    (tmp_path / "peft").mkdir()
    run(
        "import importlib.util, os\n"
        "plain = importlib.util.find_spec('peft')\n"
        "import peft_cpift\n"
        "class Other:\n"
        "    def find_spec(self, *arguments):\n"
        "        if arguments[0] == 'peft':\n"
        "            specs = [finder.find_spec(*arguments) for finder in sys.meta_path if finder is not self]\n"
        "            return next(filter(None, specs), None)\n"
        "def check():\n"
        "    found = importlib.util.find_spec('peft')\n"
        "    for part in ('name', 'origin', 'submodule_search_locations', 'cached', 'has_location'):\n"
        "        assert getattr(found, part) == getattr(plain, part), part\n"
        "    assert found.loader.get_source('peft') == plain.loader.get_source('peft')\n"
        "check()\n"
        "for place in (0, 2):\n"
        "    sys.meta_path.insert(place, Other())\n"
        "    check()\n"
        "    del sys.meta_path[place]\n"
        "assert 'peft' not in sys.modules\n"
        # as if PEFT were not installed
        "sys.path.remove(os.path.dirname(plain.submodule_search_locations[0]))\n"
        "assert importlib.util.find_spec('peft') is None\n"
        f"sys.path.append({str(tmp_path)!r})\n"
        "import peft\n"
        f"assert list(peft.__path__) == [{str(tmp_path / 'peft')!r}]\n"
    )


def test_maths_files_and_command_line_load_no_library_of_training():
    output = run(
        "import importlib, json\n"
        "import peft_cpift\n"
        "loaded = {}\n"
        "for part in ('checkpoint', 'core', 'fusion'):\n"
        "    assert getattr(peft_cpift, part).__name__ == f'peft_cpift.{part}'\n"
        "    loaded[part] = sorted(sys.modules)\n"
        "from peft_cpift import CoreRegion, find_core_region, fuse, group_tasks, slerp\n"
        "for part in ('demo', 'cli'):\n"
        "    importlib.import_module(f'peft_cpift.{part}')\n"
        "    loaded[part] = sorted(sys.modules)\n"
        "print(json.dumps(loaded))\n"
    )
    for part, modules in json.loads(output).items():
        assert "peft_cpift.checkpoint" in modules
        assert not {name.split(".")[0] for name in modules} & TRAINING, part


def test_peft_first_registers_at_once_and_reloading_changes_nothing():
    run(
        "import importlib\n"
        "import peft\n"
        "assert not registered()\n"
        "import peft_cpift\n"
        "assert registered()\n"
        "size, finders = len(peft.PeftType), len(sys.meta_path)\n"
        "for module in (peft_cpift, peft, peft_cpift):\n"
        "    importlib.reload(module)\n"
        "    assert registered()\n"
        "assert (size, finders) == (len(peft.PeftType), len(sys.meta_path))\n"
        "assert type(peft.__loader__) is type(peft.__spec__.loader) is type(peft.mapping.__loader__)\n"
    )


def test_peft_later_registers_and_loads_an_adapter(adapter, tiny_model):
    run(
        "import importlib\n"
        "import peft_cpift\n"
        "importlib.reload(peft_cpift)\n"
        "assert sum(type(finder).__module__ == 'peft_cpift' for finder in sys.meta_path) == 1\n"
        "from peft import PeftConfig, PeftModel\n"
        "assert registered()\n"
        "import peft\n"
        "assert type(peft.__loader__) is type(peft.__spec__.loader) is type(peft.mapping.__loader__)\n"
        f"assert PeftConfig.from_pretrained({str(adapter)!r}).peft_type.value == 'PROPULSION'\n"
        "from transformers import AutoModelForCausalLM\n"
        f"base = AutoModelForCausalLM.from_pretrained({str(tiny_model)!r})\n"
        f"model = PeftModel.from_pretrained(base, {str(adapter)!r})\n" + SCALES
    )


def test_transformers_alone_loads_an_adapter(adapter):
    run(
        "import peft_cpift\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(adapter)!r})\n"
        "assert registered()\n" + SCALES
    )


def test_failing_imports_are_errors_and_can_be_tried_again():
    run(
        "import peft_cpift\n"
        "def attempt(blocked):\n"
        "    sys.modules[blocked] = None\n"
        "    try:\n"
        "        import peft\n"
        "    except ModuleNotFoundError as error:\n"
        "        assert error.name == blocked\n"
        "    else:\n"
        "        raise AssertionError(f'the import went well without {blocked}')\n"
        "    assert 'peft' not in sys.modules\n"
        "    del sys.modules[blocked]\n"
        "attempt('peft.mapping')\n"
        "attempt('peft_cpift.propulsion.card')\n"
        "attempt('peft_cpift.propulsion.card')\n"
        "import peft.tuners.lora\n"
        "assert registered()\n"
    )


def test_names_of_the_package_register_and_come_with_a_star():
    run(
        "from peft_cpift import PropulsionConfig\n"
        "assert registered()\n"
        "assert PropulsionConfig(degree=25).peft_type is sys.modules['peft'].PeftType.PROPULSION\n"
        "from peft_cpift import *\n"
        "import peft_cpift\n"
        "assert all(globals()[name] is getattr(peft_cpift, name) for name in peft_cpift.__all__)\n"
        "assert peft_cpift.propulsion.PropulsionConfig is PropulsionConfig\n"
        "assert peft_cpift.isolation.freeze_core is freeze_core\n"
    )


def test_two_threads_may_import_peft_and_propulsion_at_once():
    # The second thread stops inside the import of peft_cpift.propulsion until the first is inside that of PEFT.
    run(
        "import threading, time\n"
        "import peft_cpift\n"
        "inside = threading.Event()\n"
        "def pause(event, arguments):\n"
        "    if event == 'import' and arguments[0] == 'peft_cpift.propulsion.card':\n"
        "        inside.set()\n"
        "        while 'peft' not in sys.modules:\n"
        "            time.sleep(0.001)\n"
        "sys.addaudithook(pause)\n"
        "def import_propulsion():\n"
        "    import peft_cpift.propulsion\n"
        "thread = threading.Thread(target=import_propulsion)\n"
        "thread.start()\n"
        "assert inside.wait(60)\n"
        "import peft\n"
        "thread.join(60)\n"
        "assert registered()\n"
    )


def test_type_checkers_see_the_names_that_there_are():
    tree = ast.parse(Path(peft_cpift.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {
        alias.name: node.module for node in imports for alias in node.names if node.module.startswith("peft_cpift.")
    }
    assert sorted(seen) == sorted(peft_cpift.__all__) == sorted(peft_cpift._HOMES)
    for name, module in seen.items():
        assert getattr(peft_cpift, name) is getattr(importlib.import_module(module), name)


def test_a_misspelled_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'peft_cpift' has no attribute 'nonsense'"):
        _ = peft_cpift.nonsense
    with pytest.raises(ImportError, match="cannot import name 'nonsense' from 'peft_cpift'"):
        exec("from peft_cpift import nonsense")
