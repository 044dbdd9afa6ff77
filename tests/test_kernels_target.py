"""Logits of single ids, by reference and by kernel (interpreted), against a float64 product with the vocabulary."""

import math

import pytest
import torch

from kernels import target_logits as file
from kernels.launch import triton
from kernels.target_logits import target_logits
from tests.interpreter import Fence, run_interpreted

LIMITS = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}  # error / norm
SHARD = slice(20, 50)  # of a vocabulary of 70


def draw(num_rows, width, dtype):
    hidden, weight, bias = torch.randn(num_rows, width), torch.randn(70, width), torch.randn(70)
    token_ids = torch.randint(70, (num_rows,))
    edges = torch.tensor([20, 49, 19, 50, 69])
    token_ids[: len(edges)] = edges[:num_rows]
    return hidden.to(dtype), weight.to(dtype), token_ids, bias.to(dtype)


def compare(num_rows, width, dtype):
    """A shard's logits; rows of its weight that no id names, and what lies around rows, are NaN."""
    hidden, weight, token_ids, bias = draw(num_rows, width, dtype)
    expected = (hidden.double() @ weight.double().T + bias.double())[torch.arange(num_rows), token_ids]
    expected[(token_ids < SHARD.start) | (token_ids >= SHARD.stop)] = 0
    unnamed = torch.ones(70, dtype=torch.bool).index_fill_(0, token_ids, False)
    weight[unnamed], bias[unnamed] = math.nan, math.nan
    wide_hidden, wide_weight = (torch.full((len(x), width + 3), math.nan, dtype=dtype) for x in (hidden, weight))
    wide_hidden[:, :width], wide_weight[:, :width] = hidden, weight
    fence = Fence()
    wide_hidden, shard, bias = fence.around(wide_hidden), fence.around(wide_weight[SHARD]), fence.around(bias[SHARD])
    args = wide_hidden[:, :width], shard[:, :width], fence.around(token_ids), bias, SHARD.start
    with fence.around_everything():
        found = target_logits(*args)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (found[expected == 0] == 0).all()
    assert (found.double() - expected).norm() <= LIMITS[dtype] * expected.norm().clamp(min=1)
    assert torch.equal(found, target_logits(*args))
    if num_rows > 2:  # a row does not depend on the others, nor an id's type or a layout on anything
        last = target_logits(hidden[-2:].T.contiguous().T, args[1], token_ids[-2:].int(), *args[3:])
        close = {"rtol": 0, "atol": 0} if file.runs_triton(hidden) and dtype != torch.float64 else {}
        torch.testing.assert_close(last, found[-2:], **close)


SHAPES = [(0, 8), (1, 1), (7, 512), (9, 513), (17, 1000)]


@pytest.mark.parametrize("num_rows, width", SHAPES)
@pytest.mark.parametrize("dtype", LIMITS)
def test_reference_matches_float64(num_rows, width, dtype):
    torch.manual_seed(0)
    compare(num_rows, width, dtype)


def compare_all():
    for num_rows, width in SHAPES:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            compare(num_rows, width, dtype)


@pytest.mark.skipif(triton is None, reason="needs the package triton")
def test_kernel_matches_float64():
    run_interpreted(compare_all)


def test_no_gradient_flows():
    hidden, weight, token_ids, bias = draw(5, 4, torch.float32)
    assert not target_logits(hidden.requires_grad_(), weight.requires_grad_(), token_ids, bias).requires_grad


HIDDEN, WEIGHT, IDS, BIAS = torch.zeros(4, 6), torch.zeros(9, 6), torch.zeros(4, dtype=torch.long), torch.zeros(9)


@pytest.mark.parametrize(
    "args, text",
    [
        ((HIDDEN[:3], WEIGHT, IDS, BIAS), r"\[3, 6\].*should be hidden"),
        ((HIDDEN, WEIGHT[:, :5], IDS, BIAS), r"\[9, 5\].*should be hidden"),
        ((HIDDEN, WEIGHT, IDS, BIAS[1:]), r"\[8\].*should be hidden"),
        ((HIDDEN.half(), WEIGHT, IDS, BIAS), "float16.*should be the same"),
        ((HIDDEN.long(), WEIGHT.long(), IDS, BIAS.long()), "int64.*one of bfloat16"),
        ((HIDDEN, WEIGHT, IDS.float(), BIAS), "token_ids are torch.float32"),
        ((HIDDEN, WEIGHT, IDS, BIAS.to("meta")), "tensors on cpu, cpu, meta"),
    ],
)
def test_misfits_are_rejected(args, text):
    with pytest.raises(ValueError, match=text):
        target_logits(*args)
