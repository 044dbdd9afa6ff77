"""The order of collectives: what each rank has called over each group of ranks, compared once a step.

Collectives are matched by order alone. Where one rank calls two of equal size the other way round, each takes the
other's numbers and no backend notices. So every call is folded into a hash of its operation, axis, type, size and call
site, and the ranks of a group compare hashes before they step (Args of `record` say what a call site is).
"""

import os
import sys
import zlib
from collections import deque

import torch
from torch import Tensor

from parallel.heartbeat import RankError, where

KEPT = 1000  # calls per group that can be named afterwards
NUMBERS = 13  # of a rank in gather_in_order: for each of 6 axes a hash and the first rank, and its x
_PLUMBING = tuple(os.path.join(os.path.dirname(__file__), name) for name in ("collectives.py", "mesh.py", "order.py"))
_TORCH = os.path.dirname(torch.__file__)


class Record:
    """This rank's calls over one group."""

    def __init__(self):
        self.count = self.hash = 0
        self.calls: deque[tuple] = deque(maxlen=KEPT)


records: dict[tuple[int, ...] | None, Record] = {}  # by the ranks of the group; None: all. A new mesh begins anew
_codes: dict[tuple, int] = {}


def record(axis, op: str, x: Tensor, tag: str) -> None:
    """Folds a call over an axis into its group's hash.

    Args: tag: tells calls from one line apart, as the name of the unit that is reduced; the line is the nearest one
        outside these files and torch.
    """
    frame = sys._getframe(2)
    while frame.f_back and (frame.f_code.co_filename in _PLUMBING or frame.f_code.co_filename.startswith(_TORCH)):
        frame = frame.f_back
    call = (op, axis.name, x.dtype, x.numel(), tag, frame.f_code.co_filename, frame.f_lineno)
    code = _codes.get(call)
    if code is None:
        code = _codes[call] = zlib.crc32(describe(call).encode())
    mine = records.setdefault(axis.ranks, Record())
    mine.count += 1
    mine.hash = (mine.hash * 0x100000001B3 + code) & (1 << 62) - 1
    mine.calls.append(call)


def describe(call: tuple) -> str:
    """A call in words, the same on machines that have the code in different places."""
    op, axis, dtype, numel, tag, file, line = call
    tag = f" of {tag}" if tag else ""
    return f"{op}{tag} over {axis}, {numel} x {str(dtype).removeprefix('torch.')} ({os.path.basename(file)}:{line})"


def gather_in_order(x: Tensor, mesh) -> Tensor:
    """A float64 of every rank, [] -> [world_size], once all ranks have called the same collectives in the same order.

    Communication: one all-gather over all ranks of x and 12 numbers, which ride along.
    Raises: RankError on all ranks, naming axis, phase, two ranks and the first call in which they differ.
    """
    axes = [mesh.dp, mesh.pp, mesh.tp, mesh.folded_dp, mesh.ends, mesh.world]
    mine = [records[axis.ranks].hash if axis.size > 1 and axis.ranks in records else 0 for axis in axes]
    first = [(axis.ranks or (0,))[0] if axis.size > 1 else mesh.rank for axis in axes]
    row = torch.cat([torch.tensor(mine + first, device=x.device), x.view(1).view(torch.int64)])
    hashes, first, numbers = mesh.all_gather(row[None], "world").split([len(axes), len(axes), 1], dim=1)
    differs = hashes != hashes.gather(0, first)
    if not differs.any():
        return numbers.contiguous().view(torch.float64).flatten()
    rank, column = differs.nonzero()[0].tolist()
    other = int(first[rank, column])
    log = None
    if mesh.rank in (rank, other):
        mine = records[axes[column].ranks]
        log = {mine.count - len(mine.calls) + i: describe(call) for i, call in enumerate(mine.calls)}
    logs = mesh.gather_objects(log)
    mine, theirs = logs[other], logs[rank]
    found = [i for i in sorted(mine.keys() | theirs.keys()) if mine.get(i) != theirs.get(i)]
    calls = f"more than {KEPT} calls ago"
    if found:
        calls = f"rank {other}: {mine.get(found[0], 'nothing')}; rank {rank}: {theirs.get(found[0], 'nothing')}"
    raise RankError(f"ranks of {axes[column].name} differ in the order of their collectives, in {where()}: {calls}")
