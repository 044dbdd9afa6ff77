"""Ranks for tests: processes that live on between tests, so that a test on several ranks takes milliseconds.

`run_ranks(4, fn, *args)` calls the module-level function fn(*args) on four ranks at once and returns what each of them
returned. In fn, `init_mesh()` joins the ranks (over gloo, on the CPU). A rank that raises, dies or hangs ends the test
with an error that names it; its pool is killed and the next test gets a fresh one.
"""

import multiprocessing
import os
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing import connection

import pytest

TIMEOUT = 180.0  # seconds for one call, unless the test gives another
GRACE = 1.0  # seconds that the other ranks have to report once one has failed

LOADED = ["torch", "torch._dynamo", "torch.distributed", "parallel.pipeline", "parallel.optim", "parallel.run"]
LOADED += ["transformers.models.auto.tokenization_auto", "matplotlib.figure"]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(LOADED)  # every process begins with these, instead of importing them

_pools: dict[int, "Pool"] = {}


def run_ranks(world_size: int, fn, *args, timeout: float = TIMEOUT) -> list:
    """[fn(*args) on rank 0, on rank 1, ...]; fails the test, naming the rank, if one raises, dies or hangs."""
    if world_size not in _pools:
        _pools[world_size] = Pool(world_size)
    results, problems = _pools[world_size].run(fn, args, timeout)
    if problems:
        _pools.pop(world_size).kill()
        pytest.fail("\n".join(problems), pytrace=False)
    return results


def close_pools() -> None:
    while _pools:
        _pools.popitem()[1].kill()


class Pool:
    """world_size processes in one gloo group, waiting for functions to call."""

    def __init__(self, world_size: int):
        self.folder = tempfile.TemporaryDirectory()
        self.processes, self.pipes = [], []
        for rank in range(world_size):
            pipe, far_end = context.Pipe()
            args = (rank, world_size, f"{self.folder.name}/store", far_end)
            process = context.Process(target=work, args=args, daemon=True)
            process.start()
            far_end.close()
            self.processes.append(process)
            self.pipes.append(pipe)

    def run(self, fn, args, timeout: float) -> tuple[list, list[str]]:
        """Results by rank, and a text for each rank that has none."""
        for pipe in self.pipes:
            pipe.send((fn, args))
        reports: list = [None] * len(self.pipes)  # (succeeded, result or text)
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        deadline = time.monotonic() + timeout
        while waiting and time.monotonic() < deadline:
            for pipe in connection.wait(list(waiting), timeout=0.2):
                rank = waiting.pop(pipe)
                try:
                    reports[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    self.processes[rank].join(GRACE)
                    reports[rank] = (False, f"died with exit code {self.processes[rank].exitcode}")
                if not reports[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        hung = (False, f"no result; it was still at work when the test ended ({timeout:.0f} s at most)")
        reports = [hung if report is None else report for report in reports]
        problems = [f"rank {rank}: {text}" for rank, (succeeded, text) in enumerate(reports) if not succeeded]
        return [result for _, result in reports], problems

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.folder.cleanup()


def work(rank: int, world_size: int, store: str, pipe) -> None:
    """A rank: joins the group, then calls what comes through the pipe until the pipe is closed."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if world_size > 1:
        rendezvous = {"init_method": f"file://{store}", "rank": rank, "world_size": world_size}
        dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT), **rendezvous)
    while True:
        try:
            fn, args = pipe.recv()
            torch.manual_seed(0)
            result = fn(*args)
            if world_size > 1:
                dist.barrier()
            pipe.send((True, result))
        except EOFError:
            os._exit(0)
        except BaseException:
            pipe.send((False, traceback.format_exc()))
