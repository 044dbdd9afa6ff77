"""Offline data for ILQL: continuations of real stories, each rated by `happy_stories.happiness`."""

import gzip
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

from tests.happy_stories import happiness

STORIES = Path(os.environ.get("RLHF_DATA", "nowhere"), "text/tinystories/train.jsonl.gz")


def rows():
    """A story's first sentence as prompt, the next two as response."""
    found = []
    with gzip.open(STORIES, "rt") as file:
        for line in file:
            sentences = re.split(r'(?<=[.!?])(?=\s)|(?<=[.!?]")(?=\s)', " ".join(json.loads(line)["text"].split()))
            prompt, response = sentences[0], "".join(sentences[1:3])
            if len(sentences) >= 3 and len(prompt) + len(response) < 250:
                [reward] = happiness([SimpleNamespace(response=response)])
                found.append({"prompt": prompt, "response": response, "reward": reward})
    return found
