"""What the README says: commands that parse, files that exist, flags and metrics that are there."""

import importlib
import json
import re
import shlex

import pytest
import tyro

from parallel.run import flat_flags
from tests.scripts import ROOT, make_tiny_model, read_commands, run, run_on_ranks

README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))


@pytest.mark.parametrize("command", read_commands(README))
def test_commands_parse(command):
    words = shlex.split(command, comments=True)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[script]).is_file(), words[script]
    if words[script].removesuffix(".py") in SCRIPTS:
        module = importlib.import_module(words[script].removesuffix(".py"))
        tyro.cli(module.Args, args=words[script + 1 :])


def test_the_layout_of_eight_ranks_runs(tmp_path):
    """The command as it stands there, on a smaller model and for one iteration."""
    [command] = [command for command in read_commands(README) if "--nproc-per-node 8 ppo.py" in command]
    words = shlex.split(command)
    script = words.index("ppo.py")
    assert words[1:script] == ["--nproc-per-node", "8"]
    sizes = ["--batch-size", 16, "--minibatch-size", 8, "--microbatch-size", 2, "--eval-samples", 8]
    flags = [*words[script + 1 :], "--model", make_tiny_model(tmp_path / "tiny"), "--max-iterations", 1, *sizes]
    out = run_on_ranks("ppo.py", *flags, "--layout.traffic", cwd=tmp_path, ranks=8)
    assert "data parallel 2 x tensor parallel 2" in out and "pipeline stages 2, 1f1b (processes: 8), on cpu" in out
    assert all(name in out for name in ("memory     ", "weights ", "gradients ", "optimizer ", "send "))
    assert (tmp_path / "runs/ppo/model/model.safetensors").exists()


def test_shown_files_are_the_files():
    shown = re.findall(r"^```python\n# (tests/\w+\.py): [^\n]+\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert [path for path, _ in shown] == ["tests/happy_stories.py", "tests/keep_best.py"]
    for path, text in shown:
        assert (ROOT / path).read_text().partition('"""\n\n')[2] == text, path


def test_the_best_responses_are_kept(tmp_path):
    """The filter of rejection fine-tuning, as a user calls it: by prompt, from two files, each response once."""
    scores = {"b": [0.1, 0.2, 0.3, 0.4, 0.4], "c": [0.0, 0.5, 0.6, 0.9, 0.2], "d": [0.0] * 5}
    for i, half in enumerate((slice(2), slice(2, 5))):
        rows = [
            {"iteration": 0, "kind": "sampled", "prompt": prompt, "response": f"{prompt} {score}", "score": score}
            for prompt, some in scores.items()
            for score in some[half]
        ]
        (tmp_path / f"samples-{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [tmp_path / f"samples-{i}.jsonl" for i in (0, 1)]
    status, _, err = run("tests/keep_best.py", 0.75, tmp_path / "kept.jsonl", *sources, cwd=tmp_path)
    assert status == 0, err
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    # the third quartiles are 0.4, 0.6 and 0; of prompt d nothing is better than the worst there is
    assert kept == [{"prompt": x[0], "completion": x} for x in ("b 0.4", "c 0.6", "c 0.9")]


def test_every_script_is_shown():
    assert {word for command in read_commands(README) for word in command.split() if word.endswith(".py")} >= {
        f"{name}.py" for name in SCRIPTS
    }


def test_files_and_flags_exist():
    for path in re.findall(r"`((?:[\w]+/)*\w+\.(?:py|png))`", README) + re.findall(r"\]\((\S+\.png)\)", README):
        places = [ROOT / path, ROOT / "parallel" / path, ROOT / "tests" / path, ROOT / "tasks" / path]
        assert any(place.exists() for place in places) or path in ("curves.png", "my_ppo.py"), path
    flags = set()
    for name in SCRIPTS:
        flags |= {f"--{flag.replace('_', '-')}" for flag in flat_flags(importlib.import_module(name).Args())}
    flags |= {"--nproc-per-node", "--nnodes", "--max-restarts", "--rdzv-backend", "--rdzv-endpoint"}  # torchrun's
    flags |= {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--layout.no-sequence-parallel"}
    flags |= {"--peer", "--threads", "--steps", "--out", "--flags", "--help", "--no-bos", "--seed"}
    for flag in re.findall(r"`?(--[a-z][\w.-]+)", README):
        assert flag in flags, flag
