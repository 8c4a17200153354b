"""Train once, get a compact model back: OTOv2 (arXiv 2303.06862) for Hugging Face.

Importing it makes `from_pretrained` of stock Transformers classes load compact models, and costs little more than
Transformers: everything else is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .modeling_oto import OTOError
from .saving import install_hook

if TYPE_CHECKING:
    from .arguments import OTOArguments, OTOSeq2SeqTrainingArguments, OTOTrainingArguments
    from .certificate import check_zero_invariance
    from .compaction import compact
    from .dense import to_dense
    from .dhspg import DHSPG
    from .partition import partition_zigs
    from .pruning import prune
    from .report import measure
    from .trainer import OTOMixin, OTOSeq2SeqTrainer, OTOTrainer
    from .zigs import PruningPlan, ZIGPartition

__version__ = "0.1.0"

__all__ = [
    "DHSPG",
    "OTOArguments",
    "OTOError",
    "OTOMixin",
    "OTOSeq2SeqTrainer",
    "OTOSeq2SeqTrainingArguments",
    "OTOTrainer",
    "OTOTrainingArguments",
    "PruningPlan",
    "ZIGPartition",
    "__version__",
    "check_zero_invariance",
    "compact",
    "measure",
    "partition_zigs",
    "prune",
    "to_dense",
]

_MODULE_OF = {
    "DHSPG": "dhspg",
    "OTOArguments": "arguments",
    "OTOMixin": "trainer",
    "OTOSeq2SeqTrainer": "trainer",
    "OTOSeq2SeqTrainingArguments": "arguments",
    "OTOTrainer": "trainer",
    "OTOTrainingArguments": "arguments",
    "PruningPlan": "zigs",
    "ZIGPartition": "zigs",
    "check_zero_invariance": "certificate",
    "compact": "compaction",
    "measure": "report",
    "partition_zigs": "partition",
    "prune": "pruning",
    "to_dense": "dense",
}

install_hook()


def __getattr__(name: str) -> Any:
    """Imports what is asked for the first time."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
