"""Why a position stays, and what would lift the pin: every reason that the rules, solver and rehearsal give.

A reason reads as the end of "this dimension stays: ..."; {} stands for what it depends on, an operation say.
"""

from __future__ import annotations


class Reason(str):
    """Why a position stays: a text, which prints and compares as any text.

    Attributes:
        lift: what would lift the pin.
        anywhere: the reason without the layer that is to blame.

    Example:
        >>> why = ALONG.of("softmax").at("head")
        >>> why, why.anywhere
        ('softmax runs along it in head', 'softmax runs along it')
        >>> why.lift
        'nothing: a position that goes would change the others'
    """

    lift: str
    anywhere: Reason

    def __new__(cls, text: str, lift: str = "please report it: nobody has thought of this") -> Reason:
        reason = super().__new__(cls, text)
        reason.lift = lift
        reason.anywhere = reason
        return reason

    def of(self, what: str) -> Reason:
        """The reason with {} replaced by what it depends on."""
        return Reason(self.replace("{}", what), self.lift)

    def at(self, layer: str) -> Reason:
        """The reason with the layer that it comes from."""
        return self._more(f" in {layer}" if layer else "")

    def partly(self) -> Reason:
        """The reason for a dimension of which only some positions stay."""
        return self._more(" (some positions)")

    def _more(self, text: str) -> Reason:
        reason = Reason(self + text, self.lift)
        reason.anywhere = self.anywhere
        return reason


# what would lift a pin, for several reasons alike
MEANING = "nothing: its width has a meaning"
OTHERS = "nothing: a position that goes would change the others"
NO_WEIGHT = "nothing: there is no weight to save"
STATISTICS = "nothing in this model: they change with the width; batch norm would not mind for its channels"
A_BATCH = "a batch, or several calls, that use it: partition_zigs(model, inputs)"
UNCOUNTED = "model code that does not count positions of this axis"

OUTPUT = Reason("it is part of the model's output", "nothing: it would change what the model returns")
MEETS = Reason(
    "it meets a position that stays (of an input, an index, or a buffer that is not saved, say)",
    "register the buffer with persistent=True; nothing, if it is an input, which has this width",
)
STAYS = Reason("it meets a position that can't go", MEANING)
FACTORS = Reason("its factors don't fit those of another axis", MEANING)
FIXED = Reason("a fixed position of it is read", UNCOUNTED)
STRIDE = Reason("its positions are read at a stride", UNCOUNTED)
WRAPS = Reason("it is rolled over the end by a fixed number of positions", UNCOUNTED)
MEMORY = Reason("{} reads memory by strides", "view, narrow or unfold in its place")
NUMBERED = Reason("positions are looked up by number", MEANING)
INDEX = Reason("it is an index", MEANING)
SPATIAL = Reason("it is a spatial axis", MEANING)
NEIGHBOURS = Reason("its neighbours are pooled or resized with it", OTHERS)
KERNEL = Reason("it is a position of a kernel", MEANING)
PLANE = Reason("it becomes part of the image plane", MEANING)
COMPLEX = Reason("it holds the parts of a complex number", MEANING)
SUMMED = Reason("summed over, and neither side becomes zero", OTHERS)
SUM = Reason("it is summed over, and not zero", OTHERS)
NORM = Reason("a norm is taken over it", "nothing in this model: weights that the norm counts would go")
AVERAGE = Reason(
    "an average is taken over it",
    "nothing in this model: it changes with the width, and no scaling of weights undoes that",
)
TAKEN = Reason("{} is taken over it", OTHERS)
OBSERVED = Reason(
    "an observer takes its minimum and maximum",
    "observers that are switched off, in a FakeQuantize that is not fused: model.apply(disable_observer)",
)
ALONG = Reason("{} runs along it", OTHERS)
MIXED = Reason("{} mixes all its positions", OTHERS)
LAYER_NORM = Reason("a layer norm takes mean and variance over it", STATISTICS)
GROUP_NORM = Reason("a group norm takes mean and variance over it", STATISTICS)
BATCH_NORM = Reason("a batch norm averages over it", STATISTICS)
ATTENTION = Reason("attention runs over it", OTHERS)
GATES = Reason("it counts the gates of a recurrent layer", MEANING)
STEPS = Reason("a recurrent layer runs along it", OTHERS)
SYSTEM = Reason("a linear system is solved along it", OTHERS)
TRIANGLE = Reason("a triangle is cut out of it", OTHERS)
DIVISOR = Reason(
    "it is divided by, and becomes zero",
    "an epsilon in the divisor, as in torch.nn.functional.normalize",
)
RANDOM = Reason(
    "{} draws random numbers for each of its positions",
    "nothing: other numbers would be drawn",
)
LOSS = Reason("a loss compares it with a target", "nothing: it would change what the model learns")
FUSED = Reason("{} is one kernel of a GPU", "a partition of the model on the CPU or the meta device")
BY_NUMBER = Reason(
    "flex attention may treat each of its heads and positions by number",
    "the attention implementation sdpa or eager",
)
NO_RULE = Reason(
    "{} has no rule",
    "a rule for this operation: please report it; or, for one of your own, operations of PyTorch",
)
UNUSED = Reason("the traced forward never used it", A_BATCH)
IDLE = Reason("{}, which never ran, may read it", A_BATCH)
SCRIPTED = Reason("TorchScript reads it", "the module as it is before torch.jit.script")
INSIDE = Reason(
    "it is a position inside a group (a head, say) that is pruned as a whole",
    "nothing: it goes with its group",
)
UNMADE = Reason("no parameter makes it", NO_WEIGHT)
UNREAD = Reason("no parameter consumes it", NO_WEIGHT)
LONELY = Reason("it is the only one of its axis", MEANING)
PROTECTED = Reason("protected by the caller", "leaving it out of protect")
SIZE = Reason(
    "a size used in {} can't follow it",
    "model code that takes this size from the layer it belongs to; torch.nn.MultiheadAttention takes that of all "
    "heads from embed_dim",
)
REHEARSAL = Reason(
    "cutting it failed in rehearsal: {}",
    "please report it: hf_oto can't rebuild the cut layer",
)
