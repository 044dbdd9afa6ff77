"""ILQL on real stories against plain fine-tuning, three seeds, one thread.

    RLHF_DATA=FOLDER python tests/bench_stories.py

stories260k, a 260k-parameter Llama, goes on with first sentences of TinyStories as prompts and the next two as
responses. Plain fine-tuning (sft.py) and ILQL see the same rows, ILQL also the happiness of each response. Scores are
means over 400 sampled continuations of prompts that neither has seen, with standard errors.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODEL = Path(os.environ["RLHF_DATA"], "models/stories260k")
REWARD = ("--reward", "tests/happy_stories.py:happiness", "--eval-data", "tests/rated_stories.py:prompts")
SAMPLING = ("--sampling.max-new-tokens", 80, "--eval-samples", 400)
STEPS = ("--max-steps", 600, "--batch-size", 64, "--microbatch-size", 64, "--eval-every", 600, "--save-every", 600)
OPTIM = ("--optim.lr", 1e-3, "--optim.schedule", "cosine")
ILQL = ("--awac-beta", 1, "--expectile", 0.7, "--target-sync-steps", 1, "--target-update-rate", 1)


def run(script, folder, *flags):
    """The last evaluation of a run."""
    command = [sys.executable, ROOT / script, "--output-dir", folder, *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([str(x) for x in command], cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "eval"][-1]


def train_plainly(folder, seed):
    """Mean score and standard error of a fine-tuned model's continuations."""
    data = ("--data", "tests/rated_stories.py:demonstrations")
    run("sft.py", folder / "sft", "--model", MODEL, *data, *STEPS, *OPTIM, "--seed", seed)
    flags = ("--model", folder / "sft/model", "--data", "tests/rated_stories.py:prompts", "--max-iterations", 0)
    row = run("ppo.py", folder / "sampled", *flags, *REWARD, *SAMPLING)
    return row["eval_score_sampled"], row["eval_score_sampled_se"]


def main():
    scales = ("0", "8", "32")
    print(f"{'':8}{'fine-tuning':>18}" + "".join(f"{'ILQL, scale ' + s:>20}" for s in scales) + f"{'gain / error':>14}")
    for seed in (1, 2, 3):
        with tempfile.TemporaryDirectory() as folder:
            plain, plain_error = train_plainly(Path(folder), seed)
            flags = ("--model", MODEL, "--data", "tests/rated_stories.py:rated", "--advantage-scales", *scales)
            flags += (*ILQL, *STEPS, *OPTIM, *REWARD, *SAMPLING, "--seed", seed)
            row = run("ilql.py", Path(folder) / "ilql", *flags)
            lines = (Path(folder) / "ilql/samples.jsonl").read_text().splitlines()
            samples = [json.loads(line) for line in lines]
        scores = [(row[f"eval_score_scale_{s}"], row[f"eval_score_scale_{s}_se"]) for s in scales]
        best, error = scores[-1]
        print(
            f"seed {seed:<3}{plain:>9.3f} +- {plain_error:.3f}"
            + "".join(f"{score:>11.3f} +- {e:.3f}" for score, e in scores)
            + f"{(best - plain) / (error**2 + plain_error**2) ** 0.5:>14.1f}",
            flush=True,
        )
        if seed == 1:
            last = [[s for s in samples if s["iteration"] and s["scale"] == scale] for scale in (0, 32)]
            for sample in [*last[0][:20:10], *last[1][:20:10]]:
                print(f"    scale {sample['scale']:g}: {sample['prompt']} >> {sample['response']}")


if __name__ == "__main__":
    main()
