"""Real stories as data: continuations rated by `happy_stories.happiness`, and pairs of a model's own answers.

    python -m tests.rated_stories runs/evaluate/samples.jsonl pairs.jsonl

makes preferences of what evaluate.py has sampled and scored, several answers to each prompt: of two whose lengths
differ by at most a tenth the one with the higher score is preferred.
"""

import gzip
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

from tests.happy_stories import happiness

STORIES = Path(os.environ.get("RLHF_DATA", "nowhere"), "text/tinystories")
OPENINGS = 1600  # that a model answers for the sake of preferences


def rated(file="train.jsonl.gz"):
    """For ilql.py: a story's first sentence as prompt, the next two as response, their happiness as the return."""
    rows = []
    with gzip.open(STORIES / file, "rt") as stories:
        for line in stories:
            sentences = re.split(r'(?<=[.!?])(?=\s)|(?<=[.!?]")(?=\s)', " ".join(json.loads(line)["text"].split()))
            prompt, response = sentences[0], "".join(sentences[1:3])
            if len(sentences) >= 3 and len(prompt) + len(response) < 250:
                [reward] = happiness([SimpleNamespace(response=response)])
                rows.append({"prompt": prompt, "response": response, "reward": reward})
    return rows


def demonstrations(file="train.jsonl.gz"):
    """The same for sft.py."""
    return [{"prompt": row["prompt"], "completion": row["response"]} for row in rated(file)]


def prompts():
    """First sentences of stories that are not trained on, and how they go on."""
    return demonstrations("valid.jsonl.gz")


def training_prompts():
    """First sentences of the stories that are trained on."""
    return [{"prompt": row["prompt"]} for row in rated()]


def openings():
    """Some of those, each once, to be answered for the sake of preferences."""
    return [{"prompt": prompt} for prompt in dict.fromkeys(row["prompt"] for row in rated())][:OPENINGS]


def prefer(samples):
    """Pairs of answers to one prompt, each answer in one pair at most, those with the clearest difference first."""
    answers = {}
    for sample in samples:
        if sample["finished"] and sample["response"].strip():
            answers.setdefault(sample["prompt"], []).append(sample)
    rows = []
    for prompt, group in answers.items():
        candidates = [
            (a["score"] - b["score"], i, j)
            for i, a in enumerate(group)
            for j, b in enumerate(group)
            if a["score"] > b["score"] and abs(a["response_len"] - b["response_len"]) <= 0.1 * b["response_len"]
        ]
        used = set()
        for _, i, j in sorted(candidates, reverse=True):
            if not used & {i, j}:
                used |= {i, j}
                rows.append({"prompt": prompt, "chosen": group[i]["response"], "rejected": group[j]["response"]})
    return rows


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    pairs = prefer([json.loads(line) for line in source.read_text().splitlines()])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    print(f"{target}  {len(pairs):,} pairs")
