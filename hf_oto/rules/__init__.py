"""One short function per ATen op: how the dimensions it takes become the dimensions it gives.

`apply_rules` walks a trace once and fills the axis algebra; an op without a rule, or a rule that fails, pins. A new op
is one function, with its ATen names above it, in the file of its kind.
"""

from . import contractions, elementwise, layout, lookups, others, reductions  # noqa: F401 (which fills RULES)
from .contractions import multiplications
from .reductions import reduced_dims
from .state import RULES, Axes
from .walk import apply_rules, without_repeats

__all__ = ["RULES", "Axes", "apply_rules", "multiplications", "reduced_dims", "without_repeats"]
