"""What a run shows and keeps, alike for every script: flags, folder, metrics, samples, curves, errors, signals.

A run folder holds args.json, metrics.jsonl (one object per iteration), samples.jsonl, curves.png, checkpoints/, best/
and model/; that of an evaluation results.json. Rank 0 alone writes and prints.
"""

import contextlib
import ctypes
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

from parallel import heartbeat
from parallel.collectives import RankError, traffic
from parallel.files import on_logger
from parallel.mesh import Layout, Mesh
from parallel.plan import explain_oom
from parallel.training_state import Piece, load_training_state

# flags whose change leaves the rest of a run as it would have been
HARMLESS = {"eval_every", "save_every", "log_every", "track", "microbatch_size", "rollout_timeout"}
HARMLESS |= {f"layout.{field.name}" for field in dataclasses.fields(Layout)} - {"layout.reduce_dtype"}
# flags that say how to start, not what to run
SILENT = {"output_dir", "resume", "overwrite", "allow_change", "plan", "world_size"}
WRITTEN = (
    "args.json",
    "metrics.jsonl",
    "samples.jsonl",
    "results.json",
    "curves.png",
    "checkpoints",
    "best",
    "model",
    "tensorboard",
)
PR_SET_PDEATHSIG = 1  # of prctl(2)
SHOWN_SAMPLES = 8  # of those that samples.jsonl gets
SILENCE = 3.0  # seconds that other ranks leave rank 0 to report an error that all of them have
PANELS = (  # of curves.png, the first six that a run has: title, key of training rows, keys of evaluation rows
    ("score", "score", r"eval_score_(\w+)(?<!_se)"),
    ("accuracy", "accuracy", r"eval_(\w*accuracy)"),
    ("loss (nats)", "loss", r"eval_(loss)"),
    ("KL to the reference (nats per sequence)", "kl_per_sequence", ""),
    ("response length (tokens)", "response_len", r"eval_(response_len)"),
    ("entropy (nats per token)", "entropy", ""),
    ("explained variance of the values", "explained_variance", ""),
    ("Q loss", "q_loss", ""),
    ("value loss (expectile)", "value_loss", ""),
    ("conservative loss (nats per action)", "cql_loss", ""),
    ("cloning loss (nats per action)", "awac_loss", ""),
    ("gradient norm", "grad_norm", ""),
    ("KL of the update (nats per token)", "approx_kl", ""),
)
EVAL_COLORS = ("tab:orange", "tab:green", "tab:red", "tab:purple")


@dataclasses.dataclass
class Process:
    """What signals and errors of this process need to know, whoever handles them."""

    stop_signals: list[int] = dataclasses.field(default_factory=list)  # SIGTERM and SIGUSR1 that have come
    line_open: bool = False  # a progress line on the terminal waits to be overwritten
    store: dist.Store | None = None  # where the first rank that reports an error leaves a mark


_process = Process()


def launch(main: Callable, Args: type) -> None:
    """Parses the flags and runs main(args): the last line of every script.

    An error that a user can mend is one message without a traceback, and exit status 1. Warnings are plain lines, of
    rank 0 alone.
    """
    rank = int(os.environ.get("RANK", 0))
    _process.stop_signals.clear()
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:  # SIGTERM if torchrun dies: leave no orphans
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    warnings.showwarning = lambda message, *_: say(f"warning: {message}", sys.stderr) if rank == 0 else None
    try:
        with contextlib.ExitStack() as silence:
            if rank > 0:
                for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
                    silence.enter_context(redirect(io.StringIO()))
            args = tyro.cli(Args)
    except SystemExit as stop:
        if rank > 0 and stop.code:  # the launcher ends all ranks when one has failed: rank 0 must have spoken before
            leave_to_rank_0(10 * SILENCE)
        raise
    try:
        main(args)
    except (ValueError, OSError, RankError) as error:
        fail(f"error: {error}", rank, 1)
    except torch.OutOfMemoryError as error:
        plan = f"\n{explain_oom(args)}" if hasattr(args, "job") else ""
        fail(f"error: {describe_oom(error)}{plan}", rank, 1)
    except KeyboardInterrupt:
        fail("interrupted", rank, 130)
    except SystemExit:
        raise
    except BaseException:
        fail(traceback.format_exc(), rank, 1)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # threads of the process group may abort an interpreter that ends
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def say(text: str, file=None) -> None:
    """Prints a line below the progress line."""
    if _process.line_open:
        print(flush=True)
        _process.line_open = False
    print(text, file=file, flush=True)


def describe_oom(error: torch.OutOfMemoryError) -> str:
    """What the device was doing and held when its memory ran out, and which flags need less."""
    held = ""
    if torch.cuda.is_available():
        stats, total = torch.cuda.memory_stats(), torch.cuda.get_device_properties().total_memory
        held = "; ".join(f"{name} {stats[f'allocated_bytes.all.{name}'] / 2**30:.2f}" for name in ("current", "peak"))
        held = f" ({held} of {total / 2**30:.2f} GiB)"
    return (
        f"out of memory in {heartbeat.where()}{held}: {str(error).splitlines()[0]}\nless is needed with a smaller "
        "--microbatch-size, --layout.recompute full, and on several processes a higher --layout.zero or --layout.tp"
    )


def leave_to_rank_0(seconds: float) -> None:
    """Waits while rank 0 reports an error; the launcher then ends this process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(seconds)


def fail(message: str, rank: int, status: int) -> None:
    """Prints a message, once whether one rank has it or all, and ends the process."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0 and not heartbeat.has_ended(0):
        leave_to_rank_0(SILENCE)
    reported = False
    if _process.store is not None:
        try:
            reported = _process.store.add("errors", 1) > 1
        except RuntimeError:  # the store lived in a lost process
            pass
    if not reported:
        say(f"rank {rank}: {message.strip()}" if rank > 0 else message.strip(), sys.stderr)
    sys.stdout.flush()
    if world_size > 1:
        os._exit(status)  # a process group with a lost member may hang in its own end
    sys.exit(status)


def flat_flags(args, prefix: str = "") -> dict:
    """Flags by dotted name, as JSON gives them back."""
    flags = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if dataclasses.is_dataclass(value):
            flags |= flat_flags(value, f"{prefix}{field.name}.")
        else:
            flags[prefix + field.name] = list(value) if isinstance(value, tuple) else value
    return flags


def launcher_store() -> dist.Store | None:
    """Where a torchrun that restarts its ranks keeps what one attempt has to tell the next; None without restarts."""
    if not int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) or os.environ["TORCHELASTIC_USE_AGENT_STORE"] != "True":
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"runs/{os.environ['TORCHELASTIC_RUN_ID']}", store)


class Run:
    """The folder of a run and everything that is written to it.

    Args: script: its name; args: its flags, of which output_dir, resume, overwrite, allow_change, log_every and track
        are read here.
    Communication: rank 0 chooses the folder and tells the others; one gather of versions and flags.
    Raises: ValueError on all ranks if the folder holds another run, cannot be written, or was made with other flags, or
        if the ranks do not have the same folder, versions and flags.
    """

    def __init__(self, script: str, args, mesh: Mesh):
        self.script, self.args, self.mesh = script, args, mesh
        self.resuming = self.begun = False
        self.former: list[dict] = []  # what flags were that a resumed run has changed
        self.attempts = launcher_store() if mesh.is_logger else None
        self.first_progress: tuple[float, int] | None = None  # time and iterations done at the first progress line
        self.trackers: list[Callable[[dict], None]] = []
        self.close_tracker: Callable[[], None] = lambda: None
        _process.store = mesh.world.store
        folder, error = None, None
        if mesh.is_logger:
            try:
                check_tracker(args.track)
                folder = self.choose_folder()
            except OSError as caught:
                error = f"--output-dir {args.output_dir or 'runs'} cannot be written: {caught.strerror or caught}"
            except ValueError as caught:
                error = str(caught)
        folder, self.resuming, error = mesh.broadcast_object((folder, self.resuming, error))
        if error is not None:
            raise ValueError(error)
        self.folder = folder
        self.check_ranks_agree()

    def check_ranks_agree(self) -> None:
        """Raises ValueError on all ranks if one does not see the folder, or has other versions or flags than rank 0."""
        mine = {
            "Python": sys.version.split()[0],
            "torch": str(torch.__version__),
            "transformers": version("transformers"),
        }
        mine |= {f"--{name.replace('_', '-')}": x for name, x in flat_flags(self.args).items()}
        everyone = self.mesh.gather_objects((mine, self.folder.is_dir()))
        for rank, (theirs, sees_folder) in enumerate(everyone):
            if not sees_folder:
                raise ValueError(
                    f"rank {rank} does not see the run folder {self.folder} that rank 0 has made: "
                    "--output-dir should be a folder that all machines share"
                )
            for name, ours in everyone[0][0].items():
                if theirs.get(name) != ours:
                    raise ValueError(f"rank {rank} has {name} {theirs.get(name)!r}, rank 0 {ours!r}: give all the same")

    def choose_folder(self) -> Path:
        """The run's folder, made, or checked against the flags of the run that it holds. What it holds stays."""
        args, default = self.args, Path("runs")
        if args.resume and args.overwrite:
            raise ValueError("--resume goes on with a run and --overwrite replaces it: give one of them")
        restarted = self.attempts is not None and self.attempts.check(["folder"])  # by the launcher, after a failure
        if restarted:
            folder = Path(self.attempts.get("folder").decode())
        elif args.output_dir:
            folder = Path(args.output_dir)
        elif args.resume:
            known = [path.parent for path in default.glob(f"{self.script}*/args.json")]
            folder = max(known, key=last_written, default=default / self.script)
        else:
            names = [self.script, *(f"{self.script}-{i}" for i in range(2, 100_000))]
            folder = next(default / name for name in names if not holds_files(default / name))
        holds_run = any((folder / name).exists() for name in WRITTEN)
        self.resuming = (args.resume or restarted) and holds_run
        if holds_run and not args.overwrite and not self.resuming:
            hint = "--resume goes on with it, " if "resume" in vars(args) else ""
            raise ValueError(f"{folder} holds a run: {hint}--overwrite replaces it")
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not writable")
        if restarted:
            self.note("restarted by the launcher")
        if self.resuming and (folder / "args.json").exists():
            self.compare_flags(folder / "args.json")
        return folder

    def begin(self) -> None:
        """Writes args.json, and removes the run that --overwrite replaces: there is a first result to put there."""
        if self.args.overwrite and not self.resuming:
            for path in (self.folder / name for name in WRITTEN):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if self.attempts is not None:
            self.attempts.set("folder", str(self.folder))  # an attempt after this one goes on here
        flags = flat_flags(self.args) | ({"former": self.former} if self.former else {})
        write_atomically(self.folder / "args.json", [json.dumps(flags, indent=2) + "\n"])
        self.open_tracker()

    def compare_flags(self, path: Path) -> None:
        """Lists the flags that differ from the saved ones; refuses those that change the run."""
        try:
            saved, now = json.loads(path.read_text()), flat_flags(self.args)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is damaged ({error}); once it is deleted, the flags given are believed") from None
        allowed = HARMLESS | {name.strip("-").replace("-", "_") for name in self.args.allow_change}
        if now.get("optim.schedule") == "constant":  # else the learning rate depends on the length of the run
            allowed |= {"max_iterations", "max_steps"}
        lines, refused, former = [], [], {}
        for name, value in now.items():
            if saved.get(name) != value and name not in SILENT:
                flag = name.replace("_", "-")
                lines.append(f"--{flag} was {saved.get(name)!r}, is {value!r}")
                refused += [flag] if name not in allowed else []
                former[name] = saved.get(name)
        if refused:
            differences = "\n  ".join(["the run to resume was made with other flags:", *lines])
            raise ValueError(f"{differences}\ngive the old ones, or --allow-change {' '.join(refused)}")
        for line in lines:
            self.note(f"resumed with another flag: {line}")
        self.former = [*saved.get("former", []), *([former] if former else [])]

    def load_checkpoint(self, pieces: list[Piece]) -> dict | None:
        """Fills the pieces from the newest intact checkpoint of a resumed run, and returns its meta; later rows of the
        run's files are dropped."""
        if not self.resuming:
            if self.args.resume:
                self.note(f"no run in {self.folder} to resume: starting anew")
            return None
        saved = load_training_state(self.folder / "checkpoints", pieces, self.mesh)
        step = saved["step"] if saved else -1
        self.note(f"resumed from {self.folder}/checkpoints/step-{step}" if saved else "no checkpoint: starting anew")
        on_logger(lambda: self.truncate(step), f"cannot rewrite the metrics of {self.folder}", self.mesh)
        return saved

    def truncate(self, step: int) -> None:
        """Drops the rows of iterations after `step`, and a last line that a crash tore, by an atomic rewrite."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.folder / name
            if not path.exists():
                continue
            with open(path) as file:
                write_atomically(path, (line for line in file if is_kept(line, step)))

    def open_tracker(self) -> None:
        """Hands all later rows to --track, too."""
        if self.args.track == "wandb":
            import wandb

            wandb.init(project="rlhf", name=self.folder.name, config=flat_flags(self.args))
            self.trackers.append(lambda row: wandb.log(row, step=row["iteration"]))
            self.close_tracker = wandb.finish
        elif self.args.track == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(self.folder / "tensorboard"))

            def write(row):
                for name, value in row.items():
                    if isinstance(value, int | float):
                        writer.add_scalar(f"{row['event']}/{name}", value, row["iteration"])
                writer.flush()

            self.trackers.append(write)

    def note(self, text: str) -> None:
        """Prints a line, once for all ranks."""
        if self.mesh.is_logger:
            say(text)

    def describe(self, lines: list[tuple[str, str]]) -> None:
        """Prints the opening block: label and text of each line."""
        for label, text in [("run", str(self.folder)), *lines]:
            self.note(f"{label:11}{text}")

    def log(self, row: dict) -> None:
        """Appends a row to metrics.jsonl, a number that is not finite as null, and hands it to the trackers.

        The first row of a process begins the run: before it, nothing in the folder changes. From then on SIGTERM and
        SIGUSR1 ask it to save and end (`stop_requested`); before, there is nothing to save, and they end it.
        """
        if not self.begun:
            self.begun = True
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, lambda number, _: _process.stop_signals.append(number))
            on_logger(self.begin, f"cannot write into {self.folder}", self.mesh)
        if self.mesh.is_logger:
            row = finite_or_null(row)
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            for tracker in self.trackers:
                tracker(row)

    def progress(self, done: int, total: int, shown: dict[str, str]) -> None:
        """One line: how far the run is, the time left, and some numbers; overwritten on a terminal."""
        if not self.mesh.is_logger:
            return
        now = time.monotonic()
        if self.first_progress is None:
            self.first_progress = (now, done)
        left = "?:??"
        if done > self.first_progress[1]:
            rate = (now - self.first_progress[0]) / (done - self.first_progress[1])
            seconds = round(rate * (total - done))
            left = f"{seconds // 3600}:" if seconds >= 3600 else ""
            left += f"{seconds // 60 % 60:0{2 if left else 1}}:{seconds % 60:02}"
        line = f"{done}/{total} {100 * done // total:3} %  {left} left  "
        line += "  ".join(f"{name} {text}" for name, text in shown.items())
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]:{width}}", end="", flush=True)
            _process.line_open = True
        elif done % self.args.log_every == 0 or done == total:
            say(line)

    def samples(self, rows: list[dict], iteration: int, kind: str = "") -> None:
        """Appends rows (prompt, response, score, ...) to samples.jsonl and prints a few of them as a table.

        Args: kind: the column by which rows are of several kinds, the first few of each of which are shown.
        """
        if not self.mesh.is_logger or not rows:
            return
        with open(self.folder / "samples.jsonl", "a") as file:
            file.writelines(json.dumps({"iteration": iteration, **finite_or_null(row)}) + "\n" for row in rows)
        kinds: dict = {}
        for row in rows:
            kinds.setdefault(row.get(kind), []).append(row)
        chosen = [row for alike in kinds.values() for row in alike[: max(1, SHOWN_SAMPLES // len(kinds))]]
        for line in format_table(chosen, shutil.get_terminal_size((100, 0)).columns):
            say(line)

    def curves(self) -> None:
        """Draws curves.png from metrics.jsonl."""
        if self.mesh.is_logger:
            draw_curves(self.folder / "metrics.jsonl", self.folder / "curves.png")

    def stop_requested(self) -> bool:
        """Whether SIGTERM or SIGUSR1 has come to any rank. Communication: one maximum over all ranks."""
        return self.mesh.max(float(bool(_process.stop_signals)), "world") > 0

    def finish(self) -> None:
        """Says where the results lie."""
        self.close_tracker()
        if self.stop_requested():
            self.note(f"stopped by a signal and saved; --resume --output-dir {self.folder} goes on")
        for name, what in (
            ("model", "the trained model"),
            ("best", "the best model by evaluation"),
            ("metrics.jsonl", "metrics"),
            ("results.json", "results"),
            ("curves.png", "learning curves"),
            ("samples.jsonl", "samples"),
        ):
            if (self.folder / name).exists():
                self.note(f"{what:30}{self.folder / name}")
        if self.args.layout.traffic:
            self.note("sent by a rank (ring algorithm), by axis and operation:")
            for (axis, operation), nbytes in sorted(traffic().items()):
                self.note(f"  {axis:6}{operation:16}{nbytes:>18,} bytes")


def check_tracker(track: str) -> None:
    if track != "none" and importlib.util.find_spec(track) is None:
        raise ValueError(f"--track {track} needs the package {track}: pip install {track}")


def holds_files(folder: Path) -> bool:
    """Whether a path is taken; an empty folder is what a start that failed leaves."""
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def check_flags(args, at_least: dict[str, float]) -> None:
    """Raises ValueError for a flag below its minimum or not finite.

    Args: at_least: minimum -> names of flags, separated by spaces
    """
    for minimum, names in at_least.items():
        for name in names.split():
            value = getattr(args, name)
            if not minimum <= value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {value} should be a number of at least {minimum}")


def finite_or_null(row: dict) -> dict:
    """A row as JSON can hold it."""
    return {name: None if x != x or x in (math.inf, -math.inf) else x for name, x in row.items()}


def last_written(folder: Path) -> float:
    """When a run last wrote into its folder, in seconds since 1970."""
    return max(path.stat().st_mtime for path in folder.iterdir())


def format_table(rows: list[dict], columns: int) -> list[str]:
    """Rows with the same keys as lines, headed by the keys; long texts lose their middle until a line fits."""
    table = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    while sum(widths) + 2 * len(widths) > columns and max(widths) > 12:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for line in table:
        cells = []
        for text, width in zip(line, widths, strict=True):
            if len(text) > width:
                head = 2 * (width - 5) // 3
                text = f"{text[:head]} ... {text[len(text) - (width - 5 - head) :]}"
            cells.append(f"{text:{width}}")
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def cell(value) -> str:
    """A value in one line."""
    if isinstance(value, float):
        return f"{value:.3f}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))  # line breaks as \n


def is_kept(line: str, step: int) -> bool:
    """Whether a line of a run's file is a whole row of an iteration up to `step`."""
    try:
        return line.endswith("\n") and json.loads(line)["iteration"] <= step
    except ValueError:
        return False


def write_atomically(path: Path, lines: Iterable[str]) -> None:
    temporary = path.with_name(f"tmp-{path.name}")
    with open(temporary, "w") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def draw_curves(metrics: Path, picture: Path) -> None:
    """Small multiples of the main metrics over iterations: training rows as lines, evaluations as points."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        warnings.warn("curves.png is not drawn: pip install matplotlib", stacklevel=3)
        return
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]

    def series(event: str, key: str) -> tuple[list, list]:
        points = [(row["iteration"], row[key]) for row in rows if row["event"] == event and row.get(key) is not None]
        return [x for x, _ in points], [y for _, y in points]

    keys = dict.fromkeys(key for row in rows for key in row)
    panels = []
    for title, key, pattern in PANELS:
        evaluations = {match[1]: match[0] for match in (re.fullmatch(pattern, k) for k in keys) if match and pattern}
        if (key in keys or evaluations) and not (key in ("loss", "value_loss") and "score" in keys):
            panels.append((title, key, evaluations))
    panels = panels[:6]
    if not any(row["event"] == "train" for row in rows):
        return
    columns = min(3, len(panels))
    num_lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.5 * num_lines), layout="constrained")
    axes = figure.subplots(num_lines, columns, squeeze=False).flat
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for i, (axis, (title, key, evaluations)) in enumerate(zip(axes, panels, strict=False)):
        if key in keys:
            axis.plot(*series("train", key), linewidth=1.3, color="tab:blue", label="training")
        for color, (label, eval_key) in zip(itertools.cycle(EVAL_COLORS), evaluations.items(), strict=False):
            label = f"evaluation, {label}" if len(evaluations) > 1 else "evaluation"
            axis.plot(*series("eval", eval_key), "o--", markersize=4, linewidth=0.7, color=color, label=label)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=9)
        axis.grid(alpha=0.25)
        axis.locator_params(axis="x", integer=True)
        if evaluations:
            axis.legend(fontsize=8)
        if i + columns >= len(panels):
            axis.set_xlabel("iteration", fontsize=9)
    temporary = picture.with_name("tmp-curves.png")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, picture)
