"""Tensor and pipeline parallelism against torch's own, in the same processes on the same weights and rows."""

import pytest

from tests.ranks import run_ranks
from tests.torch_peers import against_dtensor, against_pipelining, make_config


def compared(make, *args):
    our_step, their_step, compare = make(*args)
    losses = our_step(), their_step()
    return *losses, compare()


@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallelism_matches_dtensor(ranks):
    config = make_config(num_layers=2, hidden_size=128, vocab_size=131, seq_len=12)
    for ours, theirs, worst in run_ranks(ranks, compared, against_dtensor, config, 4):
        assert ours == pytest.approx(theirs, rel=1e-6) and worst < 5e-6


@pytest.mark.parametrize("ranks", [2, 4])
def test_pipeline_matches_torch_pipelining(ranks):
    config = make_config(num_layers=5, hidden_size=64, vocab_size=131, seq_len=12)
    for ours, theirs, worst in run_ranks(ranks, compared, against_pipelining, config, 8, 8):
        assert ours == pytest.approx(theirs, rel=1e-6) and worst < 5e-6
