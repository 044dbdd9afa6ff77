"""Counted collectives: the only calls of torch.distributed beside the making of process groups.

Each function takes the axis that it runs over, is the identity at size 1, and adds the bytes that a ring algorithm
sends per rank to `traffic()`: (size - 1) / size of the full tensor for a gather or a broadcast, twice that for a sum.
"""

import contextlib
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import heartbeat
from parallel.heartbeat import RankError
from parallel.order import record

ROLL_CALL_SECONDS = 3.0  # after a failed collective: how long the other ranks may take to say that they are alive

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
# Made once by all processes together; here and nowhere else, so that they can be ended before the process ends.
groups: dict[tuple[tuple[int, ...], str], dist.ProcessGroup] = {}  # by (ranks, channel)
_traffic: Counter[tuple[str, str]] = Counter()  # bytes sent by this rank, by (axis name, operation)


@dataclass(frozen=True)
class Axis:
    """One direction of the mesh: `size` ranks that work on the same thing in the same way, this one being `rank`."""

    name: str
    size: int
    rank: int
    ranks: tuple[int, ...] | None = field(default=None, repr=False)  # of all processes; None: all of them
    store: dist.Store | None = field(default=None, repr=False)  # where ranks answer the roll call
    channel: str = field(default="", repr=False)  # which of several groups of the same ranks

    def __deepcopy__(self, _):
        return self  # a copied module talks to the same ranks

    @property
    def group(self) -> dist.ProcessGroup | None:
        return None if self.ranks is None else groups[self.ranks, self.channel]


def traffic() -> dict[tuple[str, str], int]:
    """Bytes that this rank has sent since the process began, by (axis name, operation), under a ring algorithm."""
    return dict(_traffic)


def all_reduce_(x: Tensor, axis: Axis, op: str = "sum") -> None:
    """Replaces x by its sum (or max, or min) over the axis. Ring bytes: 2 (size - 1) / size of x."""
    all_reduce_async_(x, axis, op).wait()


def all_reduce_async_(x: Tensor, axis: Axis, op: str = "sum", tag: str = "") -> "Pending":
    """Starts `all_reduce_`; x is neither read nor written until `wait` of the result returns. Tag: see order.py."""
    if axis.size == 1:
        return Pending(None, axis, "all_reduce")
    _count(axis, "all_reduce", 2 * x.nbytes, x, f"{op} {tag}")
    with name_lost_ranks(axis, "all_reduce"):
        work = dist.all_reduce(x, getattr(dist.ReduceOp, op.upper()), group=axis.group, async_op=True)
    return Pending(work, axis, "all_reduce")


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """The pieces of all ranks behind one another: [n, ...] -> [size * n, ...], n being equal on all ranks."""
    if axis.size == 1:
        return x.clone()
    x = x.contiguous()
    full = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    _count(axis, "all_gather", full.nbytes, full)
    with name_lost_ranks(axis, "all_gather"):
        _all_gather(_as_bytes(full), _as_bytes(x), group=axis.group)
    return full


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """This rank's piece of the sum over the axis: [size * n, ...] -> [n, ...]."""
    piece, pending = reduce_scatter_async(x, axis)
    pending.wait()
    return piece


def reduce_scatter_async(x: Tensor, axis: Axis) -> tuple[Tensor, "Pending"]:
    """Starts `reduce_scatter`; neither x nor the result is touched until `wait` returns."""
    if axis.size == 1:
        return x.clone(), Pending(None, axis, "reduce_scatter")
    x = x.contiguous()
    piece = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    _count(axis, "reduce_scatter", x.nbytes, x)
    with name_lost_ranks(axis, "reduce_scatter"):
        work = _reduce_scatter(piece, x, group=axis.group, async_op=True)
    return piece, Pending(work, axis, "reduce_scatter")


def all_gather_async_(full: Tensor, shard: Tensor, axis: Axis, tag: str = "") -> "Pending":
    """Starts to fill full [size * n] with the shards [n] of all ranks; shard may be this rank's part of full."""
    if axis.size == 1:
        full.copy_(shard)
        return Pending(None, axis, "all_gather")
    _count(axis, "all_gather", full.nbytes, full, tag)
    with name_lost_ranks(axis, "all_gather"):
        work = _all_gather(full, shard, group=axis.group, async_op=True)
    return Pending(work, axis, "all_gather")


def reduce_scatter_async_(x: Tensor, axis: Axis, tag: str = "") -> "Pending":
    """Starts to replace this rank's part of x, x.chunk(size)[rank], by its sum over the axis; the rest is lost.

    In place: nothing is copied. Ring bytes: (size - 1) / size of x.
    """
    if axis.size == 1:
        return Pending(None, axis, "reduce_scatter")
    _count(axis, "reduce_scatter", x.nbytes, x, tag)
    with name_lost_ranks(axis, "reduce_scatter"):
        work = _reduce_scatter(x.chunk(axis.size)[axis.rank], x, group=axis.group, async_op=True)
    return Pending(work, axis, "reduce_scatter")


def broadcast_(x: Tensor, axis: Axis, source: int = 0) -> None:
    """Replaces x by that of one rank of the axis."""
    if axis.size > 1:
        _count(axis, "broadcast", x.nbytes, x)
        with name_lost_ranks(axis, "broadcast"):
            dist.broadcast(_as_bytes(x), group=axis.group, group_src=source)


def send_async(x: Tensor, axis: Axis, target: int) -> "Pending":
    """Starts to send x to a rank of the axis, which receives as many entries; x stays as it is until `wait` returns."""
    _traffic[axis.name, "send"] += x.nbytes
    with name_lost_ranks(axis, "send"):
        return Pending(dist.isend(x, group=axis.group, group_dst=target), axis, "send")


def recv_async_(x: Tensor, axis: Axis, source: int) -> "Pending":
    """Starts to fill x with what a rank of the axis sends; it is there when `wait` returns."""
    with name_lost_ranks(axis, "recv"):
        return Pending(dist.irecv(x, group=axis.group, group_src=source), axis, "recv")


@dataclass
class Pending:
    """A collective under way."""

    work: dist.Work | None
    axis: Axis
    op: str

    def wait(self) -> None:
        """Returns when the result may be used (on a GPU: by the work that is queued from now on)."""
        if self.work is not None:
            with name_lost_ranks(self.axis, self.op):
                self.work.wait()

    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        return self.work is None or self.work.is_completed()


class _Conjugate(torch.autograd.Function):
    """One function forward, its conjugate backward."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.conjugate = backward
        return forward(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.conjugate(grad), None, None


def _sum_over(axis: Axis):
    def total(x):
        x = x.clone(memory_format=torch.contiguous_format)
        all_reduce_(x, axis)
        return x

    return total


# Conjugate pairs of tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053; Korthikanti et al. 2022, 2205.05198).
# A tensor is either replicated over the axis, or sharded, or partial (its sum over the axis is meant).


def copy_to_tp(x: Tensor, axis: Axis) -> Tensor:
    """Replicated in, for sharded consumers: forward identity, backward sum of their gradients."""
    return x if axis.size == 1 else _Conjugate.apply(x, lambda x: x.view_as(x), _sum_over(axis))


def reduce_from_tp(x: Tensor, axis: Axis) -> Tensor:
    """Partial in, replicated out: forward sum, backward identity."""
    return x if axis.size == 1 else _Conjugate.apply(x, _sum_over(axis), lambda grad: grad)


def scatter_to_sp(x: Tensor, axis: Axis) -> Tensor:
    """Partial in, sharded by tokens out: forward reduce-scatter, backward all-gather."""
    if axis.size == 1:
        return x
    return _Conjugate.apply(x, lambda x: reduce_scatter(x, axis), lambda grad: all_gather(grad, axis))


def split_back(x: Tensor, axis: Axis) -> Tensor:
    """Sharded by tokens in, replicated out for replicated consumers: forward all-gather, backward this rank's piece."""
    if axis.size == 1:
        return x
    return _Conjugate.apply(x, lambda x: all_gather(x, axis), lambda grad: grad.chunk(axis.size)[axis.rank])


@contextlib.contextmanager
def name_lost_ranks(axis: Axis, op: str):
    """Turns the failure of a collective into a RankError that names the ranks which are no longer there.

    A dead peer shows as a closed connection whose owner is not known. So every rank that sees the failure leaves a
    mark in the store, and those without one after a few seconds are named: the dead, and any that is still busy
    with something else.
    """
    try:
        yield
    except RuntimeError as error:
        failed = f"{op} over {axis.name} failed in {heartbeat.where()}"
        reason = str(error).strip().splitlines()[0]
        if axis.store is None:
            raise RankError(f"{failed}, a rank is lost: {reason}") from error
        lost, deadline = list(range(dist.get_world_size())), time.monotonic() + ROLL_CALL_SECONDS
        try:
            axis.store.set(f"alive/{dist.get_rank()}", "1")
            heartbeat.look()
            while not all(map(heartbeat.has_ended, lost)) and time.monotonic() < deadline:
                lost = [rank for rank in lost if not axis.store.check([f"alive/{rank}"])]
                time.sleep(0.05)
        except RuntimeError:  # the store lived in the lost process
            lost = [0]
        who = f"no answer from {heartbeat.describe(lost)}" if lost else "though all ranks are alive"
        raise RankError(f"{failed}, {who}: {reason}") from error


def _count(axis: Axis, op: str, nbytes: int, x: Tensor | None = None, tag: str = "") -> None:
    """Args: x: what a collective moves; None where not all ranks of the axis take part."""
    if x is not None:
        record(axis, op, x, tag)
    _traffic[axis.name, op] += nbytes * (axis.size - 1) // axis.size


def _as_bytes(x: Tensor) -> Tensor:
    """Booleans as bytes: moved, never summed."""
    return x.view(torch.uint8) if x.dtype == torch.bool else x
