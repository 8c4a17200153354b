"""An optimizer around another one: whoever uses it finds the groups, the state and the defaults of the inner one.

DHSPG is an optimizer around its base. Schedulers, scalers, accelerate, FSDP2 and checkpoints treat it as they treat
the base, because all that they read or write is the base's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .modeling_oto import OTOError


class AroundOptimizer(torch.optim.Optimizer):
    """An optimizer that has no groups and no state of its own.

    Attributes:
        base: the inner optimizer.
    """

    # a fused kernel that unscales gradients also skips steps and doesn't tell us: GradScaler has to do both itself
    _step_supports_amp_scaling = False

    def _put_around(self, base: torch.optim.Optimizer, model: torch.nn.Module) -> None:
        """Takes a base optimizer, and names its parameters as the model does; in the place of torch's own `__init__`.

        Raises:
            OTOError: the base trains no parameter of the model.
        """
        names = {id(p): name for name, p in model.named_parameters()}
        if not any(id(p) in names for group in base.param_groups for p in group["params"]):
            raise OTOError(
                f"{type(base).__name__} trains no parameter of {type(model).__name__} in its step: make it with "
                "model.parameters()"
            )
        num_foreign = 0  # parameters of a loss, say
        for group in base.param_groups:
            group["param_names"] = []
            for p in group["params"]:
                if id(p) not in names:
                    num_foreign += 1
                group["param_names"].append(names.get(id(p), f"not in the model: {num_foreign}"))
        self.base = base
        super().__setstate__({})  # makes what torch's own __init__ makes, but for groups and state

    def parameters_by_name(self) -> dict[str, Tensor]:
        """The parameters as they are now; they are never kept, because FSDP replaces them in the groups."""
        params: dict[str, Tensor] = {}
        for group in self.param_groups:
            params.update(zip(group["param_names"], group["params"], strict=True))
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

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's."""
        return self.base.defaults

    def __getattr__(self, name: str) -> Any:
        """The base optimizer's; some have methods of their own, `train` and `eval` say."""
        if name.startswith("__") or "base" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.base, name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer; its parameters train and are not pruned."""
        group = without_names(param_group)
        num_so_far = sum(len(g["params"]) for g in self.param_groups)
        group["params"] = [(f"added: {num_so_far + i}", p) for i, p in enumerate(group["params"])]
        self.base.add_param_group(group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base optimizer's."""
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The base optimizer's."""
        self.base.load_state_dict(state_dict)

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
        """Without hooks, as torch has it, and without the `step` that a scheduler puts on the instance."""
        kept = {name: value for name, value in vars(self).items() if not name.startswith("_optimizer_")}
        kept.pop("step", None)
        return kept


def made(
    cls: type[torch.optim.Optimizer],
    model: torch.nn.Module,
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
    given = [p for p in model.parameters() if p.requires_grad] if params is None else list(params)
    are_groups = given and isinstance(given[0], Mapping)
    groups = given if are_groups else [{"params": given}]
    return cls([without_names(group) for group in groups], lr=1e-3 if lr is None else lr, **settings)


def without_names(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group without names; it may have one parameter, parameters, or pairs of name and parameter."""
    given = group["params"]
    given = [given] if isinstance(given, Tensor) else given
    params = [p[1] if isinstance(p, tuple) else p for p in given]
    return {**group, "params": params}
