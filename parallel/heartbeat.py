"""Signs of life: every rank says in the launcher's store that it lives and what it is doing.

A collective that waits for a rank busy with a slow reward looks like one that waits for a dead rank. So where ranks may
be busy for very different times they meet in the store instead (`wait_for_all`), where each tells what it is doing: one
that works is waited for, one that is silent is dead. Without a store, as on one process, nothing here does anything.
"""

import json
import math
import os
import threading
import time
from pathlib import Path

import torch.distributed as dist

BEAT_SECONDS = 5.0  # between two signs of life
SILENT_SECONDS = 60.0  # a rank without a new sign for so long is dead


class RankError(RuntimeError):
    """An error that is known on every rank; its message names the rank where it happened."""


class Heartbeat:
    """This rank's signs of life, and what is known of the other ranks.

    The key beat/<rank> holds a count, this machine, the process, its phase and the meetings that it has come to. A
    thread writes it over a connection of its own: a call that waits blocks all others of the same connection.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int):
        self.store, self.rank, self.world_size = store, rank, world_size
        self.machine = _describe_machine()
        self.num_meetings = self.num_beats = 0
        self.store_ended = False
        self.seen: dict[int, tuple[list, float]] = {}  # the newest sign of each rank, and when it was first seen here
        self.beat(store)
        threading.Thread(target=self.keep_beating, args=(store.clone(),), daemon=True).start()

    def beat(self, store: dist.Store) -> None:
        self.num_beats += 1
        sign = [self.num_beats, self.machine, os.getpid(), where(), self.num_meetings]
        store.set(f"beat/{self.rank}", json.dumps(sign))

    def keep_beating(self, store: dist.Store) -> None:
        try:
            while True:
                time.sleep(BEAT_SECONDS)
                self.beat(store)
        except RuntimeError:  # the store has ended, and with it the job
            pass

    def look(self) -> None:
        """Reads the signs of the ranks that have given any."""
        ranks = list(range(self.world_size))
        if not self.store.check([f"beat/{rank}" for rank in ranks]):  # some have not begun
            ranks = [rank for rank in ranks if self.store.check([f"beat/{rank}"])]
        signs = self.store.multi_get([f"beat/{rank}" for rank in ranks])
        for rank, sign in zip(ranks, map(json.loads, signs), strict=True):
            if rank not in self.seen or self.seen[rank][0] != sign:
                self.seen[rank] = (sign, time.monotonic())

    def has_ended(self, rank: int) -> bool:
        """Whether a rank of this machine is known to be dead."""
        _, machine, pid, *_ = self.seen[rank][0] if rank in self.seen else (0, None, 0)
        if machine is None or machine != self.machine:
            return False
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return True

    def last_seen(self, rank: int) -> str:
        return f"last seen in {self.seen[rank][0][3]}" if rank in self.seen else "never seen"

    def wait_for_all(self, what: str, timeout: float) -> None:
        """See the function `wait_for_all`."""
        if self.store_ended:  # with its launcher: ranks that it asked to end still save, and collectives name the lost
            return
        self.num_meetings += 1
        key, began, next_look = f"meeting/{self.num_meetings}", time.monotonic(), 0.0
        try:
            if self.rank == 0:
                self.store.delete_key(f"meeting/{self.num_meetings - 2}")  # all have left it: all came to the next one
            self.beat(self.store)
            self.store.add(key, 1)
            while self.store.add(key, 0) < self.world_size:
                now = time.monotonic()
                if now >= next_look:
                    self.look()
                    next_look = now + min(BEAT_SECONDS, SILENT_SECONDS / 4)
                for rank in range(self.world_size):
                    self.check_alive(rank, what)
                if now - began > timeout:
                    self.raise_late(what, timeout)
                time.sleep(min(max((now - began) / 20, 0.0005), 0.2))
        except RankError:
            raise
        except RuntimeError:
            self.store_ended = True

    def check_alive(self, rank: int, what: str) -> None:
        if rank in self.seen and self.seen[rank][0][4] < self.num_meetings:
            if self.has_ended(rank):
                raise RankError(f"rank {rank} is dead, {self.last_seen(rank)}; the others wait for {what}")
            if time.monotonic() - self.seen[rank][1] > SILENT_SECONDS:
                raise RankError(
                    f"rank {rank} has been silent for {SILENT_SECONDS:g} s (dead, or its machine hangs), "
                    f"{self.last_seen(rank)}; the others wait for {what}"
                )

    def raise_late(self, what: str, timeout: float) -> None:
        self.look()
        late = [r for r in range(self.world_size) if r not in self.seen or self.seen[r][0][4] < self.num_meetings]
        ranks = ", ".join(f"rank {rank} ({self.last_seen(rank)})" for rank in late)
        raise RankError(f"waited {timeout:g} s for {what}: {ranks or 'a rank'} lives but does not come")


_doing: list = ["start-up", None]  # phase, iteration
_heart: Heartbeat | None = None


def at(phase: str, iteration: int | None = None) -> None:
    """Notes what this process is doing from now on, for error messages; None = still in the same iteration."""
    _doing[0] = phase
    if iteration is not None:
        _doing[1] = iteration


def where() -> str:
    """What this process is doing: "rollout of iteration 3"."""
    phase, iteration = _doing
    return phase if iteration is None else f"{phase} of iteration {iteration}"


def start(store: dist.Store, rank: int, world_size: int) -> None:
    """Begins this process's signs of life; a new store replaces the one before."""
    global _heart
    _heart = Heartbeat(store, rank, world_size)


def wait_for_all(what: str, timeout: float = math.inf) -> None:
    """Returns when every rank has come here; meanwhile no collective waits, so that a busy rank times nothing out.

    Args: what: that the ranks wait for, in words. timeout: seconds after which a rank that lives is given up, too.
    Communication: the store alone. A rank that comes last waits one round trip.
    Raises: RankError naming a rank that has ended, is silent for SILENT_SECONDS or has not come in time, and its phase.
    """
    if _heart is not None:
        _heart.wait_for_all(what, timeout)


def has_ended(rank: int) -> bool:
    """Whether the process of a rank is known to have ended: at once on this machine, never on another."""
    return _heart is not None and _heart.has_ended(rank)


def describe(ranks: list[int]) -> str:
    """Ranks that do not answer: "rank 1 (dead, last seen in update of iteration 3)"."""
    if _heart is None:
        return f"rank {', '.join(map(str, ranks))} (dead, or busy elsewhere)"
    state = {rank: "dead" if _heart.has_ended(rank) else "dead, or busy elsewhere" for rank in ranks}
    return ", ".join(f"rank {rank} ({state[rank]}, {_heart.last_seen(rank)})" for rank in ranks)


def look() -> None:
    """Renews what is known of the other ranks, as far as the store answers."""
    if _heart is not None:
        _heart.look()


def _describe_machine() -> str | None:
    """What processes have in common that can see each other by process number; None where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None
