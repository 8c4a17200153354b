"""Train once, get a compact model back: OTOv2 (arXiv 2303.06862) for Hugging Face.

Importing it makes `from_pretrained` of stock Transformers classes load compact models.
"""

from .certificate import check_zero_invariance
from .cut import compact
from .dense import to_dense
from .dhspg import DHSPG
from .modeling_oto import OTOError
from .partition import partition_zigs
from .saving import install_hook
from .trainer import (
    OTOArguments,
    OTOMixin,
    OTOSeq2SeqTrainer,
    OTOSeq2SeqTrainingArguments,
    OTOTrainer,
    OTOTrainingArguments,
)
from .zigs import PruningPlan, ZIGPartition

install_hook()

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
    "check_zero_invariance",
    "compact",
    "partition_zigs",
    "to_dense",
]
