"""A reward that a random model can earn: the share of a response's letters that are in the first half of the walk's."""


def share(samples):
    return [sum(letter < "k" for letter in s.response) / max(len(s.response), 1) for s in samples]
