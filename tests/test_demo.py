"""Strategy: run `cpift demo` in a process of its own and follow what it prints to the table and the picture."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_demo_ends_with_a_table_and_a_picture(tmp_path):
    command = Path(sys.executable).with_name("cpift")
    done = subprocess.run([command, "demo"], cwd=tmp_path, capture_output=True, text=True, check=True)
    table = done.stdout[done.stdout.rindex("| model") :]
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in table.splitlines() if line.startswith("|")}
    assert {"base", "probe add", "fused", "final", "multi-task"} <= rows.keys()
    assert len(rows["final"]) == 6
    picture = tmp_path / re.search(r"picture: (\S+)", done.stdout)[1]
    assert picture.read_bytes().startswith(b"\x89PNG")
