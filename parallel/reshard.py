"""Weights for a rollout: those of training where they lie, or gathered once where they are sharded."""

from collections.abc import Iterator
from contextlib import contextmanager

from parallel.model import Decoder


@contextmanager
def rollout_weights(*decoders: Decoder) -> Iterator[None]:
    """Whole weights for passes without gradient of which the replicas make different numbers: generation, evaluation.

    Under zero 0 to 2 this does nothing: the weights of training serve. Under zero 3 every unit is gathered once, into
    the tensors that the parameters view in training, too, and freed at the end. Weights must not change meanwhile.
    Communication: under zero 3 one all-gather over dp per unit, so that every replica must come here.
    """
    sharded = [decoder.shards for decoder in decoders if decoder.shards is not None]
    try:
        for shards in sharded:
            shards.gather()
        yield
    finally:
        for shards in sharded:
            shards.free()
