"""hf_oto relies on no private name of another library that is not in private_names.py, and each of those is there."""

import ast
from pathlib import Path

import pytest
import torch
import transformers as tf
from private_names import PRIVATE_NAMES
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = Path(__file__).parents[1] / "hf_oto"
SOURCES = {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
INHERITED = (tf.Trainer, tf.PreTrainedModel, torch.optim.Optimizer, TorchDispatchMode, TorchFunctionMode)
OF_NAMED_TUPLES = {"_fields", "_make", "_replace"}  # Python documents these: the underscore is for other fields
LOOKING_UP = {"getattr", "hasattr", "setattr", "delattr"}
LOOKING_UP_IN_A_DICT = {"get", "pop", "setdefault"}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name.isidentifier() and name != "_"


def strings_looked_up(node):
    """The names that code asks an object for as strings: `getattr(x, "_a")`, `vars(x).get("_a")` and the like."""
    match node:
        case ast.Call(func=ast.Name(id=name), args=[_, ast.Constant(value=str(asked)), *_]) if name in LOOKING_UP:
            return [asked]
        case ast.Call(func=ast.Attribute(value=ast.Call(func=ast.Name(id="vars")), attr=name), args=[first, *_]):
            return [first.value] if name in LOOKING_UP_IN_A_DICT and isinstance(first, ast.Constant) else []
        case ast.Call(func=ast.Attribute(attr="startswith"), args=[ast.Constant(value=str(asked))]):
            return [asked]
        case ast.Compare(left=ast.Constant(value=str(asked)), comparators=[ast.Call(func=ast.Name(id="vars"))]):
            return [asked]
        case ast.Constant(value=str(asked)) if hasattr(torch.ops.aten, asked):  # rules name operations so
            return [asked]
    return []


def defined_in_class(node):
    """The methods and variables that stand in the body of a class."""
    bodies = node.body if isinstance(node, ast.ClassDef) else []
    names = [part.name for part in bodies if isinstance(part, ast.FunctionDef)]
    variables = [target for part in bodies if isinstance(part, ast.Assign) for target in part.targets]
    variables += [part.target for part in bodies if isinstance(part, ast.AnnAssign)]
    return names + [variable.id for variable in variables if isinstance(variable, ast.Name)]


def used(source):
    """{name: line} of the private names of objects and modules that code reads, sets, imports, defines or looks up."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        names = strings_looked_up(node) + defined_in_class(node)
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        found |= {name: node.lineno for name in names if is_private(name)}
    return found


def defined(source):
    """The names that code gives to methods, and to attributes that it sets."""
    nodes = list(ast.walk(ast.parse(source)))
    set_there = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    return set_there.union(*map(defined_in_class, nodes))


def names_of_others(sources):
    """{name: where it is used} of private names that are not ours.

    Ours are those that we define, unless a class that one of ours inherits from has the name too (then we override it)
    or the table has it (then we set what somebody else reads). What begins with `_oto_` is ours on whatever object.
    """
    ours = {name for source in sources.values() for name in defined(source)}
    theirs = {name for cls in INHERITED for name in dir(cls)} | {row.bare_name for row in PRIVATE_NAMES}
    places = {}
    for file, source in sources.items():
        for name, line in used(source).items():
            of_nobody_else = name in OF_NAMED_TUPLES or name.startswith("_oto_")
            if (name not in ours or name in theirs) and not of_nobody_else:
                places.setdefault(name, f"{file}:{line}")
    return places


@pytest.mark.parametrize("row", PRIVATE_NAMES, ids=str)
def test_a_private_name_is_there(row):
    if row.owner is None:
        pytest.skip("its library is not installed")
    assert row.holds, f"{row} is gone, or has changed: {row.need}"


@pytest.mark.parametrize("row", PRIVATE_NAMES, ids=str)
def test_a_name_that_is_gone_is_noticed(row):
    if row.owner is None:
        pytest.skip("its library is not installed")
    assert not row._replace(name="_made_up").holds


def test_parameters_of_other_names_are_noticed():
    (row,) = (row for row in PRIVATE_NAMES if row.bare_name == "_save")
    assert row.holds and not row._replace(name="_save(folder)").holds


def test_the_table_has_all_that_is_used_and_nothing_else():
    found = names_of_others(SOURCES)
    listed = {row.bare_name for row in PRIVATE_NAMES}
    assert {name: place for name, place in found.items() if name not in listed} == {}, "not in private_names.py"
    assert listed - found.keys() == set(), "in private_names.py, and not used any more"
    assert len(listed) == len(PRIVATE_NAMES)  # each once


@pytest.mark.parametrize(
    "code",
    [
        "model._made_up",
        "model._made_up()",
        "import torch._made_up.part",
        "from torch._made_up import part",
        "from torch import _made_up",
        "getattr(model, '_made_up', None)",
        "'_made_up' in vars(model)",
        "vars(model).pop('_made_up')",
        "class Ours(Trainer):\n    def _save_checkpoint(self): ...",  # overridden: ours by definition only
        "fake._is_param = True",
        "MOVED = {'_unsafe_view': 1}",
    ],
)
def test_a_made_up_use_is_found(code):
    (name,) = names_of_others({"made_up.py": code})
    assert name in code


@pytest.mark.parametrize(
    "code", ["self._mine = 1; self._mine", "def _name(): ...\n_name()", "row._replace(a=1)", "a.b"]
)
def test_what_is_ours_is_left_alone(code):
    assert names_of_others({"ours.py": code}) == {}
