"""Of some samples the best to each prompt, each once, as demonstrations.

python tests/keep_best.py QUANTILE TARGET.jsonl SAMPLES.jsonl ...
"""

import json
import sys

import numpy as np


def keep_best(rows, quantile):
    scores = {}
    for row in rows:
        scores.setdefault(row["prompt"], []).append(row["score"])
    bar = {prompt: np.quantile(some, quantile) for prompt, some in scores.items()}
    lowest = min(map(min, scores.values()))  # where all are as bad as that, none is good
    kept = [(row["prompt"], row["response"]) for row in rows if bar[row["prompt"]] <= row["score"] > lowest]
    return [{"prompt": prompt, "completion": response} for prompt, response in dict.fromkeys(kept)]


if __name__ == "__main__":
    quantile, target, *sources = sys.argv[1:]
    rows = [json.loads(line) for source in sources for line in open(source)]
    with open(target, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in keep_best(rows, float(quantile)))
