"""What a reward model has to beat: two ways to tell a pair's chosen answer without reading it.

A pair is anything with chosen_ids and rejected_ids, the tokens of two answers behind the same prompt.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BAG_PENALTY = 1.0  # weight of |w|^2 / 2 beside the sum of losses
BAG_STEPS = 60  # of L-BFGS
BAG_PAIRS = 20_000  # at most, the first of `train`: more cost minutes and gigabytes and change little


def count_wins(difference: Tensor) -> Tensor:
    """1 where the chosen answer wins, 1/2 for a tie, else 0, in float64."""
    return (difference.sign().double() + 1) / 2


def length_accuracy(pairs) -> float:
    """Accuracy of "the longer answer wins", in tokens."""
    difference = torch.tensor([len(pair.chosen_ids) - len(pair.rejected_ids) for pair in pairs])
    return count_wins(difference).mean().item()


def bag_of_tokens(ids: list[int]) -> list:
    """A sequence's tokens, and its pairs of neighbouring tokens."""
    return [*ids, *zip(ids, ids[1:], strict=False)]


def bag_accuracy(train, held_out) -> float:
    """Accuracy on `held_out` of a Bradley-Terry model whose score is linear in the counts of tokens and token pairs.

    With x_i the counts of the chosen answer minus those of the rejected one, the weights minimise by L-BFGS

        - sum over train of log sigmoid(w x_i) + BAG_PENALTY |w|^2 / 2
    """
    train, sides = train[:BAG_PAIRS], (("chosen_ids", 1.0), ("rejected_ids", -1.0))
    bags = (bag_of_tokens(getattr(pair, side)) for pair in train for side, _ in sides)
    column_of = {feature: i for i, feature in enumerate(dict.fromkeys(feature for bag in bags for feature in bag))}

    def count(pairs) -> tuple[Tensor, Tensor, Tensor]:  # entries of a sparse [pairs, features] matrix
        entries = [
            (row, column_of[feature], sign)
            for row, pair in enumerate(pairs)
            for side, sign in sides
            for feature in bag_of_tokens(getattr(pair, side))
            if feature in column_of
        ]
        rows, columns, signs = zip(*entries, strict=True)
        return torch.tensor(rows), torch.tensor(columns), torch.tensor(signs, dtype=torch.float64)

    def add(values: Tensor, places: Tensor, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64).index_add_(0, places, values)

    rows, columns, signs = count(train)
    weights = torch.zeros(len(column_of), dtype=torch.float64)
    optimizer = torch.optim.LBFGS([weights], max_iter=BAG_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        difference = add(signs * weights[columns], rows, len(train))
        weights.grad = BAG_PENALTY * weights - add(signs * (-difference).sigmoid()[rows], columns, len(weights))
        return BAG_PENALTY / 2 * weights.square().sum() - F.logsigmoid(difference).sum()

    optimizer.step(closure)
    rows, columns, signs = count(held_out)
    return count_wins(add(signs * weights[columns], rows, len(held_out))).mean().item()
