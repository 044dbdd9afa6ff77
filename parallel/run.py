"""What a run shows and keeps, alike for every script: flags, folder, metrics, samples, curves, errors, signals.

A run folder holds args.json, metrics.jsonl (one object per iteration), samples.jsonl, curves.png, checkpoints/, best/
and model/. Rank 0 alone writes and prints.
"""

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import tyro

from parallel.checkpoint import load_training_state, on_logger
from parallel.collectives import RankError
from parallel.mesh import Mesh

# flags whose change leaves the rest of a run as it would have been, or that the user asks for by giving them
HARMLESS = {
    "output_dir",
    "resume",
    "overwrite",
    "allow_change",
    "eval_every",
    "save_every",
    "log_every",
    "track",
    "microbatch_size",
    "layout.dp",
}
WRITTEN = ("args.json", "metrics.jsonl", "samples.jsonl", "curves.png", "checkpoints", "best", "model", "tensorboard")
SILENCE = 3.0  # seconds that other ranks leave rank 0 to report an error that all of them have
PANELS = (  # title, key of training rows, keys of evaluation rows
    ("score", "score", ("eval_score_sampled", "eval_score_greedy")),
    ("loss (nats per token)", "loss", ("eval_loss",)),
    ("KL to the reference (nats per sequence)", "kl_per_sequence", ()),
    ("entropy (nats per token)", "entropy", ()),
    ("response length (tokens)", "response_len", ("eval_response_len",)),
    ("KL of the update (nats per token)", "approx_kl", ()),
    ("explained variance of the values", "explained_variance", ()),
    ("gradient norm", "grad_norm", ()),
)

_stop_signals: list[int] = []


def launch(main: Callable, Args: type) -> None:
    """Parses the flags and runs main(args): the last line of every script.

    An error that a user can mend is one message without a traceback, and exit status 1. SIGTERM and SIGUSR1 ask the run
    to save and end (`Run.stop_requested`).
    """
    rank = int(os.environ.get("RANK", 0))
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: _stop_signals.append(number))
    try:
        args = tyro.cli(Args, console_outputs=rank == 0)
        main(args)
    except (ValueError, OSError, RankError) as error:
        fail(f"error: {error}", rank, 1)
    except KeyboardInterrupt:
        fail("interrupted", rank, 130)
    except SystemExit:
        raise
    except BaseException:
        fail(traceback.format_exc(), rank, 1)


def fail(message: str, rank: int, status: int) -> None:
    """Prints a message once, whether one rank has it or all, and ends the process."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:  # an error that rank 0 has too is reported there, and the launcher ends this process meanwhile
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SILENCE)
    prefix = f"rank {rank}: " if world_size > 1 and rank > 0 else ""
    print(f"{prefix}{message.strip()}", file=sys.stderr, flush=True)
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


class Run:
    """The folder of a run and everything that is written to it.

    Args: script: its name; args: its flags, of which output_dir, resume, overwrite, allow_change, log_every and track
        are read here.
    Communication: rank 0 chooses the folder and tells the others.
    Raises: ValueError on all ranks if the folder holds another run, cannot be written, or was made with other flags.
    """

    def __init__(self, script: str, args, mesh: Mesh):
        self.script, self.args, self.mesh = script, args, mesh
        folder, error = None, None
        if mesh.is_logger:
            try:
                folder = self.choose_folder()
            except OSError as caught:
                error = ValueError(f"--output-dir {args.output_dir or 'runs'} cannot be written: {caught}")
            except ValueError as caught:
                error = caught
        mesh.raise_together(error)
        folder, self.resuming = mesh.broadcast_object((folder, getattr(self, "resuming", False)))
        self.folder = Path(folder)
        self.first_progress: tuple[float, int] | None = None  # time and iterations done at the first progress line
        self.trackers: list[Callable[[dict], None]] = []
        mesh.raise_together(self.open_trackers() if mesh.is_logger else None)

    def choose_folder(self) -> str:
        args = self.args
        default = Path("runs")
        if args.output_dir:
            folder = Path(args.output_dir)
        elif args.resume:
            known = [path.parent for path in default.glob(f"{self.script}*/args.json")]
            folder = max(known, key=lambda path: path.stat().st_mtime, default=default / self.script)
        else:
            names = [self.script, *(f"{self.script}-{i}" for i in range(2, 100_000))]
            folder = next(default / name for name in names if not (default / name).exists())
        holds_run = any((folder / name).exists() for name in WRITTEN)
        self.resuming = args.resume and holds_run
        if holds_run and args.overwrite:
            for path in (folder / name for name in WRITTEN):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        elif holds_run and not args.resume:
            raise ValueError(f"{folder} holds a run: --resume goes on with it, --overwrite replaces it")
        folder.mkdir(parents=True, exist_ok=True)
        if self.resuming and (folder / "args.json").exists():
            self.compare_flags(folder / "args.json")
        write_atomically(folder / "args.json", json.dumps(flat_flags(args), indent=2) + "\n")
        return str(folder)

    def compare_flags(self, path: Path) -> None:
        """Lists the flags that differ from the saved ones; refuses those that change the run."""
        saved, now = json.loads(path.read_text()), flat_flags(self.args)
        allowed = HARMLESS | {name.strip("-").replace("-", "_") for name in self.args.allow_change}
        if now["optim.schedule"] == "constant":  # else the learning rate depends on the length of the run
            allowed |= {"max_iterations", "max_steps"}
        changed = {name: (saved.get(name), value) for name, value in now.items() if saved.get(name) != value}
        listed = {name: pair for name, pair in changed.items() if name not in ("resume", "overwrite", "allow_change")}
        lines = [f"--{n.replace('_', '-')} was {a!r}, is {b!r}" for n, (a, b) in listed.items() if n != "output_dir"]
        refused = [name.replace("_", "-") for name in changed if name not in allowed]
        if refused:
            raise ValueError(
                "the run to resume was made with other flags:\n  " + "\n  ".join(lines) + f"\ngive the old ones, or "
                f"--allow-change {' '.join(refused)}"
            )
        for line in lines:
            self.note(f"resumed with another flag: {line}")

    def load_checkpoint(self) -> tuple[dict, dict] | None:
        """Tensors and meta of the newest intact checkpoint of a resumed run; later rows of its files are dropped."""
        if not self.resuming:
            return None
        saved = load_training_state(self.folder / "checkpoints", self.mesh)
        step = saved[1]["step"] if saved else -1
        self.note(f"resumed from {self.folder}/checkpoints/step-{step}" if saved else "no checkpoint: starting anew")
        on_logger(lambda: self.truncate(step), f"cannot rewrite the metrics of {self.folder}", self.mesh)
        return saved

    def truncate(self, step: int) -> None:
        """Drops the rows of iterations after `step`, and a last line that a crash tore, by an atomic rewrite."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.folder / name
            if not path.exists():
                continue
            kept = []
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["iteration"] <= step:
                        kept.append(line + "\n")
                except ValueError:
                    continue
            write_atomically(path, "".join(kept))

    def open_trackers(self) -> ValueError | None:
        track = self.args.track
        if track == "none":
            return None
        if importlib.util.find_spec(track) is None:
            return ValueError(f"--track {track} needs the package {track}: pip install {track}")
        if track == "wandb":
            import wandb

            wandb.init(project="rlhf", name=self.folder.name, config=flat_flags(self.args), resume="allow")
            self.trackers.append(lambda row: wandb.log(row, step=row["iteration"]))
        else:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(self.folder / "tensorboard"))

            def write(row):
                for name, value in row.items():
                    if isinstance(value, int | float):
                        writer.add_scalar(f"{row['event']}/{name}", value, row["iteration"])
                writer.flush()

            self.trackers.append(write)
        return None

    def note(self, text: str) -> None:
        """Prints a line, once for all ranks."""
        if self.mesh.is_logger:
            print(text, flush=True)

    def describe(self, lines: list[tuple[str, str]]) -> None:
        """Prints the opening block: label and text of each line."""
        for label, text in [("run", str(self.folder)), *lines]:
            self.note(f"{label:11}{text}")

    def log(self, row: dict) -> None:
        """Appends a row to metrics.jsonl and hands it to the trackers."""
        if self.mesh.is_logger:
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
            print(f"\r{line[:width]:{width}}", end="\n" if done == total else "", flush=True)
        elif done % self.args.log_every == 0 or done == total:
            print(line, flush=True)

    def samples(self, rows: list[dict], iteration: int) -> None:
        """Appends rows (prompt, response, score, ...) to samples.jsonl and prints some of them as a table."""
        if not self.mesh.is_logger or not rows:
            return
        with open(self.folder / "samples.jsonl", "a") as file:
            file.writelines(json.dumps({"iteration": iteration, **row}) + "\n" for row in rows)
        chosen = rows[:: max(1, len(rows) // 8)][:8]
        table = [list(rows[0])] + [[cell(value) for value in row.values()] for row in chosen]
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        if sys.stdout.isatty() and self.first_progress is not None:
            print()
        for line in table:
            print("  " + "  ".join(f"{text:{width}}" for text, width in zip(line, widths, strict=True)).rstrip())
        sys.stdout.flush()

    def curves(self) -> None:
        """Draws curves.png from metrics.jsonl."""
        if self.mesh.is_logger:
            draw_curves(self.folder / "metrics.jsonl", self.folder / "curves.png")

    def stop_requested(self) -> bool:
        """Whether SIGTERM or SIGUSR1 has come to any rank. Communication: one maximum over dp."""
        return self.mesh.max(float(bool(_stop_signals)), "dp") > 0

    def finish(self) -> None:
        """Says where the results lie."""
        if self.stop_requested():
            self.note(f"stopped by a signal and saved; --resume --output-dir {self.folder} goes on")
        for name, what in (
            ("model", "the trained model"),
            ("best", "the best model by evaluation"),
            ("metrics.jsonl", "metrics"),
            ("curves.png", "learning curves"),
            ("samples.jsonl", "samples"),
        ):
            if (self.folder / name).exists():
                self.note(f"{what:30}{self.folder / name}")


def cell(value) -> str:
    """A value as the table of samples shows it."""
    if isinstance(value, float):
        return f"{value:.3f}"
    text = json.dumps(str(value), ensure_ascii=False)[1:-1]  # line breaks as \n
    return text if len(text) <= 48 else f"{text[:30]} ... {text[-13:]}"


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"tmp-{path.name}")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def draw_curves(metrics: Path, picture: Path) -> None:
    """Small multiples of the main metrics over iterations: training rows as lines, evaluations as points."""
    try:
        import matplotlib
    except ImportError:
        warnings.warn("curves.png is not drawn: pip install matplotlib", stacklevel=3)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    train = [row for row in rows if row["event"] == "train"]
    evaluations = [row for row in rows if row["event"] == "eval"]

    def series(of: list[dict], key: str) -> tuple[list, list]:
        points = [(row["iteration"], row[key]) for row in of if row.get(key) is not None]
        return [x for x, _ in points], [y for _, y in points]

    keys = set().union(*rows) if rows else set()
    panels = [panel for panel in PANELS if panel[1] in keys and not (panel[1] == "loss" and "score" in keys)]
    columns = min(3, len(panels)) or 1
    num_lines = -(-len(panels) // columns) or 1
    size = (4 * columns, 2.6 * num_lines)
    figure, axes = pyplot.subplots(num_lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, key, eval_keys) in zip(axes.flat, panels, strict=False):
        axis.plot(*series(train, key), linewidth=1.2, label="training")
        for eval_key in eval_keys:
            axis.plot(*series(evaluations, eval_key), "o-", markersize=3.5, linewidth=0.8, label=eval_key)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if eval_keys:
            axis.legend(fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("iteration", fontsize=8)
    temporary = picture.with_name("tmp-curves.png")
    figure.savefig(temporary, dpi=110)
    pyplot.close(figure)
    os.replace(temporary, picture)
