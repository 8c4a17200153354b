"""Makes stock classes honour the record: after `import hf_oto`, a config with `oto` in it builds a compact model.

This is what must not travel with a checkpoint, unlike modeling_oto.py: it changes `PreTrainedModel` for everybody. One
hook is put where every model object comes into being, `PreTrainedModel.__new__`. There `from_pretrained`,
`from_config` and `Cls(config)`, of Auto and concrete classes, all pass with the resolved config, so none of them has
to be wrapped or repeated. A second hook, at the end of `from_pretrained`, says which weights the record doesn't fit.
Both hooks call what another library has put in the same place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .modeling_oto import asks_for_compact, compact_class, finish_loading


def install_hook() -> None:
    """Installs the hooks; installing them again changes nothing. Configs without a record are built as ever."""
    stock_new = vars(PreTrainedModel).get("__new__", _create_as_python_does)
    _install("__new__", _create, before=stock_new)
    stock_finish = vars(PreTrainedModel).get("_finalize_model_loading")
    if stock_finish is not None:  # private: without it errors are only less clear
        _install("_finalize_model_loading", finish_loading, before=stock_finish)


def _install(name: str, hook: Callable[..., Any], before: Any) -> None:
    """Puts a hook under a name of `PreTrainedModel`.

    Where others have put a function of theirs over our hook, the hook goes over theirs once more. If theirs calls our
    first hook too, the hook is called twice, which does the same as calling it once.

    Args:
        before: what stood under that name, and the hook's first argument.
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
    """What Python calls where nobody has defined `PreTrainedModel.__new__`."""
    inherited = super(PreTrainedModel, cls).__new__
    if inherited is object.__new__:  # which refuses the arguments of `__init__`
        return inherited(cls)
    return inherited(cls, *args, **kwargs)
