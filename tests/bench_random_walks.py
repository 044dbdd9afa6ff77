"""What the defaults of ppo.py learn: five training seeds on the task's graph, one on each of five other graphs.

    python tests/bench_random_walks.py

Per run: the mean optimality of an iteration's rollouts, sampled at temperature 1. "reached" is the end of the first
five iterations that average at least 0.9, in seconds of rollouts and updates (evaluation and start-up not counted).
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SEEDS = (1, 2, 3, 4, 5)
GRAPHS = (1002, 1004, 1005, 1006, 1007)
OTHER_GRAPH = """
from tasks import random_walks


def base_policy():
    return random_walks.base_policy({graph})


def prompts():
    return random_walks.prompts({graph})
"""


def train(folder, name, *flags):
    """Training and evaluation rows of a run of ppo.py in a folder."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "ppo.py", "--output-dir", name, *flags]
    subprocess.run([str(x) for x in command], cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (Path(folder) / name / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "train"], [row for row in rows if row["event"] == "eval"]


def describe(label, train_rows, eval_rows):
    scores = [row["score"] for row in train_rows]
    means = [sum(scores[i : i + 5]) / 5 for i in range(len(scores) - 4)]
    reached = next((i for i, mean in enumerate(means) if mean >= 0.9), None)
    seconds = f"{train_rows[reached + 4]['seconds']:.1f} s" if reached is not None else "never"
    lowest = f"{min(means[reached:]):.3f}" if reached is not None else "-"
    ends = f"{eval_rows[0]['eval_score_sampled']:.3f} -> {eval_rows[-1]['eval_score_sampled']:.3f}"
    greedy = f"{eval_rows[-1]['eval_score_greedy']:.3f}"
    print(f"{label:12}{seconds:>9}{lowest:>18}{means[-1]:>14.3f}{ends:>18}{greedy:>9}", flush=True)


def main():
    print(f"{'':12}{'reached':>9}{'lowest 5 after':>18}{'last 5':>14}{'eval sampled':>18}{'greedy':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            describe(f"seed {seed}", *train(folder, f"seed-{seed}", "--seed", seed))
        for graph in GRAPHS:
            (Path(folder) / f"graph_{graph}.py").write_text(OTHER_GRAPH.format(graph=graph))
            task = f"graph_{graph}.py"
            flags = ("--model", f"{task}:base_policy", "--data", f"{task}:prompts")
            describe(f"graph {graph}", *train(folder, f"graph-{graph}", *flags))


if __name__ == "__main__":
    main()
