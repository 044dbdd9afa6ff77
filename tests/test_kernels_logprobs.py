"""Kernels of kernels/linear_logprobs.py, interpreted, against float64 formulas."""

from unittest import mock

import pytest
import torch

from kernels import linear_logprobs as file
from kernels.linear_logprobs import KernelLinearLogprobs, LinearLogprobs, linear_logprobs
from tests.interpreter import Fence, check_slopes, measure_slopes, run_interpreted

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
GRADIENT_LIMITS = {F32: 2e-6, F16: 1e-3, BF16: 6e-3}  # norm of the error / norm of what is expected
FORWARD_LIMIT = 2e-6  # whatever the dtype: products of 16-bit numbers are exact in float32
NAMES = ("logprobs", "entropy", "hidden.grad", "weight.grad", "bias.grad")


# ---------------------------------------------------------------------------------------------------------------------
# Formulas and inputs
# ---------------------------------------------------------------------------------------------------------------------


def formulas(hidden, weight, token_ids, bias, temperature, num_valid):
    """Log-probability of each token and entropy, in float64 and differentiable."""
    logits = hidden @ weight[:num_valid].t()
    if bias is not None:
        logits = logits + bias[:num_valid]
    logprobs = (logits / temperature).log_softmax(1)
    return logprobs.gather(1, token_ids[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(1)


def merged(shards):
    """Log-probability and entropy from what shards know."""
    largest = torch.stack([m for m, _, _, _ in shards]).amax(0)
    scales = [(m - largest).exp() for m, _, _, _ in shards]
    sum_exp = sum(c * s for c, (_, s, _, _) in zip(scales, shards, strict=True))
    weighted = sum(c * (t + (m - largest) * s) for c, (m, s, _, t) in zip(scales, shards, strict=True))
    target = sum(z for _, _, z, _ in shards)
    return target - largest - sum_exp.log(), sum_exp.log() - weighted / sum_exp


def draw(num_rows, width, vocab, num_valid, dtype, with_bias):
    """hidden, weight, token_ids, bias; logits of about 2, the rows of padding NaN."""
    hidden, weight = torch.randn(num_rows, width), torch.randn(vocab, width) * 2 / width**0.5
    bias = torch.randn(vocab) if with_bias else None
    token_ids = torch.randint(num_valid, (num_rows,))
    token_ids[0] = num_valid - 1
    for x in (weight, bias):
        if x is not None:
            x[num_valid:] = torch.nan
    return hidden.to(dtype), weight.to(dtype), token_ids, bias if bias is None else bias.to(dtype)


def gradients(outputs, inputs, grads):
    """Of sum_i grads[0, i] logprobs_i + grads[1, i] entropy_i, by those inputs that are there."""
    loss = (outputs[0] * grads[0] + outputs[1] * grads[1]).sum()
    return torch.autograd.grad(loss, [x for x in inputs if x is not None])


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def check(actual, expected, dtype, what):
    for name, a, e in zip(NAMES, actual, expected, strict=False):
        limit = GRADIENT_LIMITS[dtype] if name.endswith("grad") else FORWARD_LIMIT
        assert error(a, e) <= limit, f"{what}, {name}: {error(a, e):.1e} > {limit:.1e}"
        if name == "logprobs":
            assert (a.double() - e).abs().max() < 1e-5, f"{what}: {(a.double() - e).abs().max():.1e}"


# ---------------------------------------------------------------------------------------------------------------------
# Interpreted
# ---------------------------------------------------------------------------------------------------------------------


def compare(num_rows, width, vocab, num_valid, dtype, with_bias, temperature):
    """Forward without gradient, forward and gradients in training, in fenced memory; bfloat16 also against torch."""
    inputs = draw(num_rows, width, vocab, num_valid, dtype, with_bias)
    grads = torch.randn(2, num_rows)
    hidden, weight, token_ids, bias = inputs
    wide = [None if x is None else x.double().requires_grad_() for x in (hidden, weight, bias)]
    expected = formulas(wide[0], wide[1], token_ids, wide[2], temperature, num_valid)
    expected = [*expected, *gradients(expected, wide, grads.double())]

    fence = Fence()
    fenced = [fence.around(x) for x in (hidden, weight, bias)]
    with fence.around_everything():
        found = linear_logprobs(fenced[0], fenced[1], token_ids, fenced[2], temperature, vocab_size=num_valid)
    check(merged([found]), expected, dtype, "without gradient")

    fenced = [x if x is None else x.requires_grad_() for x in fenced]
    with fence.around_everything():
        found = linear_logprobs(fenced[0], fenced[1], token_ids, fenced[2], temperature, vocab_size=num_valid)
        assert type(found[1].grad_fn).__name__ == KernelLinearLogprobs.__name__ + "Backward"
        outputs = merged([found])
        actual = [x.detach() for x in outputs] + list(gradients(outputs, fenced, grads))
    for a, x in zip(actual[2:], [x for x in fenced if x is not None], strict=True):
        assert a.dtype == x.dtype and a.shape == x.shape
    check(actual, [x.detach() for x in expected], dtype, "with gradient")

    if dtype == BF16:
        cut = [x if x is None else x.detach() for x in fenced]
        cut[1:] = [x if x is None else x[:num_valid] for x in cut[1:]]
        cut = [x if x is None else x.requires_grad_() for x in cut]
        found = LinearLogprobs.apply(cut[0], cut[1], token_ids, cut[2], temperature, 0, num_valid)
        outputs = merged([found])
        peers = [x.detach() for x in outputs] + list(gradients(outputs, cut, grads))
        for name, a, p, e in zip(NAMES, actual, peers, expected, strict=False):
            e = e.detach()[: len(p)]
            assert error(a[: len(p)], e) <= 1.5 * error(p, e), f"{name}: {error(a[: len(p)], e)}, torch {error(p, e)}"


CASES = {
    "less than a block": (3, 16, 40, 40, F32, False, 1.0),
    "one token, one feature": (1, 1, 3, 2, F32, True, 1.3),
    "odd sizes": (33, 81, 321, 317, F32, True, 0.7),
    "several blocks of rows": (140, 40, 130, 130, BF16, False, 1.0),
    "several slices": (9, 72, 4500, 4451, BF16, True, 1.0),
    "several blocks of a row": (4, 24, 9000, 8999, F16, False, 0.9),
    "float16": (20, 100, 333, 300, F16, True, 2.0),
    "gpt2's vocabulary": (3, 32, 50304, 50257, BF16, False, 1.0),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_match_float64(case):
    run_interpreted(compare, *CASES[case])


def chunks():
    """Gradients of several chunks, and those of a second backward, equal those of one that was kept."""
    hidden, weight, token_ids, bias = draw(23, 20, 150, 141, F32, True)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    grads, fence, results = torch.randn(2, 23), Fence(), []
    with torch.no_grad():
        expected = formulas(hidden.double(), weight.double(), token_ids, bias.double(), 0.8, 141)
    several = {"CHUNK_ROWS": 6, "SUM_ELEMENTS": 1300}
    tiles = {"CHUNK_ROWS": 7, "ROW_TILES": file.Tiles(4, 64, 4, 1)}
    for patch in ({"CHUNK_ROWS": 23}, several, tiles, {"WORKSPACE_BYTES": 4 * 192 * 5}):
        with mock.patch.multiple(file, **patch), fence.around_everything():
            found = linear_logprobs(hidden, weight, token_ids, bias, 0.8, vocab_size=141)
            outputs, node = merged([found]), found[1].grad_fn
            check([x.detach() for x in outputs], expected, F32, str(patch))
            assert (node.kept is None) == (patch != {"CHUNK_ROWS": 23})
            for _ in range(2):
                loss = (outputs[0] * grads[0] + outputs[1] * grads[1]).sum()
                results.append(torch.autograd.grad(loss, inputs, retain_graph=True))
    for result in results[1:]:
        for a, e in zip(result, results[0], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


def test_chunks_match_one_chunk():
    run_interpreted(chunks)


def blocks():
    """Groups of blocks of rows, the last one smaller, and slices of few blocks."""
    hidden, weight, token_ids, _ = draw(300, 20, 330, 325, BF16, False)
    fence = Fence()
    fenced = fence.around(hidden), fence.around(weight)
    expected = formulas(hidden.double(), weight.double(), token_ids, None, 1.0, 325)
    for patch in ({"GROUP_BLOCKS": 2, "SLICE_BLOCKS": 2}, {"GROUP_BLOCKS": 3, "SLICE_BLOCKS": 1}):
        with mock.patch.multiple(file, **patch), fence.around_everything():
            check(merged([linear_logprobs(*fenced, token_ids, vocab_size=325)]), expected, BF16, str(patch))


def test_blocks_cover_everything():
    run_interpreted(blocks)


def partial_gradients():
    """Of some inputs, from some outputs."""
    hidden, weight, token_ids, bias = draw(7, 12, 60, 60, F32, True)
    wide = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    logits = wide[0] @ wide[1].t() + wide[2]
    largest = logits.detach().amax(1)
    shifted = logits - largest[:, None]
    expected = (shifted.exp().sum(1), logits.gather(1, token_ids[:, None])[:, 0], (shifted.exp() * shifted).sum(1))
    for some in ((0,), (1,), (2,)):
        inputs = [x.clone().requires_grad_(i in some) for i, x in enumerate((hidden, weight, bias))]
        found = linear_logprobs(inputs[0], inputs[1], token_ids, inputs[2])
        assert not found[0].requires_grad
        torch.testing.assert_close(found[0].double(), largest, rtol=1e-6, atol=1e-6)
        for i, e in enumerate(expected):
            [actual] = torch.autograd.grad(found[i + 1].sum(), [inputs[some[0]]], retain_graph=True)
            [wanted] = torch.autograd.grad(e.sum(), [wide[some[0]]], retain_graph=True)
            assert error(actual, wanted) < 4e-6, (some, i, error(actual, wanted))


def test_each_gradient_matches_float64():
    run_interpreted(partial_gradients)


def shards():
    """Two shards, the second with padding, and one of padding alone; targets in each."""
    hidden, weight, token_ids, bias = draw(10, 24, 192, 120, F32, True)
    token_ids[:4] = torch.tensor([0, 63, 64, 119])
    expected = [x.detach() for x in formulas(hidden.double(), weight.double(), token_ids, bias.double(), 0.9, 120)]
    for grad in (False, True):
        hidden.requires_grad_(grad)
        found = []
        for i in (0, 64, 128):
            part = slice(i, i + 64)
            found.append(linear_logprobs(hidden, weight[part], token_ids, bias[part], 0.9, i, 120))
        check([x.detach() for x in merged(found)], expected, F32, f"grad {grad}")
        assert ((found[0][2] == 0) == (token_ids >= 64)).all()
        assert ((found[1][2] == 0) == (token_ids < 64)).all()
        largest, *others = found[2]
        assert (largest == torch.finfo(F32).min).all() and not any(x.any() for x in others)


def test_shards_merge_to_the_whole():
    run_interpreted(shards)


def extremes():
    """All logits -1e4, all 1e4, and one of 1e4 among -1e4: no overflow, nothing lost; gradients are finite."""
    hidden = torch.tensor([[-1e4, 0.0], [1e4, 0.0], [0.0, 1e4]])
    weight = torch.ones(90, 2)
    weight[:, 1] = -1
    weight[77, 1] = 1
    token_ids, log = torch.tensor([3, 89, 77]), torch.tensor(90.0).log().item()
    expected = torch.tensor([[-log, -log, 0], [log, log, 0]])
    for dtype in (F32, BF16):
        for grad in (False, True):
            inputs = [x.to(dtype, copy=True).requires_grad_(grad) for x in (hidden, weight)]
            outputs = torch.stack(merged([linear_logprobs(*inputs, token_ids)]))
            torch.testing.assert_close(outputs.detach(), expected, rtol=0, atol=1e-5)
        for x in torch.autograd.grad(outputs.sum(), inputs):
            assert x.isfinite().all()


def test_kernels_survive_extreme_logits():
    run_interpreted(extremes)


def rows_alone():
    """Without gradient in 16 bits a row's result is the same to the bit in another batch, at another place, and a
    second time; in float32 it is that of training."""
    hidden, weight, token_ids, _ = draw(150, 40, 2200, 2200, BF16, False)
    whole = torch.stack(linear_logprobs(hidden, weight, token_ids))
    order = torch.randperm(150)
    for some in (torch.arange(150), order, order[:9], torch.tensor([140])):
        again = torch.stack(linear_logprobs(hidden[some], weight, token_ids[some]))
        assert torch.equal(again, whole[:, some]), len(some)
    hidden, weight = hidden.float().requires_grad_(), weight.float()
    trained = torch.stack(linear_logprobs(hidden, weight, token_ids))
    assert trained.requires_grad
    assert torch.equal(torch.stack(linear_logprobs(hidden.detach(), weight, token_ids)), trained)


def test_a_row_does_not_depend_on_others():
    run_interpreted(rows_alone)


def layouts():
    """Inputs that are parts of larger tensors, transposed, or with int32 ids; no rows at all."""
    hidden, weight, token_ids, bias = draw(8, 24, 70, 70, F32, True)
    expected = linear_logprobs(hidden, weight, token_ids, bias)
    spread = torch.full((8, 50), torch.nan)
    spread[:, 13:37] = hidden
    ids = torch.stack((token_ids, token_ids), 1)[:, 0]
    for some in (
        (spread[:, 13:37], weight, ids, bias),
        (hidden.t().contiguous().t(), weight.t().contiguous().t(), token_ids.int(), bias.repeat_interleave(2)[::2]),
    ):
        for a, e in zip(linear_logprobs(*some), expected, strict=True):
            assert torch.equal(a, e)
    hidden = torch.zeros(0, 24, requires_grad=True)
    outputs = linear_logprobs(hidden, weight, token_ids[:0], bias)
    assert [x.shape for x in outputs] == [(0,)] * 4
    outputs[1].sum().backward()
    with pytest.raises(ValueError, match="not float64"):
        linear_logprobs(hidden.double(), weight.double(), token_ids[:0])


def test_kernels_take_any_layout():
    run_interpreted(layouts)


def too_large():
    hidden, weight, token_ids = torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.long)
    size = (1 << 30) + 1
    with pytest.raises(ValueError, match="1073741825.*KERNELS=reference"):
        linear_logprobs(hidden.expand(size, 2), weight, token_ids.expand(size))
    with pytest.raises(ValueError, match="1073741825.*KERNELS=reference"):
        linear_logprobs(hidden, weight[:1].expand(size, 2), token_ids)


def test_kernels_reject_what_int32_does_not_count():
    run_interpreted(too_large)


def differences():
    """Slopes in a random direction of hidden, weight and bias: of autograd, and of differences over three widths."""
    inputs = draw(6, 12, 70, 61, F32, True)
    inputs, token_ids = [inputs[0], inputs[1], inputs[3]], inputs[2]
    inputs[1:] = [x[:61] for x in inputs[1:]]

    def loss(hidden, weight, bias):
        logprobs, entropy = merged([linear_logprobs(hidden, weight, token_ids, bias, 0.8)])
        return (logprobs.double() + 0.5 * entropy.double()).sum()

    leaves = [x.requires_grad_() for x in inputs]
    return measure_slopes(loss, inputs, torch.autograd.grad(loss(*leaves), leaves), (0.04, 0.02, 0.01))


def test_gradients_are_the_slopes_of_the_forward():
    check_slopes(run_interpreted(differences))


def twice(fn):
    hidden = torch.randn(5, 4, requires_grad=True)
    logprobs, _ = merged([fn(hidden, torch.randn(9, 4), torch.arange(5))])
    with pytest.raises(ValueError, match="no second derivative"):
        torch.autograd.grad(logprobs.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("run", [run_interpreted, lambda fn, *args: fn(*args)], ids=["kernels", "reference"])
def test_a_gradient_of_a_gradient_is_refused(run):
    run(twice, linear_logprobs)


HIDDEN, WEIGHT, IDS, BIAS = torch.zeros(4, 6), torch.zeros(9, 6), torch.zeros(4, dtype=torch.long), torch.zeros(9)


@pytest.mark.parametrize(
    "args, text",
    [
        ((HIDDEN[:3], WEIGHT, IDS), r"\[3, 6\].*do not fit"),
        ((HIDDEN, WEIGHT[:, :5], IDS), r"\[9, 5\].*do not fit"),
        ((HIDDEN, WEIGHT, IDS, BIAS[1:]), r"\[8\].*do not fit"),
        ((HIDDEN[None], WEIGHT, IDS), r"\[1, 4, 6\].*do not fit"),
        ((HIDDEN.bfloat16(), WEIGHT, IDS), "torch.bfloat16.*should be the same"),
        ((HIDDEN.long(), WEIGHT.long(), IDS), "torch.int64.*one of bfloat16"),
        ((HIDDEN, WEIGHT, IDS.float()), "torch.float32.*int64 or int32"),
        ((HIDDEN, WEIGHT.to("meta"), IDS), "several devices.*meta"),
        ((HIDDEN, WEIGHT, IDS, BIAS, 0.0), "temperature 0.0"),
    ],
)
def test_linear_logprobs_rejects_misfits(args, text):
    with pytest.raises(ValueError, match=text):
        linear_logprobs(*args)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_workspace_is_bounded(dtype):
    for stride in (64, 50304, 131072, 256000, 1 << 20):
        rows = file.chunk_rows(stride, dtype)
        assert 128 <= rows <= 4096
        assert rows * stride * (4 if dtype == F32 else 6) <= 1 << 30
