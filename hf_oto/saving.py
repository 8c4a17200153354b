"""Makes stock classes honour the record: after `import hf_oto`, a config with `oto` in it builds a compact model.

Stands beside modeling_oto.py and holds what must not travel with a checkpoint. The hook sits where a model object
comes into being, `PreTrainedModel.__new__`: `from_pretrained`, `from_config` and `Cls(config)`, of Auto and concrete
classes, all pass there with the resolved config in hand, so none of them is wrapped or repeated. A second one says at
the end of `from_pretrained` which weights the record doesn't fit.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .modeling_oto import compact_class, finish_loading


def _new(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> PreTrainedModel:
    """An object of `cls`, or of its compact class if the config, the first argument, carries a record.

    Sub-models never see the record of the model they are part of: `CompactMixin.__init__` hides it from them.
    """
    config = args[0] if args else kwargs.get("config")
    if isinstance(config, PreTrainedConfig) and "oto" in vars(config):
        cls = compact_class(cls)  # a subclass of cls, so Python goes on to call its __init__
    return super(PreTrainedModel, cls).__new__(cls)


def install_hook() -> None:
    """Installs the hooks; installing them again changes nothing. Configs without a record are built as ever."""
    PreTrainedModel.__new__ = staticmethod(_new)
    PreTrainedModel._finalize_model_loading = staticmethod(finish_loading)
