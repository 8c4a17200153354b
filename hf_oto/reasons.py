"""Why a position stays, and what would lift the pin: every reason that the rules, the solver and the rehearsal give.

{} is what differs from case to case; where one layer is to blame a reason ends with it, " in encoder.layer.0".
"""

from __future__ import annotations

import functools
import re

OUTPUT = "it is part of the model's output"
MEETS = "it meets a position that stays (of an input or an index, say)"
STAYS = "it meets a position that can't go"
FACTORS = "its factors don't fit those of another axis"
FIXED = "a fixed position of it is read"
STRIDE = "its positions are read at a stride"
WRAPS = "it is rolled over the end by a fixed number of positions"
MEMORY = "{} reads memory by strides"
NUMBERED = "positions are looked up by number"
INDEX = "it is an index"
SPATIAL = "it is a spatial axis"
NEIGHBOURS = "its neighbours are pooled or resized with it"
KERNEL = "it is a position of a kernel"
PLANE = "it becomes part of the image plane"
COMPLEX = "it holds the parts of a complex number"
SUMMED = "summed over, and neither side becomes zero"
SUM = "it is summed over, and not zero"
NORM = "a norm is taken over it"
AVERAGE = "an average is taken over it"
TAKEN = "{} is taken over it"
OBSERVED = "an observer takes its minimum and maximum"
ALONG = "{} runs along it"
MIXED = "{} mixes all its positions"
LAYER_NORM = "a layer norm takes mean and variance over it"
GROUP_NORM = "a group norm takes mean and variance over it"
BATCH_NORM = "a batch norm averages over it"
ATTENTION = "attention runs over it"
GATES = "it counts the gates of a recurrent layer"
STEPS = "a recurrent layer runs along it"
SYSTEM = "a linear system is solved along it"
TRIANGLE = "a triangle is cut out of it"
DIVISOR = "it is divided by, and becomes zero"
RANDOM = "{} draws random numbers for each of its positions"
LOSS = "a loss compares it with a target"
FUSED = "{} is one kernel of a GPU"
BY_NUMBER = "flex attention may treat each of its heads and positions by number"
NO_RULE = "{} has no rule"
UNUSED = "the traced forward never used it"
IDLE = "{}, which never ran, may read it"
SCRIPTED = "TorchScript reads it"
INSIDE = "it is a position inside a group (a head, say) that is pruned as a whole"
UNMADE = "no parameter makes it"
UNREAD = "no parameter consumes it"
LONELY = "it is the only one of its axis"
PROTECTED = "protected by the caller"
SIZE = "a size used in {} can't follow it"
REHEARSAL = "cutting it failed in rehearsal: {}"

_MEANING = "nothing: its width has a meaning"
_OTHERS = "nothing: a position that goes would change the others"
LIFTS = {  # reason -> what would lift it
    **dict.fromkeys((SPATIAL, KERNEL, PLANE, COMPLEX, INDEX, NUMBERED, GATES, LONELY, STAYS, FACTORS), _MEANING),
    **dict.fromkeys((ALONG, MIXED, TAKEN, SUM, SUMMED, NEIGHBOURS, ATTENTION, STEPS, SYSTEM, TRIANGLE), _OTHERS),
    OUTPUT: "nothing: it would change what the model returns",
    LOSS: "nothing: it would change what the model learns",
    MEETS: "nothing: the input has this width",
    **dict.fromkeys((FIXED, STRIDE, WRAPS), "model code that does not count positions of this axis"),
    BY_NUMBER: "the attention implementation sdpa or eager",
    MEMORY: "view, narrow or unfold in its place",
    NORM: "nothing in this model: weights that the norm counts would go",
    AVERAGE: "nothing in this model: it changes with the width, and no scaling of weights undoes that",
    **dict.fromkeys(
        (LAYER_NORM, GROUP_NORM, BATCH_NORM),
        "nothing in this model: they change with the width; batch norm would not mind for its channels",
    ),
    OBSERVED: "observers that are switched off, in a FakeQuantize that is not fused: model.apply(disable_observer)",
    DIVISOR: "an epsilon in the divisor, as in torch.nn.functional.normalize",
    RANDOM: "nothing: other numbers would be drawn",
    FUSED: "a partition of the model on the CPU or the meta device",
    NO_RULE: "a rule for this operation: please report it; or, for one of your own, operations of PyTorch",
    **dict.fromkeys((UNUSED, IDLE), "a batch, or several calls, that use it: partition_zigs(model, inputs)"),
    SCRIPTED: "the module as it is before torch.jit.script",
    INSIDE: "nothing: it goes with its group",
    **dict.fromkeys((UNMADE, UNREAD), "nothing: there is no weight to save"),
    PROTECTED: "leaving it out of protect",
    SIZE: "model code that takes this size from the layer it belongs to; torch.nn.MultiheadAttention takes that of "
    "all heads from embed_dim",
    REHEARSAL: "please report it: hf_oto can't rebuild the cut layer",
}


def lift(reason: str) -> str:
    """What would lift a pin.

    Example:
        >>> lift("softmax runs along it in head")
        'nothing: a position that goes would change the others'
    """
    without_layer = re.sub(r" in [\w.]*$", "", reason)
    found = (text for template, text in LIFTS.items() if _pattern(template).fullmatch(without_layer))
    return next(found, "please report it: nobody has thought of this")


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, template.split("{}"))), re.DOTALL)
