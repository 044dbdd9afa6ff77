"""Models with kernels, in the interpreter, against the same models with references: gradients, losses and samples."""

import os
from unittest import mock

import pytest
import torch

from kernels import attention as attention_file
from kernels.launch import Tiles
from parallel.data_parallel import data_parallel
from parallel.families import config_from_hf
from parallel.generation import Sampling, generate
from parallel.mesh import Layout, init_mesh
from parallel.model import Decoder
from parallel.pipeline import forward_backward
from parallel.tensor import hidden_before, vocab_parallel_logprobs
from ppo import MAX_MISMATCH
from tests.interpreter import run_interpreted
from tests.test_layouts import CASES

SMALL = {
    "gpt_neox": {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64},
    "qwen3": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
}
TILES = (Tiles(16, 16, 4, 1),) * 3


def make_policy(case):
    config = config_from_hf({**CASES[case], **SMALL[case], "num_hidden_layers": 2, "vocab_size": 131}, "test")[0]
    return Decoder(config, init_mesh(), seed=4)


def step(case, implementation, packed):
    """Metrics and gradients of a step over log-probabilities and entropies."""
    with (
        mock.patch.dict(os.environ, {"KERNELS": implementation}),
        mock.patch.object(attention_file, "tiles_of", lambda *_: TILES),
    ):
        policy = make_policy(case)
        model = data_parallel({"policy": policy}, policy.mesh, Layout())
        ids = torch.randint(131, (2, 23), generator=torch.Generator().manual_seed(1))
        first_key = torch.zeros_like(ids)
        if packed:
            first_key[0, 9:], first_key[1, 5:] = 9, 5
        positions = torch.arange(23) - first_key
        mask = positions > 0

        def loss_fn(hidden, microbatch):
            states = hidden_before(hidden["policy"], mask)
            logprobs, entropy = vocab_parallel_logprobs(states, policy, ids[mask], 0.9)
            return -(logprobs + 0.1 * entropy).sum() / mask.sum(), {"entropy": entropy.detach().mean()}

        model.zero_grad()
        microbatch = {"input_ids": ids, "position_ids": positions, "first_key": first_key}
        metrics = forward_backward(model, [microbatch], loss_fn)
        return metrics, {unit.name: unit.flat_grad.clone() for unit in model.units}


def compare_steps(case, packed):
    metrics, gradients = step(case, "triton", packed)
    expected_metrics, expected = step(case, "reference", packed)
    differences = [((gradients[name] - x).abs().max() / x.abs().max()).item() for name, x in expected.items()]
    return metrics, expected_metrics, max(differences)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("case", SMALL)
def test_a_step_with_kernels_is_that_with_references(case, packed):
    metrics, expected, difference = run_interpreted(compare_steps, case, packed)
    assert difference <= 5e-6
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6)


def samples(case, implementation):
    with (
        mock.patch.dict(os.environ, {"KERNELS": implementation}),
        mock.patch.object(attention_file, "tiles_of", lambda *_: TILES),
    ):
        prompts = [[3, 4, 5], [7], list(range(20, 30))]
        given = dict(eos_ids=[5], sample_ids=[0, 1, 2], seed=3, num_ids=131)
        policy = make_policy(case)
        out = generate(policy, prompts, Sampling(0.8, max_new_tokens=6), **given)
        positions, mask = torch.arange(out.input_ids.shape[1]).expand_as(out.input_ids), out.response_mask
        states = hidden_before(policy(out.input_ids, positions, torch.zeros_like(positions)), mask)
        trained, _ = vocab_parallel_logprobs(states, policy, out.input_ids[mask], 0.8)
        return out.response_ids(), out.logprobs, (out.logprobs[mask] - trained).abs().max().item()


def compare_samples(case):
    (ids, logprobs, mismatch), (expected_ids, expected, _) = samples(case, "triton"), samples(case, "reference")
    return ids, expected_ids, (logprobs - expected).abs().max().item(), mismatch


@pytest.mark.parametrize("case", SMALL)
def test_samples_with_kernels_are_those_with_references(case):
    ids, expected_ids, difference, mismatch = run_interpreted(compare_samples, case)
    assert ids == expected_ids and difference <= 1e-5
    assert mismatch <= MAX_MISMATCH / 10  # between the kernels of generation and those of training
