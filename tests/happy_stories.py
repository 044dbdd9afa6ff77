"""A reward of a user's own: stories with several different happy words, without repeating themselves."""

import re

HAPPY = set("happy smiled laughed fun love loved hugged hug friend friends joy cheered proud excited thanked".split())


def happiness(samples):
    scores = []
    for sample in samples:
        words = re.findall("[a-z]+", sample.response.lower())
        four_grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
        num_repeated = len(four_grams) - len(set(four_grams))
        scores.append(min(len(HAPPY.intersection(words)), 5) / 5 - 0.2 * num_repeated)
    return scores
