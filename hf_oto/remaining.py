"""The partition of a model that has been cut: the ZIGs that are left, at the positions where they are now.

The structure of the dense model is also that of every model that is cut out of it. So nothing is traced again: the
axes get shorter, and positions are renumbered without those that are gone.

Worked example: an axis of 4 heads, 2 rows each, takes rows 0 to 7 of a weight. Head 1 is cut out, and with it rows 2
and 3. The axis that is left has 3 ZIGs: the old head 0 in rows 0 and 1, head 2 in rows 2 and 3, head 3 in 4 and 5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from .cut import Cut
from .zigs import Member, ZIGPartition


def partition_left(partition: ZIGPartition, gone: np.ndarray) -> ZIGPartition:
    """The ZIGs that are left of a partition, in their order.

    The result has no equations of sizes. Only those of the dense model are ever solved.

    Args:
        gone: which ZIGs have been cut out, bool (num_zigs,).
    """
    if not gone.any():
        return partition
    # positions need neither sizes nor scales
    cut = Cut(partition, gone, attributes={}, scales={})
    gone_positions = cut.positions
    axes = []
    num_gone_of_axes = []
    for axis, gone_of_axis in partition.split(gone):
        stays = ~gone_of_axis  # (size,)
        members = []
        for member in axis.members:
            member_left = _member_left(member, axis.size, stays, gone_positions)
            members.append(member_left)
        num_left = int(stays.sum())
        axis_left = dataclasses.replace(axis, size=num_left, members=tuple(members))
        axes.append(axis_left)
        num_gone = axis.size - num_left
        num_gone_of_axes.append(num_gone)
    work = partition.work
    if work is not None:
        work = work.without(np.array(num_gone_of_axes))
    return dataclasses.replace(partition, axes=tuple(axes), work=work, sizes=None)


def _member_left(
    member: Member, size: int, stays: np.ndarray, gone_positions: Mapping[str, Mapping[int, np.ndarray]]
) -> Member:
    """A member without the ZIGs that are gone. The ZIGs that are left get their new positions.

    Args:
        size: the number of ZIGs of the axis before.
        stays: which of its ZIGs stay, bool (size,).
        gone_positions: parameter or buffer -> dimension -> the positions of it that are gone.
    """
    gone = gone_positions.get(member.param, {}).get(member.dim)
    if gone is None:
        return member
    positions = member.positions(size)  # (size, k)
    positions = positions[stays]  # (ZIGs left, k)
    # a position moves to the front by as many places as positions in front of it are gone
    shift = np.searchsorted(np.sort(gone), positions)
    return Member.at(member.param, member.dim, member.role, positions - shift)
