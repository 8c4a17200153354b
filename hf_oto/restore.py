"""A model as it was: everything its modules keep is remembered, and put back bit by bit, whatever was raised.

It stands under the trace, the rehearsal, the certificate and the measurements. Each of them changes a model for a
moment (its mode, its weights, its sizes, whatever its forward keeps), and `restored` is the one undo for all of that:
nobody copies the user's model. What a forward does while it is looked at is in evaluating.py.

Worked example: of a module with the attributes {"training": True, "cache": [t]} the walk remembers two containers, the
dict of attributes and the list, each with a shallow copy. If a forward then appends to the list and eval() sets
training to False, both are filled again from their copies; the tensor t was never copied.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import operator
import random
import signal
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

# exactly these types: nobody knows what a subclass does when it is written to
CONTAINERS = (dict, OrderedDict, defaultdict, list, deque, set)
ATOMS = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size}
NO_OBJECTS = (int, str, torch.Tensor, type, enum.Enum, types.ModuleType)
CALLABLES = (types.FunctionType, types.MethodType, functools.partial)
STATES = (
    torch.Generator, np.random.Generator, np.random.RandomState, random.Random, np.ndarray,
    functools._lru_cache_wrapper,
)  # fmt: skip
DEPTH = 3  # levels of containers and objects in a module's attributes; deeper ones may be data sets or trainers
MANY = 1000  # entries: a container with more may be a data set; it is remembered, but what is in it is not
LARGE = 2**26  # bytes: an array that is larger is not what a forward counts in
NOBODY_WRITES = ("torch", "builtins")  # packages whose classes keep nothing for one model


State = tuple[Callable[[Any], Any], Any]  # (setter, value): what is no container is put back by setter(value)


class Contents(NamedTuple):
    """What a model's modules keep, as it was when it was remembered."""

    containers: list[tuple[Any, Any]]  # (container, its shallow copy)
    states: list[State]


def contents(model: nn.Module, *owners: Any) -> Contents:
    """Remembers what the modules of a model keep; tensors are not copied.

    Modules that are registered nowhere count, too. So does what functions and classes keep for the model: the closures
    of hooks and of a patched forward, attributes of its classes, caches, and the containers in its files that its
    classes name.

    Args:
        owners: other objects, whose own attributes are remembered too, with the containers in them.
    """
    walk = _Walk(model, owners)
    return Contents([(container, container.copy()) for container in walk.containers], walk.states)


class _Walk:
    """One walk through all that a model keeps, which collects `containers` and `states`.

    It is a class, because a closure that calls itself lives until the garbage collector comes, and tensors with it.
    """

    def __init__(self, model: nn.Module, owners: Sequence[Any] = ()) -> None:
        self.containers: list[Any] = []
        self.states: list[State] = []
        self._seen: set[int] = set()
        for owner in owners:
            self._enter(vars(owner), DEPTH, objects=False)
        for module in model.modules():
            if id(module) not in self._seen:
                self._enter_module(module)

    def _enter(self, container: Any, depth: int, objects: bool = True) -> None:
        """Remembers a container and visits what is in it.

        Args:
            depth: how many levels of containers may be entered below this one.
            objects: whether objects and functions are visited, or only containers, modules and states.
        """
        self._seen.add(id(container))
        self.containers.append(container)
        if not depth or isinstance(container, set) or len(container) > MANY:
            return
        values = container.values() if isinstance(container, dict) else container
        for inner in list(values):
            kind = _kind(type(inner))
            if kind != "atom" and id(inner) not in self._seen:
                self._visit(inner, kind, depth - 1, objects)

    def _visit(self, value: Any, kind: str, depth: int, objects: bool) -> None:
        if kind == "container":
            self._enter(value, depth, objects)
        elif kind == "module":
            self._enter_module(value)
        elif kind == "state":
            self._seen.add(id(value))
            state = _state(value)
            if state is not None:
                self.states.append(state)
        elif objects:
            self._seen.add(id(value))
            if kind == "callable":
                self.states += _cells(value)
                self._visit_all(held(value), depth)  # a function is no step deeper
            else:
                self.states += _slots(value)
                # the attributes of some objects (a class, say) are a read-only view
                if hasattr(value, "__dict__") and type(vars(value)) in CONTAINERS:
                    self._enter(vars(value), depth)

    def _visit_all(self, values: Iterable[Any], depth: int) -> None:
        for value in values:
            kind = _kind(type(value))
            if kind != "atom" and id(value) not in self._seen:
                self._visit(value, kind, depth, objects=True)

    def _enter_module(self, module: nn.Module) -> None:
        self._seen.add(id(module))
        self._enter(vars(module), DEPTH)
        if isinstance(module, torch.jit.ScriptModule):
            self.states.append((functools.partial(setattr, module, "training"), module.training))
        for cls in type(module).__mro__:
            package = cls.__module__.partition(".")[0]
            if id(cls) in self._seen or package in NOBODY_WRITES:
                continue
            self._seen.add(id(cls))
            self.states.append((functools.partial(_put_back_class, cls), dict(vars(cls))))
            self._visit_all((*_attributes(cls), *_named_globals(cls)), 1)


@functools.lru_cache(4096)
def _kind(cls: type) -> str:
    """What the values of a type are to a walk; it meets tens of thousands of values, but few types."""
    if cls in CONTAINERS:
        return "container"
    if issubclass(cls, nn.Module):
        return "module"
    if cls in ATOMS or issubclass(cls, NO_OBJECTS):
        return "atom"
    if issubclass(cls, STATES):
        return "state"
    return "callable" if issubclass(cls, CALLABLES) else "object"


def put_back(kept: Contents) -> None:
    """Fills every container with what it held, the same objects in the same order, and sets every state.

    The order counts: that of the parameters is that of `state_dict` and of the optimizer.
    """
    with uninterrupted():
        for container, before in kept.containers:
            if _is_same(container, before):
                continue
            container.clear()
            if isinstance(container, (dict, set)):
                container.update(before)
            else:
                container.extend(before)
        for restore, state in kept.states:
            restore(state)


@contextlib.contextmanager
def restored(model: nn.Module, *owners: Any) -> Iterator[Contents]:
    """While open, anything may be done to what the model's modules keep; in the end all of it is as it was.

    Args:
        owners: other objects, whose own attributes are restored too.
    """
    kept = contents(model, *owners)
    try:
        yield kept
    finally:
        put_back(kept)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """While open, Ctrl-C waits, so that what is being put back is put back as a whole."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals arrive in the main thread only
        return
    waiting: list[tuple[Any, ...]] = []
    handler = signal.signal(signal.SIGINT, lambda *given: waiting.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
    if waiting and callable(handler):
        handler(*waiting[0])


class Place(NamedTuple):
    """Where a module keeps a tensor: it is `container[key]`, or `container[key][position]` in a tuple."""

    container: Any
    key: Any
    position: int | None

    def put(self, tensor: torch.Tensor) -> None:
        """Puts another tensor there."""
        if self.position is None:
            self.container[self.key] = tensor
            return
        old = self.container[self.key]
        items = [*old[: self.position], tensor, *old[self.position + 1 :]]
        is_named_tuple = hasattr(old, "_fields")
        self.container[self.key] = type(old)(*items) if is_named_tuple else tuple(items)


def places(model: nn.Module) -> dict[int, list[Place]]:
    """Id of a tensor -> all places where the modules keep it.

    A tensor is kept as a parameter or buffer, under one name or several, as an attribute, or in a list (the flat
    weights of recurrent layers).
    """
    return _places(_Walk(model).containers)


def _places(containers: Iterable[Any]) -> dict[int, list[Place]]:
    places_of_id: dict[int, list[Place]] = {}
    for container in containers:
        if isinstance(container, set):
            continue
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in items:
            if is_tensor(type(value)):
                places_of_id.setdefault(id(value), []).append(Place(container, key, None))
            elif isinstance(value, tuple):
                for position, inner in enumerate(value):
                    if is_tensor(type(inner)):
                        places_of_id.setdefault(id(inner), []).append(Place(container, key, position))
    return places_of_id


@functools.lru_cache(4096)
def is_tensor(cls: type) -> bool:
    return issubclass(cls, torch.Tensor)


def replace_tensors_(kept: Contents, new: Mapping[int, torch.Tensor]) -> None:
    """Puts new tensors in all places where the modules keep old ones.

    Args:
        kept: the contents of the model.
        new: id of the old tensor -> the new one. The old ones must be alive.
    """
    places_of_id = _places(container for container, _ in kept.containers)
    for old_id, places_of_tensor in places_of_id.items():
        if old_id in new:
            for place in places_of_tensor:
                place.put(new[old_id])


def _is_same(container: Any, before: Any) -> bool:
    """Whether a container holds the same objects in the same order as its copy: then it isn't written to."""
    if len(container) != len(before):
        return False
    if not before:
        return True
    if isinstance(container, dict):
        pairs: Iterable[tuple[Any, Any]] = zip(container.items(), before.items(), strict=True)
        return all(a[0] is b[0] and a[1] is b[1] for a, b in pairs)
    if isinstance(container, set):
        return container == before
    return all(map(operator.is_, container, before))


EMPTY = object()  # stands for the value of a cell or slot that has none


def _state(value: Any) -> State | None:
    """How to put back what isn't kept in Python's containers: generators of random numbers, caches, small arrays."""
    if isinstance(value, torch.Generator):
        return value.set_state, value.get_state()
    if isinstance(value, random.SystemRandom):  # it has no state
        return value.seed, None
    if isinstance(value, random.Random):
        return value.setstate, value.getstate()
    if isinstance(value, np.random.RandomState):
        return value.set_state, value.get_state()
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return functools.partial(setattr, bits, "state"), bits.state
    if isinstance(value, functools._lru_cache_wrapper):
        return functools.partial(_forget, value), value.cache_info().misses
    if type(value) is np.ndarray:
        can_be_written = value.flags.writeable and not value.dtype.hasobject
        if can_be_written and value.nbytes <= LARGE:
            return functools.partial(np.copyto, value), value.copy()
    return None


def _forget(cache: Any, misses: int) -> None:
    """Empties a cache that has taken in something since then; a single entry can't be taken out."""
    if cache.cache_info().misses != misses:
        cache.cache_clear()


def _cells(function: Any) -> Iterator[State]:
    """The variables that a function shares with the functions around it."""
    for cell in getattr(function, "__closure__", None) or ():
        yield functools.partial(_put_back_cell, cell), _value(cell)


def _value(cell: types.CellType) -> Any:
    """What is in a cell; EMPTY for a variable that nothing was assigned to yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return EMPTY


def _put_back_cell(cell: types.CellType, value: Any) -> None:
    if value is EMPTY:
        del cell.cell_contents
    else:
        cell.cell_contents = value


def held(function: Any) -> list[Any]:
    """What a function keeps alive: the values of its closure and defaults, its attributes, what is bound to it."""
    if isinstance(function, functools.partial):
        return [function.func, *function.args, *function.keywords.values()]
    if isinstance(function, types.MethodType):
        return [function.__self__, function.__func__]
    closure = [_value(cell) for cell in function.__closure__ or ()]
    defaults = function.__defaults__ or ()
    keyword_defaults = (function.__kwdefaults__ or {}).values()
    return [*closure, *defaults, *keyword_defaults, vars(function)]


def _members(cls: type) -> Iterator[types.MemberDescriptorType]:
    """The slots that a class and its bases declare."""
    for base in cls.__mro__:
        if "__slots__" in vars(base):
            for value in vars(base).values():
                if isinstance(value, types.MemberDescriptorType):
                    yield value


def slots_of(value: Any) -> list[tuple[types.MemberDescriptorType, Any]]:
    """(slot, value) of those slots of an object that have a value."""
    return [(slot, slot.__get__(value)) for slot in _members(type(value)) if hasattr(value, slot.__name__)]


def _slots(value: Any) -> Iterator[State]:
    """All slots of an object, with EMPTY for those without a value."""
    value_of_slot = dict(slots_of(value))
    for slot in _members(type(value)):
        yield functools.partial(_put_back_slot, slot, value), value_of_slot.get(slot, EMPTY)


def _put_back_slot(slot: types.MemberDescriptorType, owner: Any, value: Any) -> None:
    if value is not EMPTY:
        slot.__set__(owner, value)
    elif hasattr(owner, slot.__name__):
        slot.__delete__(owner)


def _put_back_class(cls: type, before: Mapping[str, Any]) -> None:
    for name in vars(cls).keys() - before.keys():
        delattr(cls, name)
    for name, value in before.items():
        if vars(cls).get(name) is not value and not name.startswith("__"):
            setattr(cls, name, value)


def _attributes(cls: type) -> list[Any]:
    """The attributes of a class that may change: what is no function, and caches."""
    values = [value for name, value in vars(cls).items() if not name.startswith("__") and not callable(value)]
    caches = [value for value in vars(cls).values() if isinstance(value, functools._lru_cache_wrapper)]
    return values + caches


NAMED: weakref.WeakKeyDictionary[type, list[tuple[dict[str, Any], str]]] = weakref.WeakKeyDictionary()


def _named_globals(cls: type) -> Iterator[Any]:
    """The containers and caches that are global variables of a file and that the functions of a class name."""
    if cls not in NAMED:
        NAMED[cls] = [*_names(cls)]
    for file_globals, name in NAMED[cls]:
        value = file_globals.get(name)
        if type(value) in CONTAINERS or isinstance(value, functools._lru_cache_wrapper):
            yield value


def _names(cls: type) -> Iterator[tuple[dict[str, Any], str]]:
    """(globals of a file, name) of all global variables that the functions of a class name, or that functions named by
    these do; functions, classes and modules themselves are left out."""
    functions = [value for value in vars(cls).values() if isinstance(value, types.FunctionType)]
    seen = set(map(id, functions))
    while functions:
        function = functions.pop()
        for name in _names_in_code(function.__code__):
            if name not in function.__globals__ or id(function.__globals__[name]) in seen:
                continue
            value = function.__globals__[name]
            seen.add(id(value))
            if not isinstance(value, (types.FunctionType, type, types.ModuleType)):
                yield function.__globals__, name
            inner = getattr(value, "__wrapped__", value)  # what is inside a decorator
            if isinstance(inner, types.FunctionType) and inner.__module__.partition(".")[0] not in NOBODY_WRITES:
                functions.append(inner)


def _names_in_code(code: types.CodeType) -> Iterator[str]:
    """The names of globals and attributes in a function's code, and in that of the functions inside it."""
    codes = [code]
    while codes:
        code = codes.pop()
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
        yield from code.co_names
