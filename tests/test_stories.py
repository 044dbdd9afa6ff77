"""A real small Llama on real text: skipped unless RLHF_DATA names a folder with stories260k and TinyStories."""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch

from parallel.checkpoint import eos_ids, load_decoder
from parallel.data import load_tokenizer
from parallel.generation import Sampling, generate
from parallel.mesh import init_mesh
from tests.scripts import ROOT, read_rows, run

DATA = Path(os.environ.get("RLHF_DATA", "nowhere"))
MODEL, STORIES = DATA / "models/stories260k", DATA / "text/tinystories"
pytestmark = pytest.mark.skipif(not (MODEL.is_dir() and STORIES.is_dir()), reason="RLHF_DATA holds no stories")
OPENING = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high."
)


def test_sft_evaluation_matches_transformers(tmp_path):
    with gzip.open(STORIES / "valid.jsonl.gz", "rt") as file:
        lines = list(file)[:120]
    (tmp_path / "stories.jsonl").write_text("".join(lines))
    flags = ("--model", MODEL, "--data", "stories.jsonl", "--max-steps", 0, "--output-dir", tmp_path / "run")
    status, _, err = run("sft.py", *flags, cwd=tmp_path)
    assert status == 0, err
    [row] = read_rows(tmp_path / "run", "eval")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    nats, count = 0.0, 0
    with torch.no_grad():
        for line in lines:
            ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[1, *ids, 2][:512]])
            log_probs = model(ids).logits[0, :-1].double().log_softmax(1)
            nats -= log_probs.gather(1, ids[0, 1:, None]).sum().item()
            count += ids.shape[1] - 1
    assert row["eval_tokens"] == count
    assert abs(row["eval_loss"] - nats / count) < 1e-5


def test_greedy_generation_gives_the_published_sample():
    decoder, tokenizer = load_decoder(str(MODEL), init_mesh(), torch.float32), load_tokenizer(str(MODEL))
    ids = eos_ids(str(MODEL), tokenizer)
    assert ids == [1, 2]
    prompt = tokenizer("Once upon a time")["input_ids"]
    sampling = Sampling(temperature=0, max_new_tokens=400)
    out = generate(decoder, [prompt], sampling, eos_ids=ids, sample_ids=[0], seed=0)
    assert tokenizer.decode(out.input_ids[0], skip_special_tokens=True).startswith(OPENING)
    assert out.finished.tolist() == [True] and out.input_ids[0, -1] in (1, 2)


def test_stop_sequence_ends_sentences(tmp_path):
    flags = ("--model", MODEL, "--data", STORIES / "valid.jsonl.gz", "--prompt-tokens", 8, "--eval-samples", 40)
    flags += ("--reward", ROOT / "tests/happy_stories.py:happiness", "--sampling.max-new-tokens", 60)
    flags += ("--max-iterations", 0, "--sampling.stop", ".", "--output-dir", tmp_path / "run")
    status, _, err = run("ppo.py", *flags, cwd=tmp_path)
    assert status == 0, err
    [row] = read_rows(tmp_path / "run", "eval")
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert row["eval_finished"] > 0.9 and row["eval_response_len"] < 40
    assert not any("." in sample["response"] for sample in samples)


def test_ppo_makes_stories_happier(tmp_path):
    """Five iterations of PPO on a user's own reward gain more than four standard errors; the KL stays bounded."""
    flags = ("--model", MODEL, "--data", STORIES / "train.jsonl.gz", "--eval-data", STORIES / "valid.jsonl.gz")
    flags += ("--prompt-tokens", 16, "--sampling.max-new-tokens", 48, "--batch-size", 128, "--eval-samples", 400)
    flags += ("--reward", ROOT / "tests/happy_stories.py:happiness", "--optim.lr", 3e-4, "--value-lr", 3e-3)
    flags += ("--kl-coef", 0.03, "--max-iterations", 5, "--output-dir", tmp_path / "run")
    status, _, err = run("ppo.py", *flags, cwd=tmp_path)
    assert status == 0, err
    before, after = read_rows(tmp_path / "run", "eval")
    errors = [row["eval_score_sampled_se"] for row in (before, after)]
    gain = after["eval_score_sampled"] - before["eval_score_sampled"]
    assert gain > 4 * sum(e**2 for e in errors) ** 0.5, (before, after)
    assert max(row["kl_per_sequence"] for row in read_rows(tmp_path / "run")) < 15
