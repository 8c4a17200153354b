"""What the README shows runs, only with fewer steps, and what it names is there; docstrings' examples hold, too."""

import doctest
import importlib
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import hf_oto

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
REFERENCE, RESULTS = ((ROOT / "recipes" / name).read_text() for name in ("README.md", "RESULTS.md"))


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def replaced(text, old, new):
    assert text.count(old) == 1
    return text.replace(old, new)


def test_the_blocks_run(tmp_path):
    """The complete script, in an empty folder; then the few lines at the top, with its data and a new model."""
    few_lines, script = blocks("python")
    assert sum(map(bool, few_lines.splitlines())) == 5
    script = replaced(script, "max_steps=400", "max_steps=30")
    few_lines = replaced(few_lines, '"out",', '"out", max_steps=30, report_to="none",')
    again = "model = type(compact)(config)\n" + replaced(few_lines, '"compact"', '"again"')
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", f"{script}\n{again}"]
    done = subprocess.run(run, cwd=tmp_path, env=one_thread, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("9 prunable axes") == done.stdout.count("max output difference") == 2
    shares = re.findall(r"^MACs .* (\d+) %$", done.stdout, re.MULTILINE)
    assert [abs(int(share) - 50) <= 1 for share in shares] == [True, True]
    assert all((tmp_path / name / "modeling_oto.py").exists() for name in ("compact", "again"))


def test_the_readme_is_short():
    assert len(README.encode()) <= 7000 < len(f"{README}{REFERENCE}".encode())


def missing(text, folder):
    """Files that a text links to, or has in a command, and that aren't there."""
    links = {folder / target.split("#")[0] for target in re.findall(r"\]\((?!http)([^)]+)\)", text)}
    named = re.findall(r"\b(recipes/[\w/]+\.(?:py|yaml)|tests/\w+\.txt)", text)
    return {path for path in links | {ROOT / name for name in named} if not path.exists()}


def test_what_is_named_is_there():
    assert not missing(README, ROOT) and not missing(f"{REFERENCE}{RESULTS}", ROOT / "recipes")
    assert missing("[a](b.md) and recipes/no_such.py", ROOT) == {ROOT / "b.md", ROOT / "recipes/no_such.py"}  # control
    recipes = {f"recipes/{path.name}" for path in (ROOT / "recipes").glob("*.py")}
    assert all(name in REFERENCE for name in recipes)


def test_anchors_are_headings():
    both = f"{REFERENCE}\n{RESULTS}"
    headings = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", both, re.M)}
    anchors = re.findall(r"\]\((?:(?:recipes/)?(?:README|RESULTS)\.md)?#([\w-]+)\)", f"{README}{both}")
    assert anchors and set(anchors) <= headings
    assert "no-such-heading" not in headings  # control


def test_every_argument_is_in_the_reference():
    ours = {field.name for field in fields(hf_oto.OTOArguments)}
    table = REFERENCE[REFERENCE.index("## Arguments") : REFERENCE.index("## What a run tells")]
    explained = {name for row in re.findall(r"^\| (`.+?) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert explained == ours


def test_ci_does_what_the_readme_says():
    script = (ROOT / ".ci" / "run").read_text()
    tests = next(block for block in blocks("bash") if "pytest" in block)
    for part in tests.strip().split(" && "):
        words = [word for word in part.split() if not word.startswith('".[')]  # it installs the recipes' packages, too
        assert all(word in script for word in words), part
    assert "--no-such-option" not in script  # control


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(hf_oto.__file__).parent.glob("[a-z]*.py")))
@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_examples_in_docstrings_hold(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, ran = doctest.testmod(importlib.import_module(f"hf_oto.{name}"))
    assert failed == 0
    assert ran or name not in ("compact", "dhspg", "partition", "report", "trainer", "zigs")
