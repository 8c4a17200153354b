"""The global variables that the functions of a class name: restore.py remembers the containers and caches among them.

Worked example: a model's file has a dict TABLES, a function `table_of(n)` that reads TABLES[n], and a class whose
forward calls `table_of`. The class names `table_of`, and that function names TABLES, so TABLES is such a variable.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Iterator
from typing import Any

NOBODY_WRITES = ("torch", "builtins")  # packages whose classes keep nothing for one model

Variable = tuple[dict[str, Any], str]  # (globals of a file, name)
# A class is looked through once; its variables are read anew each time, because they may be assigned to.
_VARIABLES: weakref.WeakKeyDictionary[type, list[Variable]] = weakref.WeakKeyDictionary()


def keeps_nothing(module: str) -> bool:
    """Whether a module belongs to a package whose classes keep nothing for one model."""
    package = module.partition(".")[0]
    return package in NOBODY_WRITES


def named_globals(cls: type) -> Iterator[Any]:
    """The values of the global variables that the functions of a class name, or the functions that these name."""
    if cls not in _VARIABLES:
        _VARIABLES[cls] = [*_variables(cls)]
    for file_globals, name in _VARIABLES[cls]:
        yield file_globals.get(name)


def _variables(cls: type) -> Iterator[Variable]:
    """All of these variables but those whose values are functions, classes and modules."""
    functions = [value for value in vars(cls).values() if isinstance(value, types.FunctionType)]
    seen = set(map(id, functions))
    while functions:
        function = functions.pop()
        file_globals = function.__globals__
        for name in _names_in_code(function.__code__):
            if name not in file_globals:  # the name of an attribute or a builtin
                continue
            value = file_globals[name]
            if id(value) in seen:
                continue
            seen.add(id(value))
            if not isinstance(value, (types.FunctionType, type, types.ModuleType)):
                yield file_globals, name
            inner = getattr(value, "__wrapped__", value)  # what is inside a decorator
            if isinstance(inner, types.FunctionType) and not keeps_nothing(inner.__module__):
                functions.append(inner)


def _names_in_code(code: types.CodeType) -> Iterator[str]:
    """The names of globals and attributes in a function's code, and in that of the functions inside it."""
    codes = [code]
    while codes:
        code = codes.pop()
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
        yield from code.co_names
