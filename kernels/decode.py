"""Attention of generation: one new token per sequence, stored in its KV cache and attending to what lies there.

The kernels cut a sequence's keys into splits of a fixed number, each a program's, and merge what those found in order:
so a sequence's result depends on nothing but that sequence, and the grid on the cache's capacity alone, not on lengths,
which are read on the device.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from kernels.attention import load_rows, store_rows
from kernels.launch import DTYPES, PIECES, Tiles, architecture, jit, overlaps_itself, padded_head, runs_triton, tl
from kernels.pointwise import rotate_


class Step:
    """How long each sequence is, its new token included; made once a step for all layers.

    A slot that is not in use has length 0: what is stored there is not defined, what it attends to is nothing, which
    gives 0. Lengths beyond max_len give NaN, where kernels run.

    Args: max_len: the cache's capacity.
    Shapes: lens [num_sequences] integers
    """

    def __init__(self, lens: Tensor, max_len: int):
        self.lens, self.max_len = lens, max_len
        self._biases: dict[int | None, Tensor] = {}

    def bias(self, window: int | None) -> Tensor:
        """0 for the cached keys that the new token sees, -inf for the others: float32 [num_sequences, 1, 1, max_len]"""
        if window not in self._biases:
            key = torch.arange(self.max_len, device=self.lens.device)
            hidden_from_query = key >= self.lens[:, None]
            if window is not None:
                hidden_from_query |= key < self.lens[:, None] - window
            bias = torch.zeros(hidden_from_query.shape, device=key.device).masked_fill_(hidden_from_query, -torch.inf)
            self._biases[window] = bias[:, None, None]
        return self._biases[window]

    @cached_property
    def is_unused(self) -> Tensor:
        """[num_sequences, 1, 1]"""
        return (self.lens == 0)[:, None, None]

    @cached_property
    def positions(self) -> Tensor:
        """Where the new token goes, [num_sequences]"""
        return (self.lens - 1).clamp(min=0)

    def places(self, cache: Tensor) -> Tensor:
        """Where each head's new key and value go: rows of the cache seen as [-1, head_dim], the same in all layers."""
        if self._places is None or self._places[0] != cache.shape:
            _, num_slots, num_kv_heads, max_len, _ = cache.shape
            heads = torch.arange(2 * num_slots * num_kv_heads, device=cache.device).view(2, num_slots, num_kv_heads)
            heads = heads[:, : len(self.lens)].transpose(0, 1)  # [slots in use, 2, kv_heads], as a token's k and v lie
            self._places = cache.shape, (heads * max_len + self.positions[:, None, None]).flatten()
        return self._places[1]

    _places: tuple[torch.Size, Tensor] | None = None


def append_reference(
    qkv: Tensor, cache: Tensor, step: Step, num_heads: int, tables: tuple[Tensor, Tensor] | None, interleaved: bool
) -> Tensor:
    num_kv_heads, head_dim = cache.shape[2], cache.shape[4]
    if tables is not None:
        qkv = rotate_(qkv, *tables, num_heads + num_kv_heads, head_dim, interleaved)
    heads = qkv.view(len(qkv), -1, head_dim)
    new = heads[:, num_heads:].reshape(-1, head_dim)  # of each sequence its keys, then its values
    cache.view(-1, head_dim).index_copy_(0, step.places(cache), new)
    return heads[:, :num_heads]


def decode_attention_reference(q: Tensor, cache: Tensor, step: Step, window: int | None) -> Tensor:
    num_sequences, num_heads, head_dim = q.shape
    keys, values = cache[:, :num_sequences]
    q = (q * head_dim**-0.5).view(num_sequences, keys.shape[1], -1, head_dim)  # [num_sequences, kv_heads, group, ...]
    probs = (q @ keys.transpose(-1, -2)).add_(step.bias(window).to(q.dtype)).softmax(-1)
    return (probs @ values).reshape(num_sequences, num_heads, head_dim).masked_fill_(step.is_unused, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels (Dao et al. 2023, "Flash-Decoding for long-context inference")
# ---------------------------------------------------------------------------------------------------------------------
#
# A head lies in pieces of D0 and D1 features, of which the first HEAD_DIM exist. What is masked is not read. All sums
# are in float32.

QUERY_ROWS = 16  # heads of a program, which share keys and values; the fewest that a product on tensor cores takes
APPEND_HEADS = 8  # of a program
NO_WINDOW = 1 << 30
LOG2_E = 1.4426950408889634

# (architecture, head_dim, bits) -> rows: keys of a split, columns: keys of a block
TILES = {
    (arch, head_dim, bits): Tiles(256, columns, 4, num_stages)
    for arch in (80, 90)
    for head_dim, bits, columns, num_stages in (
        (32, 16, 128, 3), (64, 16, 64, 3), (80, 16, 32, 3), (96, 16, 64, 3), (128, 16, 64, 3), (256, 16, 32, 3),
        (32, 32, 32, 3), (64, 32, 16, 3), (80, 32, 16, 3), (96, 32, 16, 3), (128, 32, 16, 3), (256, 32, 16, 2),
    )
}  # fmt: skip


@jit
def append_kernel(
    qkv_ptr, q_ptr, cache_ptr, lens_ptr, cos_ptr, sin_ptr, qkv_stride, kind_stride, slot_stride, head_stride,
    token_stride, max_len, num_heads, num_kv_heads, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """A program: some heads of a sequence's new token, queries, keys and values alike; grid: (sequences, heads).

    HALF: how many pairs of each head turn.
    """
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    feature = tl.arange(0, PADDED)[None, :]
    exists = (head < num_heads + 2 * num_kv_heads) & (feature < HEAD_DIM)
    source = qkv_ptr + sequence * qkv_stride + head * HEAD_DIM
    x = tl.load(source + feature, mask=exists, other=0.0)
    if HALF > 0:
        if INTERLEAVED:
            pair = feature // 2
            is_first = feature % 2 == 0
            partner = tl.where(is_first, feature + 1, feature - 1)
        else:
            pair = feature % HALF
            is_first = feature < HALF
            partner = tl.where(is_first, feature + HALF, feature - HALF)
        turns = exists & (feature < 2 * HALF) & (head < num_heads + num_kv_heads)
        cos = tl.load(cos_ptr + sequence * HALF + pair, mask=turns, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + sequence * HALF + pair, mask=turns, other=0.0).to(tl.float32)
        other = tl.load(source + partner, mask=turns, other=0.0).to(tl.float32)
        turned = x.to(tl.float32) * cos + tl.where(is_first, -other, other) * sin
        x = tl.where(turns, turned.to(x.dtype), x)
    tl.store(q_ptr + (sequence * num_heads + head) * HEAD_DIM + feature, x, mask=exists & (head < num_heads))
    length = tl.load(lens_ptr + sequence).to(tl.int64)
    kv_head = tl.maximum(head - num_heads, 0)  # keys first, then values
    place = (kv_head // num_kv_heads).to(tl.int64) * kind_stride + (kv_head % num_kv_heads).to(tl.int64) * head_stride
    place += sequence * slot_stride + (length - 1) * token_stride
    if (length > 0) & (length <= max_len):
        tl.store(cache_ptr + place + feature, x, mask=exists & (head >= num_heads))


@jit
def split_kernel(
    q_ptr, cache_ptr, lens_ptr, acc_ptr, stats_ptr, scale, q_stride, q_head_stride, kind_stride, slot_stride,
    head_stride, token_stride, max_len, window, num_heads, group, num_splits, ROWS: tl.constexpr, SPLIT: tl.constexpr,
    BN: tl.constexpr, HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """A program: a split of a sequence's keys, for up to ROWS query heads that read them.

    acc [sequences, heads, splits, head_dim]: sum of exp2(score - largest) v; stats [sequences, heads, splits, 2]:
    largest and the same sum without v; grid: (sequences, kv_heads * blocks of a group, splits).

    scale: log2(e) / sqrt(head_dim). group: query heads of a key/value head.
    """
    sequence, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    blocks_of_group = tl.cdiv(group, ROWS)
    kv_head = tl.program_id(1) // blocks_of_group
    row = tl.program_id(1) % blocks_of_group * ROWS + tl.arange(0, ROWS)  # in the group
    ok = row < group
    heads = kv_head * group + row
    length = tl.minimum(tl.load(lens_ptr + sequence), max_len).to(tl.int32)
    earliest = tl.maximum(length - window, 0)
    start = tl.maximum(split * SPLIT, earliest // BN * BN)  # so that each block holds a key that is seen
    stop = tl.minimum(split * SPLIT + SPLIT, length)
    if start < stop:
        q_base = q_ptr + sequence * q_stride
        q0 = load_rows(q_base, heads, q_head_stride, ok, D0, 0, HEAD_DIM, True)
        q1 = q0
        if D1 > 0:
            q1 = load_rows(q_base, heads, q_head_stride, ok, D1, D0, HEAD_DIM, True)
        acc0 = tl.zeros((ROWS, D0), tl.float32)
        acc1 = tl.zeros((ROWS, D1 if D1 > 0 else 16), tl.float32)
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        k_base = cache_ptr + sequence * slot_stride + kv_head.to(tl.int64) * head_stride
        v_base = k_base + kind_stride
        for first in range(start, stop, BN):
            keys = first + tl.arange(0, BN)
            seen = (keys >= earliest) & (keys < stop)
            k0 = load_rows(k_base, keys, token_stride, seen, D0, 0, HEAD_DIM, True)
            scores = tl.dot(q0, k0.T, input_precision="ieee")
            if D1 > 0:
                k1 = load_rows(k_base, keys, token_stride, seen, D1, D0, HEAD_DIM, True)
                scores = tl.dot(q1, k1.T, scores, input_precision="ieee")  # [ROWS, BN]
            scores = tl.where(seen[None, :], scores * scale, float("-inf"))
            new = tl.maximum(largest, tl.max(scores, 1))
            decay = tl.exp2(largest - new)
            probs = tl.exp2(scores - new[:, None])
            total = total * decay + tl.sum(probs, 1)
            probs = probs.to(q0.dtype)
            v0 = load_rows(v_base, keys, token_stride, seen, D0, 0, HEAD_DIM, True)
            acc0 = tl.dot(probs, v0, acc0 * decay[:, None], input_precision="ieee")
            if D1 > 0:
                v1 = load_rows(v_base, keys, token_stride, seen, D1, D0, HEAD_DIM, True)
                acc1 = tl.dot(probs, v1, acc1 * decay[:, None], input_precision="ieee")
            largest = new
        part = (sequence * num_heads + heads) * num_splits + split
        tl.store(stats_ptr + part * 2, largest, mask=ok)
        tl.store(stats_ptr + part * 2 + 1, total, mask=ok)
        at = acc_ptr + part[:, None] * HEAD_DIM
        store_rows(at, acc0, ok, D0, 0, HEAD_DIM)
        if D1 > 0:
            store_rows(at, acc1, ok, D1, D0, HEAD_DIM)


@jit
def merge_kernel(
    acc_ptr, stats_ptr, lens_ptr, out_ptr, max_len, window, num_splits, SPLIT: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """out [sequences, heads, head_dim] from the splits that `split_kernel` has filled, in order; grid: its first two.

    Splits that hold none of the visible keys were not written and are not read.
    """
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    feature = tl.arange(0, PADDED)
    given = tl.load(lens_ptr + tl.program_id(0))
    length = tl.minimum(given, max_len).to(tl.int32)
    acc = tl.zeros((PADDED,), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    largest = tl.full((), float("-inf"), tl.float32)
    for split in range(tl.maximum(length - window, 0) // SPLIT, tl.cdiv(length, SPLIT)):
        part = row * num_splits + split
        its_largest = tl.load(stats_ptr + part * 2)
        new = tl.maximum(largest, its_largest)
        decay = tl.exp2(largest - new)
        weight = tl.exp2(its_largest - new)
        its_acc = tl.load(acc_ptr + part * HEAD_DIM + feature, mask=feature < HEAD_DIM, other=0.0)
        acc = acc * decay + its_acc * weight
        total = total * decay + tl.load(stats_ptr + part * 2 + 1) * weight
        largest = new
    out = acc / tl.where(length > 0, total, 1.0)
    out = tl.where(given > max_len, float("nan"), out)
    tl.store(out_ptr + row * HEAD_DIM + feature, out.to(out_ptr.dtype.element_ty), mask=feature < HEAD_DIM)


def append_by_kernel(qkv, cache, step, num_heads, tables, interleaved) -> Tensor:
    num_sequences, (_, _, num_kv_heads, max_len, head_dim) = len(qkv), cache.shape
    q = torch.empty(num_sequences, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    cos, sin = (qkv, qkv) if tables is None else (x.contiguous() for x in tables)
    half = 0 if tables is None else cos.shape[-1]
    grid = (num_sequences, -(-(num_heads + 2 * num_kv_heads) // APPEND_HEADS))
    if num_sequences:
        with torch.cuda.device_of(qkv):
            append_kernel[grid](
                qkv, q, cache, step.lens, cos, sin, qkv.stride(0), *cache.stride()[:4], max_len, num_heads,
                num_kv_heads, HEAD_DIM=head_dim, PADDED=1 << (head_dim - 1).bit_length(), HALF=half,
                INTERLEAVED=interleaved, HEADS=APPEND_HEADS, num_warps=4,
            )  # fmt: skip
    return q


def decode_attention_by_kernels(q, cache, step, window) -> Tensor:
    (num_sequences, num_heads, head_dim), (_, _, num_kv_heads, max_len, _) = q.shape, cache.shape
    tiles = TILES[architecture(q.device.index), padded_head(head_dim), 8 * q.itemsize]
    d0, d1 = PIECES[padded_head(head_dim)]
    window = NO_WINDOW if window is None else min(window, NO_WINDOW)
    group, num_splits = num_heads // num_kv_heads, -(-max_len // tiles.rows)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    acc = torch.empty(num_sequences, num_heads, num_splits, head_dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(num_sequences, num_heads, num_splits, 2, dtype=torch.float32, device=q.device)
    if num_sequences:
        with torch.cuda.device_of(q):
            split_kernel[(num_sequences, num_kv_heads * -(-group // QUERY_ROWS), num_splits)](
                q, cache, step.lens, acc, stats, LOG2_E * head_dim**-0.5, *q.stride()[:2], *cache.stride()[:4], max_len,
                window, num_heads, group, num_splits, ROWS=QUERY_ROWS, SPLIT=tiles.rows, BN=tiles.columns,
                HEAD_DIM=head_dim, D0=d0, D1=d1, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            )  # fmt: skip
            merge_kernel[(num_sequences, num_heads)](
                acc, stats, step.lens, out, max_len, window, num_splits, SPLIT=tiles.rows, HEAD_DIM=head_dim,
                PADDED=1 << (head_dim - 1).bit_length(), num_warps=1,
            )  # fmt: skip
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Public functions
# ---------------------------------------------------------------------------------------------------------------------


def append(
    qkv: Tensor,
    cache: Tensor,
    step: Step,
    num_heads: int,
    tables: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Rotates the new tokens' queries and keys, stores keys and values in the cache and returns the queries.

    What qkv holds afterwards is not defined.

    Args: tables: cosine and sine as `rotate_` takes them; None rotates nothing. interleaved: as in `rotate_`.
    Shapes: qkv [num_sequences, (q + k + v heads) * head_dim]; cache [2 (keys, values), num_slots, num_kv_heads,
        max_len, head_dim], of which the first num_sequences slots are meant; tables [num_sequences, 1, rotary_dim / 2]
        -> [num_sequences, num_heads, head_dim]
    Raises: ValueError if shapes do not fit, or the kernel cannot do it.
    """
    check_cache(qkv, cache, step)
    num_sequences, (_, _, num_kv_heads, _, head_dim) = len(step.lens), cache.shape
    if qkv.shape != (num_sequences, (num_heads + 2 * num_kv_heads) * head_dim):
        heads = f"{num_heads} + 2 * {num_kv_heads} heads of {head_dim}"
        raise ValueError(f"qkv is {list(qkv.shape)}, not {num_sequences} sequences of {heads}")
    if tables is not None:
        half = tables[0].shape[-1]
        wanted = (num_sequences, 1, half)
        fits = all(x.shape == wanted and x.dtype == qkv.dtype and x.device == qkv.device for x in tables)
        if not fits or not 0 < 2 * half <= head_dim:
            shapes = ", ".join(f"{list(x.shape)} {x.dtype} on {x.device}" for x in tables)
            wanted = f"[{num_sequences}, 1, at most {head_dim // 2}] of {qkv.dtype} on {qkv.device}"
            raise ValueError(f"tables are {shapes}, not {wanted}, as qkv is")
    if runs_triton(qkv):
        check_for_kernels(qkv, cache, step)
        return append_by_kernel(qkv, cache, step, num_heads, tables, interleaved)
    return append_reference(qkv, cache, step, num_heads, tables, interleaved)


def decode_attention(q: Tensor, cache: Tensor, step: Step, window: int | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v for one query per sequence, which sees its last `window` keys; no gradient.

    Query head h reads key/value head h // (num_heads / num_kv_heads). Kernels do not read beyond a sequence's length;
    the reference needs finite numbers there.

    Shapes: q [num_sequences, num_heads, head_dim]; cache as in `append` -> q's
    Raises: ValueError if shapes do not fit, or the kernels cannot do it.
    """
    check_cache(q, cache, step)
    if q.ndim != 3 or q.shape[0] != len(step.lens) or q.shape[2] != cache.shape[4] or q.shape[1] % cache.shape[2]:
        raise ValueError(f"q {list(q.shape)} does not fit {len(step.lens)} lengths and a cache {list(cache.shape)}")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} keys: at least 1, the new token's own")
    if runs_triton(q):
        check_for_kernels(q, cache, step)
        return decode_attention_by_kernels(q, cache, step, window)
    return decode_attention_reference(q, cache, step, window)


def check_cache(x: Tensor, cache: Tensor, step: Step) -> None:
    """Raises ValueError if cache and step do not belong together, or not to x."""
    if cache.ndim != 5 or cache.shape[0] != 2 or cache.shape[1] < len(step.lens) or cache.shape[3] != step.max_len:
        wanted = f"[2, {len(step.lens)} or more, num_kv_heads, {step.max_len}, head_dim]"
        raise ValueError(f"the cache is {list(cache.shape)}, not {wanted}")
    if cache.dtype != x.dtype or not cache.device == x.device == step.lens.device:
        given = f"{x.dtype} on {x.device}, the cache {cache.dtype} on {cache.device}, lengths on {step.lens.device}"
        raise ValueError(f"new heads are {given}: one dtype and device, please")
    if x.dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"new heads are {x.dtype}: should be one of bfloat16, float16, float32 and float64")
    if step.lens.ndim != 1 or step.lens.dtype not in (torch.int32, torch.int64) or not step.lens.is_contiguous():
        raise ValueError(f"lengths are {list(step.lens.shape)} {step.lens.dtype}, not contiguous integers [sequences]")
    if overlaps_itself(cache):
        raise ValueError(f"the cache's strides {cache.stride()} give different tokens the same memory")
    if x.untyped_storage()._cdata == cache.untyped_storage()._cdata:
        raise ValueError("new heads and cache share their memory: give new heads their own")


def check_for_kernels(x: Tensor, cache: Tensor, step: Step) -> None:
    """Raises ValueError for what the kernels do not do."""
    padded_head(cache.shape[4])
    if x.stride(-1) != 1 or cache.stride(4) != 1:
        strides = f"{x.stride(-1)} in new heads, {cache.stride(4)} in the cache"
        raise ValueError(f"the features of a head are {strides} apart: they must be neighbours")
    for name, span in (("a head's cache", cache.shape[3] * cache.stride(3)), ("a query", x.shape[1] * x.stride(1))):
        if span >= 2**31:
            raise ValueError(f"{name} spans {span:,} numbers, beyond 2^31")
