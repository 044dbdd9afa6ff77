"""The scripts as a user runs them: learning, ranks, resume, forks, bad input."""

import gzip
import json
import math
import resource
import shutil
import signal
import time
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

import ppo
from parallel.checkpoint import eos_ids, load_decoder
from parallel.data import load_tokenizer
from parallel.generation import Sampling, generate
from parallel.mesh import init_mesh
from parallel.run import launch
from tasks import random_walks
from tasks.random_walks import EOS, NODES, base_policy, make_graph, make_tokenizer, measure
from tests.scripts import (
    ROOT,
    TIMEOUT,
    TINY_GPT2,
    assert_explained,
    make_tiny_model,
    read_rows,
    run,
    run_on_ranks,
    start,
    without_times,
)
from tests.states import read_state

SHORT = ("--batch-size", 16, "--minibatch-size", 8, "--microbatch-size", 4, "--eval-samples", 20, "--eval-every", 4)


@pytest.fixture(autouse=True)
def signal_handlers():
    """Gives SIGTERM and SIGUSR1 back after a script has run in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def default_runs(tmp_path_factory):
    """`python ppo.py` without flags, and its first iterations on two ranks: folders, and what the first prints."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    folder = tmp_path_factory.mktemp("default")
    status, out, err = run("ppo.py", cwd=folder, fresh=True)
    assert status == 0, err
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 240, "seconds of a processor"
    process, metrics = start("ppo.py", "--output-dir", "two", cwd=folder, ranks=2), folder / "two/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count('"train"') >= 12):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.kill()
    process.communicate(timeout=TIMEOUT)  # returns when the ranks have ended, too
    return (folder / "runs/ppo", folder / "two"), out


def test_default_run_learns_the_task(default_runs):
    (folder, _), out = default_runs
    evaluations = read_rows(folder, "eval")
    assert_explained(evaluations + read_rows(folder))
    assert abs(evaluations[0]["eval_score_sampled"] - 0.35) < 0.04
    assert evaluations[-1]["eval_score_sampled"] >= 0.97 and evaluations[-1]["eval_score_greedy"] >= 0.97
    rows = read_rows(folder)
    scores = [row["score"] for row in rows]
    means = [sum(scores[i : i + 5]) / 5 for i in range(len(scores) - 4)]
    reached = next(i for i, mean in enumerate(means) if mean >= 0.9)
    assert min(means[reached:]) >= 0.85 and means[-1] >= 0.97
    assert all(row["rollout_mismatch_max"] < 1e-4 and row["first_log_ratio"] == 0 for row in rows)
    for words in ("parameters", "layout", "optimizer steps", "runs/ppo"):
        assert words in out, words


def test_two_ranks_repeat_the_run_of_one(default_runs):
    """Every token and metric, bit for bit, but for a norm summed in another order and the rounding of other batches."""
    one, two = (without_times(read_rows(folder)) for folder in default_runs[0])
    assert len(two) >= 12
    for a, b in zip(one, two, strict=False):
        assert b.pop("grad_norm") == pytest.approx(a.pop("grad_norm"), rel=1e-14)
        for name in ("rollout_mismatch", "rollout_mismatch_max"):
            assert max(a.pop(name), b.pop(name)) < 1e-4
        assert a == b
    one, two = (without_times(read_rows(folder, "eval")) for folder in default_runs[0])
    assert len(two) >= 2 and one[: len(two)] == two


def test_base_policy_walks_like_the_walks(default_runs, monkeypatch):
    """At least 90 % of its walks are valid, and their optimality is that of the walks that it was cloned from."""
    monkeypatch.setattr(random_walks, "CACHE", default_runs[0][0].parent / "cache")
    [folder] = random_walks.CACHE.iterdir()
    assert base_policy() == folder, "it is made once"
    policy, tokenizer = load_decoder(str(folder), init_mesh(), torch.float32), load_tokenizer(folder)
    assert eos_ids(str(folder), tokenizer) == [EOS]
    assert sum(p.numel() for p in policy.parameters()) - 144 * (128 - 23) == 1_655_280  # without padded vocabulary rows
    starts = [tokenizer(node)["input_ids"] for node in NODES[1:]] * 100
    generation = generate(policy, starts, Sampling(), eos_ids=[EOS], sample_ids=list(range(2000)), seed=0)
    walks = [prompt + response for prompt, response in zip(starts, generation.response_ids(), strict=True)]
    walks = [walk[:-1] if walk[-1] == EOS else walk for walk in walks]
    texts, graph = ["".join(NODES[i] if i < len(NODES) else "?" for i in walk) for walk in walks], make_graph()
    valid = [all(b in graph.successors.get(a, "") for a, b in pairwise(text)) for text in texts]
    assert sum(valid) >= 0.9 * len(valid)
    assert sum(measure(text, graph) for text in texts) / len(texts) == pytest.approx(0.35, abs=0.04)


def test_run_folder_holds_what_the_design_says(default_runs):
    (run_folder, _), _ = default_runs
    for name in ("args.json", "metrics.jsonl", "samples.jsonl", "curves.png", "checkpoints", "model", "best"):
        assert (run_folder / name).exists(), name
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run_folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(run_folder / "model")
    ids = torch.tensor([tokenizer("t")["input_ids"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
    assert tokenizer.decode(out[0]).startswith("t") and "a" in tokenizer.decode(out[0])
    heads = load_file(run_folder / "model/heads.safetensors")
    assert heads["value_head.weight"].shape == (1, 144)
    samples = [json.loads(line) for line in (run_folder / "samples.jsonl").read_text().splitlines()]
    assert all(set(sample) == {"iteration", "kind", "prompt", "response", "score", "finished"} for sample in samples)
    for row in read_rows(run_folder, "eval"):  # every sample of every evaluation is kept: its mean comes out
        for kind, count in (("greedy", 20), ("sampled", 2000)):
            of_kind = [(s["iteration"], s["kind"]) == (row["iteration"], kind) for s in samples]
            scores = [s["score"] for s, mine in zip(samples, of_kind, strict=True) if mine]
            assert len(scores) == count and sum(scores) / count == pytest.approx(row[f"eval_score_{kind}"])


def test_sft_learns_the_walks(tmp_path):
    status, out, err = run("sft.py", "--max-steps", 60, "--eval-every", 60, cwd=tmp_path)
    assert status == 0, err
    evaluations = read_rows(tmp_path / "runs/sft", "eval")
    assert_explained(evaluations + read_rows(tmp_path / "runs/sft"))
    losses = [row["eval_loss"] for row in evaluations]
    assert losses[0] > 3.0 and losses[-1] < 1.0, losses


# --- options --------------------------------------------------------------------------------------------------------

VARIANTS = {
    "rloo": ("--advantage", "rloo", "--samples-per-prompt", 4),
    "grpo": ("--advantage", "grpo", "--samples-per-prompt", 4),
    "value model": ("--value-model", "copy", "--value-lr", 1e-3, "--value-warmup-iterations", 2),
    "bfloat16": ("--dtype", "bfloat16"),
    "float64": ("--dtype", "float64"),
    "truncated": ("--sampling.top-k", 5, "--sampling.top-p", 0.9, "--sampling.temperature", 0.7),
    "stop": ("--sampling.stop", "ab", "c"),
    "scores": ("--score-clip", 0.5, "--score-scaling", "--missing-eos-score", -1),
    "KL": ("--kl-coef", 0.1, "--kl-target", 0.01, "--max-kl", 1e-9, "--entropy-coef", 0.01),
    "no reference": ("--kl-coef", 0),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_ppo_options_work(variant, tiny, tmp_path, monkeypatch, capfd):
    """Two iterations in this process: finite metrics, and what the option is for."""
    letters = ("--reward", ROOT / "tests/letter_reward.py:share")
    flags = ("--model", tiny, *SHORT, *letters, "--max-iterations", 2, "--optim.lr", 0.003, *VARIANTS[variant])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ppo.py", *map(str, flags)])
    launch(ppo.main, ppo.Args)
    out, _ = capfd.readouterr()
    rows = read_rows("runs/ppo")
    assert len(rows) == 2
    assert all(math.isfinite(x) for row in rows for x in row.values() if isinstance(x, float)), rows
    expected_steps = 8 if variant != "KL" else 2  # the first minibatch of an iteration is on-policy, the second is not
    assert rows[-1]["optimizer_steps"] == expected_steps
    if variant in ("rloo", "grpo"):
        assert "value_loss" not in rows[0] and not (tmp_path / "runs/ppo/model/heads.safetensors").exists()
    if variant == "value model":
        before, after = load_file(tiny / "model.safetensors"), load_file(tmp_path / "runs/ppo/model/model.safetensors")
        assert all(torch.equal(after[name], x) for name, x in before.items()), "the policy moved in value warm-up"
        assert not (tmp_path / "runs/ppo/model/heads.safetensors").exists(), "a head without the trunk that it reads"
    if variant == "truncated":
        assert 0.1 < rows[0]["kept_mass"] < 0.999 and out.count("off-policy") == 1
    if variant == "stop":
        samples = [json.loads(line) for line in (tmp_path / "runs/ppo/samples.jsonl").read_text().splitlines()]
        assert not any("ab" in row["response"] or "c" in row["response"] for row in samples)
        assert rows[0]["finished"] > 0.1
    if variant == "KL":
        assert rows[1]["kl_coef"] != rows[0]["kl_coef"] and rows[0]["kl_per_sequence"] == 0
    assert ("kl" in rows[0]) == (variant != "no reference")


def run_here(monkeypatch, folder, *flags):
    """Training rows of a run of ppo.py in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["ppo.py", "--output-dir", "run", "--overwrite", *map(str, flags)])
    launch(ppo.main, ppo.Args)
    return read_rows("run")


def test_kl_penalty_holds_the_policy_back(tiny, tmp_path, monkeypatch):
    """The same run with a large KL coefficient ends nearer to its reference, which stays where the policy began."""
    flags = ("--model", tiny, *SHORT, *LETTERS, "--max-iterations", 8)
    free, held = (run_here(monkeypatch, tmp_path, *flags, "--kl-coef", coef)[-1] for coef in (1e-6, 1.0))
    assert free["kl_per_sequence"] > 0.5 and free["kl_k3"] > 0.05, free
    assert held["kl_per_sequence"] < free["kl_per_sequence"] / 2 and held["kl_k3"] < free["kl_k3"] / 2


def test_options_reach_what_they_control(tiny, tmp_path, monkeypatch):
    """What main hands to the pure functions and the optimizer, against what the flags and the metrics say."""
    calls = {}

    def spy(owner, name):
        function = getattr(owner, name)

        def recorded(*args, **kwargs):
            result = function(*args, **kwargs)
            calls.setdefault(name, []).append((args, kwargs, result))
            return result

        monkeypatch.setattr(owner, name, recorded)

    for name in ("shape_scores", "shape_rewards", "compute_gae", "ppo_loss", "AdamW", "clip_grad_norm", "generate"):
        spy(ppo, name)
    flags = ("--model", tiny, *SHORT, *LETTERS, "--max-iterations", 2, "--gamma", 0.9, "--gae-lambda", 0.7)
    flags += ("--missing-eos-score", -2, "--score-scaling", "--kl-coef", 0.3, "--value-lr", 0.02)
    flags += ("--optim.max-grad-norm", 0.5, "--sampling.temperature", 0.8, "--eval-temperature", 1.3)
    first, second = run_here(monkeypatch, tmp_path, *flags)
    scaled = []
    for i, row in enumerate((first, second)):
        (_, finished, mask, missing, clip), _, shaped = calls["shape_scores"][i]
        assert (missing, clip) == (-2, 0) and not finished.all()
        assert (shaped[~finished].sum(1) == -2).all() and (shaped[finished].sum(1) >= 0).all()
        scaled.append(shaped.sum(1).double())
        (token_scores, old, ref, _, kl_coef), _, (rewards, kl) = calls["shape_rewards"][i]
        torch.testing.assert_close(token_scores.sum(1), (scaled[-1] / torch.cat(scaled).std(correction=0)).float())
        torch.testing.assert_close(rewards, token_scores - kl_coef * (old - ref) * mask)
        assert kl_coef == 0.3 and row["kl_per_sequence"] == pytest.approx(kl.sum(1).mean().item())
        (gae_rewards, values, _, gamma, gae_lambda), _, advantages = calls["compute_gae"][i]
        assert gae_rewards is rewards and (gamma, gae_lambda) == (0.9, 0.7)
        real = advantages[mask]
        assert row["advantage_std"] == pytest.approx(real.std(correction=0).item(), rel=1e-5)
        epoch = [call[0][3] for call in calls["ppo_loss"][8 * i : 8 * i + 4]]  # one epoch's micro-batches
        together = {name: torch.cat([old[name] for old in epoch]) for name in epoch[0]}
        assert len(together["advantages"]) == len(real)
        assert together["advantages"].mean().abs() < 1e-5
        assert together["advantages"].std(correction=0).item() == pytest.approx(1, rel=1e-5)
        torch.testing.assert_close(together["returns"].sum(), (advantages + values)[mask].sum())
    assert calls["AdamW"][0][0][1] == {"policy": 0.01, "value_head": 0.02}
    assert all(args[1] == 0.5 for args, _, _ in calls["clip_grad_norm"])
    temperatures = [args[2].temperature for args, _, _ in calls["generate"]]
    assert temperatures == [0, 1.3, 0.8, 0.8, 0, 1.3]


# --- resume ---------------------------------------------------------------------------------------------------------


def final_state(folder):
    """Tensors of the last checkpoint, and rows without times."""
    last = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.removeprefix("step-")))
    return (
        read_state(last),
        without_times(read_rows(folder)),
        without_times(read_rows(folder, "eval")),
    )


def assert_same_run(actual, expected):
    tensors, *rows = final_state(actual)
    expected_tensors, *expected_rows = final_state(expected)
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in expected_tensors.items():
        assert torch.equal(tensors[name], tensor), name
    assert rows == expected_rows
    for name in ("model", "best"):
        weights, expected_weights = (load_file(run / name / "model.safetensors") for run in (actual, expected))
        assert all(torch.equal(weights[key], x) for key, x in expected_weights.items()), name


LETTERS = ("--reward", ROOT / "tests/letter_reward.py:share", "--optim.lr", 0.01)  # a random model earns and learns
PPO_FLAGS = (*SHORT, *LETTERS, "--max-iterations", 6, "--save-every", 2, "--eval-every", 2)
PPO_FLAGS += ("--kl-coef", 0.05, "--kl-target", 1, "--score-scaling")


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    status, _, err = run("ppo.py", "--model", tiny, "--output-dir", folder / "run", *PPO_FLAGS, cwd=folder)
    assert status == 0, err
    rows, scores = read_rows(folder / "run"), [row["eval_score_sampled"] for row in read_rows(folder / "run", "eval")]
    assert rows[-1]["kl_per_sequence"] > 0.1 and len(set(scores)) == len(scores), "nothing moves that could go astray"
    return folder / "run"


MOMENTS = {  # function, its how manieth call
    "rollout": ("parallel.generation.generate", 4),
    "update": ("parallel.optim.AdamW.step", 11),  # of iteration 3
    "save": ("parallel.training_state.full_shapes", 2),  # in iteration 4; tensors are written, their names are not
    "metrics": ("parallel.run.Run.log", 7),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_ppo_run_resumes_bit_for_bit(moment, tiny, undisturbed, tmp_path):
    flags = ("--model", tiny, "--output-dir", tmp_path / "run", *PPO_FLAGS)
    status, _, err = run("ppo.py", *flags, cwd=tmp_path, signal_at=(*MOMENTS[moment], signal.SIGKILL))
    assert status == -signal.SIGKILL, err
    assert (tmp_path / "run/checkpoints/tmp-step-4").exists() == (moment == "save")
    status, out, err = run("ppo.py", *flags, "--resume", cwd=tmp_path)
    assert status == 0, err
    assert_same_run(tmp_path / "run", undisturbed)


def test_sigterm_saves_and_the_run_goes_on(tiny, undisturbed, tmp_path):
    flags = ("--model", tiny, "--output-dir", tmp_path / "run", *PPO_FLAGS)
    moment = ("parallel.optim.AdamW.step", 10, signal.SIGTERM)
    status, _, err = run("ppo.py", *flags, cwd=tmp_path, signal_at=moment)
    assert status == 0, err
    assert len(read_rows(tmp_path / "run")) == 3 and (tmp_path / "run/checkpoints/step-3").is_dir()
    assert not (tmp_path / "run/model").exists()
    status, _, err = run("ppo.py", *flags, "--resume", cwd=tmp_path)
    assert status == 0, err
    assert_same_run(tmp_path / "run", undisturbed)


def test_damaged_checkpoint_falls_back_to_the_one_before(tiny, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    state = tmp_path / "run/checkpoints/step-6/rank-0.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    flags = ("--model", tiny, "--output-dir", tmp_path / "run", *PPO_FLAGS, "--resume")
    status, out, err = run("ppo.py", *flags, cwd=tmp_path)
    assert status == 0, err
    assert "step-6" in out + err
    assert_same_run(tmp_path / "run", undisturbed)


def test_resume_refuses_changed_flags_and_another_model(tiny, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    flags = ("--output-dir", tmp_path / "run", *PPO_FLAGS, "--resume")
    status, _, err = run("ppo.py", "--model", tiny, *flags, "--gamma", 0.9, cwd=tmp_path)
    assert status == 1 and "gamma" in err and "--allow-change" in err
    wide = {**TINY_GPT2, "n_embd": 48}
    other = make_tiny_model(tmp_path / "other", hf_config=wide)
    status, _, err = run("ppo.py", "--model", other, *flags, "--allow-change", "model", cwd=tmp_path)
    assert status == 1 and "another model" in err, err


def test_sft_resumes_bit_for_bit(tiny, tmp_path):
    flags = ("--model", tiny, "--max-steps", 12, "--save-every", 4, "--eval-every", 6, "--microbatch-size", 30)
    status, _, err = run("sft.py", *flags, "--output-dir", tmp_path / "whole", cwd=tmp_path)
    assert status == 0, err
    moment = ("parallel.run.Run.progress", 7, signal.SIGKILL)
    status, _, err = run("sft.py", *flags, "--output-dir", tmp_path / "run", cwd=tmp_path, signal_at=moment)
    assert status == -signal.SIGKILL and len(read_rows(tmp_path / "run")) == 7, err
    status, _, err = run("sft.py", *flags, "--output-dir", tmp_path / "run", "--resume", cwd=tmp_path)
    assert status == 0, err
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# --- forks ----------------------------------------------------------------------------------------------------------


def test_fork_with_own_reward_and_data_takes_five_lines(tiny, tmp_path):
    source = (ROOT / "ppo.py").read_text()
    changes = {
        'reward: str = "tasks.random_walks:optimality"': 'reward: str = "my_ppo.py:short"',
        '("tasks.random_walks:prompts",)': '("letters.txt",)',
        "if __name__ ==": "def short(samples):\n    return [-len(s.response) for s in samples]\n\nif __name__ ==",
    }
    (tmp_path / "letters.txt").write_text("b\nc\nd\ne\nf\n")
    for old, new in changes.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    before, after = (ROOT / "ppo.py").read_text().splitlines(), source.splitlines()
    new_lines = [line for line in after if line.strip() and line not in before]
    assert len(new_lines) <= 5, new_lines
    (tmp_path / "my_ppo.py").write_text(source)
    flags = ("--model", tiny, *SHORT, "--max-iterations", 12, "--optim.lr", 0.01)
    status, _, err = run(tmp_path / "my_ppo.py", *flags, cwd=tmp_path)
    assert status == 0, err
    rows = read_rows(tmp_path / "runs/ppo")
    assert rows[-1]["score"] > rows[0]["score"] + 1.0, "responses did not become shorter"


# --- bad input ------------------------------------------------------------------------------------------------------

REWARDS = """
import os


def raises(samples):
    return [1 / 0 if i == 5 else 0.0 for i, s in enumerate(samples)]


def nan(samples):
    return [float("nan") if i == 3 else 0.0 for i, s in enumerate(samples)]


def short(samples):
    return [0.0] * (len(samples) - 1)


def text(samples):
    return ["good"] * len(samples)


def leaves(samples):
    raise SystemExit(0)


def huge(samples):
    return [1e39 if i == 2 else 0.0 for i, s in enumerate(samples)]


def fails_on_rank_one(samples):
    if os.environ.get("RANK") == "1":
        open("failed", "w").close()
        raise RuntimeError("no such luck")
    return [0.0] * len(samples)
"""
FILES = {
    "rewards.py": REWARDS,
    "broken.jsonl": '{"prompt": "b"}\n{"prompt": \n',
    "fieldless.jsonl": '{"prompt": "b"}\n{"question": "c"}\n',
    "empty.jsonl": "\n",
    "long.jsonl": json.dumps({"prompt": "b" * 60}) + "\n",
    "file": "",
    "surrogate.jsonl": '{"prompt": "\\ud800"}\n',
}
BAD_INPUTS = {  # flags -> what the message must name
    "misspelt flag": (("--gama", 0.9), ["--gama", "--gamma"]),
    "missing file": (("--data", "nowhere.jsonl"), ["nowhere.jsonl"]),
    "malformed line": (("--data", "broken.jsonl"), ["broken.jsonl", "line 2"]),
    "missing field": (("--data", "fieldless.jsonl"), ["fieldless.jsonl", "line 2", "`prompt`", "question"]),
    "empty data": (("--data", "empty.jsonl"), ["empty.jsonl"]),
    "no room": (("--data", "long.jsonl"), ["long.jsonl", "60 tokens", "--sampling.max-new-tokens"]),
    "reward raises": (("--reward", "rewards.py:raises"), ["rewards.py", "ZeroDivisionError", "sample"]),
    "reward NaN": (("--reward", "rewards.py:nan"), ["rewards.py:nan", "nan", "sample 3"]),
    "reward too short": (("--reward", "rewards.py:short"), ["19 values for 20 samples"]),
    "reward text": (("--reward", "rewards.py:text"), ["'good'", "sample 0"]),
    "reward down": (("--reward", "http://127.0.0.1:9/score"), ["127.0.0.1:9", "tries"]),
    "unwritable folder": (("--output-dir", "file/run"), ["file/run"]),
    "layout": (("--layout.dp", 3), ["3", "process"]),
    "no epochs": (("--epochs", 0), ["--epochs 0", "at least 1"]),
    "negative rate": (("--optim.lr", -1), ["--optim.lr -1"]),
    "nothing to steer": (("--kl-coef", 0, "--kl-target", 6), ["--kl-target steers"]),
    "reward exits": (("--reward", "rewards.py:leaves"), ["rewards.py", "SystemExit", "sample"]),
    "reward overflows": (("--reward", "rewards.py:huge"), ["1e+39", "sample 2"]),
    "address": (("--reward", "http://[::1"), ["reward http://[::1", "no address"]),
    "torn archive": (("--data", "torn.jsonl.gz"), ["torn.jsonl.gz"]),
    "half a pair": (("--data", "surrogate.jsonl"), ["surrogate.jsonl, line 1", "surrogate"]),
    "batch": (("--minibatch-size", 12), ["--batch-size 16", "--minibatch-size 12"]),
    "greedy rollouts": (("--sampling.temperature", 0), ["--sampling.temperature", "above 0"]),
    "too many ids": (("--tokenizer", "big"), ["31 ids", "23"]),
    "not a model": (("--model", "./nowhere"), ["./nowhere"]),
}


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    packed = bytearray(gzip.compress(b'{"prompt": "b"}\n' * 1000))
    packed[20:40] = bytes(20)
    (folder / "torn.jsonl.gz").write_bytes(packed)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list("0123456789")[:8])
    tokenizer.save_pretrained(folder / "big")
    return folder


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_ppo_rejects(case, tiny, bad_folder, monkeypatch, capfd):
    """In this process, as one rank: an exit with an error, one message that names the culprit, no traceback."""
    flags, names = BAD_INPUTS[case]
    monkeypatch.chdir(bad_folder)
    model = () if "--model" in flags else ("--model", tiny)
    short = [flag for flag in SHORT if flag not in flags]
    argv = ["ppo.py", *model, *short, "--max-iterations", 2, *flags]
    if "--minibatch-size" in flags:
        argv = ["ppo.py", *model, "--batch-size", 16, *flags]
    monkeypatch.setattr("sys.argv", [str(x) for x in argv])
    started = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        launch(ppo.main, ppo.Args)
    out, err = capfd.readouterr()
    assert stopped.value.code not in (0, None) and time.monotonic() - started < 60
    for name in names:
        assert name in err + out, (name, err)
    assert "Traceback" not in err, err


def test_a_start_that_fails_leaves_the_run_before(tiny, undisturbed, tmp_path):
    """Bad data with --overwrite, or in a folder of its own, writes nothing; --resume then finds the good run."""
    shutil.copytree(undisturbed, tmp_path / "runs/ppo")
    before = {path: path.read_bytes() for path in (tmp_path / "runs/ppo").rglob("*") if path.is_file()}
    flags = ("--model", tiny, *PPO_FLAGS)
    for how in (("--output-dir", "runs/ppo", "--overwrite"), ("--output-dir", "other"), ()):
        status, _, err = run("ppo.py", *flags, *how, "--data", "nowhere.jsonl", cwd=tmp_path)
        assert status == 1 and "nowhere.jsonl" in err
    broken = ("--resume", "--allow-change", "model", "--model", "./nowhere")
    status, _, err = run("ppo.py", *PPO_FLAGS, *broken, cwd=tmp_path)
    assert status == 1
    assert before == {path: path.read_bytes() for path in (tmp_path / "runs/ppo").rglob("*") if path.is_file()}
    status, out, err = run("ppo.py", *flags, "--output-dir", "other", "--max-iterations", 0, cwd=tmp_path)
    assert status == 0, err
    status, out, err = run("ppo.py", *flags, "--resume", "--output-dir", "runs/ppo", cwd=tmp_path)
    assert status == 0 and "resumed from runs/ppo/checkpoints/step-6" in out, err


def test_fewer_prompts_than_ranks(tiny, tmp_path):
    (tmp_path / "one.txt").write_text("b\n")
    flags = ("--model", tiny, "--batch-size", 4, "--minibatch-size", 2, "--data", "one.txt", "--eval-samples", 1)
    out = run_on_ranks("ppo.py", *flags, "--max-iterations", 1, cwd=tmp_path, ranks=2)
    assert "1/1 100 %" in out, out


def test_one_failing_replica_stops_both_with_one_message(tiny, bad_folder):
    flags = ("--model", tiny, *SHORT, "--max-iterations", 2, "--reward", "rewards.py:fails_on_rank_one")
    status, _, err = run("ppo.py", *flags, cwd=bad_folder, ranks=2)
    assert status != 0 and time.time() - (bad_folder / "failed").stat().st_mtime < 25
    assert err.count("error: rank 1: reward rewards.py:fails_on_rank_one raised RuntimeError: no such luck") == 1, err


def test_nan_weight_is_named_before_it_spreads(tmp_path):
    def poison(decoder):
        decoder.layers["1"].ffn_out.weight[3, 5] = float("nan")

    folder = make_tiny_model(tmp_path / "model", edit=poison)
    status, _, err = run("ppo.py", "--model", folder, *SHORT, "--max-iterations", 2, cwd=tmp_path)
    assert status == 1 and "transformer.h.1.mlp.c_proj.weight holds a NaN" in err, err


def test_overflowing_gradients_skip_steps_and_stop_the_run(tiny, tmp_path):
    """After one step of this size the next forward passes overflow."""
    huge = ("--optim.lr", 1e30, "--epochs", 4)
    status, _, err = run("ppo.py", "--model", tiny, *SHORT, *huge, "--output-dir", tmp_path / "run", cwd=tmp_path)
    assert status == 1 and "5 optimizer steps in a row skipped: non-finite gradient of" in err, err
