"""What the defaults of ilql.py learn from 1,000 random walks, on five training seeds, one thread.

    python tests/bench_ilql.py

Per run: seconds per optimizer step, sampled optimality (2,000 samples at fixed noise, with its standard error) at scale
0, which is plain cloning, 1 and 100, and the first evaluated step from which scale 100 stays at or above 0.9.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SEEDS = (1, 2, 3, 4, 5)
SCALES = ("0", "1", "100")


def train(folder, seed):
    """Training and evaluation rows of a run of ilql.py in a folder."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "ilql.py", "--output-dir", f"seed-{seed}", "--seed", seed, "--eval-every", 20]
    subprocess.run([str(x) for x in command], cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (Path(folder) / f"seed-{seed}/metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "train"], [row for row in rows if row["event"] == "eval"]


def main():
    print(f"{'':8}{'s/step':>8}{'fastest':>9}{'>= 0.9 from':>13}" + "".join(f"{'scale ' + s:>18}" for s in SCALES))
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            train_rows, eval_rows = train(folder, seed)
            seconds = [row["step_seconds"] for row in train_rows[5:]]
            below = [row["iteration"] for row in eval_rows if row["eval_score_scale_100"] < 0.9]
            since = next((row["iteration"] for row in eval_rows if row["iteration"] > max(below, default=-1)), "never")
            last = eval_rows[-1]
            scores = [f"{last[f'eval_score_scale_{s}']:.3f} +- {last[f'eval_score_scale_{s}_se']:.3f}" for s in SCALES]
            print(
                f"seed {seed:<3}{statistics.median(seconds):>8.3f}{min(seconds):>9.3f}{since:>13}"
                + "".join(f"{score:>18}" for score in scores),
                flush=True,
            )


if __name__ == "__main__":
    main()
