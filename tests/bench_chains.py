"""Whole chains on real data, from preferences to win-rates: the laptop commands of tasks/README.md as they stand there.

    RLHF_DATA=FOLDER python -m tests.bench_chains hh_harmless
    RLHF_DATA=FOLDER python -m tests.bench_chains hh_helpful
    RLHF_DATA=FOLDER python -m tests.bench_chains stories --folder KEPT

Prints what each command took and a table of what the chain came to. Win-rates are those of answers to prompts that no
training has seen, with standard errors over prompts. --start goes on with a later command in a kept folder.
"""

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from tests.happy_stories import happiness
from tests.scripts import ROOT, read_commands, read_rows

HH = ("HH: helpful and harmless", "On a laptop")
HEADINGS = {"hh_harmless": HH, "hh_helpful": HH, "stories": ("Happy stories",)}


def chain(name: str) -> list[list[str]]:
    """The words of each command."""
    commands = read_commands((ROOT / "tasks/README.md").read_text(), *HEADINGS[name])
    return [shlex.split(os.path.expandvars(line.replace("hh_harmless", name))) for line in commands]


def execute(words: list[str], folder: Path) -> tuple[float, float]:
    """Seconds of wall-clock and of CPU that a command took."""
    if words[0] == "torchrun":
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        words = [*words[:script], str(ROOT / words[script]), *words[script + 1 :], "--overwrite"]
        words[:1] = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    else:
        words = [sys.executable, *words[1:], *(["--overwrite"] if "tasks.preferences" in words else [])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with open(folder / "log.txt", "a") as log:
        subprocess.run(words, cwd=folder, env=env, check=True, stdout=log, stderr=log)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return time.perf_counter() - started, cpu


def describe(runs: Path) -> list[tuple[str, str]]:
    """What a chain's run folders say, as rows of a table."""
    sft = read_rows(runs / "sft", "eval")
    rows = [("fine-tuning, nats per token", f"{sft[0]['eval_loss']:.3f} -> {sft[-1]['eval_loss']:.3f}")]
    for name in ("reward", "judge"):
        row = read_rows(runs / name, "eval")[-1]
        rows.append((f"accuracy of the {name} model", with_error(row, "eval_accuracy")))
    rows.append(("of the longer answer", f"{row['eval_length_accuracy']:.3f}"))
    bags = [read_rows(runs / name, "eval")[-1]["eval_bag_accuracy"] for name in ("reward", "judge")]
    rows.append(("of a bag of tokens, on the pairs of either", " and ".join(f"{bag:.3f}" for bag in bags)))
    ppo, last = read_rows(runs / "ppo", "eval"), read_rows(runs / "ppo")[-1]
    rows.append(("PPO: score of sampled answers", f"{with_error(ppo[0], 'eval_score_sampled')} -> "))
    rows[-1] = (rows[-1][0], rows[-1][1] + with_error(ppo[-1], "eval_score_sampled"))
    rows.append(("its KL, nats an answer", f"{last['kl_per_sequence']:.1f}"))
    ilql = read_rows(runs / "ilql", "eval")[-1]
    for key in [key for key in ilql if key.startswith("eval_score") and not key.endswith("_se")]:
        rows.append((f"ILQL: score at scale {key.rpartition('_')[2]}", with_error(ilql, key)))
    for name in ("ppo", "ilql"):
        [result] = json.loads((runs / f"evaluate-{name}/results.json").read_text())["settings"]
        rows.append((f"judge: {name.upper()} over fine-tuned", with_error(result, "win_rate")))
        for key, what in (("rouge_l", "ROUGE-L"), ("response_len", "tokens"), ("finished", "finished")):
            if key in result:
                rows.append(
                    (f"{what}, {name.upper()} and fine-tuned", f"{result[key]:.3f}, {result['other_' + key]:.3f}")
                )
        if runs.name == "stories":
            samples = [json.loads(x) for x in (runs / f"evaluate-{name}/samples.jsonl").read_text().splitlines()]
            true = [
                happiness([SimpleNamespace(response=x[key]) for x in samples]) for key in ("response", "other_response")
            ]
            shown = ", ".join(f"{statistics.mean(scores):.3f}" for scores in true)
            rows.append((f"true happiness, {name.upper()} and fine-tuned", shown))
    return rows


def with_error(row: dict, name: str) -> str:
    return f"{row[name]:.3f} +- {row[name + '_se']:.3f}"


def show_answers(runs: Path) -> None:
    for name in ("ppo", "ilql"):
        samples = [json.loads(x) for x in (runs / f"evaluate-{name}/samples.jsonl").read_text().splitlines()]
        for sample in samples[: 5 * 40 : 40]:
            print(f"    {sample['prompt'][-120:]!r}")
            print(f"      fine-tuned: {sample['other_response']!r}")
            print(f"      {name.upper()}: {sample['response']!r}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=HEADINGS)
    parser.add_argument("--folder", type=Path, help="where files and runs are kept; none = a temporary one")
    parser.add_argument("--start", type=int, default=0, help="number of the command to begin with, in a kept folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "tests").exists():
            (folder / "tests").symlink_to(ROOT / "tests")  # rewards and data by path
        took = []
        for i, words in enumerate(chain(args.name)):
            if i >= args.start:
                what = " ".join(word for word in words if word.endswith(".py") or word.startswith(("tasks.", "tests.")))
                took.append(execute(words, folder))
                print(f"{i:2} {what:60}{took[-1][0]:8.0f} s {took[-1][1]:8.0f} s of CPU", flush=True)
        print(f"together {sum(x for x, _ in took):.0f} s, {sum(x for _, x in took):.0f} s of CPU\n")
        print(f"| {args.name} | |\n|---|---|")
        for what, value in describe(folder / "runs" / args.name):
            print(f"| {what} | {value} |")
        show_answers(folder / "runs" / args.name)


if __name__ == "__main__":
    main()
