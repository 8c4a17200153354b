"""Makes stock classes honour the record: after `import hf_oto`, a config with `oto` in it builds a compact model.

Stands beside modeling_oto.py and holds what must not travel with a checkpoint. The hook sits where a model object
comes into being, `PreTrainedModel.__new__`: `from_pretrained`, `from_config` and `Cls(config)`, of Auto and concrete
classes, all pass there with the resolved config in hand, so none of them is wrapped or repeated. A second one says at
the end of `from_pretrained` which weights the record doesn't fit. What another library has put in either place is
called by ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .modeling_oto import asks_for_compact, compact_class, finish_loading


def install_hook() -> None:
    """Installs the hooks; installing them again changes nothing. Configs without a record are built as ever."""
    _install("__new__", _create, before=vars(PreTrainedModel).get("__new__", _create_as_python_does))
    if "_finalize_model_loading" in vars(PreTrainedModel):  # private: without it errors are only less clear
        _install("_finalize_model_loading", finish_loading, before=vars(PreTrainedModel)["_finalize_model_loading"])


def _install(name: str, hook: Callable[..., Any], before: Any) -> None:
    """Puts `hook` under a name of `PreTrainedModel`; `before` is what stood there, and the hook's first argument.

    Where others have put a function of theirs over our hook, the hook goes over theirs once more. It is then called
    twice if theirs calls it too, and what it does twice is as if done once.
    """
    before = before.__func__ if isinstance(before, staticmethod) else before
    if getattr(before, "_oto_hook", False):
        return

    @wraps(before)
    def chained(*args: Any, **kwargs: Any) -> Any:
        return hook(before, *args, **kwargs)

    chained._oto_hook = True
    setattr(PreTrainedModel, name, staticmethod(chained))


def _create(before: Callable[..., Any], cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> PreTrainedModel:
    """An object of `cls`, or of its compact class if the config, the first argument, carries a record."""
    config = args[0] if args else kwargs.get("config")
    if isinstance(config, PreTrainedConfig) and asks_for_compact(config):
        cls = compact_class(cls)  # a subclass of cls, so Python goes on to call its __init__
    return before(cls, *args, **kwargs)


def _create_as_python_does(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> PreTrainedModel:
    """What is called where nobody has defined `PreTrainedModel.__new__`."""
    inherited = super(PreTrainedModel, cls).__new__
    return inherited(cls) if inherited is object.__new__ else inherited(cls, *args, **kwargs)
