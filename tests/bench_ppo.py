"""Seconds per PPO iteration on random walks at trlX's hyper-parameters, beside any other systems.

    python tests/bench_ppo.py --model FOLDER
    python tests/bench_ppo.py --model FOLDER --peer "VENV/bin/python trl_classic_randomwalks.py --iters 9 --threads 1"

140 rollouts and 8 optimizer steps (4 epochs x 2 minibatches of 70) an iteration, a 6 x 144 GPT-2, float32, learning
rate 3e-4, no KL penalty, one thread. Ours is the mean of iterations 1 to 8 with everything counted; a peer prints a
last line of JSON with `iter_s_median`. Runs alternate; the table gives medians and minima over the rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = (
    "--batch-size 140 --minibatch-size 70 --microbatch-size 70 --epochs 4 --optim.lr 3e-4 --optim.max-grad-norm 0 "
    "--value-coef 1.2 --kl-coef 0 --gamma 1 --gae-lambda 0.95 --max-iterations 8 --eval-every 100 --save-every 100 "
    "--eval-samples 0 --no-bos"
).split()


def run_ours(model, threads):
    """Rows of metrics.jsonl of one run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, ROOT / "ppo.py", "--model", model, "--output-dir", out, *FLAGS]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "train"]


def run_peer(command):
    """The last line of JSON that a command prints."""
    out = subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout
    return next(json.loads(line) for line in reversed(out.splitlines()) if line.startswith("{"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the base policy")
    parser.add_argument("--peer", action="append", default=[], help="command of another system; may be repeated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    seconds: list[list[float]] = [[] for _ in range(1 + len(args.peer))]
    for i in range(args.rounds):
        rows = run_ours(args.model, args.threads)
        seconds[0].append(statistics.mean(row["iteration_seconds"] for row in rows))
        for times, command in zip(seconds[1:], args.peer, strict=True):
            times.append(run_peer(command)["iter_s_median"])
        print(f"round {i}: " + "  ".join(f"{times[-1]:.3f} s" for times in seconds), flush=True)
    names = ["ours", *(f"peer {i + 1}" for i in range(len(args.peer)))]
    for name, times in zip(names, seconds, strict=True):
        ratio = statistics.median(seconds[0]) / statistics.median(times)
        print(f"{name:8} median {statistics.median(times):.3f} s  minimum {min(times):.3f} s  ours / it {ratio:.2f}")
    tokens = statistics.mean(row["iteration_tokens"] for row in rows) / 140
    phases = {key: statistics.mean(row[key] for row in rows) for key in rows[0] if key.endswith("_seconds")}
    print("ours by phase: " + "  ".join(f"{name.removesuffix('_seconds')} {s:.3f}" for name, s in phases.items()))
    print(
        f"tokens a sequence: {tokens:.2f} of 10, the rest packed away; padded equivalent "
        f"{statistics.median(seconds[0]) * 10 / tokens:.3f} s"
    )


if __name__ == "__main__":
    main()
