"""Running the scripts in tests: a tiny model folder, and commands as a user types them."""

import contextlib
import importlib
import io
import itertools
import json
import os
import pkgutil
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import tyro

from parallel.checkpoint import save_decoder
from parallel.families import config_from_hf
from parallel.mesh import init_mesh
from parallel.model import Decoder
from tasks.random_walks import make_tokenizer
from tests.ranks import context, run_ranks

ROOT = Path(__file__).parents[1]
TIMEOUT = 600  # seconds after which a script hangs
TINY_GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 23,
    "bos_token_id": None,
    "eos_token_id": 21,
    "pad_token_id": 22,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}


def make_tiny_model(folder, edit=None, hf_config=TINY_GPT2) -> Path:
    """A random 2-layer GPT-2 with the random-walks tokenizer, as a Hugging Face folder."""
    mesh = init_mesh()
    config, _ = config_from_hf(hf_config, str(folder))
    decoder = Decoder(config, mesh, seed=1)
    decoder.hf_config = hf_config
    with torch.no_grad():
        if edit is not None:
            edit(decoder)
    save_decoder(decoder, folder, mesh, make_tokenizer())
    return Path(folder)


def states_of(roles, microbatch):
    """Hidden states of every decoder, by role: what a script's loss reads."""
    where = microbatch["input_ids"], microbatch["position_ids"], microbatch["first_key"]
    return {role: module(*where) for role, module in roles.items() if isinstance(module, Decoder)}


def command(script, *flags, ranks=1, restarts=0):
    """The command line of a script: plain Python for one process, torchrun's module for more."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        launcher += [f"--max-restarts={restarts}"]
    return [*launcher, str(script), *map(str, flags)]


def environment(extra=None):
    return {**os.environ, **(extra or {}), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def start(script, *flags, cwd, ranks=1, restarts=0, env=None, **options):
    """Starts a script in a folder of its own, the repository on its path, one thread per process."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = command(ROOT / script, *flags, ranks=ranks, restarts=restarts)
    return subprocess.Popen(line, cwd=cwd, env=environment(env), **{**pipes, **options})


def run(script, *flags, cwd, ranks=1, fresh=False, signal_at=None):
    """(exit status, standard output, standard error) of a script.

    Args: fresh: as a user starts it; else one process is forked with torch in it, which saves seconds of imports.
        signal_at: (function, count, signal): a forked script gets the signal when it calls the function, given as
        "module.name", for the count-th time
    """
    if fresh or ranks > 1:
        process = start(script, *flags, cwd=cwd, ranks=ranks)
        try:
            out, err = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
        return process.returncode, out, err
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("out", "err")]
        args = ([str(x) for x in (ROOT / script, *flags)], cwd, environment(), outputs, signal_at)
        process = context.Process(target=run_as_main, args=args, daemon=True)
        process.start()
        process.join(TIMEOUT)
        process.kill()
        process.join()
        return process.exitcode, *(path.read_text() for path in outputs)


def run_as_main(argv, cwd, env, outputs, signal_at):
    """What `python SCRIPT FLAGS` does, in a process that is there."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv[:] = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    torch.set_num_threads(1)
    if signal_at is not None:
        name, count, number = signal_at
        function, calls = pkgutil.resolve_name(name), itertools.count(1)

        def called(*args, **options):
            if next(calls) == count:
                os.kill(os.getpid(), number)
            return function(*args, **options)

        mock.patch(name, called).start()
    runpy.run_path(argv[0], run_name="__main__")


def run_on_ranks(script, *flags, cwd, ranks=1):
    """What a script prints whose main runs on ranks that are there, without a start-up; fails the test if it raises."""
    name, flags = script.removesuffix(".py"), [str(flag) for flag in flags]
    return run_ranks(ranks, call_main, name, flags, cwd, timeout=TIMEOUT)[0]


def call_main(name, flags, cwd):
    """What rank 0 prints; the others print nothing."""
    module = importlib.import_module(name)
    with contextlib.chdir(cwd), mock.patch.object(sys, "path", [str(cwd), *sys.path]):
        with mock.patch.object(torch.distributed, "destroy_process_group"):  # the ranks live on
            with contextlib.redirect_stdout(io.StringIO()) as out:
                module.main(tyro.cli(module.Args, args=flags))
    return out.getvalue()


def read_commands(text, *headings):
    """The commands of a Markdown text's code blocks, continued lines joined; of what stands under headings."""
    for heading in headings:
        begin = re.search(rf"^(#+) {re.escape(heading)}$", text, re.MULTILINE)
        text = text[begin.end() :]
        end = re.search(rf"^#{{1,{len(begin[1])}}} ", text, re.MULTILINE)
        text = text[: end.start()] if end else text
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(block for language, block in blocks if not language).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if re.match(r"(srun )?(torchrun|python) ", part)]


def read_rows(folder, event="train"):
    """The rows of a run's metrics.jsonl of one kind."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == event]


def assert_explained(rows):
    """Every key of the rows stands in the README's table of metrics."""
    readme = (ROOT / "README.md").read_text()
    explained = set(re.findall(r"`(\w+)`", readme[readme.index("## Metrics") : readme.index("## Where this differs")]))
    for key in {key for row in rows for key in row}:
        assert re.sub(r"_scale_[^_]*", "_scale_100", key) in explained, key


def without_times(rows):
    """Rows less what depends on the clock."""
    timed = ("seconds", "per_second", "mfu")
    return [{name: x for name, x in row.items() if not name.endswith(timed)} for row in rows]
