"""Which ZIGs go, slowly and literally: one ZIG and one block after the other, plain Python, no arrays.

An axis is a dict: its size, the multiple of which so many ZIGs have to stay, how many may go at most, the axis whose
tie it has, what one of its ZIGs costs, and whether it is a bottleneck.
"""

import math

OVERSHOOT = 0.005
UNDER_A_NORM = 0.01


def zigs_of(axes, a):
    """The numbers of the ZIGs of an axis."""
    start = sum(axis["size"] for axis in axes[:a])
    return list(range(start, start + axes[a]["size"]))


def by_salience(zigs, salience, zero):
    """The zero ones first, then the least salient, of equal ones the first."""
    return [z for z in zigs if zero[z]] + sorted((z for z in zigs if not zero[z]), key=lambda z: (salience[z], z))


def weigh_survivors(axes, salience, salience_of_axes, zero, under_a_norm=UNDER_A_NORM, bottlenecks=True):
    """The k-th living ZIG to go of a bottleneck, or under a norm, weighs (size / (living - k)) ** 2 as much."""
    weighted = list(salience)
    for a in range(len(axes)):
        total = 0.0
        for z in zigs_of(axes, a):
            total += salience[z]
        is_bottleneck = bottlenecks and axes[a]["bottleneck"] and salience_of_axes[a] < math.inf
        if not (salience_of_axes[a] < under_a_norm * total or is_bottleneck):
            continue
        living = [z for z in by_salience(zigs_of(axes, a), salience, zero) if not zero[z]]
        for k, z in enumerate(living):
            factor = axes[a]["size"] / (len(living) - k)
            weighted[z] = salience[z] * (factor * factor)
    return weighted


def widths_of(axis):
    """The numbers of ZIGs that may stay of an axis, the largest first: all of them, or a multiple."""
    fewest = axis["size"] - axis["removable"]
    return [n for n in range(axis["size"], fewest - 1, -1) if n == axis["size"] or n % axis["multiple"] == 0]


def blocks_of_tie(axes, together, salience, zero):
    """The blocks that tied axes may lose, in their order: lists of ZIGs, some of which may be zero already."""
    blocks = []
    in_order = {a: by_salience(zigs_of(axes, a), salience, zero) for a in together}
    for step in range(1, min(len(widths_of(axes[a])) for a in together)):
        block = []
        for a in together:
            size, widths = axes[a]["size"], widths_of(axes[a])
            block += in_order[a][size - widths[step - 1] : size - widths[step]]
        blocks.append(block)
    return blocks


def left_of(terms, gone):
    """A sum of products of widths: every width is a number of positions, and what a ZIG of some axes takes of it."""
    total = 0
    for term in terms:
        product = 1
        for positions, per_zig in term:
            product *= positions - sum(n * gone[a] for a, n in per_zig)
        total += product
    return total


def choose(
    axes, terms, salience, zero, may_go, share, goal, exact,
    overshoot=OVERSHOOT, finish=True, ties=True, whole=True, ordered=True,
):  # fmt: skip
    """The ZIGs to be made zero next. The last arguments break a rule each, for negative controls."""
    nothing = [0] * len(axes)
    dense = left_of(terms, nothing)
    aim = goal if share == 1 else dense - round((dense - goal) * share)

    def left(chosen):
        return left_of(terms, [sum(zero[z] or z in chosen for z in zigs_of(axes, a)) for a in range(len(axes))])

    waiting = []  # (how late it goes, tie, number, living ZIGs, whether some of the block are zero already)
    for tie in range(len(axes)):
        together = [a for a in range(len(axes)) if axes[a]["tie"] == tie] if ties else [tie]
        if not together or not all(may_go[a] for a in together):
            continue
        latest = -math.inf
        for number, block in enumerate(blocks_of_tie(axes, together, salience, zero)):
            living = [z for z in block if not zero[z]]
            total, cost = 0.0, 0.0
            for z in block:
                a = next(a for a in together if z in zigs_of(axes, a))
                total += 0 if zero[z] else salience[z]
                cost += axes[a]["cost"]
            begun = finish and len(living) < len(block)
            # never before the one before it, whatever the rounding
            latest = max(latest if ordered else -math.inf, -math.inf if begun else total / cost)
            if living:
                waiting.append((latest, tie, number, living, begun))
    waiting.sort(key=lambda block: block[:3])  # the least salient first; of equal ones those of the first axis

    best = None
    while True:
        taken, chosen = [], set()
        for block in waiting:
            if left(chosen) <= aim:
                break
            taken.append(block)
            chosen |= set(block[3])
        if left(chosen) > aim:
            best = best or taken
            break
        if best is None or left(chosen) > left({z for block in best for z in block[3]}):
            best = taken
        if not taken or taken[-1][4] or aim - left(chosen) <= overshoot * dense:
            break
        # the last block is too much: what comes after it is tried instead, but nothing more of its axis
        too_much = taken[-1]
        waiting = taken[:-1] + [block for block in waiting[len(taken) :] if block[1] != too_much[1]]

    zigs = [z for block in best for z in block[3]]
    if exact and whole:
        zigs = zigs[: max(0, int(dense - aim) - sum(zero))]
    return [z in zigs for z in range(len(salience))]
