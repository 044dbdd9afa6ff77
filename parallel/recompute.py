"""Recomputation: activations that the backward pass computes again instead of the forward keeping them.

    none        everything that a gradient reads is kept
    selective   what norms, activation functions and gated products give is not kept, matrix products and attention are
    full        of each layer its input is kept (Chen et al. 2016, arXiv 1604.06174)

The operations and their order are the same, hence also the bits of every gradient.
Source: selective, Korthikanti et al. 2022 (arXiv 2205.05198), section 5, there for attention.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recompute(enabled: bool, fn: Callable[..., Tensor], *args) -> Tensor:
    """fn(*args); if enabled, all that its backward reads is computed again then, from args.

    The recomputation stops at the last tensor that the backward reads. Where fn ends in a matrix product, that is the
    product's input: the product itself is not repeated. Communication: none.
    """
    if not enabled or not torch.is_grad_enabled():
        return fn(*args)
    return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False)  # nothing here is random
