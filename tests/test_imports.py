"""What importing costs, and which way imports point."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import hf_oto

ROOT = Path(hf_oto.__file__).parent
HEAVY = ("transformers.trainer", "hf_oto.trainer", "hf_oto.partition", "datasets", "peft", "bitsandbytes")


def imported(code):
    """The modules among HEAVY that are there after some code has run in a new process."""
    code += f"; import sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_a_loader_imports_the_hook_alone():
    stock = "import transformers; transformers.BertModel"
    assert imported(f"{stock}; import hf_oto; hf_oto.OTOError") == imported(stock)
    assert "hf_oto.partition" in imported("import hf_oto; hf_oto.partition_zigs")  # control: what is used is there


def test_all_public_names_are_there():
    assert set(hf_oto.__all__) <= set(dir(hf_oto))
    for name in hf_oto.__all__:
        assert getattr(hf_oto, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'prunner'"):
        getattr(hf_oto, "prunner")  # noqa: B009


def imports_of(path):
    """The modules of ours that a file imports when it is imported itself; what only type checkers read is none."""
    found = set()
    package = path.relative_to(ROOT).parts[:-1]

    def visit(body):
        for node in body:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            if isinstance(node, ast.ImportFrom) and node.level:
                base = (*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else ()))
                found.update((*base, name.name) for name in node.names)
                found.add(base)
            for inner in ("body", "orelse", "handlers", "finalbody"):
                visit(getattr(node, inner, []))

    visit(ast.parse(path.read_text()).body)
    return found


def graph():
    """Module -> the modules that it imports."""
    names = {path.relative_to(ROOT).with_suffix("").parts: path for path in ROOT.rglob("*.py")}
    names = {name[:-1] if name[-1] == "__init__" else name: path for name, path in names.items()}
    found = {name: (imports_of(path) & names.keys()) - {name} for name, path in names.items()}
    # a package is what it gathers: who imports one of its files meets the file, not the package
    return {name: {x for x in others if x != ()} for name, others in found.items() if name != ()}


def test_imports_point_one_way():
    found = graph()
    assert len(found) > 25 and ("zigs",) in found[("solve",)]
    order = list(graphlib.TopologicalSorter(found).static_order())
    assert order.index(("axes",)) < order.index(("partition",)) < order.index(("trainer",))
    found[("axes",)] = {("trainer",)}  # control
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(found).prepare()


def test_what_travels_with_checkpoints_imports_nothing_of_ours():
    found = graph()
    assert not found[("modeling_oto",)]
    assert found[("saving",)] == {("modeling_oto",)}  # control
