"""A world of ranks in one process, and whether NCCL could execute what they issue.

Gloo moves whatever both ends have asked for, in any order; NCCL may hold each operation of a GPU up until those that
were issued before it have ended, and then ranks that issue theirs in different orders wait for each other for ever. So
`play` runs all ranks of a world here, on real data, and records what each of them issues and waits for; `execute` plays
these records once more, by the worst rules that NCCL may follow.
"""

import os
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

GROUPS = ("parallel.collectives.groups", "parallel.mesh.groups")  # one dict, of which every rank has its own here


IN_STORE = -1  # the number of what is no communicator: all ranks' meetings in the store


class Group(NamedTuple):
    """A communicator: the ranks that it joins, and the how manieth it is that they made."""

    ranks: tuple[int, ...]
    number: int


@dataclass(eq=False)
class Operation:
    """One rank's part in a collective, or one end of a message."""

    group: Group
    kind: str
    dtype: torch.dtype
    entries: int  # that this rank contributes, sends or receives
    peer: int | None = None  # the other end of a message
    is_done: bool = False  # in the play
    waiting: list[int] = field(default_factory=list)  # ranks, in the play

    @property
    def what(self) -> tuple:
        """What all members of a collective, or both ends of a message, must agree on."""
        return self.kind if self.peer is None else "message", self.dtype, self.entries

    def __str__(self) -> str:
        ends = f" {'to' if self.kind == 'send' else 'from'} {self.peer}" if self.peer is not None else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kind}{ends} of {self.entries} {dtype} in group {self.group.number} of ranks {self.group.ranks}"


class Wait(NamedTuple):
    """The host goes on when an operation that it has issued has ended."""

    operation: Operation


Trace = list[Operation | Wait]


def locked() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


# --- the play -------------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """Ends the rank in which it is raised: the play is over."""


class World:
    """Ranks that are threads, of which one runs at a time: until it waits for another, or has ended.

    What they call of torch.distributed comes here. A send does not wait for its receive, and what goes through one
    communicator does not wait for another: as with gloo.
    """

    def __init__(self, size: int):
        self.everyone, self.store = Group(tuple(range(size)), 0), Group(tuple(range(size)), IN_STORE)
        self.traces: list[Trace] = [[] for _ in range(size)]
        self.results: list = [None] * size
        self.ended = [False] * size
        self.problem: str | None = None  # ranks that disagree
        self.error: BaseException | None = None  # what a rank has raised
        self.stopped = False
        self.running = 0
        self.ready = deque(range(size))
        self.gates = [locked() for _ in range(size)]  # which a rank acquires to run
        self.over = locked()
        self.counts: Counter = Counter()  # collectives by (rank, group); of groups by rank
        self.meetings: dict[tuple, dict] = defaultdict(dict)  # collectives that some members have come to
        self.mail: dict[tuple, deque] = defaultdict(deque)  # ends of messages that have not met, by their direction

    # the ranks

    def run(self, fn: Callable, args: tuple) -> None:
        """Calls fn(*args) on all ranks; returns when all have ended or none can go on."""
        threads = [threading.Thread(target=self.work, args=(rank, fn, args)) for rank in self.everyone.ranks]
        for thread in threads:
            thread.start()
        self.pass_on()
        self.over.acquire()
        self.stopped = True
        for gate, thread in zip(self.gates, threads, strict=True):  # those that still wait, one by one
            if thread.is_alive():
                gate.release()
            thread.join()

    def work(self, rank: int, fn: Callable, args: tuple) -> None:
        self.gates[rank].acquire()
        try:
            if not self.stopped:
                self.results[rank] = fn(*args)
                self.ended[rank] = True
        except Stopped:
            return
        except BaseException as error:
            if not self.stopped:
                self.error = error
                self.ready.clear()
        if not self.stopped:
            self.pass_on()

    def pass_on(self) -> None:
        """Lets the next rank run; the play is over if there is none."""
        if not self.ready:
            self.over.release()
            return
        self.running = self.ready.popleft()
        os.environ["RANK"] = str(self.running)
        self.gates[self.running].release()

    def wait(self, operation: Operation) -> None:
        self.check_running()
        self.traces[self.running].append(Wait(operation))
        if not operation.is_done:
            rank = self.running
            operation.waiting.append(rank)
            self.pass_on()
            self.gates[rank].acquire()
            self.check_running()

    def check_running(self) -> None:
        if self.stopped:
            raise Stopped

    def end(self, operation: Operation) -> None:
        operation.is_done = True
        self.ready.extend(operation.waiting)

    def check_equal(self, mine: Operation, rank: int, theirs: Operation) -> None:
        """Ends the play if two ends of an operation do not fit."""
        if mine.what != theirs.what:
            self.problem = f"rank {self.running} comes with {mine}, rank {rank} with {theirs}"
            self.ready.clear()
            self.stopped = True
            self.over.release()
            raise Stopped

    # what they call

    def meet(self, group: Group | None, kind: str, x: Tensor, out: Tensor, combine: Callable, wait: bool) -> "Work":
        """A collective. Args: combine: from the x of all members to what each of them gets."""
        self.check_running()
        rank, group = self.running, group or self.everyone
        operation = Operation(group, kind, x.dtype, x.numel())
        self.traces[rank].append(operation)
        self.counts[rank, group] += 1
        here = self.meetings[group, self.counts[rank, group]]
        here[rank] = operation, x, out
        first = next(iter(here))
        self.check_equal(operation, first, here[first][0])
        if len(here) == len(group.ranks):
            del self.meetings[group, self.counts[rank, group]]
            operations, inputs, outputs = zip(*(here[member] for member in group.ranks), strict=True)
            with torch.no_grad():
                combined = combine([x.data.flatten() for x in inputs])
                for result, member_out in zip(combined, outputs, strict=True):
                    member_out.data.copy_(result.view(member_out.shape))  # .data: a write that autograd does not see
            for one in operations:
                self.end(one)
        work = Work(self, operation)
        if wait:
            work.wait()
        return work

    def all_reduce(self, x, op=dist.ReduceOp.SUM, group=None, async_op=False):
        name, reduce = {
            dist.ReduceOp.SUM: ("sum", lambda x: x.sum(0)),
            dist.ReduceOp.MAX: ("max", lambda x: x.amax(0)),
            dist.ReduceOp.MIN: ("min", lambda x: x.amin(0)),
        }[op]
        return self.meet(
            group, f"all_reduce ({name})", x, x, lambda xs: [reduce(torch.stack(xs))] * len(xs), not async_op
        )

    def all_gather(self, out, x, group=None, async_op=False):
        return self.meet(group, "all_gather", x, out, lambda xs: [torch.cat(xs)] * len(xs), not async_op)

    def reduce_scatter(self, out, x, group=None, async_op=False):
        combine = lambda xs: torch.stack(xs).sum(0).chunk(len(xs))  # noqa: E731
        return self.meet(group, "reduce_scatter", x, out, combine, not async_op)

    def broadcast(self, x, group=None, group_src=0):
        self.meet(group, f"broadcast (from {group_src})", x, x, lambda xs: [xs[group_src]] * len(xs), True)

    def isend(self, x, group=None, group_dst=0):
        return self.message("send", x, group or self.everyone, group_dst)

    def irecv(self, x, group=None, group_src=0):
        return self.message("recv", x, group or self.everyone, group_src)

    def message(self, kind: str, x: Tensor, group: Group, place: int) -> "Work":
        self.check_running()
        rank, peer = self.running, group.ranks[place]
        operation = Operation(group, kind, x.dtype, x.numel(), peer)
        self.traces[rank].append(operation)
        if kind == "send":
            x = x.clone()
            self.end(operation)
        ends = self.mail[(group, rank, peer) if kind == "send" else (group, peer, rank)]
        if not ends or ends[0][0].kind == kind:
            ends.append((operation, x))
        else:
            other, there = ends.popleft()
            self.check_equal(operation, peer, other)
            source, target = (x, there) if kind == "send" else (there, x)
            target.data.copy_(source.view(target.shape))
            self.end(operation)
            self.end(other)
        return Work(self, operation)

    def meet_in_store(self, what: str, timeout: float) -> None:
        """Hosts that wait for each other without the GPUs."""
        here = torch.zeros(1)
        self.meet(self.store, f"meeting ({what})", here, here, lambda xs: xs, True)

    def new_group(self, ranks, **_):
        """Every rank makes all groups, in one order: a collective of them all."""
        self.counts[self.running] += 1
        group = Group(tuple(ranks), self.counts[self.running])
        mine = torch.tensor([*group.ranks])
        self.meet(None, f"new_group of {group.ranks}", mine, mine, lambda xs: xs, True)
        return group


@dataclass
class Work:
    world: World
    operation: Operation

    def wait(self) -> None:
        self.world.wait(self.operation)

    def is_completed(self) -> bool:
        return False  # at worst


class PerRank(dict):
    """A dict of which each rank of a world has its own."""

    def __init__(self, world: World):
        super().__init__()
        self.world = world

    def __contains__(self, key):
        return super().__contains__((self.world.running, key))

    def __getitem__(self, key):
        return super().__getitem__((self.world.running, key))

    def __setitem__(self, key, value):
        super().__setitem__((self.world.running, key), value)

    def setdefault(self, key, default):
        return super().setdefault((self.world.running, key), default)

    def clear(self):
        for key in [key for key in self if key[0] == self.world.running]:
            del self[key]


_worlds: list[World] = []  # the one that is played


def current_rank() -> int:
    """The rank that calls this: so a test can plant something on one rank alone."""
    return _worlds[-1].running


def play(size: int, fn: Callable, *args) -> World:
    """Calls fn(*args) on `size` ranks, as `tests.ranks.run_ranks` does, but here; what they did and returned.

    Raises: what a rank raises, with its number.
    """
    world = World(size)
    calls = dict(
        all_reduce=world.all_reduce,
        broadcast=world.broadcast,
        isend=world.isend,
        irecv=world.irecv,
        new_group=world.new_group,
        is_initialized=lambda: True,
        get_world_size=lambda: size,
        get_rank=lambda: world.running,
        destroy_process_group=lambda: None,
    )
    environment = {"WORLD_SIZE": str(size), "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment))
        for name, call in calls.items():
            stack.enter_context(mock.patch.object(dist, name, call))
        stack.enter_context(mock.patch("parallel.collectives._all_gather", world.all_gather))
        stack.enter_context(mock.patch("parallel.collectives._reduce_scatter", world.reduce_scatter))
        groups = PerRank(world)
        for name in GROUPS:
            stack.enter_context(mock.patch(name, groups))
        stack.enter_context(mock.patch("parallel.order.records", PerRank(world)))
        stack.enter_context(mock.patch("parallel.heartbeat.wait_for_all", world.meet_in_store))
        stack.enter_context(mock.patch("signal.signal"))  # not of a thread's
        _worlds.append(world)
        try:
            world.run(fn, args)
        finally:
            _worlds.pop()
    if world.error is not None:
        raise world.error
    return world


# --- the execution --------------------------------------------------------------------------------------------------


def execute(traces: list[Trace], one_queue: bool = True) -> str | None:
    """What keeps NCCL from executing what ranks issue, in words; None if nothing does.

    A GPU has one queue, into which its host puts operations as it issues them: NCCL promises no more where several
    communicators share a GPU. A collective ends when it is the first in the queues of all its members; a message when
    both of its ends are. The host goes on at once, and stops at a wait until the operation has ended. Who goes first
    changes nothing in such a play, so one play decides; and if it comes to its end, all operations have one order which
    agrees with every rank's, so that no kinder rule (a stream for each communicator, messages that are buffered) and
    none that blocks the host meanwhile (communicators that are connected when first used) can make them stand still.
    Meetings in the store keep hosts waiting, and no GPU.

    Args: one_queue: False: one for each communicator, the kinder rule.
    """
    position = [0] * len(traces)
    queues: list[dict[Group | None, deque[Operation]]] = [defaultdict(deque) for _ in traces]
    ended: set[Operation] = set()

    def queue(rank: int, group: Group) -> deque[Operation]:
        return queues[rank][None if one_queue and group.number != IN_STORE else group]

    def members(operation: Operation, rank: int) -> tuple[int, ...]:
        return operation.group.ranks if operation.peer is None else (rank, operation.peer)

    def first(rank: int, group: Group) -> Operation | None:
        return next(iter(queue(rank, group)), None)

    def meets(operation: Operation, rank: int, other: int) -> bool:
        """Whether the first operation of another rank is the other part of this one."""
        theirs = first(other, operation.group)
        if theirs is None or theirs.group != operation.group or (theirs.peer is None) != (operation.peer is None):
            return False
        return other == rank or operation.peer is None or (theirs.peer == rank and theirs.kind != operation.kind)

    def advance(rank: int) -> None:
        """The host goes as far as it can."""
        trace = traces[rank]
        while position[rank] < len(trace):
            step = trace[position[rank]]
            if isinstance(step, Operation):
                queue(rank, step.group).append(step)
            elif step.operation not in ended:
                return
            position[rank] += 1

    todo = deque(range(len(traces)))
    while todo:
        rank = todo.popleft()
        advance(rank)
        for line in list(queues[rank].values()):
            while line and all(meets(line[0], rank, other) for other in members(line[0], rank)):
                involved = {other: first(other, line[0].group) for other in members(line[0], rank)}
                for other, theirs in involved.items():
                    if theirs.what != line[0].what:
                        return f"rank {rank} comes with {line[0]}, rank {other} with {theirs}"
                for other, theirs in involved.items():
                    queue(other, theirs.group).popleft()
                    ended.add(theirs)
                    advance(other)
                todo.extend(involved)

    stuck = {rank for rank in range(len(traces)) if position[rank] < len(traces[rank]) or any(queues[rank].values())}
    if not stuck:
        return None
    path, rank = [], min(stuck)  # from each rank to one that it waits for, until one comes back
    while rank not in path:
        path.append(rank)
        for line in filter(None, queues[rank].values()):
            rank = next(other for other in members(line[0], rank) if not meets(line[0], rank, other))
            break
    lines = []
    for one in path[path.index(rank) :]:
        steps = [str(line[0]) for line in queues[one].values() if line]
        lines.append(f"rank {one} stands before {' and before '.join(steps) or 'nothing: it has ended'}")
    return "; ".join(lines)


def forgotten(traces: list[Trace]) -> list[str]:
    """Operations that nobody waits for."""
    waited = {step.operation for trace in traces for step in trace if isinstance(step, Wait)}
    steps = ((rank, step) for rank, trace in enumerate(traces) for step in trace if isinstance(step, Operation))
    return [f"rank {rank}: {step}" for rank, step in steps if step not in waited]


def find_disorder(size: int, fn: Callable, *args) -> str | None:
    """Plays fn(*args) on `size` ranks: what keeps NCCL from executing what they issue, in words; None if nothing."""
    world = play(size, fn, *args)
    return world.problem or execute(world.traces) or next(iter(forgotten(world.traces)), None)
