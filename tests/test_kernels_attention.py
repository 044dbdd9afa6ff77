"""Flash attention in Triton's interpreter against float64 formulas, and compiled ahead of time."""

from unittest import mock

import pytest
import torch

from kernels import attention as attention_file
from kernels.attention import TILES, Visible, attention, tiles_of
from kernels.launch import PIECES, Tiles
from tests.interpreter import Fence, check_slopes, measure_slopes, run_interpreted
from tests.test_kernels import plain_gradients

FORWARD = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # |a - b| / |b|
GRADIENTS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


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


def inputs_of(shape, kv_heads, dtype, packed, fence=None):
    """q, k, v: of one tensor, as layers give them, or each by itself; and a gradient; all in fenced memory."""
    fence, (batch, seq_len, heads, head_dim) = fence or Fence(), shape
    x = torch.randn(batch, seq_len, heads + 2 * kv_heads, head_dim).to(dtype)
    parts = (fence.around(x) if packed else x).split((heads, kv_heads, kv_heads), 2)
    parts = [part if packed else fence.around(part) for part in parts]
    return [part.detach().requires_grad_() for part in parts], fence.around(torch.randn(shape).to(dtype))


def run_case(shape, kv_heads, dtype, lens, window, tiles, packed=True):
    """Errors of output and gradients, and those of torch's own in this dtype; a second run gives the same bits, nothing
    is read or written beside any tensor, and every entry of the results is written."""
    first_key, fence = documents(shape[0], shape[1], lens), Fence()
    inputs, grad = inputs_of(shape, kv_heads, dtype, packed, fence)
    expected = plain_gradients([x.detach().double().requires_grad_() for x in inputs], first_key, window, grad.double())
    runs = []
    visible = Visible(first_key, window)
    visible.bounds = tuple(fence.around(x) for x in visible.bounds)
    with mock.patch.object(attention_file, "tiles_of", lambda *_: tiles), fence.around_everything():
        for _ in range(2):
            out = attention(*inputs, visible)
            runs.append([out.detach(), *torch.autograd.grad(out, inputs, grad)])
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
    "12": ((2, 37, 3, 12), 1, F32, [9, 28], None, three(16, 16)),
    "72": ((1, 40, 2, 72), 1, F32, [33, 7], 20, three(16, 16)),
    "bfloat16, 33": ((1, 50, 2, 33), 2, BF16, [9, 41], None, three(16, 32)),
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


def run_small(inputs, grad, first_key, tiles):
    """Output and gradients."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    with mock.patch.object(attention_file, "tiles_of", lambda *_: tiles):
        out = attention(*inputs, Visible(first_key))
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def run_unseen():
    """NaN in another document and in a row of another sequence: blocks that hold nothing of them do not see it."""
    first_key = documents(2, 48, [32, 16])
    inputs, grad = inputs_of((2, 48, 2, 32), 1, F32, True)
    expected = run_small(inputs, grad, first_key, three(16, 16))
    with torch.no_grad():
        for x in (*inputs, grad):
            x[1], x[0, 32:] = torch.nan, torch.nan
    found = run_small(inputs, grad, first_key, three(16, 16))
    return [torch.equal(a[0, :32], b[0, :32]) for a, b in zip(found, expected, strict=True)]


def test_what_nobody_sees_does_not_leak():
    assert run_interpreted(run_unseen) == [True] * 4


def run_permuted(dtype):
    """Documents of whole blocks of 32 in another order within their row: whether all of them keep all of their bits."""
    lens, order = [32, 96, 64], [1, 2, 0]
    [q, k, v], grad = inputs_of((1, 192, 2, 32), 1, dtype, True)
    starts = [0, 32, 128]
    moved = torch.cat([torch.arange(starts[i], starts[i] + lens[i]) for i in order])
    results = run_small((q, k, v), grad, documents(1, 192, lens), three(32, 16))
    others = run_small(
        [x[:, moved] for x in (q, k, v)], grad[:, moved], documents(1, 192, [lens[i] for i in order]), three(32, 16)
    )
    return all(torch.equal(a[:, moved], b) for a, b in zip(results, others, strict=True))


def test_a_document_does_not_depend_on_its_place_among_blocks():
    assert run_interpreted(run_permuted, F32) and run_interpreted(run_permuted, BF16)


def run_differences():
    """Slopes in a random direction of q, k and v: of autograd, and of differences over three widths."""
    inputs, grad = inputs_of((1, 37, 2, 32), 1, F32, True)
    first_key = documents(1, 37, [15, 22])
    _, *gradients = run_small(inputs, grad, first_key, three(16, 16))

    def loss(*moved):
        with mock.patch.object(attention_file, "tiles_of", lambda *_: three(16, 16)):
            return (attention(*moved, Visible(first_key)).double() * grad).sum()

    return measure_slopes(loss, inputs, gradients, (0.08, 0.04, 0.02))


def test_gradients_are_the_slopes_of_the_forward():
    check_slopes(run_interpreted(run_differences))


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


def run_twice():
    x = torch.randn(1, 5, 1, 32, requires_grad=True)
    out = attention(x, x, x, Visible(torch.zeros(1, 5, dtype=torch.long)))
    [grad] = torch.autograd.grad(out.sum(), x, create_graph=True)
    (grad * x).sum().backward()


def test_a_gradient_of_a_gradient_is_refused():
    """Not silently without the part of it that goes through the kernels."""
    with pytest.raises(pytest.fail.Exception, match="no second derivative"):
        run_interpreted(run_twice)


def refused(text, q, k=None, first_key=None, window=None):
    k = q if k is None else k
    first_key = torch.zeros(q.shape[:2], dtype=torch.long, device=q.device) if first_key is None else first_key
    with pytest.raises(ValueError, match=text):
        attention(q, k, k, Visible(first_key, window))


def strided(shape, stride):
    """A view of memory that is not there: nothing may be read."""
    return torch.empty_strided(shape, stride, device="meta", dtype=BF16)


def refuse_by_kernels():
    refused(r"heads of 264: kernels take at most 256 \(without padding 32, 64, 80", torch.zeros(1, 4, 2, 264))
    refused("not float64", torch.zeros(1, 4, 2, 32, dtype=torch.float64))
    refused(r"row of q spans 2,147,483,648 numbers", strided((1, 16, 2, 32), (0, 1 << 27, 32, 1)))
    refused(r"row of q spans 4,294,967,296 numbers", strided((1, 1 << 20, 32, 128), (0, 128, 1 << 27, 1)))
    k = strided((1, 16, 1, 32), (0, 1 << 28, 32, 1))
    refused(r"row of k spans 4,294,967,296 numbers", strided((1, 16, 2, 32), (0, 64, 32, 1)), k)
    refused(r"row of the output spans 2,147,483,648", strided((1, 1 << 20, 64, 32), (0, 32, 0, 1)))
    refused("65,536 rows: attention kernels take 65,535", strided((1 << 16, 1, 1, 32), (32, 32, 32, 1)))


def test_what_kernels_do_not_do_is_refused():
    run_interpreted(refuse_by_kernels)


def refuse():
    x, rows = torch.zeros(2, 4, 2, 32), torch.zeros(2, 4, dtype=torch.long)
    refused(r"k \[2, 4, 3, 32\].*do not fit", x, x[:, :, :1].expand(2, 4, 3, 32))
    refused(r"k \[2, 4, 2, 16\].*do not fit", x, x[..., :16])
    refused(r"k \[2, 4, 0, 32\].*do not fit", x, x[:, :, :0])
    refused(r"first_key \[1, 4\] do not fit", x, None, rows[:1])
    refused(r"first_key \[2, 3\] do not fit", x, None, rows[:, :3])
    refused(r"q \[4, 2, 32\].*do not fit", x[0], None, rows[0])
    refused("torch.float32, torch.float16.*one of bfloat16", x, x.half())
    refused("torch.int32.*one of bfloat16", x.int())
    refused("first_key is torch.float32", x, None, rows.float())
    refused("cpu, meta, meta and cpu: one device", x, x.to("meta"))
    refused("a window of 0 keys", x, None, rows, 0)


@pytest.mark.parametrize("run", [run_interpreted, lambda fn: fn()], ids=["kernels", "reference"])
def test_misfits_are_refused(run):
    run(refuse)


def test_every_head_dim_has_tiles():
    for arch in (80, 90):
        for head_dim in PIECES:
            assert len(tiles_of(head_dim, 2, arch)) == 3 and (arch, head_dim) in TILES
            assert all(x.rows >= 16 and x.columns >= 16 for x in tiles_of(head_dim, 4, arch))
