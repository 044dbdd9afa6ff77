"""Kernels of generation: one new token per sequence, and the sampler. In Triton's interpreter against float64 formulas;
compiled ahead of time for sm_80 and sm_90, with the tiles that they run with there.

What compiles is compared with tests/results/compiled_decode.json, by Triton's version.
`python -m tests.test_kernels_decode [FOLDER]` writes that file anew, with the Triton of FOLDER, too.
"""

import math

import pytest
import torch

from kernels import decode
from kernels.decode import Step, append, decode_attention
from kernels.launch import triton
from tests.interpreter import run_interpreted

needs_triton = pytest.mark.skipif(triton is None, reason="needs the package triton")
LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # of error / norm
BLOCK, SPLIT = 64, 256  # of 16 bits and a head dim of 64 or 128
GUARD = 64  # numbers


def error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


def guarded(x, fill=math.nan):
    """x, with `fill` around it in memory; and a function that says whether that is still there."""
    memory = torch.full((x.numel() + 2 * GUARD,), fill, dtype=x.dtype)
    inside = memory[GUARD:-GUARD].view(x.shape)
    inside.copy_(x)
    return inside, lambda: bool(torch.stack((memory[:GUARD], memory[-GUARD:])).isnan().all())


def make_cache(lens, num_kv_heads, head_dim, max_len, dtype, layout="slots"):
    """Random keys and values, NaN beyond each length and in a slot more than there are lengths."""
    shape = (2, len(lens) + 1, num_kv_heads, max_len, head_dim)
    cache = torch.randn(shape).to(dtype)
    for i, n in enumerate([*lens, 0]):
        cache[:, i, :, n:] = math.nan
    if layout == "tokens":  # [2, slots, max_len, kv_heads, head_dim] in memory, with room between tokens
        wide = torch.full((2, shape[1], max_len, num_kv_heads, head_dim + 16), math.nan, dtype=dtype)
        strided = wide[..., :head_dim].transpose(2, 3)
        strided.copy_(cache)
        return strided
    return guarded(cache)[0]


def plain_decode(q, cache, lens, window):
    """One sequence, one head at a time, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // cache.shape[2]
    for i, n in enumerate(lens):
        start = 0 if window is None else max(n - window, 0)
        for h in range(q.shape[1]) if n else ():
            keys, values = cache[:, i, h // group, start:n].double()
            out[i, h] = (keys @ q[i, h].double() / q.shape[2] ** 0.5).softmax(0) @ values
    return out


def attend(lens, num_heads, num_kv_heads, head_dim, dtype, window=None, max_len=None, layout="slots"):
    """Errors of the kernels, and of torch's operations on the same numbers; and whether unused slots give 0."""
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    cache = make_cache(lens, num_kv_heads, head_dim, max_len or max(lens), dtype, layout)
    wide = torch.full((len(lens), num_heads + 3, head_dim), math.nan, dtype=dtype)  # as a projection's output lies
    wide[:, :num_heads] = torch.randn(len(lens), num_heads, head_dim)
    q, step = wide[:, :num_heads], Step(torch.tensor(lens), cache.shape[3])
    out = decode_attention(q, cache, step, window)
    again = decode_attention(q, cache, Step(torch.tensor(lens, dtype=torch.int32), cache.shape[3]), window)
    assert torch.equal(out, again), "two runs differ"
    expected = plain_decode(q, cache, lens, window)
    plain = decode.decode_attention_reference(q, cache.nan_to_num(7.0), step, window)
    assert not out[[n == 0 for n in lens]].any()
    return error(out, expected), error(plain, expected)


def assert_accurate(dtype, errors):
    ours, torchs = errors
    assert ours <= LIMITS[dtype], errors
    if dtype == torch.bfloat16:
        assert ours <= 1.5 * torchs, errors


@needs_triton
@pytest.mark.parametrize("head_dim", list(decode.PIECES))
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_decode_attention_matches_float64_for_every_head_dim(head_dim, dtype):
    assert_accurate(dtype, run_interpreted(attend, [37, 5], 4, 2, head_dim, dtype))


@needs_triton
@pytest.mark.parametrize("group, window", [(1, None), (2, 1), (4, BLOCK + 5), (8, None), (17, BLOCK + 5)])
def test_decode_attention_matches_float64_for_every_group_and_window(group, window):
    lens = [1, 2, 0, BLOCK + 1, 131]
    assert_accurate(torch.float16, run_interpreted(attend, lens, group, 1, 64, torch.float16, window, 150))


@needs_triton
@pytest.mark.parametrize("layout", ["slots", "tokens"])
@pytest.mark.parametrize("window", [None, 97])
def test_decode_attention_matches_float64_around_blocks_and_splits(layout, window):
    lens = [BLOCK - 1, BLOCK, BLOCK + 1, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT + BLOCK, 523]
    assert_accurate(torch.bfloat16, run_interpreted(attend, lens, 2, 1, 64, torch.bfloat16, window, None, layout))


def attend_in_company():
    """A sequence alone, among others in another order, and in a cache of another capacity."""
    lens = [70, 300, 1, 0, 257]
    q, cache = torch.randn(5, 2, 64), make_cache(lens, 2, 64, 300, torch.float32)
    out = decode_attention(q, cache, Step(torch.tensor(lens), 300))
    order = [4, 2, 0, 1, 3]
    longer = torch.nn.functional.pad(cache[:, order], (0, 0, 0, 400), value=math.nan)
    moved = decode_attention(q[order], longer, Step(torch.tensor(lens)[order], 700))
    alone = decode_attention(q[1:2], cache[:, 1:2], Step(torch.tensor(lens)[1:2], 300))
    return torch.equal(out[order], moved), torch.equal(out[1:2], alone)


@needs_triton
def test_decode_attention_of_a_sequence_does_not_depend_on_others_or_capacity():
    assert run_interpreted(attend_in_company) == (True, True)


def attend_beyond_capacity():
    cache = torch.randn(2, 2, 1, 20, 32)
    step = Step(torch.tensor([21, 20]), 20)
    qkv = torch.randn(2, 3 * 32)
    before = cache.clone()
    q = append(qkv, cache, step, 1)
    assert torch.equal(cache[:, 0], before[:, 0])
    return decode_attention(q, cache, step)


@needs_triton
def test_decode_attention_of_a_length_beyond_the_cache_is_nan():
    out = run_interpreted(attend_beyond_capacity)
    assert out[0].isnan().all() and out[1].isfinite().all()


def plain_append(qkv, cache, lens, num_heads, tables, interleaved):
    """What `append` returns and stores, one number at a time, in float64."""
    heads, cache = qkv.double().view(len(qkv), -1, cache.shape[4]).clone(), cache.double()
    num_kv_heads = cache.shape[2]
    if tables is not None:
        cos, sin = (x[:, 0].double() for x in tables)
        half = cos.shape[1]
        for j in range(half):
            a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + half)
            x, y = (heads[:, : num_heads + num_kv_heads, at].clone() for at in (a, b))
            heads[:, : num_heads + num_kv_heads, a] = x * cos[:, j : j + 1] - y * sin[:, j : j + 1]
            heads[:, : num_heads + num_kv_heads, b] = y * cos[:, j : j + 1] + x * sin[:, j : j + 1]
    for i, n in enumerate(lens):
        if n:
            cache[0, i, :, n - 1] = heads[i, num_heads : num_heads + num_kv_heads]
            cache[1, i, :, n - 1] = heads[i, num_heads + num_kv_heads :]
    return heads[:, :num_heads], cache


def append_some(num_heads, num_kv_heads, head_dim, dtype, rotary_dim, interleaved, layout="slots"):
    """Errors of queries and cache, of the kernel and of torch's operations."""
    torch.use_deterministic_algorithms(True)
    lens = [1, 7, 0, 16]
    cache = make_cache([max(n - 1, 0) for n in lens], num_kv_heads, head_dim, 16, dtype, layout)
    qkv, is_guarded = guarded(torch.randn(len(lens), (num_heads + 2 * num_kv_heads) * head_dim).to(dtype))
    tables = None
    if rotary_dim:
        angles = torch.randn(len(lens), 1, rotary_dim // 2) * 5
        tables = angles.cos().to(dtype), angles.sin().to(dtype)
    expected_q, expected_cache = plain_append(qkv, cache, lens, num_heads, tables, interleaved)
    step = Step(torch.tensor(lens), 16)
    plain_cache = cache.clone().contiguous()
    plain_q = decode.append_reference(qkv.clone(), plain_cache, step, num_heads, tables, interleaved)
    q = append(qkv, cache, step, num_heads, tables, interleaved)
    assert is_guarded() and torch.equal(cache.isnan(), expected_cache.isnan()), "stored where it should not be"
    used = [n > 0 for n in lens]
    pairs = []
    for stored, queries in ((cache, q), (plain_cache, plain_q)):
        of_cache = [x[:, : len(lens)][:, used].nan_to_num() for x in (stored, expected_cache)]
        pairs.append((error(queries, expected_q), error(*of_cache)))
    return tuple(zip(*pairs, strict=True))


@needs_triton
@pytest.mark.parametrize(
    "head_dim, rotary_dim", [(32, 32), (64, 16), (80, 32), (96, 24), (128, 128), (256, 64), (64, 0)]
)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_append_matches_float64(head_dim, rotary_dim, interleaved):
    for dtype, heads, layout in ((torch.float32, (3, 1), "slots"), (torch.bfloat16, (8, 4), "tokens")):
        errors = run_interpreted(append_some, *heads, head_dim, dtype, rotary_dim, interleaved, layout)
        for ours, torchs in errors:
            assert_accurate(dtype, (ours, torchs))
            assert torchs <= 2 * LIMITS[dtype], errors


def refuse(name):
    """Calls with one thing wrong."""
    lens, max_len, window = torch.tensor([3, 4]), 8, None
    q, cache, qkv, tables = torch.randn(2, 4, 64), torch.randn(2, 2, 2, 8, 64), torch.randn(2, 8 * 64), None
    if name == "head dims 32, 64":
        q, cache = q[..., :48].contiguous(), cache[..., :48].contiguous()
    elif name == "int16":
        q, cache = q.to(torch.int16), cache.to(torch.int16)
    elif name == "does not fit":
        q = q[:, :3]
    elif name == "the cache is":
        max_len = 9
    elif name == "window of 0":
        window = 0
    elif name == "one dtype":
        q = q.half()
    elif name == "lengths are":
        lens = lens.float()
    elif name == "neighbours":
        cache = cache.transpose(3, 4).contiguous().transpose(3, 4)
    elif name == "same memory":
        cache = cache[:, :, :1].expand(2, 2, 2, 8, 64)
    elif name == "share their memory":
        q = cache.view(-1)[: q.numel()].view(q.shape)
    elif name == "qkv is":
        qkv = qkv[:, :-64]
    elif name == "tables are":
        tables = torch.ones(2, 1, 64), torch.ones(2, 1, 64)
    with pytest.raises(ValueError, match=name):
        if name in ("qkv is", "tables are"):
            append(qkv, cache, Step(lens, max_len), 4, tables)
        else:
            decode_attention(q, cache, Step(lens, max_len), window)


@needs_triton
def test_decode_rejects_what_kernels_do_not_take():
    wrong = ("head dims 32, 64", "int16", "does not fit", "the cache is", "window of 0", "one dtype", "lengths are")
    for name in (*wrong, "neighbours", "same memory", "share their memory", "qkv is", "tables are"):
        run_interpreted(refuse, name)
