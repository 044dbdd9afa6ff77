"""Kernels of generation, interpreted, against float64 formulas: one new token per sequence, and the sampler."""

import functools
import math
import os
from unittest import mock

import numpy as np
import pytest
import torch

from kernels import decode, sampler
from kernels.decode import Step, append, decode_attention
from kernels.launch import PIECES, Tiles, triton
from parallel import generation
from parallel.generation import Sampling, generate, sample_tokens
from parallel.mesh import init_mesh
from parallel.model import Decoder, DecoderConfig
from tests.interpreter import Fence, run_interpreted

needs_triton = pytest.mark.skipif(triton is None, reason="needs the package triton")
LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # of error / norm
BLOCK, SPLIT = 64, 256  # of 16 bits and a head dim of 64 or 128


def error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


def make_cache(lens, num_kv_heads, head_dim, max_len, dtype, layout="slots", fence=None):
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
    return (fence or Fence()).around(cache)


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
    """Errors of the kernels, in fenced memory, and of torch's operations on the same numbers; unused slots give 0."""
    fence = Fence()
    cache = make_cache(lens, num_kv_heads, head_dim, max_len or max(lens), dtype, layout, fence)
    wide = torch.full((len(lens), num_heads + 3, head_dim), math.nan, dtype=dtype)  # as a projection's output lies
    wide[:, :num_heads] = torch.randn(len(lens), num_heads, head_dim)
    q, step = fence.around(wide)[:, :num_heads], Step(fence.around(torch.tensor(lens)), cache.shape[3])
    with fence.around_everything():
        out = decode_attention(q, cache, step, window)
        again = decode_attention(q, cache, Step(step.lens.int(), cache.shape[3]), window)
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
@pytest.mark.parametrize("head_dim", [*PIECES, 12, 72])
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
    lens, fence = [1, 7, 0, 16], Fence()
    cache = make_cache([max(n - 1, 0) for n in lens], num_kv_heads, head_dim, 16, dtype, layout, fence)
    qkv = fence.around(torch.randn(len(lens), (num_heads + 2 * num_kv_heads) * head_dim).to(dtype))
    tables = None
    if rotary_dim:
        angles = torch.randn(len(lens), 1, rotary_dim // 2) * 5
        tables = fence.around(angles.cos().to(dtype)), fence.around(angles.sin().to(dtype))
    expected_q, expected_cache = plain_append(qkv, cache, lens, num_heads, tables, interleaved)
    step = Step(torch.tensor(lens), 16)
    plain_cache = cache.clone().contiguous()
    plain_q = decode.append_reference(qkv.clone(), plain_cache, step, num_heads, tables, interleaved)
    with fence.around_everything():
        q = append(qkv, cache, step, num_heads, tables, interleaved)
    assert torch.equal(cache.isnan(), expected_cache.isnan()), "stored where it should not be"
    used = [n > 0 for n in lens]
    pairs = []
    for stored, queries in ((cache, q), (plain_cache, plain_q)):
        of_cache = [x[:, : len(lens)][:, used].nan_to_num() for x in (stored, expected_cache)]
        pairs.append((error(queries, expected_q), error(*of_cache)))
    return tuple(zip(*pairs, strict=True))


@needs_triton
@pytest.mark.parametrize(
    "head_dim, rotary_dim", [(12, 6), (32, 32), (64, 16), (80, 32), (96, 24), (128, 128), (256, 64), (64, 0)]
)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_append_matches_float64(head_dim, rotary_dim, interleaved):
    for dtype, heads, layout in ((torch.float32, (3, 1), "slots"), (torch.bfloat16, (8, 4), "tokens")):
        errors = run_interpreted(append_some, *heads, head_dim, dtype, rotary_dim, interleaved, layout)
        for ours, torchs in errors:
            assert_accurate(dtype, (ours, torchs))
            assert torchs <= 2 * LIMITS[dtype], errors


def refuse(name):
    """Calls with one thing wrong. What spans too much, or lies elsewhere, has no memory."""
    lens, max_len, window = torch.tensor([3, 4]), 8, None
    q, cache, qkv, tables = torch.randn(2, 4, 64), torch.randn(2, 2, 2, 8, 64), torch.randn(2, 8 * 64), None
    if name == "heads of 264":
        q, cache = torch.randn(2, 4, 264), torch.randn(2, 2, 2, 8, 264)
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
    elif name == "the same memory":  # tokens that begin within the one before
        cache = cache.as_strided((2, 2, 2, 8, 64), (1024, 512, 256, 32, 1))
    elif name == "2,147,483,648 numbers":
        cache = torch.empty_strided((2, 2, 2, 8, 64), (1 << 34, 1 << 33, 1 << 32, 1 << 28, 1), device="meta")
        q, lens = q.to("meta"), lens.to("meta")
    elif name == "a query spans 4,294,967,296":
        q = torch.empty_strided((2, 4, 64), (64, 1 << 30, 1), device="meta")
        cache, lens = cache.to("meta"), lens.to("meta")
    elif name == "on meta, not":
        tables = (torch.ones(2, 1, 16, device="meta"),) * 2
    elif name == "share their memory":
        q = cache.view(-1)[: q.numel()].view(q.shape)
    elif name == "qkv is":
        qkv = qkv[:, :-64]
    elif name == "tables are":
        tables = torch.ones(2, 1, 64), torch.ones(2, 1, 64)
    with pytest.raises(ValueError, match=name):
        if name in ("qkv is", "tables are", "on meta, not"):
            append(qkv, cache, Step(lens, max_len), 4, tables)
        else:
            decode_attention(q, cache, Step(lens, max_len), window)


@needs_triton
def test_decode_rejects_what_kernels_do_not_take():
    wrong = ("heads of 264", "does not fit", "the cache is", "window of 0", "one dtype", "lengths are")
    wrong += ("neighbours", "2,147,483,648 numbers", "a query spans 4,294,967,296")
    for name in (*wrong, *WRONG_FOR_BOTH):
        run_interpreted(refuse, name)


WRONG_FOR_BOTH = ("same memory", "the same memory", "share their memory", "qkv is", "tables are", "on meta, not")
WRONG_FOR_BOTH += ("int16",)


@pytest.mark.parametrize("name", WRONG_FOR_BOTH)
def test_reference_of_decoding_rejects_what_would_give_wrong_numbers(name):
    refuse(name)


# Many rows to a program: the interpreter takes as long for one number as for thousands.
WIDE = {"sum": Tiles(4096, 128, 4, 1), "border": Tiles(1024, 1024, 8, 1), "draw": Tiles(512, 128, 4, 1)}


def draw_by_both(n, sampling, num_ids, vocab, tiles, tower=0.0):
    """What kernels and reference draw from the same logits with the same noise, and the exact log-probabilities.

    tower: how far an id that may not be drawn lies above what it would be.
    """
    fence, wide = Fence(), torch.randn(n, vocab + 128) * 3  # rows further apart than they are long
    wide[:, vocab - 60] += tower
    wide[:, vocab - 50 : vocab], wide[:, vocab:] = -torch.inf, math.nan
    logits, noise = fence.around(wide)[:, :vocab], fence.around(torch.rand(n, dtype=torch.float64))
    with mock.patch.dict(sampler.TILES, tiles), fence.around_everything():
        by_kernels = sample_tokens(logits, noise, sampling, num_ids)
    with mock.patch.dict(os.environ, KERNELS="reference"):
        by_reference = sample_tokens(logits, noise, sampling, num_ids)
    exact = (logits.double() / sampling.temperature).log_softmax(1).gather(1, by_kernels[0][:, None])[:, 0]
    return by_kernels, by_reference, exact


@needs_triton
@pytest.mark.parametrize("temperature, num_ids", [(1.0, None), (0.7, 900), (1.9, 129)])
def test_sampler_draws_the_reference_tokens(temperature, num_ids):
    ours, expected, exact = run_interpreted(draw_by_both, 4000, Sampling(temperature), num_ids, 1024, WIDE)
    assert torch.equal(ours[0], expected[0])
    assert (ours[1] - exact).abs().max() < 2e-6
    # a quotient of float32 weights below two different maxima: up to 40 nats x 2^-24 apart
    torch.testing.assert_close(ours[2], expected[2], rtol=3e-6, atol=0)


@needs_triton
@pytest.mark.parametrize(
    "sampling, num_ids",
    [(Sampling(top_k=7), None), (Sampling(0.8, top_p=0.9), 600), (Sampling(1.5, top_k=40, top_p=0.5), None)],
    ids=["top-k", "top-p", "both"],
)
def test_truncated_sampler_draws_the_reference_tokens(sampling, num_ids):
    ours, expected, exact = run_interpreted(draw_by_both, 1000, sampling, num_ids, 1024, WIDE)
    assert torch.equal(ours[0], expected[0])
    assert (ours[1] - exact).abs().max() < 2e-6  # of the full distribution
    torch.testing.assert_close(ours[2], expected[2], rtol=1e-6, atol=0)


@needs_triton
@pytest.mark.parametrize("sampling", [Sampling(0.5), Sampling(0.5, top_k=5, top_p=0.9)], ids=["all", "truncated"])
def test_what_may_not_be_drawn_hides_nothing(sampling):
    """However likely an id is that may not be drawn, others are drawn as ever; log-probabilities stay those of all."""
    ours, expected, exact = run_interpreted(draw_by_both, 1000, sampling, 900, 1024, WIDE, 200.0)
    assert torch.equal(ours[0], expected[0]) and ours[0].max() < 900 and len(ours[0].unique()) > 100
    if not sampling.truncates:
        assert torch.equal(ours[0], run_interpreted(draw_by_both, 1000, sampling, 900, 1024, WIDE)[0][0])
    for found in (ours[1], expected[1]):
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours[2], expected[2], rtol=1e-6, atol=0)


@needs_triton
def test_sampler_draws_the_reference_tokens_with_the_tiles_of_gpus():
    for sampling in (Sampling(), Sampling(0.9, top_k=3, top_p=0.9)):
        ours, expected, _ = run_interpreted(draw_by_both, 3, sampling, 500, 640, {})
        assert torch.equal(ours[0], expected[0])


def find_borders():
    """Which ids kernels and reference keep of logits with many ties, and of rows that are all alike."""
    logits = (torch.randn(64, 256) * 4).round() / 2
    logits[0] = 0.0
    logits[1, 3:] = -torch.inf
    kept = []
    for num_ids, top_k, top_p in ((256, 1, None), (256, 40, None), (256, 0, 0.5), (256, 256, 0.999), (200, 30, 0.7)):
        masks = []
        for kind in (sampler.KernelWeights, sampler.Weights):
            weights = kind(logits, 1.0)
            total, largest = weights.sum_blocks().sum(1), weights.largest
            weights.drop_ids(num_ids)
            total = total * weights.nats_above(largest).exp()
            border = weights.border(top_k, None if top_p is None else top_p * total)
            below = logits[:, :num_ids] - logits[:, :num_ids].amax(1, keepdim=True)
            numbers = below.exp()
            if kind is sampler.KernelWeights:  # the interpreter's exp is numpy's
                numbers = torch.from_numpy(np.exp(below.numpy()))
            masks.append(numbers >= border[:, None])
        kept.append(masks)
    return kept


@needs_triton
def test_border_keeps_what_a_sort_keeps_ties_included():
    with_wide_tiles = functools.partial(run_wide, find_borders)
    for (ours, expected), least in zip(run_interpreted(with_wide_tiles), (1, 40, 1, 1, 1), strict=True):
        assert torch.equal(ours, expected)
        assert (ours.sum(1) >= least).all() and ours[0].all() and (ours.sum(1) > least).any()


def run_wide(fn):
    with mock.patch.dict(sampler.TILES, WIDE):
        return fn()


def draw_from_shards():
    """A vocabulary in one, two and four shards; the same rows in another order and company; the ends of the noise."""
    n, vocab = 40, 512
    logits = torch.randn(n, vocab) * 2
    noise = torch.rand(n, dtype=torch.float64)
    noise[0], noise[1] = 0.0, 1 - 2**-53
    logits[:2] = -torch.inf
    logits[:2, [5, 9, 300]] = 1e4
    found = []
    for size in (vocab, vocab // 2, vocab // 4):
        starts = range(0, vocab, size)
        largest = logits.amax(1)
        shards = [sampler.KernelWeights(logits[:, start : start + size], 0.7, largest) for start in starts]
        sums = torch.cat([shard.sum_blocks() for shard in shards], 1)
        drawn = [shard.draw(sums.cumsum(1), noise, sums.sum(1), i) for shard, i in zip(shards, starts, strict=True)]
        tokens, logprobs = torch.full((n,), -1), torch.zeros(n)
        for (ids, its_logprobs), start in zip(drawn, starts, strict=True):
            is_here = (ids >= start) & (ids < start + size)
            tokens[is_here], logprobs[is_here] = ids[is_here], its_logprobs[is_here]
        found.append((tokens, logprobs, sums))
    order = torch.randperm(n)[:17]
    again = sample_tokens(logits[order], noise[order], Sampling(0.7))
    return found, [x[order] for x in found[0][:2]], again


@needs_triton
def test_sampler_does_not_depend_on_shards_or_other_rows():
    found, expected, again = run_interpreted(functools.partial(run_wide, draw_from_shards))
    for shards in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(shards, found[0], strict=True))
    assert found[0][0][:2].tolist() == [5, 300]
    assert all(torch.equal(a, b) for a, b in zip(again[:2], expected, strict=True))


def refuse_logits(name):
    logits, noise = torch.zeros(2, 256), torch.zeros(2, dtype=torch.float64)
    if name == "float16":
        logits = logits.half()
    elif name == "2 apart":
        logits = torch.zeros(2, 512)[:, ::2]
    elif name == "a multiple of 128":
        logits = logits[:, :200]
    elif name == "noise is torch.float32":
        noise = noise.float()
    with pytest.raises(ValueError, match=name):
        sample_tokens(logits, noise, Sampling())


@needs_triton
def test_sampler_rejects_what_kernels_do_not_take():
    for name in ("float16", "2 apart", "a multiple of 128", "noise is torch.float32"):
        run_interpreted(refuse_logits, name)


def generate_by_both(options):
    """Responses and log-probabilities of a tiny model, from kernels, token by token and running ahead, and from the
    reference."""
    config = DecoderConfig(
        num_layers=2, hidden_size=24, num_heads=2, num_kv_heads=1, ffn_size=40, vocab_size=100, max_seq_len=64,
        norm="rmsnorm", norm_eps=1e-5, activation="silu", gated=True, init_std=0.5, **{"head_dim": 32} | options,
    )  # fmt: skip
    decoder = Decoder(config, init_mesh(), seed=3)
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
    found = []
    for kernels, ahead in (("triton", False), ("triton", True), ("reference", False)):
        with (
            mock.patch.dict(os.environ, KERNELS=kernels),
            mock.patch.dict(sampler.TILES, WIDE),
            mock.patch.object(generation, "runs_ahead", lambda decoder, ahead=ahead: ahead),
        ):
            ends = {"eos_ids": [0], "num_ids": 99, "num_slots": 3}
            out = generate(decoder, prompts, Sampling(0.8, max_new_tokens=6), sample_ids=[0, 1, 2, 3], seed=1, **ends)
        found.append((out.response_ids(), out.logprobs))
    return found


@needs_triton
@pytest.mark.parametrize(
    "options",
    [
        {"rotary_dim": 16, "windows": (None, 4)},
        {"rotary_dim": 32, "rotary_interleaved": True, "qk_norm": True, "windows": (3, 3)},
        {"learned_positions": True, "head_dim": 12},
    ],
    ids=["windows", "interleaved", "learned positions, padded heads"],
)
def test_generation_by_kernels_gives_the_reference_tokens(options):
    *by_kernels, (expected_ids, expected_logprobs) = run_interpreted(generate_by_both, options)
    for ids, logprobs in by_kernels:
        assert ids == expected_ids
        torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-5, atol=1e-5)
