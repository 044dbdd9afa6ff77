"""What sft.py computes: packing, micro-batches and the evaluation loss, against plain loops."""

from functools import partial

import pytest
import torch

import sft
from parallel.data import Example
from parallel.data_parallel import data_parallel
from parallel.mesh import Layout, init_mesh
from parallel.model import Decoder
from parallel.pipeline import forward_backward
from tests.test_generation import CONFIG


def make_examples():
    generator = torch.Generator().manual_seed(0)
    examples = []
    for n in (2, 9, 5, 17, 3, 30, 4, 8):
        ids = torch.randint(0, CONFIG.vocab_size, (n,), generator=generator).tolist()
        mask = [False] + (torch.rand(n - 1, generator=generator) < 0.7).tolist()
        mask[-1] = True
        examples.append(Example(ids, mask))
    return examples


def plain_loss(decoder, examples):
    """Sum of nats over the loss tokens of all examples, one example at a time, and their number."""
    nats, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.input_ids])
        hidden = decoder(ids, torch.arange(ids.shape[1])[None], torch.zeros_like(ids))[0]
        log_probs = (hidden @ decoder.lm_head_weight.t())[:, : CONFIG.vocab_size].log_softmax(1)
        for t in range(1, ids.shape[1]):
            if example.loss_mask[t]:
                nats, count = nats - log_probs[t - 1, ids[0, t]], count + 1
    return nats, count


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("microbatch_size", [1, 3, 8])
def test_loss_and_gradients_match_one_example_at_a_time(packing, microbatch_size):
    """Packed documents do not see each other, padding does nothing, and micro-batches do not change the mean."""
    mesh, examples = init_mesh(), make_examples()
    decoder = Decoder(CONFIG, mesh, torch.float64, seed=3)
    nats, count = plain_loss(decoder, examples)
    expected = torch.autograd.grad(nats / count, list(decoder.parameters()))
    model = data_parallel({"policy": decoder}, mesh, Layout())
    args = sft.Args(packing=packing, microbatch_size=microbatch_size)
    loss_fn = partial(sft.sft_loss, policy=decoder, num_tokens=count)
    model.zero_grad()
    metrics = forward_backward(model, list(sft.make_microbatches(examples, args, mesh.device)), loss_fn)
    assert metrics["loss"] == pytest.approx((nats / count).item(), rel=1e-12)
    for (name, parameter), gradient in zip(decoder.named_parameters(), expected, strict=True):
        error = (parameter.grad - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-12, (name, error)
    assert sft.evaluate(decoder, examples, args, mesh)["eval_loss"] == pytest.approx((nats / count).item(), rel=1e-12)


def test_packing_wastes_little():
    """Short demonstrations share rows: 40 of 8 tokens fill ten rows of 32."""
    examples = [Example([1] * 8, [False] + [True] * 7)] * 40
    [microbatch] = sft.make_microbatches(examples, sft.Args(), torch.device("cpu"))
    assert microbatch["input_ids"].shape == (10, 32)
