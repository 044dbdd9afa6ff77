"""What the details of ppo.py's implementation do on its default run: each switched alone, over several seeds.

    OMP_NUM_THREADS=1 python -m tests.bench_ablations --out FOLDER

Flags are changed where ppo.py has them; of the rest a pure function of the script is exchanged. Each run is a process
of its own and a folder in FOLDER, and is not repeated once it is complete. The table gives mean +- deviation.
"""

import argparse
import contextlib
import math
import statistics
from functools import partial
from pathlib import Path
from unittest import mock

import tyro

import ppo
from parallel.model import ScalarHead
from tests.ranks import context
from tests.scripts import read_rows

REACHED = 0.9  # mean score of five iterations
STRONG_KL = ("--kl-coef", "0.03")  # at the default of 0.001 the estimators cannot be told apart


def leave_advantages(advantages, response_mask):
    """In place of `ppo.whiten`: advantages as they are, and their deviation."""
    return advantages * response_mask, advantages[response_mask].std(correction=0)


def penalise_by_k3(token_scores, old_logprobs, ref_logprobs, response_mask, kl_coef):
    """`ppo.shape_rewards` with k3 = r - 1 - log r, r = ref / old, for the penalty."""
    kl = (old_logprobs - ref_logprobs) * response_mask
    return token_scores - kl_coef * ((-kl).exp() - 1 + kl), kl


def leave_scores(token_scores, old_logprobs, ref_logprobs, response_mask, kl_coef):
    """`ppo.shape_rewards` without a penalty, for one in the loss."""
    return token_scores, (old_logprobs - ref_logprobs) * response_mask


def loss_with_k3(hidden, microbatch, roles, args, num_tokens, value_only=False):
    """`ppo.minibatch_loss` plus kl_coef times the mean of k3, r = ref / new, which is differentiated."""
    mask = microbatch["response_mask"]
    logprobs, entropy, values = ppo.read_heads(hidden, microbatch, roles, args.sampling.temperature, value_only)
    old = {name: microbatch[name][mask] for name in ("old_logprobs", "advantages", "values", "returns")}
    loss, metrics = ppo.ppo_loss(logprobs, entropy, values, old, args, num_tokens, value_only)
    kl = logprobs - microbatch["ref_logprobs"][mask]  # k1
    return loss + args.kl_coef * ((-kl).exp() - 1 + kl).sum() / num_tokens, metrics


SETTINGS = {  # name: flags, what is exchanged in ppo
    "default": ((), {}),
    "advantages not whitened": ((), {"whiten": leave_advantages}),
    "values not clipped": (("--value-clip-range", "1e9"), {}),
    "1 epoch": (("--epochs", "1"), {}),
    "4 epochs": (("--epochs", "4"), {}),
    "Adam's epsilon 1e-5": (("--optim.eps", "1e-5"), {}),
    "value head from N(0, 1 / (d + 1))": ((), {"ScalarHead": "normal"}),
    "KL coefficient 0.03: k1 in the reward": (STRONG_KL, {}),
    "KL coefficient 0.03: k3 in the reward": (STRONG_KL, {"shape_rewards": penalise_by_k3}),
    "KL coefficient 0.03: k3 as a loss": (STRONG_KL, {"shape_rewards": leave_scores, "minibatch_loss": loss_with_k3}),
}


def normal_head(hidden_size, mesh, dtype, seed):
    """A value head that does not start at 0."""
    return ScalarHead(hidden_size, mesh, dtype, std=1 / math.sqrt(hidden_size + 1), seed=seed)


def train(setting, seed, folder, flags=()):
    """A run of ppo.py under a setting, in this process."""
    changed, exchanged = SETTINGS[setting]
    exchanged = dict(exchanged)
    if "ScalarHead" in exchanged:
        exchanged["ScalarHead"] = partial(normal_head, seed=seed)
    evaluation = ("--eval-every", "1000", "--save-every", "1000")
    words = ["--output-dir", str(folder), "--overwrite", "--seed", str(seed), *evaluation, *changed, *flags]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for name, replacement in exchanged.items():
            stack.enter_context(mock.patch.object(ppo, name, replacement))
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(f"{folder}.log", "w"))))
        ppo.main(tyro.cli(ppo.Args, args=words))


def describe(folder):
    """Final sampled score, iterations to five that average REACHED (None: never), nats per sequence at the end."""
    rows = read_rows(folder)
    scores = [row["score"] for row in rows]
    means = [statistics.mean(scores[i - 5 : i]) for i in range(5, len(scores) + 1)]
    reached = next((5 + i for i, mean in enumerate(means) if mean >= REACHED), None)
    kl = statistics.mean(row["kl_per_sequence"] for row in rows[-5:])
    return read_rows(folder, "eval")[-1]["eval_score_sampled"], reached, kl


def mean_and_deviation(values, digits):
    """The values that are there, e.g. "0.98 +- 0.01", with how many of them are missing."""
    there = [value for value in values if value is not None]
    if not there:
        return "never"
    deviation = statistics.stdev(there) if len(there) > 1 else 0.0
    missing = f" ({len(values) - len(there)} of {len(values)} never)" if len(there) < len(values) else ""
    return f"{statistics.mean(there):.{digits}f} +- {deviation:.{digits}f}{missing}"


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="of ppo.py, in every run; the last flag")
    args = parser.parse_args(words)
    for seed in args.seeds:
        for setting in args.settings:
            folder = args.out / f"{list(SETTINGS).index(setting)}-seed-{seed}"
            if (folder / "model").exists():
                continue
            process = context.Process(target=train, args=(setting, seed, folder.absolute(), args.flags))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{setting}, seed {seed} has failed: {folder}.log")
    print("| | final optimality | iterations to 0.9 | KL (nats per response) |\n|---|---|---|---|")
    for setting in args.settings:
        folders = [args.out / f"{list(SETTINGS).index(setting)}-seed-{seed}" for seed in args.seeds]
        columns = zip(*map(describe, folders), strict=True)
        cells = [mean_and_deviation(column, digits) for column, digits in zip(columns, (3, 1, 2), strict=True)]
        print(f"| {setting} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
