"""What a user sees of any script: flags, folder, progress, samples, curves, errors, signals.

This file is also the script that the tests run: a loop of five iterations that fails on demand.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import ppo
import sft
from parallel.mesh import Layout, init_mesh
from parallel.optim import Optim
from parallel.run import Run, draw_curves, flat_flags, format_table, launch
from parallel.training_state import save_training_state
from tests.ranks import run_ranks
from tests.scripts import TIMEOUT, start


@dataclass
class Args:
    """Counts to five."""

    output_dir: str = ""
    """run folder"""
    resume: bool = False
    """go on"""
    overwrite: bool = False
    """replace"""
    allow_change: tuple[str, ...] = ()
    """flags that may differ"""
    log_every: int = 1
    """iterations"""
    eval_every: int = 1
    """iterations"""
    track: str = "none"
    """where to log"""
    max_iterations: int = 5
    """iterations"""
    pause: float = 0.0
    """seconds per iteration"""
    fail: str = ""
    """what happens in iteration 3"""
    fail_rank: int = -1
    """where; -1 = everywhere"""
    optim: Optim = field(default_factory=Optim)
    layout: Layout = field(default_factory=Layout)

    def __post_init__(self):
        if self.max_iterations < 0:
            raise ValueError(f"--max-iterations {self.max_iterations} is negative")


def main(args):
    mesh = init_mesh(args.layout)
    run = Run("count", args, mesh)
    saved = run.load_checkpoint([])
    run.describe([("pid", str(os.getpid()))])
    iteration = saved["step"] if saved else 0
    while iteration < args.max_iterations and not run.stop_requested():
        iteration += 1
        time.sleep(args.pause)
        if iteration == 3 and args.fail_rank in (-1, mesh.rank):
            fail(args.fail)
        mesh.sum(1.0, "dp")
        run.log({"event": "train", "iteration": iteration, "score": 1 / iteration})
        run.progress(iteration, args.max_iterations, {"score": f"{1 / iteration:.3f}"})
    save_training_state(run.folder / "checkpoints", iteration, [], {}, keep=2, mesh=mesh)
    run.curves()
    run.finish()
    mesh.close()


def fail(what):
    if what == "warning":
        warnings.warn("this is odd", stacklevel=2)
    elif what == "mendable":
        raise ValueError("the input is bad")
    elif what == "bug":
        raise TypeError("the code is bad")
    elif what:
        os.kill(os.getpid(), getattr(signal, what))


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """Runs the script in this process, in a folder of its own: (exit status, standard output, standard error)."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def call(*flags, script=(main, Args)):
        monkeypatch.setattr(sys, "argv", ["count.py", *map(str, flags)])
        status = 0
        try:
            launch(*script)
        except SystemExit as stop:
            status = stop.code
        return status, *capfd.readouterr()

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def rows(folder):
    return [json.loads(line)["iteration"] for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [ppo, sft], ids=["ppo", "sft"])
def test_help_explains_every_flag(script, call):
    status, page, _ = call("--help", script=(script.main, script.Args))
    assert status == 0
    assert max(map(len, page.splitlines())) <= 100
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", page).split())
    metavar = r"( (STR|INT|FLOAT|\[\S+ \[(\S+ )?\.\.\.\]\]|(\{None\}\|)?\{[\w,]+\}|\{None\}\|FLOAT)|, --(\w+\.)?no-\S+)"
    for flag in flat_flags(script.Args()):
        flag = flag.replace("_", "-")
        assert re.search(rf"--{flag}{metavar} (?!\(default)", text), f"--{flag} has no help"


def test_misspelt_flag_is_named_with_a_suggestion(call):
    status, out, err = call("--max-iteratoins", 3)
    assert status == 2 and not out
    assert "--max-iteratoins" in err and "Perhaps you meant" in err and "--max-iterations INT" in err


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ((main, Args), ["--max-iterations", -1], "--max-iterations -1 is negative"),
        ((ppo.main, ppo.Args), ["--batch-size", 33], "--batch-size 33 is no multiple of --minibatch-size 32"),
        ((ppo.main, ppo.Args), ["--sampling.top-p", 2], "--sampling.top-p 2.0 is not in (0, 1]"),
        ((ppo.main, ppo.Args), ["--advantage", "rlo"], "rloo"),
        ((ppo.main, ppo.Args), ["--batch-size", "many"], "--batch-size"),
    ],
)
def test_bad_value_of_a_flag_is_one_message(script, flags, message, call):
    status, out, err = call(*flags, script=script)
    assert status == 2 and not out and "Traceback" not in err
    assert message in " ".join(re.sub(r"[│╭╮╰╯─]", " ", err).split())


# ---------------------------------------------------------------------------------------------------------------------
# The run folder
# ---------------------------------------------------------------------------------------------------------------------


def test_default_folder_is_the_next_free_one(call):
    for name in ("count", "count-2", "count-3"):
        status, out, _ = call()
        assert status == 0 and f"run        runs/{name}\n" in out
        assert out.endswith(
            f"metrics                       runs/{name}/metrics.jsonl\n"
            f"learning curves               runs/{name}/curves.png\n"
        )
        assert json.loads(Path(f"runs/{name}/args.json").read_text())["optim.lr"] == Optim().lr


def test_folder_that_holds_a_run_is_refused_or_replaced(call):
    call("--output-dir", "here")
    status, _, err = call("--output-dir", "here")
    assert status == 1 and err == "error: here holds a run: --resume goes on with it, --overwrite replaces it\n"
    assert rows("here") == [1, 2, 3, 4, 5]
    Path("here/notes.txt").write_text("mine")
    status, _, _ = call("--output-dir", "here", "--overwrite", "--max-iterations", 2)
    assert status == 0 and rows("here") == [1, 2] and Path("here/notes.txt").read_text() == "mine"
    assert [path.name for path in Path("here/checkpoints").iterdir()] == ["step-2"]
    status, _, err = call("--output-dir", "here", "--overwrite", "--resume")
    assert status == 1 and err.startswith("error: --resume goes on with a run and --overwrite replaces it")


@pytest.mark.parametrize("folder", ["file", "file/run", "/proc/run"])
def test_folder_that_cannot_be_written_is_named(folder, call):
    Path("file").write_text("")
    status, _, err = call("--output-dir", folder)
    assert status == 1 and err.startswith(f"error: --output-dir {folder} cannot be written: ") and err.count("\n") == 1


def test_resume_takes_the_newest_run_and_drops_later_rows(call):
    call()
    call("--max-iterations", 4)
    now = time.time()
    for path in Path("runs/count").iterdir():
        os.utime(path, (now - 60, now - 60))
    with open("runs/count-2/metrics.jsonl", "a") as file:
        file.write('{"event": "train", "iteration": 5, "score": 9}\n{"event": "tra')  # a crash after the checkpoint
    status, out, _ = call("--resume", "--max-iterations", 6)
    assert status == 0 and "resumed from runs/count-2/checkpoints/step-4\n" in out
    assert "resumed with another flag: --max-iterations was 4, is 6\n" in out  # harmless: the rate is constant
    assert rows("runs/count-2") == [1, 2, 3, 4, 5, 6]
    assert "6/6 100 %" in out and "4/6" not in out


def test_resume_without_a_run_or_a_checkpoint_starts_anew(call):
    status, out, _ = call("--resume")
    assert status == 0 and "no run in runs/count to resume: starting anew\n" in out
    for path in Path("runs/count/checkpoints").rglob("*"):
        if path.is_file():
            path.unlink()
    for path in Path("runs/count/checkpoints").iterdir():
        path.rmdir()
    status, out, _ = call("--resume")
    assert status == 0 and "no checkpoint: starting anew\n" in out and rows("runs/count") == [1, 2, 3, 4, 5]


def test_resume_refuses_flags_that_change_the_run(call):
    call()
    changed = ("--resume", "--optim.lr", 0.5, "--eval-every", 2, "--max-iterations", 6)
    status, _, err = call(*changed)
    assert status == 1 and err == (
        "error: the run to resume was made with other flags:\n"
        "  --eval-every was 1, is 2\n  --max-iterations was 5, is 6\n  --optim.lr was 0.0003, is 0.5\n"
        "give the old ones, or --allow-change optim.lr\n"
    )
    status, out, _ = call(*changed, "--allow-change", "optim.lr")
    assert status == 0 and "resumed with another flag: --optim.lr was 0.0003, is 0.5\n" in out
    assert json.loads(Path("runs/count/args.json").read_text())["former"] == [
        {"eval_every": 1, "max_iterations": 5, "optim.lr": 0.0003}
    ]
    status, _, err = call(*changed[:-1], 7, "--optim.schedule", "linear", "--allow-change", "optim.schedule")
    assert status == 1 and "--allow-change max-iterations" in err  # now the learning rate depends on the length
    Path("runs/count/args.json").write_text("{")
    status, _, err = call("--resume")
    assert status == 1 and err.startswith("error: runs/count/args.json is damaged (")


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_tracker_that_is_not_installed_is_named(package, call, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, err = call("--track", package)
    assert status == 1 and err == f"error: --track {package} needs the package {package}: pip install {package}\n"
    assert not Path("runs").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What is shown
# ---------------------------------------------------------------------------------------------------------------------


def test_progress_lines_off_a_terminal_follow_log_every(call):
    _, out, _ = call("--log-every", 2, "--max-iterations", 5)
    shown = [line for line in out.splitlines() if " % " in line]
    assert [line.split()[0] for line in shown] == ["2/5", "4/5", "5/5"]
    assert shown[0] == "2/5  40 %  0:00 left  score 0.500" and "\r" not in out


def test_progress_on_a_terminal_is_one_line_that_others_do_not_run_into(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    run = Run("count", Args(output_dir=str(tmp_path / "run"), log_every=100), init_mesh())
    clock = iter((100.0, 110.0, 1000.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    run.progress(1, 1000, {"score": "0.1"})
    run.progress(2, 1000, {"score": "0.2", "a number": "x" * 50})
    run.note("iteration 2: eval")
    run.progress(1000, 1000, {"score": "0.3"})
    run.note("done")
    lines = capsys.readouterr().out.split("\n")
    assert lines[0].split("\r")[1:] == [
        f"{'1/1000   0 %  ?:?? left  score 0.1':39}",
        "2/1000   0 %  2:46:20 left  score 0.2  "[:39],
    ]
    assert lines[1:] == ["iteration 2: eval", f"\r{'1000/1000 100 %  0:00 left  score 0.3':39}", "done", ""]


def test_samples_are_kept_whole_and_shown_cut(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    run = Run("count", Args(output_dir=str(tmp_path / "run")), init_mesh())
    samples = [{"prompt": f"say {i}", "response": 'a "b"\né ' + "word " * 4 * i, "score": i / 4} for i in range(2000)]
    run.samples(samples, iteration=7)
    kept = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert kept == [{"iteration": 7, **row} for row in samples]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and max(map(len, lines)) <= 60
    assert lines[0].split() == ["prompt", "response", "score"]
    assert lines[1].startswith('  say 0   a "b"\\né ') and lines[1].endswith("0.000")
    assert " ... " in lines[8] and lines[8].endswith("1.750")


def test_samples_of_every_kind_are_shown(tmp_path, capsys):
    run = Run("count", Args(output_dir=str(tmp_path / "run")), init_mesh())
    counts = {"greedy": 2, "sampled": 90, "other": 9}
    samples = [{"kind": kind, "prompt": f"{kind} {i}"} for kind, count in counts.items() for i in range(count)]
    run.samples(samples, 3, "kind")
    shown = [line.split("  ")[-1].strip() for line in capsys.readouterr().out.splitlines()[1:]]
    assert shown == ["greedy 0", "greedy 1", "sampled 0", "sampled 1", "other 0", "other 1"]
    assert len((tmp_path / "run/samples.jsonl").read_text().splitlines()) == 101


def test_table_of_narrow_values_is_not_cut():
    lines = format_table([{"kind": "greedy", "score": None}, {"kind": "sampled", "score": -1.5}], columns=10)
    assert lines == ["  kind     score", "  greedy   None", "  sampled  -1.500"]


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"event": "eval", "iteration": 0, "eval_loss": 3.0}],
        [{"event": "train", "iteration": i, "loss": 1 / i, "grad_norm": None} for i in range(1, 5)],
        [
            {"event": "eval", "iteration": 0, "eval_score_sampled": 0.1, "eval_score_greedy": 0.2},
            *({"event": "train", "iteration": i, "score": float("nan"), "entropy": 0.1} for i in range(1, 3)),
        ],
    ],
    ids=["nothing", "baseline", "sft", "ppo"],
)
def test_curves_are_drawn_from_what_there_is(metrics, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    drawn = any(row["event"] == "train" for row in metrics)
    assert (tmp_path / "curves.png").exists() == drawn
    assert not drawn or (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "tmp-curves.png").exists()


def test_run_without_matplotlib_goes_on(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = call()
    assert status == 0 and err == "warning: curves.png is not drawn: pip install matplotlib\n"


# ---------------------------------------------------------------------------------------------------------------------
# Errors and signals
# ---------------------------------------------------------------------------------------------------------------------


def test_warning_is_one_plain_line(call):
    status, _, err = call("--fail", "warning")
    assert status == 0 and err == "warning: this is odd\n"


def test_error_that_a_user_can_mend_has_no_traceback(call):
    status, _, err = call("--fail", "mendable")
    assert status == 1 and err == "error: the input is bad\n"


def test_error_of_the_code_has_its_traceback(call):
    status, _, err = call("--fail", "bug")
    assert status == 1 and err.count("Traceback") == 1 and err.endswith("TypeError: the code is bad\n")


def test_interrupt_ends_with_one_word(call):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal; in the background it is ignored
    status, _, err = call("--fail", "SIGINT")
    assert status == 130 and err == "interrupted\n"


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1"])
def test_signal_saves_at_the_next_boundary(number, call):
    status, out, err = call("--fail", number)
    assert status == 0 and not err and rows("runs/count") == [1, 2, 3]
    assert "stopped by a signal and saved; --resume --output-dir runs/count goes on\n" in out
    status, out, _ = call("--resume", "--fail", number, "--allow-change", "fail")
    assert status == 0 and rows("runs/count") == [1, 2, 3, 4, 5] and "stopped" not in out


ON_TWO_RANKS = {  # flags, the one line that tells what happened
    "misspelt flag": (("--max-iteratoins", "3"), "Unrecognized options: --max-iteratoins, 3"),
    "both ranks": (("--fail", "mendable"), "error: the input is bad"),
    "rank 1": (("--fail", "mendable", "--fail-rank", "1"), "rank 1: error: the input is bad"),
    "rank 0 killed": (("--fail", "SIGKILL", "--fail-rank", "0"), "no answer from rank 0 (dead"),
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """All of them at once, since each waits: (exit status, standard error, seconds since the ranks had started)."""
    processes = {}
    for case, (flags, _) in ON_TWO_RANKS.items():
        folder = tmp_path_factory.mktemp("case")
        with open(folder / "err", "w") as err:
            options = dict(stderr=err, stdout=subprocess.DEVNULL)
            processes[case] = folder, start(Path(__file__), *flags, cwd=folder, ranks=2, **options)
    results, deadline = {}, time.time() + TIMEOUT
    while len(results) < len(processes) and time.time() < deadline:
        for case, (folder, process) in processes.items():
            if case not in results and process.poll() is not None:
                seconds = time.time() - max(path.stat().st_mtime for path in folder.glob("started-*"))
                results[case] = process.returncode, (folder / "err").read_text(), seconds
        time.sleep(0.05)
    for _, process in processes.values():
        process.kill()
    return results


@pytest.mark.parametrize("case", ON_TWO_RANKS)
def test_two_ranks_report_an_error_once(case, two_ranks):
    """And before any timeout: a rank waits 30 s for another to speak, the launcher as long for one to end."""
    assert case in two_ranks, f"still running after {TIMEOUT} s"
    status, err, seconds = two_ranks[case]
    assert status != 0 and err.count(ON_TWO_RANKS[case][1]) == 1 and seconds < 25, (seconds, err)
    ours = err.split("torch/distributed/elastic")[0]
    assert "Traceback" not in ours and err.count("error: ") <= 1, err


def begin_on_rank(folder, log_every, torch_version):
    """What rank 1 has instead of rank 0: its working directory, a flag, a version; the message that it ends with."""
    mesh, patch = init_mesh(), pytest.MonkeyPatch()
    with patch.context():
        patch.chdir(folder if mesh.rank else folder.parent)
        if mesh.rank:
            patch.setattr("torch.__version__", torch_version)
        try:
            Run("count", Args(output_dir="run", log_every=log_every if mesh.rank else 1), mesh)
        except ValueError as error:
            return str(error)
        finally:
            patch.undo()
    return ""


def test_ranks_that_differ_are_named(tmp_path):
    (tmp_path / "elsewhere/run").mkdir(parents=True)
    version = str(torch.__version__)
    assert run_ranks(2, begin_on_rank, tmp_path / "elsewhere", 1, version) == [""] * 2
    for (log_every, other), message in {
        (7, version): "rank 1 has --log-every 7, rank 0 1: give all the same",
        (1, "2.0"): f"rank 1 has torch '2.0', rank 0 {version!r}: give all the same",
    }.items():
        assert run_ranks(2, begin_on_rank, tmp_path / "elsewhere", log_every, other) == [message] * 2
    (tmp_path / "elsewhere/run").rmdir()
    for message in run_ranks(2, begin_on_rank, tmp_path / "elsewhere", 1, version):
        assert message.startswith("rank 1 does not see the run folder run that rank 0 has made")


def test_death_of_the_launcher_saves_and_leaves_no_orphan(tmp_path):
    process = start(Path(__file__), "--max-iterations", 10_000, "--pause", 0.05, cwd=tmp_path, ranks=2)
    metrics = tmp_path / "runs/count/metrics.jsonl"
    while not metrics.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    out, _ = process.communicate(timeout=TIMEOUT)  # returns when the ranks, too, have closed the pipe
    assert "stopped by a signal and saved; --resume --output-dir runs/count goes on\n" in out
    assert (tmp_path / "runs/count/checkpoints").exists()


if __name__ == "__main__":
    Path(f"started-{os.environ['RANK']}").touch()
    launch(main, Args)
