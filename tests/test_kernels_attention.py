"""Flash attention in Triton's interpreter against float64 formulas, and compiled ahead of time."""

from unittest import mock

import pytest
import torch

from kernels import attention as attention_file
from kernels.attention import PIECES, TILES, Visible, attention, tiles_of
from kernels.launch import Tiles
from tests.interpreter import run_interpreted
from tests.test_kernels import plain_gradients

FORWARD = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # |a - b| / |b|
GRADIENTS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
GUARD = 64  # entries around every input


def guarded(x):
    """The same numbers between NaNs."""
    whole = torch.full((x.numel() + 2 * GUARD,), torch.nan, dtype=x.dtype)
    inner = whole[GUARD : GUARD + x.numel()].view(x.shape)
    inner.copy_(x)
    return inner


def error(a, b, scale=1.0):
    """Relative to b; to a scale where b is 0 but for rounding, as gradients of queries that see one key."""
    norm = b.norm() if b.norm() > 1e-12 else scale
    return ((a.double() - b).norm() / norm).item()


def documents(batch, seq_len, lens):
    """first_key of rows that are cut into documents of these lengths, another way round in every second row."""
    first_key = torch.zeros(batch, seq_len, dtype=torch.long)
    for row in range(batch):
        start = 0
        for length in lens if row % 2 == 0 else lens[::-1]:
            first_key[row, start : start + length] = start
            start += length
        first_key[row, start:] = start
    return first_key


def inputs_of(shape, kv_heads, dtype, packed):
    """q, k, v: of one tensor, as layers give them, or each between NaNs; and a gradient."""
    batch, seq_len, heads, head_dim = shape
    x = torch.randn(batch, seq_len, heads + 2 * kv_heads, head_dim).to(dtype)
    parts = guarded(x).split((heads, kv_heads, kv_heads), 2) if packed else x.split((heads, kv_heads, kv_heads), 2)
    parts = [part if packed else guarded(part) for part in parts]
    return [part.detach().requires_grad_() for part in parts], torch.randn(shape).to(dtype)


def run_case(shape, kv_heads, dtype, lens, window, tiles, packed=True):
    """Errors of output and gradients; those of torch's own in this dtype; whether a second run gives the same bits."""
    first_key = documents(shape[0], shape[1], lens)
    inputs, grad = inputs_of(shape, kv_heads, dtype, packed)
    expected = plain_gradients([x.detach().double().requires_grad_() for x in inputs], first_key, window, grad.double())
    runs = []
    with mock.patch.object(attention_file, "tiles_of", lambda *_: tiles):
        for _ in range(2):
            for x in inputs:
                x.grad = None
            out = attention(*inputs, Visible(first_key, window))
            out.backward(grad)
            runs.append([out.detach(), *(x.grad for x in inputs)])
    with mock.patch.dict("os.environ", {"KERNELS": "reference"}):
        plain = [x.detach().clone().requires_grad_() for x in inputs]
        out = attention(*plain, Visible(first_key, window))
        out.backward(grad)
        theirs = [out.detach(), *(x.grad for x in plain)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    return [[error(a, b, grad.norm()) for a, b in zip(found, expected, strict=True)] for found in (runs[0], theirs)]


def three(rows, columns):
    return (Tiles(rows, columns, 4, 1),) * 3


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CASES = {  # shape, key/value heads, type, documents, window, tiles
    "one token": ((1, 1, 1, 32), 1, F32, [1], None, three(16, 16)),
    "two tokens, two documents": ((2, 2, 2, 32), 1, F32, [1, 1], None, three(16, 16)),
    "one less than a block": ((1, 31, 2, 32), 2, F32, [31], None, three(16, 32)),
    "a block": ((1, 32, 2, 64), 1, F32, [32], None, three(16, 32)),
    "one more than a block": ((1, 33, 2, 64), 2, F32, [33], None, three(32, 16)),
    "documents": ((2, 67, 4, 32), 2, F32, [1, 13, 30, 23], None, three(16, 16)),
    "documents and padding": ((2, 67, 4, 32), 1, F32, [29, 17, 2], None, three(32, 16)),
    "more keys than queries": ((2, 67, 2, 32), 2, F32, [40, 27], None, three(16, 32)),
    "window": ((2, 61, 2, 32), 1, F32, [61], 7, three(16, 16)),
    "window and documents": ((2, 61, 2, 32), 2, F32, [20, 41], 23, three(32, 16)),
    "window of a token": ((1, 35, 1, 32), 1, F32, [35], 1, three(16, 16)),
    "eight heads on one": ((1, 37, 8, 32), 1, F32, [30, 7], None, three(16, 32)),
    "80": ((1, 50, 2, 80), 1, F32, [33, 17], None, three(16, 16)),
    "96": ((1, 50, 2, 96), 2, F32, [33, 17], None, three(32, 16)),
    "128": ((1, 40, 2, 128), 1, F32, [40], None, three(16, 32)),
    "256": ((1, 40, 1, 256), 1, F32, [13, 27], None, three(16, 16)),
    "bfloat16": ((2, 67, 4, 64), 2, BF16, [40, 27], None, three(32, 32)),
    "bfloat16, 96": ((1, 67, 2, 96), 1, BF16, [67], 30, three(32, 16)),
    "bfloat16, 80": ((1, 50, 2, 80), 2, BF16, [9, 41], None, three(16, 32)),
    "float16": ((2, 50, 2, 64), 1, F16, [20, 30], None, three(16, 16)),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_match_float64(name):
    dtype = CASES[name][2]
    ours, theirs = run_interpreted(run_case, *CASES[name], name != "documents")
    for what, mine, other in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True):
        limit = (FORWARD if what == "out" else GRADIENTS)[dtype]
        assert mine <= limit, (what, mine)
        if dtype == BF16:
            assert mine <= 1.5 * other + 1e-4, (what, mine, other)


def run_extreme(scale):
    """Scores so large that only the largest counts; so negative a common part that exponentials alone would vanish."""
    shape, first_key = (1, 40, 1, 32), torch.zeros(1, 40, dtype=torch.long)
    q, k, v = (torch.randn(shape) for _ in range(3))
    q[..., 0], k[..., 0] = scale, 100.0
    with mock.patch.object(attention_file, "tiles_of", lambda *_: three(16, 16)):
        out = attention(q, k, v, Visible(first_key))
    expected = plain_gradients([x.double().requires_grad_() for x in (q, k, v)], first_key, None, torch.ones(shape))[0]
    return error(out, expected)


@pytest.mark.parametrize("scale", [1000.0, -1000.0])
def test_extreme_scores(scale):
    assert run_interpreted(run_extreme, scale) < 2e-2  # scores of 2e4 in float32 differ by 2e-3 from their own rounding


def run_unseen(_):
    """NaN in what comes later in the row, in what another document holds, and in a row of another sequence."""
    first_key = documents(2, 48, [20, 28])
    [q, k, v], grad = inputs_of((2, 48, 2, 32), 1, F32, True)
    results = []
    for poison in (False, True):
        with torch.no_grad():
            if poison:
                k[1], v[1], q[1] = torch.nan, torch.nan, torch.nan
                k[0, 20:], v[0, 20:] = torch.nan, torch.nan
                q[0, 20:] = torch.nan
        inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        with mock.patch.object(attention_file, "tiles_of", lambda *_: three(16, 16)):
            out = attention(*inputs, Visible(first_key))
            out[0, :16].backward(grad[0, :16])  # of the blocks that hold nothing but the first document
        results.append([out.detach()[0, :16], *(x.grad[0, :16] for x in inputs)])
    return [torch.equal(a, b) for a, b in zip(*results, strict=True)]


def test_what_nobody_sees_does_not_leak():
    same_out, *_ = run_interpreted(run_unseen, None)
    assert same_out


def run_alone(_):
    """A row's output and gradients alone in a batch and among others."""
    first_key = documents(3, 45, [17, 28])
    inputs, grad = inputs_of((3, 45, 2, 64), 1, BF16, True)
    results = []
    for rows in (slice(0, 3), slice(1, 2)):
        some = [x.detach()[rows].clone().requires_grad_() for x in inputs]
        with mock.patch.object(attention_file, "tiles_of", lambda *_: three(32, 16)):
            out = attention(*some, Visible(first_key[rows]))
            out.backward(grad[rows])
        row = 1 if rows.start == 0 else 0
        results.append([out.detach()[row], *(x.grad[row] for x in some)])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_row_does_not_depend_on_the_batch():
    assert run_interpreted(run_alone, None)


def refused(kind):
    x = torch.zeros(1, 4, 2, 48 if kind == "head dim" else 32)
    y = x.half() if kind == "types" else x
    y = y[:, :, :1].expand(1, 4, 3, 32) if kind == "heads" else y
    try:
        attention(x, y, y, Visible(torch.zeros(1, 4, dtype=torch.long)))
    except ValueError as problem:
        return str(problem)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("head dim", "kernels of attention take head dims 32, 64, 80, 96, 128, 256, not 48"),
        ("types", "bfloat16, float16 or float32, not torch.float32, torch.float16"),
        ("heads", "do not fit"),
    ],
)
def test_what_kernels_do_not_do_is_refused(kind, text):
    assert text in run_interpreted(refused, kind)


def test_every_head_dim_has_tiles():
    for arch in (80, 90):
        for head_dim in PIECES:
            assert len(tiles_of(head_dim, 2, arch)) == 3 and (arch, head_dim) in TILES
            assert all(x.rows >= 16 and x.columns >= 16 for x in tiles_of(head_dim, 4, arch))
