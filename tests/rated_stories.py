"""Real stories as offline data: each continuation rated by `happy_stories.happiness`."""

import gzip
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

from tests.happy_stories import happiness

STORIES = Path(os.environ.get("RLHF_DATA", "nowhere"), "text/tinystories")


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


def demonstrations():
    """The same for sft.py."""
    return [{"prompt": row["prompt"], "completion": row["response"]} for row in rated()]


def prompts():
    """First sentences of stories that are not trained on."""
    return [{"prompt": row["prompt"]} for row in rated("valid.jsonl.gz")]


def training_prompts():
    """First sentences of the stories that are trained on."""
    return [{"prompt": row["prompt"]} for row in rated()]
