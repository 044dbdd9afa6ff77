"""Running the scripts in tests: a tiny model folder, and commands as a user types them."""

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
import tyro

from parallel.checkpoint import save_decoder
from parallel.families import config_from_hf
from parallel.mesh import init_mesh
from parallel.model import Decoder
from tasks.random_walks import make_tokenizer
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[1]
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


def start(script, *flags, cwd, ranks=1, restarts=0, env=None, **options):
    """Starts a script in a folder of its own, the repository on its path, one thread per process."""
    env = {**os.environ, **(env or {}), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    script = ROOT / script if not Path(script).is_absolute() else script
    line = command(script, *flags, ranks=ranks, restarts=restarts)
    return subprocess.Popen(line, cwd=cwd, env=env, **{**pipes, **options})


def run(script, *flags, cwd, ranks=1, timeout=150):
    """(exit status, standard output, standard error) of a script."""
    process = start(script, *flags, cwd=cwd, ranks=ranks)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def run_on_ranks(script, *flags, cwd, ranks=1):
    """Runs a script's main on ranks that are there already, which takes no start-up; fails the test if it raises."""
    run_ranks(ranks, call_main, script.removesuffix(".py"), [str(flag) for flag in flags], cwd, timeout=120)


def call_main(name, flags, cwd):
    module = importlib.import_module(name)
    with contextlib.chdir(cwd), mock.patch.object(sys, "path", [str(cwd), *sys.path]):
        with mock.patch.object(torch.distributed, "destroy_process_group"):  # the ranks live on
            with contextlib.redirect_stdout(io.StringIO()):
                module.main(tyro.cli(module.Args, args=flags))


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
