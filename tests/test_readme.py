"""The README's main block runs as it stands, in an empty folder, only with fewer steps; so do docstrings' examples."""

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_oto

README = Path(__file__).parents[1] / "README.md"


def test_the_main_block_runs(tmp_path):
    block = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    script, changed = re.subn("max_steps=400", "max_steps=30", block)
    assert changed == 1
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, cwd=tmp_path, env=one_thread, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "9 prunable axes" in done.stdout and "max output difference" in done.stdout
    assert (tmp_path / "compact" / "modeling_oto.py").exists()


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(hf_oto.__file__).parent.glob("[a-z]*.py")))
@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_examples_in_docstrings_hold(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, ran = doctest.testmod(importlib.import_module(f"hf_oto.{name}"))
    assert failed == 0
    assert ran or name not in ("compact", "dhspg", "partition", "report", "trainer", "zigs")
