"""The partition of a model that has been cut: the ZIGs that are left, at the positions where they are now.

What is found in the dense model holds in every model that is cut out of it. So nothing is traced again: the axes are
shorter, and every position is counted without those that are gone.

Worked example: an axis of 4 heads, 2 rows each, is rows 0 to 7 of a weight. Without head 1, rows 2 and 3 are gone. The
axis that is left has 3 ZIGs, the old heads 0, 2 and 3: its rows 0 and 1, 2 and 3, 4 and 5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from .cut import Cut
from .zigs import Member, ZIGPartition


def partition_left(partition: ZIGPartition, gone: np.ndarray) -> ZIGPartition:
    """The ZIGs that are left of a partition, in their order.

    It has no equations of sizes: these stay those of the dense model.

    Args:
        gone: which ZIGs have been cut out, bool (num_zigs,).
    """
    if not gone.any():
        return partition
    gone_positions = Cut(partition, gone, {}, {}).positions
    axes = []
    num_gone = []
    for axis, gone_of_axis in partition.split(gone):
        members = tuple(_member_left(m, axis.size, ~gone_of_axis, gone_positions) for m in axis.members)
        num_left = int((~gone_of_axis).sum())
        axes.append(dataclasses.replace(axis, size=num_left, members=members))
        num_gone.append(axis.size - num_left)
    work = None if partition.work is None else partition.work.without(np.array(num_gone))
    return dataclasses.replace(partition, axes=tuple(axes), work=work, sizes=None)


def _member_left(
    member: Member, size: int, stays: np.ndarray, gone_positions: Mapping[str, Mapping[int, np.ndarray]]
) -> Member:
    """A member without the ZIGs that are gone, and with the positions that the others have then.

    Args:
        size: of the axis before.
        stays: which of its ZIGs stay, bool (size,).
        gone_positions: parameter or buffer -> dimension -> the positions of it that are gone.
    """
    gone = gone_positions.get(member.param, {}).get(member.dim)
    if gone is None:
        return member
    before = member.positions(size)[stays]  # (ZIGs left, k)
    num_gone_before = np.searchsorted(np.sort(gone), before)  # so many positions in front of each one are gone
    return Member.at(member.param, member.dim, member.role, before - num_gone_before)
