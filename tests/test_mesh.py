"""The mesh and its collectives: results against one process, bytes against formulas, errors on all ranks."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from parallel.collectives import Axis, RankError, all_gather, all_reduce_, all_reduce_async_, broadcast_, traffic
from parallel.mesh import Layout, check_layout, init_mesh
from tests.ranks import TIMEOUT, run_ranks

REPOSITORY = Path(__file__).parent.parent


def reductions():
    mesh = init_mesh()
    x = torch.arange(5, dtype=torch.float64) * (mesh.rank + 1)
    kept = x.clone()
    results = {
        "sum": mesh.sum(x, "dp"),
        "max": mesh.max(x, "dp"),
        "number": mesh.sum(0.1 + mesh.rank, "dp"),
        "largest": mesh.max(mesh.rank, "dp"),
        "gathered": mesh.all_gather(x[None, :2], "dp"),
        "flags": mesh.all_gather(torch.tensor([mesh.rank == 1]), "dp"),
        "objects": mesh.gather_objects({"rank": mesh.rank, "text": "é" * mesh.rank}),
        "broadcast": mesh.broadcast_object(["from", mesh.rank] if mesh.is_logger else None),
    }
    assert torch.equal(x, kept), "an argument was changed"
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_reductions_match_one_process(world_size):
    ranks = torch.arange(world_size, dtype=torch.float64)
    x = torch.arange(5, dtype=torch.float64) * (ranks[:, None] + 1)  # [world_size, 5]
    for rank, result in enumerate(run_ranks(world_size, reductions)):
        assert torch.equal(result["sum"], x.sum(0)), f"rank {rank}"
        assert torch.equal(result["max"], x.amax(0)), f"rank {rank}"
        assert result["number"] == pytest.approx(float((ranks + 0.1).sum()), rel=1e-15)
        assert isinstance(result["number"], float) and result["largest"] == world_size - 1
        assert torch.equal(result["gathered"], x[:, :2])
        assert result["flags"].tolist() == [r == 1 for r in range(world_size)]
        assert result["objects"] == [{"rank": r, "text": "é" * r} for r in range(world_size)]
        assert result["broadcast"] == ["from", 0]


def test_mesh_of_a_plain_shell_needs_no_group():
    mesh = init_mesh()
    assert (mesh.world_size, mesh.rank, mesh.dp.size, mesh.is_logger) == (1, 0, 1, True)
    assert not torch.distributed.is_initialized()
    x = torch.ones(3)
    assert mesh.sum(x, "dp") is not x and torch.equal(mesh.sum(x, "tp"), x)
    mesh.barrier()
    mesh.close()


def measured_traffic():
    mesh, before = init_mesh(), traffic()
    x = torch.ones(12, dtype=torch.float32)
    all_reduce_(x, mesh.dp)
    all_reduce_async_(x.double(), mesh.dp).wait()
    all_gather(x[:3], mesh.dp)
    broadcast_(x.to(torch.bfloat16), mesh.dp)
    sent = {key: value - before.get(key, 0) for key, value in traffic().items() if key[0] == "dp"}
    return {key: value for key, value in sent.items() if value}


@pytest.mark.parametrize("size", [2, 4])
def test_traffic_equals_ring_formulas(size):
    expected = {
        ("dp", "all_reduce"): 2 * (12 * 4 + 12 * 8) * (size - 1) // size,
        ("dp", "all_gather"): size * 3 * 4 * (size - 1) // size,
        ("dp", "broadcast"): 12 * 2 * (size - 1) // size,
    }
    assert run_ranks(size, measured_traffic) == [expected] * size


def test_collectives_over_one_rank_send_nothing():
    before, x = traffic(), torch.ones(3)
    all_reduce_(x, Axis("dp", 1, 0))
    assert torch.equal(all_gather(x, Axis("dp", 1, 0)), x) and traffic() == before


def raising_together(failing, kind):
    mesh = init_mesh()
    mesh.raise_together(None)
    error = kind("row 7 has no field 'prompt'") if mesh.rank in failing else None
    try:
        mesh.raise_together(error)
    except RankError as caught:
        return str(caught), caught.__cause__ is error, mesh.sum(1, "dp")


def test_raise_together_names_first_failing_rank_on_all():
    assert (
        run_ranks(4, raising_together, (1, 3), ValueError) == [("rank 1: row 7 has no field 'prompt'", True, 4.0)] * 4
    )
    [(text, *_)] = run_ranks(1, raising_together, (0,), ValueError)
    assert text == "row 7 has no field 'prompt'"
    assert run_ranks(2, raising_together, (0,), ZeroDivisionError)[1][0].startswith("rank 0: ZeroDivisionError: row 7")


@pytest.mark.parametrize(("dp", "world_size"), [(3, 2), (1, 2), (2, 1), (-1, 1)])
def test_layout_rejects_another_number_of_processes(dp, world_size):
    with pytest.raises(ValueError, match=f"--layout.dp {max(dp, 1)} needs .* processes, but {world_size} were started"):
        check_layout(Layout(dp=dp), world_size)


def layout_error():
    with pytest.raises(ValueError, match="--layout.dp 3 .*2 were started"):
        init_mesh(Layout(dp=3))


def test_layout_is_rejected_on_every_rank():
    run_ranks(2, layout_error)


def one_rank_fails(how):
    mesh = init_mesh()
    if mesh.rank == 1:
        os._exit(9) if how == "dies" else threading.Event().wait() if how == "hangs" else int("x")
    mesh.barrier()


@pytest.mark.parametrize(
    ("how", "text"),
    [("dies", "rank 1: died with exit code 9"), ("hangs", "rank 1: no result"), ("raises", "ValueError")],
)
def test_pool_names_the_failing_rank(how, text):
    started = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match="(?s)rank 1: .*" + text.removeprefix("rank 1: ")):
        run_ranks(2, one_rank_fails, how, timeout=2 if how == "hangs" else TIMEOUT)
    assert time.monotonic() - started < TIMEOUT / 2, "the other rank was waited for"
    assert run_ranks(2, measured_traffic), "the next test gets a fresh pool"


VICTIM = """
import os, signal
from parallel.mesh import init_mesh
signal.signal(signal.SIGTERM, lambda *_: None)  # as scripts do, which save when they are asked to end
mesh = init_mesh()
mesh.barrier()
if mesh.rank == 1:
    open(os.environ["REPORT"] + "1", "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
try:
    mesh.barrier()
except RuntimeError as error:
    open(os.environ["REPORT"] + str(mesh.rank), "w").write(f"{type(error).__name__}: {error}")
    raise
"""


def test_killed_rank_is_named_by_the_others(tmp_path):
    (tmp_path / "victim.py").write_text(VICTIM)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "REPORT": f"{tmp_path}/rank", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "victim.py"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    seconds = time.time() - (tmp_path / "rank1").stat().st_mtime
    assert ended.returncode != 0 and seconds < 40, (seconds, ended.stderr)
    for rank in (0, 2):
        report = (tmp_path / f"rank{rank}").read_text()
        assert report.startswith(
            "RankError: all_reduce over world failed in start-up, no answer from rank 1 (dead, last "
        ), report
