"""PPO on real stories against a learned reward model, judged by another one: the whole chain, one thread.

    RLHF_DATA=FOLDER python -m tests.bench_learned_reward --seed 1

sft.py goes on with stories260k on first sentences and the two that follow. That model answers each of 2,400 openings
eight times; of two answers whose lengths differ by at most a tenth, the happier one is chosen (different happy words,
no repeated 4-grams: `tests/happy_stories.py`). Half of the openings train the reward model, the other half the judge.
ppo.py then learns from the reward model alone; both models answer openings that none of this has seen, with the same
noise, and the judge says which answer it prefers.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
from pathlib import Path

import torch

from parallel.checkpoint import eos_ids, load_decoder
from parallel.data import load_tokenizer, prompt_rows
from parallel.generation import Sampling, generate
from parallel.mesh import init_mesh
from parallel.rows import Row
from tasks.rewards import SampleContext, make_reward, make_samples
from tests import rated_stories
from tests.bench_stories import MODEL, run
from tests.happy_stories import happiness

NEW_TOKENS, ANSWERS = 80, 8
SFT = ("--max-steps", 600, "--batch-size", 64, "--microbatch-size", 64, "--eval-every", 600, "--save-every", 600)
SFT += ("--optim.lr", 1e-3, "--optim.schedule", "cosine")
REWARD = ("--max-steps", 120, "--batch-size", 32, "--microbatch-size", 32, "--eval-every", 30, "--save-every", 120)
REWARD += ("--optim.lr", 5e-4, "--optim.schedule", "cosine", "--optim.weight-decay", 0.1)
PPO = ("--max-iterations", 25, "--eval-every", 25, "--batch-size", 128, "--minibatch-size", 32, "--eval-samples", 400)
PPO += ("--optim.lr", 1e-4, "--value-lr", 1e-3, "--kl-coef", 0.2, "--missing-eos-score", -5)
PPO += ("--sampling.max-new-tokens", NEW_TOKENS)


def answer(folder, openings, num_answers, seed):
    """`num_answers` samples of a model's continuations of each opening, those of one opening together."""
    mesh = init_mesh()
    decoder, tokenizer = load_decoder(str(folder), mesh, torch.float32), load_tokenizer(str(folder))
    eos = eos_ids(str(folder), tokenizer)
    prompts = prompt_rows([Row({"prompt": x}, "an opening") for x in openings], tokenizer, 0, 400)
    prompts = [prompt for prompt in prompts for _ in range(num_answers)]
    sampling, ids = Sampling(max_new_tokens=NEW_TOKENS), [prompt.prompt_ids for prompt in prompts]
    generation = generate(decoder, ids, sampling, eos_ids=eos, sample_ids=list(range(len(ids))), seed=seed)
    return make_samples(generation, prompts, tokenizer, eos, ())


def prefer(samples, path):
    """Writes the pair of each opening whose happiness differs most, of those with lengths within a tenth."""
    rows = []
    for first in range(0, len(samples), ANSWERS):
        group = [s for s in samples[first : first + ANSWERS] if s.finished and s.response.strip()]
        scored = sorted(zip(happiness(group), range(len(group)), strict=True))
        pairs = [
            (high - low, group[i], group[j])
            for low, j in scored
            for high, i in scored
            if high > low
            and abs(len(group[i].response_ids) - len(group[j].response_ids)) <= 0.1 * len(group[j].response_ids)
        ]
        if pairs:
            _, chosen, rejected = max(pairs, key=lambda pair: pair[0])
            rows.append({"prompt": chosen.prompt, "chosen": chosen.response, "rejected": rejected.response})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def mean_and_error(values):
    return f"{statistics.mean(values):.3f} +- {statistics.pstdev(values) / math.sqrt(len(values)):.3f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    seed = parser.parse_args().seed
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = "tests/rated_stories.py:demonstrations"
        row = run("sft.py", folder / "sft", "--model", MODEL, "--data", data, *SFT, "--seed", seed)
        print(f"sft.py: {row['eval_loss']:.3f} nats per token", flush=True)
        sft = folder / "sft/model"

        openings = [row["prompt"] for row in rated_stories.rated()][:2400]
        samples = answer(sft, openings, ANSWERS, seed)
        half = len(samples) // 2
        for name, some in (("reward", samples[:half]), ("judge", samples[half:])):
            num_pairs = prefer(some, folder / f"{name}.jsonl")
            row = run("reward_model.py", folder / name, "--model", sft, "--data", folder / f"{name}.jsonl", *REWARD)
            print(
                f"{name}: {num_pairs} pairs; accuracy {row['eval_accuracy']:.3f} +- {row['eval_accuracy_se']:.3f} of "
                f"held-out pairs, longer answer {row['eval_length_accuracy']:.3f}, bag {row['eval_bag_accuracy']:.3f}",
                flush=True,
            )

        prompts = ("--data", "tests/rated_stories.py:training_prompts", "--eval-data", "tests/rated_stories.py:prompts")
        flags = ("--model", sft, *prompts, "--reward", folder / "reward/best", *PPO, "--seed", seed)
        flags += ("--value-model", folder / "reward/best")  # scores this large would pull at a shared trunk
        row = run("ppo.py", folder / "ppo", *flags)
        metrics = [json.loads(line) for line in (folder / "ppo/metrics.jsonl").read_text().splitlines()]
        before = next(row for row in metrics if row["event"] == "eval")
        kl = [row["kl_per_sequence"] for row in metrics if row["event"] == "train"][-1]
        print(
            f"ppo.py: reward model's score {before['eval_score_sampled']:.3f} -> {row['eval_score_sampled']:.3f} "
            f"+- {row['eval_score_sampled_se']:.3f}, KL {kl:.1f} nats per answer",
            flush=True,
        )

        openings = [row["prompt"] for row in rated_stories.prompts()]
        answers = [answer(model, openings, 2, seed + 100) for model in (sft, folder / "ppo/model")]
        tokenizer = load_tokenizer(str(sft))
        judge = make_reward(
            str(folder / "judge/best"), SampleContext(init_mesh(), tokenizer, eos_ids(str(sft), tokenizer))
        )
        judged = [judge(samples) for samples in answers]
        wins = [(b > a) + (b == a) / 2 for a, b in zip(*judged, strict=True)]
        print(f"win-rate of PPO over SFT by the judge: {mean_and_error(wins)} of {len(wins)} pairs")
        for name, samples in zip(("SFT", "PPO"), answers, strict=True):
            lens = [len(sample.response_ids) for sample in samples]
            print(
                f"{name}: true happiness {mean_and_error(happiness(samples))}, {statistics.mean(lens):.1f} tokens, "
                f"finished {statistics.mean(sample.finished for sample in samples):.3f}"
            )
        for i in (0, 2, 4):
            for name, samples in zip(("SFT", "PPO"), answers, strict=True):
                print(f"  {name}: {samples[i].prompt} >>{samples[i].response}")


if __name__ == "__main__":
    main()
