"""A model as it was: everything its modules keep is remembered, and put back bit by bit, whatever was raised.

Stands under the trace, the rehearsal, the certificate and the measurements. Each of them changes a model for a moment
(its mode, its weights, its sizes, whatever its forward keeps), and `restored` is the one undo for all of that: nobody
copies the user's model. What a forward does while it is looked at is in evaluating.py.
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

# these very types: what a subclass does when it is written to is its own affair
CONTAINERS = (dict, OrderedDict, defaultdict, list, deque, set)
ATOMS = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size}
NO_OBJECTS = (int, str, torch.Tensor, type, enum.Enum, types.ModuleType)
CALLABLES = (types.FunctionType, types.MethodType, functools.partial)
STATES = (
    torch.Generator, np.random.Generator, np.random.RandomState, random.Random, np.ndarray,
    functools._lru_cache_wrapper,
)  # fmt: skip
DEPTH = 3  # of containers and objects inside a module's own: beyond may lie data sets, trainers, the world
MANY = 1000  # entries: a container with more may be a data set, and is remembered, but not entered
LARGE = 2**26  # bytes: an array that is larger is no counter
NOBODY_WRITES = ("torch", "builtins")  # packages whose classes keep nothing for one model


class Contents(NamedTuple):
    """What a model's modules keep: every container with a shallow copy, and what is none as (setter, value)."""

    containers: list[tuple[Any, Any]]
    states: list[tuple[Callable[[Any], Any], Any]]


def contents(model: nn.Module, *owners: Any) -> Contents:
    """Remembers what the modules of a model keep; tensors are not copied.

    Modules that are registered nowhere count, too, and so does what functions keep for the model: the closures of
    hooks and of a patched forward, its classes' attributes, containers of its files that its classes name, caches.

    Args:
        owners: other objects, whose own attributes are remembered too, with the containers in them.
    """
    walk = _Walk(model, owners)
    return Contents([(container, container.copy()) for container in walk.containers], walk.states)


class _Walk:
    """One walk through all that a model keeps: `containers`, and `states` as (setter, value).

    A class, as a closure that calls itself lives until the garbage collector comes, and tensors with it.
    """

    def __init__(self, model: nn.Module, owners: Sequence[Any] = ()) -> None:
        self.containers: list[Any] = []
        self.states: list[tuple[Callable[[Any], Any], Any]] = []
        self._seen: set[int] = set()
        for owner in owners:
            self._enter(vars(owner), DEPTH, objects=False)
        for module in model.modules():
            if id(module) not in self._seen:
                self._enter_module(module)

    def _enter(self, container: Any, depth: int, objects: bool = True) -> None:
        self._seen.add(id(container))
        self.containers.append(container)
        if not depth or isinstance(container, set) or len(container) > MANY:
            return
        for inner in list(container.values() if isinstance(container, dict) else container):
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
            self.states += [state] if (state := _state(value)) else []
        elif objects:
            self._seen.add(id(value))
            if kind == "callable":
                self.states += _cells(value)
                self._visit_all(held(value), depth)  # a function is no step deeper
            else:
                self.states += _slots(value)
                # of some classes this is a read-only view
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
            if id(cls) not in self._seen and cls.__module__.partition(".")[0] not in NOBODY_WRITES:
                self._seen.add(id(cls))
                self.states.append((functools.partial(_put_back_class, cls), dict(vars(cls))))
                self._visit_all((*_attributes(cls), *_named_globals(cls)), 1)


@functools.lru_cache(4096)
def _kind(cls: type) -> str:
    """What the values of a type are to a walk: asked of tens of thousands of values, and of few types."""
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
    """Makes every container what it was, the same objects in the same order: that of parameters is that of
    `state_dict` and of the optimizer."""
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
    """While open, anything may be done to what the model's modules keep, and to the attributes of other objects; in
    the end all of it is as it was."""
    kept = contents(model, *owners)
    try:
        yield kept
    finally:
        put_back(kept)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """While open, Ctrl-C waits: what is being put back is put back whole."""
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
    """Where a module keeps a tensor: `container[key]`, or there at this position of a tuple."""

    container: Any
    key: Any
    position: int | None

    def put(self, tensor: torch.Tensor) -> None:
        """Puts another tensor there."""
        if self.position is None:
            self.container[self.key] = tensor
            return
        whole = self.container[self.key]
        items = [*whole[: self.position], tensor, *whole[self.position + 1 :]]
        self.container[self.key] = type(whole)(*items) if hasattr(whole, "_fields") else tuple(items)


def places(model: nn.Module) -> dict[int, list[Place]]:
    """Where the modules keep every tensor, by its id: as parameter or buffer, under one name or several, as an
    attribute, in a list (the flat weights of recurrent layers)."""
    return _places(_Walk(model).containers)


def _places(containers: Iterable[Any]) -> dict[int, list[Place]]:
    found: dict[int, list[Place]] = {}
    for container in containers:
        if isinstance(container, set):
            continue
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            if is_tensor(type(value)):
                found.setdefault(id(value), []).append(Place(container, key, None))
            elif isinstance(value, tuple):
                for position, inner in enumerate(value):
                    if is_tensor(type(inner)):
                        found.setdefault(id(inner), []).append(Place(container, key, position))
    return found


@functools.lru_cache(4096)
def is_tensor(cls: type) -> bool:
    return issubclass(cls, torch.Tensor)


def replace_tensors_(kept: Contents, new: Mapping[int, torch.Tensor]) -> None:
    """Puts new tensors in the place of old ones, wherever the modules keep these.

    Args:
        kept: the contents of the model.
        new: id of the old tensor -> the new one. The old ones must be alive.
    """
    for old, somewhere in _places(container for container, _ in kept.containers).items():
        for place in somewhere if old in new else ():
            place.put(new[old])


def _is_same(container: Any, before: Any) -> bool:
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


EMPTY = object()  # of a cell or a slot that nothing was put in


def _state(value: Any) -> tuple[Callable[[Any], Any], Any] | None:
    """(setter, state) of what lives in C: generators of random numbers, caches, small arrays."""
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
    if type(value) is np.ndarray and value.flags.writeable and not value.dtype.hasobject and value.nbytes <= LARGE:
        return functools.partial(np.copyto, value), value.copy()
    return None


def _forget(cache: Any, misses: int) -> None:
    """Empties a cache that has taken something up: of the entries, one can't be taken out alone."""
    if cache.cache_info().misses != misses:
        cache.cache_clear()


def _cells(function: Any) -> Iterator[tuple[Callable[[Any], Any], Any]]:
    """(setter, value) of the variables that a function shares with others."""
    for cell in getattr(function, "__closure__", None) or ():
        yield functools.partial(_put_back_cell, cell), _value(cell)


def _value(cell: types.CellType) -> Any:
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
    """What a function holds: the values of its closure and its defaults, what is bound to it."""
    if isinstance(function, functools.partial):
        return [function.func, *function.args, *function.keywords.values()]
    if isinstance(function, types.MethodType):
        return [function.__self__, function.__func__]
    shared = [_value(cell) for cell in function.__closure__ or ()]
    return [*shared, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), vars(function)]


def slots_of(value: Any) -> list[tuple[types.MemberDescriptorType, Any]]:
    """(slot, value) of the slots of an object that have one."""
    slots = (slot for cls in type(value).__mro__ if "__slots__" in vars(cls) for slot in vars(cls).values())
    members = [slot for slot in slots if isinstance(slot, types.MemberDescriptorType)]
    return [(slot, slot.__get__(value)) for slot in members if hasattr(value, slot.__name__)]


def _slots(value: Any) -> Iterator[tuple[Callable[[Any], Any], Any]]:
    """(setter, value) of the slots of an object."""
    full = dict(slots_of(value))
    for cls in type(value).__mro__:
        for slot in vars(cls).values() if "__slots__" in vars(cls) else ():
            if isinstance(slot, types.MemberDescriptorType):
                yield functools.partial(_put_back_slot, slot, value), full.get(slot, EMPTY)


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
    return [value for name, value in vars(cls).items() if not name.startswith("__") and not callable(value)] + [
        value for value in vars(cls).values() if isinstance(value, functools._lru_cache_wrapper)
    ]


NAMED: weakref.WeakKeyDictionary[type, list[tuple[dict[str, Any], str]]] = weakref.WeakKeyDictionary()


def _named_globals(cls: type) -> Iterator[Any]:
    """The containers and caches of a file that the functions of a class name."""
    if cls not in NAMED:
        NAMED[cls] = [*_names(cls)]
    for where, name in NAMED[cls]:
        value = where.get(name)
        if type(value) in CONTAINERS or isinstance(value, functools._lru_cache_wrapper):
            yield value


def _names(cls: type) -> Iterator[tuple[dict[str, Any], str]]:
    """(globals, name) of all that the functions of a class name and that is no function, class or module, they or
    functions that they name."""
    todo = [f for f in vars(cls).values() if isinstance(f, types.FunctionType)]
    seen = set(map(id, todo))
    while todo:
        function = todo.pop()
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
            for name in code.co_names:
                if name not in function.__globals__ or id(function.__globals__[name]) in seen:
                    continue
                value = function.__globals__[name]
                seen.add(id(value))
                if not isinstance(value, (types.FunctionType, type, types.ModuleType)):
                    yield function.__globals__, name
                inner = getattr(value, "__wrapped__", value)
                if isinstance(inner, types.FunctionType) and inner.__module__.partition(".")[0] not in NOBODY_WRITES:
                    todo.append(inner)
