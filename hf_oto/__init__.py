"""Train once, get a compact model back: OTOv2 for Hugging Face (arXiv 2303.06862)."""

from . import saving
from .compact import compact
from .partition import check_zero_invariance, partition_zigs
from .zigs import PruningPlan, ZIGPartition
