"""Restoring a model: everything that its modules keep is remembered, and put back bit by bit, whatever was raised.

The trace, the rehearsal, the certificate and the measurements need this. Each of them changes a model for a moment:
its mode, its weights, its sizes, whatever its forward keeps. `restored` undoes all of these changes, so nobody copies
the user's model. What a forward does while it is looked at is in evaluating.py.

Worked example: a module has the attributes {"training": True, "cache": [t]}. The walk remembers two containers, the
dict of attributes and the list, each with a shallow copy. If a forward then appends to the list and eval() sets
training to False, both containers are filled again from their copies. The tensor t is never copied.
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
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .named_globals import keeps_nothing, named_globals

# exactly these types: a subclass may do anything when it is written to
CONTAINERS = (dict, OrderedDict, defaultdict, list, deque, set)
ATOMS = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size}
NO_OBJECTS = (int, str, torch.Tensor, type, enum.Enum, types.ModuleType)
CALLABLES = (types.FunctionType, types.MethodType, functools.partial)
# what no container holds, but a forward may change all the same
STATES = (
    torch.Generator, np.random.Generator, np.random.RandomState, random.Random, np.ndarray,
    functools._lru_cache_wrapper,
)  # fmt: skip
DEPTH = 3  # levels of containers and objects in a module's attributes; deeper ones may be data sets or trainers
MANY = 1000  # entries: a container with more may be a data set; it is remembered, but its entries are not
LARGE = 2**26  # bytes: no forward counts in an array that is larger


State = tuple[Callable[[Any], Any], Any]  # (setter, value): what is no container is put back by setter(value)


class Contents(NamedTuple):
    """What a model's modules keep, as it was when it was remembered."""

    containers: list[tuple[Any, Any]]  # (container, its shallow copy)
    states: list[State]


def contents(model: nn.Module, *owners: Any) -> Contents:
    """Remembers what the modules of a model keep; tensors are not copied.

    Modules that are registered nowhere are remembered too, and so is what functions and classes keep for the model:
    the closures of hooks and of a patched forward, attributes of its classes, caches, and the containers in its files
    that its classes name.

    Args:
        owners: other objects, whose own attributes are remembered too, with the containers in them.
    """
    walk = _Walk(model, owners)
    copies = []
    for container in walk.containers:
        copies.append((container, container.copy()))
    return Contents(copies, walk.states)


class _Walk:
    """One walk through all that a model keeps, which collects `containers` and `states`."""

    # a class, because a closure that calls itself would live until the garbage collector comes, and tensors with it

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
        is_leaf = isinstance(container, set) or len(container) > MANY
        if is_leaf or not depth:
            return
        values = container.values() if isinstance(container, dict) else container
        for inner in list(values):  # a copy: asking an object for its attributes may run code that writes here
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
        if isinstance(module, torch.jit.ScriptModule):  # its mode is not in vars(module)
            set_mode = functools.partial(setattr, module, "training")
            self.states.append((set_mode, module.training))
        for cls in type(module).__mro__:
            if id(cls) not in self._seen and not keeps_nothing(cls.__module__):
                self._enter_class(cls)

    def _enter_class(self, cls: type) -> None:
        self._seen.add(id(cls))
        set_attributes = functools.partial(_put_back_class, cls)
        self.states.append((set_attributes, dict(vars(cls))))
        self._visit_all(_attributes(cls), 1)
        self._visit_all(_kept_in_globals(cls), 1)


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
    if issubclass(cls, CALLABLES):
        return "callable"
    return "object"


def put_back(kept: Contents) -> None:
    """Fills every container with what it held, the same objects in the same order, and sets every state."""
    # the order of the parameters in their dict is their order in `state_dict` and in the optimizer
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
    """While open, anything that the model's modules keep may be changed; in the end all of it is as it was.

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

    def wait(*given: Any) -> None:
        waiting.append(given)

    handler = signal.signal(signal.SIGINT, wait)
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

    @property
    def tensor(self) -> torch.Tensor:
        """What is there now."""
        value = self.container[self.key]
        return value if self.position is None else value[self.position]

    def put(self, tensor: torch.Tensor) -> None:
        """Puts another tensor there."""
        if self.position is None:
            self.container[self.key] = tensor
            return
        old = self.container[self.key]
        items = list(old)
        items[self.position] = tensor
        is_named_tuple = hasattr(old, "_fields")
        # a tuple can't be written to: a new one takes its place
        self.container[self.key] = type(old)(*items) if is_named_tuple else tuple(items)


def places(model: nn.Module) -> dict[int, list[Place]]:
    """Id of a tensor -> all places where the modules keep it.

    A tensor is kept as a parameter or buffer, under one name or several, as an attribute, or in a list (the flat
    weights of recurrent layers).
    """
    return places_in(_Walk(model).containers)


def places_in(containers: Iterable[Any]) -> dict[int, list[Place]]:
    """`places`, of some containers."""
    places_of_id: dict[int, list[Place]] = {}
    for container in containers:
        if isinstance(container, set):  # an entry of a set has no place
            continue
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in items:
            if is_tensor(type(value)):
                place = Place(container, key, None)
                places_of_id.setdefault(id(value), []).append(place)
            elif isinstance(value, tuple):
                for position, inner in enumerate(value):
                    if is_tensor(type(inner)):
                        place = Place(container, key, position)
                        places_of_id.setdefault(id(inner), []).append(place)
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
    places_of_id = places_in(container for container, _ in kept.containers)
    for old_id, places_of_tensor in places_of_id.items():
        if old_id in new:
            for place in places_of_tensor:
                place.put(new[old_id])


def _is_same(container: Any, before: Any) -> bool:
    """Whether a container holds the same objects in the same order as its copy; then nothing is put back into it."""
    if len(container) != len(before):
        return False
    if not before:
        return True
    if isinstance(container, set):
        return container == before
    is_same = all(map(operator.is_, container, before))  # of a dict, these are the keys
    if isinstance(container, dict):
        return is_same and all(map(operator.is_, container.values(), before.values()))
    return is_same


EMPTY = object()  # stands for the value of a cell or slot that has none


def _state(value: Any) -> State | None:
    """How to put back what isn't kept in Python's containers: generators of random numbers, caches, small arrays."""
    if isinstance(value, torch.Generator):
        return value.set_state, value.get_state()
    if isinstance(value, random.SystemRandom):  # it has no state, and `seed` does nothing
        return value.seed, None
    if isinstance(value, random.Random):
        return value.setstate, value.getstate()
    if isinstance(value, np.random.RandomState):
        return value.set_state, value.get_state()
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        set_bits = functools.partial(setattr, bits, "state")
        return set_bits, bits.state
    if isinstance(value, functools._lru_cache_wrapper):
        forget = functools.partial(_forget, value)
        return forget, value.cache_info().misses
    if type(value) is np.ndarray:
        can_be_written = value.flags.writeable and not value.dtype.hasobject
        if can_be_written and value.nbytes <= LARGE:
            fill = functools.partial(np.copyto, value)
            return fill, value.copy()
    return None


def _forget(cache: Any, misses: int) -> None:
    """Empties a cache that had fewer misses when it was remembered: then it has taken in new entries."""
    # a single entry can't be taken out
    if cache.cache_info().misses != misses:
        cache.cache_clear()


def _cells(function: Any) -> Iterator[State]:
    """The variables that a function shares with the functions around it."""
    cells = getattr(function, "__closure__", None) or ()
    for cell in cells:
        put_back_value = functools.partial(_put_back_cell, cell)
        yield put_back_value, _value(cell)


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
    found = []
    for slot in _members(type(value)):
        if hasattr(value, slot.__name__):
            found.append((slot, slot.__get__(value)))
    return found


def _slots(value: Any) -> Iterator[State]:
    """All slots of an object, with EMPTY for those without a value."""
    value_of_slot = dict(slots_of(value))
    for slot in _members(type(value)):
        put_back_value = functools.partial(_put_back_slot, slot, value)
        yield put_back_value, value_of_slot.get(slot, EMPTY)


def _put_back_slot(slot: types.MemberDescriptorType, owner: Any, value: Any) -> None:
    if value is not EMPTY:
        slot.__set__(owner, value)
    elif hasattr(owner, slot.__name__):
        slot.__delete__(owner)


def _put_back_class(cls: type, before: Mapping[str, Any]) -> None:
    for name in vars(cls).keys() - before.keys():
        delattr(cls, name)
    for name, value in before.items():
        is_changed = vars(cls).get(name) is not value
        # some of Python's own attributes, such as `__dict__`, can't be set
        if is_changed and not name.startswith("__"):
            setattr(cls, name, value)


def _is_cache(value: Any) -> bool:
    return isinstance(value, functools._lru_cache_wrapper)


def _attributes(cls: type) -> list[Any]:
    """The attributes of a class that may change: caches, and everything that is no function."""
    values = []
    caches = []
    for name, value in vars(cls).items():
        if _is_cache(value):
            caches.append(value)
        elif not name.startswith("__") and not callable(value):
            values.append(value)
    return values + caches


def _kept_in_globals(cls: type) -> Iterator[Any]:
    """The containers and caches that are global variables of a file and that the functions of a class name."""
    for value in named_globals(cls):
        if type(value) in CONTAINERS or _is_cache(value):
            yield value
