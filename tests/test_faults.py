"""What goes wrong between ranks is noticed soon and named: order, drift, silence, death; and a killed job goes on."""

import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from parallel import heartbeat, optim, run
from parallel.collectives import RankError, all_reduce_, all_reduce_async_
from parallel.data_parallel import data_parallel
from parallel.families import config_from_hf
from parallel.heartbeat import Heartbeat
from parallel.mesh import Layout, check_layout, init_mesh
from parallel.model import Decoder
from parallel.optim import AdamW, clip_grad_norm
from parallel.order import KEPT, gather_in_order
from tests.ranks import run_ranks
from tests.scripts import TIMEOUT, TINY_GPT2, make_tiny_model, run_on_ranks, start
from tests.scripts import run as run_script
from tests.test_scripts import LETTERS, assert_same_run

# --- the order of collectives -----------------------------------------------------------------------------------------


def message_of(function, *args):
    """What a RankError says; None without one."""
    try:
        function(*args)
    except RankError as error:
        return str(error)


def check_order(mesh):
    mine = torch.tensor(mesh.rank + 0.1, dtype=torch.float64)
    assert gather_in_order(mine, mesh).tolist() == [rank + 0.1 for rank in range(mesh.world_size)]


def two_sums(mesh, rank, names):
    """Sums over dp of two tensors of one size, from two lines or under two names, on one rank the other way round."""
    a, b = torch.full((4,), 1.0), torch.full((4,), 10.0)
    swapped = mesh.rank == rank
    if names:
        for x in (b, a) if swapped else (a, b):
            all_reduce_async_(x, mesh.dp, tag="one" if x is a else "two").wait()
        return a, b
    if swapped:
        all_reduce_(b, mesh.dp)
    all_reduce_(a, mesh.dp)
    if not swapped:
        all_reduce_(b, mesh.dp)
    return a, b


def swap(layout, names, num_later):
    """What ranks say of their order before a swap on rank 1, after it, and after a new start; and the wrong sum."""
    mesh = init_mesh(layout)
    mesh.at("update", 3)
    mesh.gather_objects("x" * mesh.rank)  # of unequal sizes
    before = message_of(check_order, mesh)
    a, _ = two_sums(mesh, 1, names)
    for _ in range(num_later):
        mesh.sum(1.0, "dp")
    after = message_of(check_order, mesh)
    return before, after, message_of(check_order, init_mesh(layout)), a[0].item()


@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(dp=4), Layout(dp=2, tp=2)], ids=str)
@pytest.mark.parametrize("names", [False, True], ids=["lines", "names"])
def test_swapped_collectives_are_named_on_all_ranks(layout, names):
    results = run_ranks(layout.dp * layout.tp, swap, layout, names, 0)
    assert {(before, later) for before, _, later, _ in results} == {(None, None)}
    [text] = {after for _, after, _, _ in results}
    other = 3 if layout.tp == 2 else 0
    call = r"all_reduce of sum (one|two)? ?over dp, 4 x float32 \(test_faults.py:\d+\)"
    ranks = rf"rank {min(other, 1)}: {call}; rank {max(other, 1)}: {call}"
    expected = f"ranks of dp differ in the order of their collectives, in update of iteration 3: {ranks}"
    found = re.fullmatch(expected, text)
    assert found and (found[1] != found[2]) == names, text
    assert results[0][3] == 11 or layout != Layout(dp=2), "the backend noticed"


def test_swap_of_long_ago_is_caught():
    for _, text, _, _ in run_ranks(2, swap, Layout(), False, KEPT):
        assert text.endswith(f"in update of iteration 3: more than {KEPT} calls ago"), text


# --- replicas that drift ----------------------------------------------------------------------------------------------


def flip_a_bit(layout, rank, name):
    """Steps of a tiny decoder, the gradients being 0; before the second, one bit changes on one rank."""
    mesh = init_mesh(layout)
    config = config_from_hf(TINY_GPT2, "test")[0]
    decoder = Decoder(config, mesh, seed=1)
    model = data_parallel({"policy": decoder}, mesh, layout)
    optimizer = AdamW(model, 1e-3)
    patch = pytest.MonkeyPatch()
    with patch.context() as patch:
        patch.setattr(optim, "DRIFT_EVERY", 3)
        for step in range(3):
            clip_grad_norm(model, 1.0, mesh)
            if step == 1 and mesh.rank == rank:
                unit, i = next((u, u.names.index(name)) for u in model.units if name in u.names)
                unit.view(unit.flat, i).view(torch.int32).flatten()[1] ^= 1
            message = message_of(optimizer.step)
            if message is not None or step == 2:
                return step, message


@pytest.mark.parametrize(
    ("layout", "name", "text"),
    [
        (Layout(dp=2), "layers.1.ffn_in.weight", r"layers.1 \(.*\) on rank 0, 1 differ from each other over dp"),
        (Layout(dp=4), "layers.0.ffn_in.bias", r"layers.0 \(.*\) on rank 1 differ from the other 3 over dp"),
        (
            Layout(tp=4),
            "layers.1.ffn_norm.weight",
            "layers.1.ffn_norm.weight on rank 1 differ from the other 3 over tp",
        ),
    ],
    ids=str,
)
def test_one_flipped_bit_is_named(layout, name, text):
    world_size = layout.tp * max(layout.dp, 1)
    for step, message in run_ranks(world_size, flip_a_bit, layout, 1, f"policy.{name}"):
        assert step == 2 and re.search(f"weights of policy.{text}; a device .* --resume goes on", message), message


def test_healthy_replicas_pass():
    for layout in (Layout(dp=4), Layout(dp=2, tp=2, zero=3), Layout(tp=4), Layout(dp=4, zero=3)):
        assert run_ranks(4, flip_a_bit, layout, -1, "") == [(2, None)] * 4


# --- ranks that are busy, late, silent or dead ------------------------------------------------------------------------


class Clock:
    """Time that passes where the ranks sleep, and nowhere else; what is due by then happens meanwhile."""

    def __init__(self):
        self.now, self.due = 0.0, []  # seconds, (when, what) to come

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        end = self.now + seconds
        while self.due and min(self.due, key=lambda x: x[0])[0] <= end:
            self.now, happen = self.due.pop(self.due.index(min(self.due, key=lambda x: x[0])))
            happen()
        self.now = end

    def every(self, seconds, happen):
        def again():
            happen()
            self.every(seconds, happen)

        self.due.append((self.now + seconds, again))


@pytest.fixture
def hearts(monkeypatch):
    """Two ranks in this process, over a store of their own, and their clock; rank 1 gives signs of life."""
    heartbeat.at("scoring", 7)
    clock, store = Clock(), dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with monkeypatch.context() as patch:
        patch.setattr(Heartbeat, "keep_beating", lambda *_: None)
        hearts = [Heartbeat(dist.PrefixStore("job", store.clone()), rank, 2) for rank in range(2)]
    monkeypatch.setattr(heartbeat, "time", clock)
    clock.every(heartbeat.BEAT_SECONDS, lambda: hearts[1].beat(hearts[1].store))
    yield *hearts, clock  # while the store lives


def wait(heart, timeout=10_000.0):
    """(seconds that it took, what a RankError said)"""
    started = heartbeat.time.monotonic()
    message = message_of(heart.wait_for_all, "the scores", timeout)
    return heartbeat.time.monotonic() - started, message


def test_busy_rank_is_waited_for(hearts):
    waiting, busy, clock = hearts
    for late in (0.01, 1000.0):  # seconds; the second more than SILENT_SECONDS, with signs of life
        clock.due.append((clock.now + late, lambda: wait(busy)))
        seconds, message = wait(waiting)
        assert message is None and late <= seconds < late + min(late / 10, 0.3)


def test_busy_rank_is_given_up_in_the_end(hearts):
    seconds, text = wait(hearts[0], timeout=700)
    assert text == "waited 700 s for the scores: rank 1 (last seen in scoring of iteration 7) lives but does not come"
    assert 700 <= seconds < 700.3


def test_silent_rank_is_dead(hearts):
    waiting, _, clock = hearts
    clock.sleep(13.0)
    clock.due.clear()
    seconds, message = wait(waiting)
    assert message.startswith("rank 1 has been silent for 60 s (dead, or its machine hangs), last seen in scoring of ")
    assert 60 <= seconds < 60.3


def test_dead_process_is_seen_at_once(hearts, monkeypatch):
    waiting, lost, clock = hearts
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # until it is waited for, it is a zombie
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: child)
        lost.beat(lost.store)
    clock.due.clear()
    seconds, message = wait(waiting)
    os.waitpid(child, 0)
    assert message == "rank 1 is dead, last seen in scoring of iteration 7; the others wait for the scores"
    assert seconds == 0


def test_ranks_meet_again_and_again(monkeypatch):
    """With threads, clock and signs of life as they are."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    hearts = [Heartbeat(dist.PrefixStore("job", store.clone()), rank, 2) for rank in range(2)]
    with ThreadPoolExecutor() as pool:
        both = pool.map(lambda heart: [wait(heart)[1] for _ in range(200)], hearts)
    assert list(both) == [[None] * 200] * 2
    num_beats = hearts[1].num_beats
    while hearts[1].num_beats < num_beats + 3:  # by itself
        time.sleep(0.01)


def test_phases_are_told():
    heartbeat.at("rollout", 7)
    assert heartbeat.where() == "rollout of iteration 7"
    heartbeat.at("scoring")
    assert heartbeat.where() == "scoring of iteration 7"


# --- layouts and memory -----------------------------------------------------------------------------------------------


def test_layout_that_does_not_fit_the_model_is_refused_before_any_group(monkeypatch):
    config = config_from_hf(TINY_GPT2, "test")[0]
    for name, value in {"RANK": 0, "WORLD_SIZE": 24, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="tp 8 does not divide.* 4 heads.*24 processes.*tp 1 or .*tp 2 or .*tp 4$"):
        init_mesh(Layout(tp=8), config)
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match="--layout.tp 5 does not divide the 24 processes.*give one of 1, 2, 4,"):
        check_layout(Layout(tp=5), 24, config)
    check_layout(Layout(tp=4), 24, config)


def test_script_refuses_such_a_layout_once(tmp_path):
    model = make_tiny_model(tmp_path / "model", hf_config={**TINY_GPT2, "n_head": 1})
    status, _, err = run_script("sft.py", "--model", model, "--layout.tp", 2, cwd=tmp_path, ranks=2)
    assert status == 1 and not (tmp_path / "runs").exists()
    assert err.count("error: --layout.tp 2 does not divide this model's 1 heads, 1 key/value heads") == 1, err
    assert err.count("error: --") == 1 and "with 2 processes it takes --layout.tp 1\n" in err, err


def test_out_of_memory_says_where_and_what_helps():
    heartbeat.at("update", 2)
    text = run.describe_oom(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore."))
    assert text.startswith("out of memory in update of iteration 2: CUDA out of memory. Tried to allocate 2 GiB.\n")
    assert all(flag in text for flag in ("--microbatch-size", "--layout.recompute", "--layout.zero", "--layout.tp"))


# --- killed ranks -----------------------------------------------------------------------------------------------------

KILLED = """
import os, time
attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], int(os.environ["RANK"])
open(f"times/started-{attempt}-{rank}", "w").write(str(time.time()))
import json, signal, threading
import ppo
from parallel.run import launch

phase, victim, call, delay = (json.loads(os.environ["PLAN"]) + [["", -1, 0, 0]])[int(attempt)]

def kill():
    open(f"times/killed-{attempt}", "w").write(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)

def fatal(function):
    calls = []
    def called(*args, **options):
        calls.append(0)
        if len(calls) == call:
            threading.Timer(delay, kill).start()
        return function(*args, **options)
    return called

if rank == victim:
    setattr(ppo, phase, fatal(getattr(ppo, phase)))
launch(ppo.main, ppo.Args)
"""
# phase as the function of ppo.py, rank, the how manieth call, seconds from its beginning
KILLS = [("load_decoder", 1, 1, 0.0), ("generate", 0, 4, 0.01), ("forward_backward", 1, 10, 0.01)]
KILLS += [("save_training_state", 0, 1, 0.002)]
FLAGS = ("--batch-size", 16, "--minibatch-size", 8, "--eval-samples", 20, "--max-iterations", 6, "--save-every", 2)
FLAGS += (*LETTERS, "--kl-coef", 0.05, "--eval-every", 2)


def test_job_with_killed_ranks_goes_on_by_itself_bit_for_bit(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    (tmp_path / "times").mkdir()
    (tmp_path / "killed.py").write_text(KILLED)
    run_on_ranks("ppo.py", "--model", model, *FLAGS, "--output-dir", "whole", cwd=tmp_path, ranks=2)
    options = dict(cwd=tmp_path, ranks=2, restarts=len(KILLS), env={"PLAN": json.dumps(KILLS)})
    process = start(tmp_path / "killed.py", "--model", model, *FLAGS, **options)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["ppo"]  # no restart has chosen another
    assert out.count("restarted by the launcher") == len(KILLS) - 1  # the first was killed before its first metrics
    assert_same_run(tmp_path / "runs/ppo", tmp_path / "whole")
    noticed = re.findall(r"^E\d+ (\d\d):(\d\d):(\d\d\.\d+) .* failed \(exitcode", err, re.MULTILINE)
    assert len(noticed) == len(KILLS)
    for attempt, (hours, minutes, seconds) in enumerate(noticed):
        killed = float((tmp_path / f"times/killed-{attempt}").read_text())
        started = max(float(path.read_text()) for path in (tmp_path / "times").glob(f"started-{attempt + 1}-*"))
        clock = time.localtime(killed)
        day = clock.tm_hour * 3600 + clock.tm_min * 60 + clock.tm_sec + killed % 1
        to_notice = (int(hours) * 3600 + int(minutes) * 60 + float(seconds) - day) % 86400
        print(f"{KILLS[attempt][0]}: noticed after {to_notice:.2f} s, running again after {started - killed:.2f} s")
        # without waiting for silence (60 s) or for the launcher to kill by force what it asked to end (30 s)
        assert to_notice < 25 and started - killed < 25, KILLS[attempt]
