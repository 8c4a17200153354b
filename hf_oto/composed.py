"""An optimizer around another one: whoever uses it finds the groups, the state and the defaults of the inner one.

DHSPG is an optimizer around its base. Schedulers, scalers, accelerate, FSDP2 and checkpoints treat it as they treat
the base, because all that they read or write is the base's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .modeling_oto import OTOError

OF_SCHEDULERS = {"initial_lr"}  # entries of groups that are no settings of an optimizer


class AroundOptimizer(torch.optim.Optimizer):
    """An optimizer that has no groups and no state of its own.

    Attributes:
        base: the inner optimizer.
    """

    # A fused kernel that unscales gradients also skips steps and doesn't tell us: GradScaler has to do both itself.
    _step_supports_amp_scaling = False

    def _put_around(self, base: torch.optim.Optimizer, model: nn.Module) -> None:
        """Takes a base optimizer, and names its parameters as the model does.

        This is called in the place of torch's own `__init__`, which would make groups and state.

        Raises:
            OTOError: the base trains no parameter of the model.
        """
        # By id, because == compares the entries of tensors.
        names = {id(p): name for name, p in model.named_parameters()}
        _check_trained(base, model, names)
        num_foreign = 0  # parameters of a loss, say
        for group in base.param_groups:
            param_names = []
            for p in group["params"]:
                name = names.get(id(p))
                if name is None:
                    num_foreign += 1
                    name = f"not in the model: {num_foreign}"
                param_names.append(name)
            group["param_names"] = param_names
        self.base = base
        # Makes what torch's own __init__ makes, but for groups and state.
        super().__setstate__({})

    def parameters_by_name(self) -> dict[str, Tensor]:
        """The parameters as they are now; they are never kept, because FSDP replaces them in the groups."""
        params: dict[str, Tensor] = {}
        for group in self.param_groups:
            if len(group["param_names"]) != len(group["params"]):
                raise OTOError(
                    "the optimizer has got other parameters than those it was made for: under DeepSpeed's ZeRO they "
                    "are flat, and `hf_oto.zero.ZeroDHSPG` takes the place of DHSPG"
                )
            named = zip(group["param_names"], group["params"], strict=True)
            params.update(named)
        return params

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    def state_of(self, p: Tensor) -> Mapping[str, Any]:
        """The base optimizer's state of a parameter, empty where there is none."""
        return self.state[p] if p in self.state else {}  # reading a defaultdict would add p to it

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's."""
        return self.base.defaults

    def __getattr__(self, name: str) -> Any:
        """The base optimizer's; some have methods of their own, `train` and `eval` say."""
        is_special = name.startswith("__")
        # pickle and copy ask for attributes before there is a base; to look it up here would never end.
        if is_special or "base" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.base, name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer; its parameters train and are not pruned."""
        group = without_names(param_group)
        number = sum(len(earlier["params"]) for earlier in self.param_groups)
        # torch takes a group with names only if all groups have some, as ours do.
        named = []
        for p in group["params"]:
            named.append((f"added: {number}", p))
            number += 1
        group["params"] = named
        self.base.add_param_group(group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base optimizer's."""
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The base optimizer's.

        Raises:
            OTOError: the state is of another kind of optimizer, which torch would find out in the next step only.
        """
        saved = state_dict["param_groups"][0].keys()
        lacking = self.defaults.keys() - saved
        foreign = saved - self.param_groups[0].keys() - OF_SCHEDULERS
        # other releases of torch may know one setting more or less, but not both
        if lacking and foreign:
            raise OTOError(
                f"this optimizer state is not of {type(self.base).__name__}: it has {min(foreign)!r} and no "
                f"{min(lacking)!r}. Go on with the kind of optimizer (`optim`) that the run began with"
            )
        self.base.load_state_dict(state_dict)

    # The hooks of states, too, have to see the base: it is the one that makes and loads them.

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """The base optimizer's."""
        return self.base.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """The base optimizer's."""
        return self.base.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """The base optimizer's."""
        return self.base.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """The base optimizer's."""
        return self.base.register_load_state_dict_post_hook(hook, prepend)

    def __getstate__(self) -> dict[str, Any]:
        """The attributes that are pickled and copied.

        Hooks are left out, as torch leaves them out, and so is the `step` that a scheduler puts on the instance.
        """
        kept = {}
        # What is left out calls this very object, and would not call its copy.
        for name, value in vars(self).items():
            is_of_hooks = name.startswith("_optimizer_")
            if not is_of_hooks and name != "step":
                kept[name] = value
        return kept


def _check_trained(base: torch.optim.Optimizer, model: nn.Module, names: Mapping[int, str]) -> None:
    """Checks that an optimizer trains a parameter of the model.

    Args:
        names: id -> name of the parameters of the model.
    """
    for group in base.param_groups:
        for p in group["params"]:
            # One is enough: others may be frozen, or belong to a loss.
            if id(p) in names:
                return
    fact = f"{type(base).__name__} trains no parameter of {type(model).__name__} in its step"
    if not any(p.requires_grad for p in model.parameters()):
        raise OTOError(f"{fact}: all of its parameters are frozen, so unfreeze some (requires_grad)")
    raise OTOError(f"{fact}: make it with model.parameters()")


def made(
    cls: type[torch.optim.Optimizer],
    model: nn.Module,
    lr: float | None,
    params: Iterable[Any] | None,
    settings: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """Makes an optimizer of a class.

    Args:
        lr: learning rate; None: 1e-3.
        params: parameters or groups of them; None: all parameters of the model that require gradients.
        settings: the other arguments of the class.
    """
    if params is None:
        params = [p for p in model.parameters() if p.requires_grad]
    if lr is None:
        lr = 1e-3
    groups = list(params)
    are_groups = bool(groups) and isinstance(groups[0], Mapping)
    if not are_groups:
        groups = [{"params": groups}]
    # torch refuses names in some groups only, and `_put_around` gives names to all parameters.
    unnamed = [without_names(group) for group in groups]
    return cls(unnamed, lr=lr, **settings)


def without_names(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group without names; it may have one parameter, parameters, or pairs of name and parameter."""
    given = group["params"]
    if isinstance(given, Tensor):
        given = [given]
    params = []
    for p in given:
        if isinstance(p, tuple):
            p = p[1]
        params.append(p)
    return {**group, "params": params}
