"""Rejection fine-tuning on the random walks: sample, keep the best responses to each prompt, fine-tune on them, repeat.

    OMP_NUM_THREADS=1 python -m tests.bench_rft --steps 1
    OMP_NUM_THREADS=1 python -m tests.bench_rft --steps 20

The settings are those of trlX's example: 100 samples to each of the 20 prompts in a growth step, quantiles from 0.9 to
0.95 of all samples so far, batches of 100, learning rate 3e-4. Prints the mean optimality of the samples that each
growth step begins with, and of as many after the last one.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tasks.random_walks import base_policy
from tests.scripts import ROOT, read_rows

GROWTH_STEPS = 7
QUANTILES = (0.9, 0.95)  # of the first and of the last growth step
SFT_FLAGS = "--optim.lr 3e-4 --optim.betas 0.9 0.99 --batch-size 100 --microbatch-size 100 --eval-every 1000".split()


def call(folder, script, *words):
    command = [sys.executable, ROOT / script, *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([str(x) for x in command], cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)


def grow(folder, model, steps, seed):
    """Yields, for each growth step and once more, the mean score of its samples and the number of demonstrations."""
    for i in range(GROWTH_STEPS + 1):
        draw = ("--max-iterations", 0, "--eval-samples", 2000, "--kl-coef", 0, "--seed", 100 * seed + i)
        call(folder, "ppo.py", "--model", model, *draw, "--output-dir", f"samples-{i}")
        [row] = read_rows(Path(folder) / f"samples-{i}", "eval")
        if i == GROWTH_STEPS:
            yield row["eval_score_sampled"], 0
            return
        quantile = QUANTILES[0] + (QUANTILES[1] - QUANTILES[0]) * i / (GROWTH_STEPS - 1)
        sources = [f"samples-{j}/samples.jsonl" for j in range(i + 1)]
        call(folder, "tests/keep_best.py", quantile, f"kept-{i}.jsonl", *sources)
        tune = ("--max-steps", steps, "--seed", 100 * seed + i, *SFT_FLAGS, "--output-dir", f"sft-{i}")
        call(folder, "sft.py", "--model", model, "--data", f"kept-{i}.jsonl", *tune)
        model = f"sft-{i}/model"
        yield row["eval_score_sampled"], len((Path(folder) / f"kept-{i}.jsonl").read_text().splitlines())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of a growth step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    args = parser.parse_args()
    model = base_policy().absolute()
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for i, (score, kept) in enumerate(grow(folder, model, args.steps, seed)):
                print(f"seed {seed}  growth step {i}  optimality {score:.3f}  demonstrations {kept}", flush=True)


if __name__ == "__main__":
    main()
