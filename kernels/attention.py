"""Causal attention over packed documents: the reference in PyTorch, and flash attention in Triton.

`first_key` says who may look where: the query at position q of a row sees the keys k with
max(first_key[q], q - window + 1) <= k <= q. One integer per token expresses packing, right padding (causality hides
what comes later) and sliding windows. `decode.py` holds the one-query-per-sequence form that generation uses.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.launch import DTYPES, PIECES, Tiles, architecture, differentiable_once, jit, padded_head, runs_triton, tl

LOG2_E = 1.4426950408889634
EXPLICIT_MAX_LEN = 128  # up to this row length two batched matrix products and a softmax beat the fused CPU kernel


class Visible:
    """Which keys each query of a batch sees; made once a forward for all layers that share a window.

    Args: window: how many keys a query sees at most, its own among them; None: all.
    Shapes: first_key [batch, seq_len] integers, the first position of each token's document in row coordinates; in each
        row it never falls.
    """

    def __init__(self, first_key: Tensor, window: int | None = None):
        if window is not None and window < 1:
            raise ValueError(f"a window of {window} keys: at least 1, the query's own")
        self.first_key, self.window = first_key, window

    @cached_property
    def earliest(self) -> Tensor:
        """The first key that each query sees: [batch, seq_len]"""
        if self.window is None:
            return self.first_key
        position = torch.arange(self.first_key.shape[1], device=self.first_key.device)
        return torch.maximum(self.first_key, position - self.window + 1)

    @cached_property
    def mask(self) -> Tensor:
        """Bool [batch, 1, seq_len (query), seq_len (key)]; the 1 stands for the heads."""
        position = torch.arange(self.first_key.shape[1], device=self.first_key.device)  # [seq_len]
        return ((position >= self.earliest[:, :, None]) & (position <= position[:, None]))[:, None]

    @cached_property
    def bias(self) -> Tensor:
        """0 where `mask` is True, -inf elsewhere."""
        return torch.zeros(self.mask.shape, device=self.mask.device).masked_fill_(~self.mask, -torch.inf)

    @cached_property
    def is_plain_causal(self) -> bool:
        """Every row is one document that each of its queries sees whole."""
        seq_len = self.first_key.shape[1]
        return (self.window is None or self.window >= seq_len) and not bool(self.first_key.any())

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """For kernels, int32 [batch, seq_len]: the first key of each query, and one past the last query of each key."""
        earliest = self.earliest.contiguous()
        position = torch.arange(earliest.shape[1], device=earliest.device).expand_as(earliest).contiguous()
        return earliest.int(), torch.searchsorted(earliest, position, right=True).int()


def group_heads(x: Tensor, num_kv_heads: int) -> Tensor:
    """Query heads that share a key/value head one below the other.

    Shapes: [batch, seq_len, heads, head_dim] -> contiguous [kv_heads * batch, heads / kv_heads * seq_len, head_dim]
    """
    batch, seq_len, _, head_dim = x.shape
    return x.unflatten(2, (num_kv_heads, -1)).permute(2, 0, 3, 1, 4).reshape(num_kv_heads * batch, -1, head_dim)


def ungroup_heads(x: Tensor, batch: int, seq_len: int) -> Tensor:
    """The inverse of `group_heads`."""
    x = x.view(-1, batch, x.shape[1] // seq_len, seq_len, x.shape[2])  # [kv_heads, batch, group, seq_len, head_dim]
    return x.permute(1, 3, 0, 2, 4).flatten(2, 3)


class ExplicitAttention(torch.autograd.Function):
    """Attention of short rows by batched products; by hand, since autograd would copy twice as much.

    With S = q k^T / sqrt(head_dim) + bias, P = softmax(S) and o = P v:
    dv = P^T do, dP = do v^T, dS = P * (dP - rowsum(P * dP)), dq = dS k / sqrt(head_dim), dk = dS^T q / sqrt(head_dim)
    """

    @staticmethod
    def forward(ctx, q, k, v, bias):
        batch, seq_len, _, head_dim = q.shape
        num_kv_heads = k.shape[2]
        q, k, v = (
            group_heads(q * head_dim**-0.5, num_kv_heads),
            group_heads(k, num_kv_heads),
            group_heads(v, num_kv_heads),
        )
        scores = torch.bmm(q, k.transpose(1, 2))  # [kv_heads * batch, group * seq_len, seq_len]
        scores.view(num_kv_heads, batch, -1, seq_len, seq_len).add_(bias)
        probs = scores.softmax(-1)
        ctx.save_for_backward(q, k, v, probs)
        ctx.shape = batch, seq_len
        return ungroup_heads(torch.bmm(probs, v), batch, seq_len)

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, probs = ctx.saved_tensors  # q carries 1 / sqrt(head_dim)
        batch, seq_len = ctx.shape
        grad_out = group_heads(grad_out, k.shape[0] // batch)
        grad_v = torch.bmm(probs.transpose(1, 2), grad_out)
        grad_scores = torch.bmm(grad_out, v.transpose(1, 2)).mul_(probs)
        grad_scores.addcmul_(probs, grad_scores.sum(-1, keepdim=True), value=-1)
        grad_q = torch.bmm(grad_scores, k).mul_(k.shape[-1] ** -0.5)
        grad_k = torch.bmm(grad_scores.transpose(1, 2), q)
        return *(ungroup_heads(x, batch, seq_len) for x in (grad_q, grad_k, grad_v)), None


# ---------------------------------------------------------------------------------------------------------------------
# Kernels (Dao 2023, arXiv 2307.08691)
# ---------------------------------------------------------------------------------------------------------------------
#
# A program owns a block of rows and walks the blocks of columns that any of them sees: masked at both ends, unmasked
# between. A head lies in pieces of D0 and D1 features, of which the first HEAD_DIM exist. Every output is written once,
# by one program: runs repeat bit for bit, and a row depends on nothing but its own tokens.

# (architecture, head_dim) -> forward (queries, keys), dk and dv (queries, keys), dq (queries, keys); of 16-bit types
TILES = {
    (90, 32): (Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
    (90, 64): (Tiles(128, 64, 8, 3), Tiles(32, 128, 8, 2), Tiles(128, 64, 8, 2)),
    (90, 80): (Tiles(128, 64, 8, 2), Tiles(32, 128, 8, 2), Tiles(128, 64, 8, 2)),
    (90, 96): (Tiles(128, 64, 8, 2), Tiles(32, 64, 8, 2), Tiles(128, 64, 8, 2)),
    (90, 128): (Tiles(128, 64, 8, 2), Tiles(32, 64, 8, 2), Tiles(128, 64, 8, 2)),
    (90, 256): (Tiles(128, 64, 8, 1), Tiles(64, 32, 8, 1), Tiles(128, 32, 8, 2)),
    (80, 32): (Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 2), Tiles(64, 64, 4, 2)),
    (80, 64): (Tiles(128, 64, 8, 3), Tiles(32, 128, 8, 2), Tiles(128, 64, 8, 2)),
    (80, 80): (Tiles(128, 64, 8, 2), Tiles(32, 64, 4, 2), Tiles(64, 64, 4, 2)),
    (80, 96): (Tiles(128, 64, 8, 2), Tiles(32, 64, 8, 2), Tiles(64, 32, 4, 2)),
    (80, 128): (Tiles(128, 32, 8, 2), Tiles(32, 64, 8, 2), Tiles(128, 32, 8, 2)),
    (80, 256): (Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(64, 32, 8, 1)),
}
DELTA_ROWS = 64
MAX_BATCH = 65535  # of a launch's third dimension
FLOAT32_TILES = Tiles(16, 16, 8, 1)  # exact products go without tensor cores, through registers


def tiles_of(head_dim: int, itemsize: int, arch: int) -> tuple[Tiles, Tiles, Tiles]:
    """For forward, dk and dv, dq."""
    return TILES[arch, padded_head(head_dim)] if itemsize == 2 else (FLOAT32_TILES,) * 3


@jit
def load_rows(
    base, rows, stride, ok, D: tl.constexpr, OFFSET: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr
):
    """[rows, D] from column OFFSET on, 0 where not ok and from HEAD_DIM on."""
    column = (OFFSET + tl.arange(0, D))[None, :]
    at = base + rows[:, None] * stride + column
    if OFFSET + D > HEAD_DIM:
        return tl.load(at, mask=ok[:, None] & (column < HEAD_DIM), other=0.0)
    if MASKED:
        return tl.load(at, mask=ok[:, None], other=0.0)
    return tl.load(at)


@jit
def store_rows(base, x, ok, D: tl.constexpr, OFFSET: tl.constexpr, HEAD_DIM: tl.constexpr):
    """x [rows, D] to column OFFSET and on, where ok and below HEAD_DIM. Shapes: base [rows, 1], ok [rows]"""
    column = (OFFSET + tl.arange(0, D))[None, :]
    mask = ok[:, None]
    if OFFSET + D > HEAD_DIM:
        mask = mask & (column < HEAD_DIM)
    tl.store(base + column, x.to(base.dtype.element_ty), mask=mask)


@jit
def forward_keys(
    acc0, acc1, largest, total, q0, q1, k_base, v_base, rows, earliest, start, stop, first, last, k_stride, v_stride,
    scale, BN: tl.constexpr, HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Blocks of keys [start, stop) of which [first, last) may be read: output, largest score and sum so far, base 2."""
    for c in range(start, stop, BN):
        columns = c + tl.arange(0, BN)
        ok = (columns >= first) & (columns < last)
        scores = tl.dot(q0, load_rows(k_base, columns, k_stride, ok, D0, 0, HEAD_DIM, MASKED).T, input_precision="ieee")
        if D1 > 0:
            k1 = load_rows(k_base, columns, k_stride, ok, D1, D0, HEAD_DIM, MASKED)
            scores = tl.dot(q1, k1.T, scores, input_precision="ieee")
        scores = scores * scale
        if MASKED:
            seen = (columns[None, :] >= earliest[:, None]) & (columns[None, :] <= rows[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)  # rows that have seen nothing yet
        probs = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(largest - shift)
        total = total * decay + tl.sum(probs, 1)
        probs = probs.to(q0.dtype)
        v0 = load_rows(v_base, columns, v_stride, ok, D0, 0, HEAD_DIM, MASKED)
        acc0 = tl.dot(probs, v0, acc0 * decay[:, None], input_precision="ieee")
        if D1 > 0:
            v1 = load_rows(v_base, columns, v_stride, ok, D1, D0, HEAD_DIM, MASKED)
            acc1 = tl.dot(probs, v1, acc1 * decay[:, None], input_precision="ieee")
        largest = new
    return acc0, acc1, largest, total


@jit
def flash_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, earliest_ptr, scale, q_batch, q_token, q_head, k_batch, k_token, k_head,
    v_batch, v_token, v_head, seq_len, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out [batch, seq_len, heads, head_dim], lse [batch, heads, seq_len] in base 2; grid: (blocks, heads, batch).

    scale: log2(e) / sqrt(head_dim).
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # those with the most keys first
    head, heads = tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    rows = block * BM + tl.arange(0, BM)
    ok = rows < seq_len
    q_base = q_ptr + batch * q_batch + head * q_head
    k_base = k_ptr + batch * k_batch + (head // GROUP) * k_head
    v_base = v_ptr + batch * v_batch + (head // GROUP) * v_head
    q0 = load_rows(q_base, rows, q_token, ok, D0, 0, HEAD_DIM, True)
    q1 = q0
    if D1 > 0:
        q1 = load_rows(q_base, rows, q_token, ok, D1, D0, HEAD_DIM, True)
    bounds = earliest_ptr + batch * seq_len
    earliest = tl.load(bounds + rows, mask=ok, other=seq_len)
    last = tl.minimum(block * BM + BM, seq_len)
    first = tl.load(bounds + block * BM)
    diagonal = (block * BM) // BN * BN
    whole = tl.minimum(tl.cdiv(tl.load(bounds + last - 1), BN) * BN, diagonal)  # from here on all rows see all keys
    acc0 = tl.zeros((BM, D0), tl.float32)
    acc1 = tl.zeros((BM, D1 if D1 > 0 else 16), tl.float32)
    largest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc0, acc1, largest, total = forward_keys(
        acc0, acc1, largest, total, q0, q1, k_base, v_base, rows, earliest, first // BN * BN, whole, first, last,
        k_token, v_token, scale, BN, HEAD_DIM, D0, D1, True,
    )  # fmt: skip
    acc0, acc1, largest, total = forward_keys(
        acc0, acc1, largest, total, q0, q1, k_base, v_base, rows, earliest, whole, diagonal, first, last,
        k_token, v_token, scale, BN, HEAD_DIM, D0, D1, False,
    )  # fmt: skip
    acc0, acc1, largest, total = forward_keys(
        acc0, acc1, largest, total, q0, q1, k_base, v_base, rows, earliest, diagonal, last, first, last,
        k_token, v_token, scale, BN, HEAD_DIM, D0, D1, True,
    )  # fmt: skip
    inverse = 1.0 / tl.where(ok, total, 1.0)
    at = out_ptr + ((batch * seq_len + rows)[:, None] * heads + head) * HEAD_DIM
    store_rows(at, acc0 * inverse[:, None], ok, D0, 0, HEAD_DIM)
    if D1 > 0:
        store_rows(at, acc1 * inverse[:, None], ok, D1, D0, HEAD_DIM)
    lse = largest + tl.log2(tl.where(ok, total, 1.0))
    tl.store(lse_ptr + (batch * heads + head) * seq_len + rows, lse, mask=ok)


@jit
def flash_delta(
    out_ptr, grad_ptr, delta_ptr, g_batch, g_token, g_head, seq_len, HEAD_DIM: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(out * grad): [batch, heads, seq_len]; grid: (blocks, heads, batch)."""
    head, heads, batch = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ok = rows < seq_len
    out = out_ptr + batch * seq_len * heads * HEAD_DIM + head * HEAD_DIM
    grad = grad_ptr + batch * g_batch + head * g_head
    stride = heads * HEAD_DIM
    product = load_rows(out, rows, stride, ok, D0, 0, HEAD_DIM, True).to(tl.float32)
    delta = tl.sum(product * load_rows(grad, rows, g_token, ok, D0, 0, HEAD_DIM, True).to(tl.float32), 1)
    if D1 > 0:
        product = load_rows(out, rows, stride, ok, D1, D0, HEAD_DIM, True).to(tl.float32)
        delta += tl.sum(product * load_rows(grad, rows, g_token, ok, D1, D0, HEAD_DIM, True).to(tl.float32), 1)
    tl.store(delta_ptr + (batch * heads + head) * seq_len + rows, delta, mask=ok)


@jit
def backward_queries(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, columns, after, q_base, g_base, lse_base, delta_base, start, stop, last,
    q_token, g_token, scale, BM: tl.constexpr, HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what blocks of queries [start, stop) below `last` give to the gradients of a block of keys and values."""
    for r in range(start, stop, BM):
        rows = r + tl.arange(0, BM)
        ok = rows < last
        q0 = load_rows(q_base, rows, q_token, ok, D0, 0, HEAD_DIM, MASKED)
        g0 = load_rows(g_base, rows, g_token, ok, D0, 0, HEAD_DIM, MASKED)
        q1, g1 = q0, g0
        scores = tl.dot(k0, q0.T, input_precision="ieee")  # [keys, queries]
        dp = tl.dot(v0, g0.T, input_precision="ieee")
        if D1 > 0:
            q1 = load_rows(q_base, rows, q_token, ok, D1, D0, HEAD_DIM, MASKED)
            g1 = load_rows(g_base, rows, g_token, ok, D1, D0, HEAD_DIM, MASKED)
            scores = tl.dot(k1, q1.T, scores, input_precision="ieee")
            dp = tl.dot(v1, g1.T, dp, input_precision="ieee")
        lse = tl.load(lse_base + rows, mask=ok, other=0.0)
        delta = tl.load(delta_base + rows, mask=ok, other=0.0)
        probs = tl.exp2(scores * scale - lse[None, :])
        if MASKED:
            seen = (columns[:, None] <= rows[None, :]) & (rows[None, :] < after[:, None])
            probs = tl.where(seen, probs, 0.0)
        ds = (probs * (dp - delta[None, :])).to(q0.dtype)
        probs = probs.to(q0.dtype)
        dv0 = tl.dot(probs, g0, dv0, input_precision="ieee")
        dk0 = tl.dot(ds, q0, dk0, input_precision="ieee")
        if D1 > 0:
            dv1 = tl.dot(probs, g1, dv1, input_precision="ieee")
            dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
    return dk0, dk1, dv0, dv1


@jit
def flash_backward_kv(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, after_ptr, scale, q_batch, q_token, q_head,
    k_batch, k_token, k_head, v_batch, v_token, v_head, g_batch, g_token, g_head, seq_len, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk, dv [batch, seq_len, kv_heads, head_dim]: a program owns a block of keys of one key/value head and visits the
    query heads of its group in order; grid: (blocks, kv_heads, batch). scale: log2(e) / sqrt(head_dim)."""
    block, kv_head, kv_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    columns = block * BN + tl.arange(0, BN)
    ok = columns < seq_len
    k_base = k_ptr + batch * k_batch + kv_head * k_head
    v_base = v_ptr + batch * v_batch + kv_head * v_head
    k0 = load_rows(k_base, columns, k_token, ok, D0, 0, HEAD_DIM, True)
    v0 = load_rows(v_base, columns, v_token, ok, D0, 0, HEAD_DIM, True)
    k1, v1 = k0, v0
    if D1 > 0:
        k1 = load_rows(k_base, columns, k_token, ok, D1, D0, HEAD_DIM, True)
        v1 = load_rows(v_base, columns, v_token, ok, D1, D0, HEAD_DIM, True)
    bounds = after_ptr + batch * seq_len
    after = tl.load(bounds + columns, mask=ok, other=0)
    last = tl.load(bounds + tl.minimum(block * BN + BN, seq_len) - 1)
    start = (block * BN) // BM * BM
    below = tl.cdiv(block * BN + BN - 1, BM) * BM  # from here on all queries are behind all keys
    below = tl.minimum(below, last)
    whole = tl.maximum(tl.load(bounds + block * BN) // BM * BM, below)  # and up to here they see all of them
    dk0 = tl.zeros((BN, D0), tl.float32)
    dv0 = tl.zeros((BN, D0), tl.float32)
    dk1 = tl.zeros((BN, D1 if D1 > 0 else 16), tl.float32)
    dv1 = tl.zeros((BN, D1 if D1 > 0 else 16), tl.float32)
    for i in range(0, GROUP):
        head = kv_head * GROUP + i
        q_base = q_ptr + batch * q_batch + head * q_head
        g_base = grad_ptr + batch * g_batch + head * g_head
        numbers = (batch * kv_heads * GROUP + head) * seq_len
        dk0, dk1, dv0, dv1 = backward_queries(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, columns, after, q_base, g_base, lse_ptr + numbers, delta_ptr + numbers,
            start, below, last, q_token, g_token, scale, BM, HEAD_DIM, D0, D1, True,
        )  # fmt: skip
        dk0, dk1, dv0, dv1 = backward_queries(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, columns, after, q_base, g_base, lse_ptr + numbers, delta_ptr + numbers,
            below, whole, last, q_token, g_token, scale, BM, HEAD_DIM, D0, D1, False,
        )  # fmt: skip
        dk0, dk1, dv0, dv1 = backward_queries(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, columns, after, q_base, g_base, lse_ptr + numbers, delta_ptr + numbers,
            whole, last, last, q_token, g_token, scale, BM, HEAD_DIM, D0, D1, True,
        )  # fmt: skip
    scale = scale * 0.6931471805599453  # ln 2: 1 / sqrt(head_dim)
    at = ((batch * seq_len + columns)[:, None] * kv_heads + kv_head) * HEAD_DIM
    store_rows(dk_ptr + at, dk0 * scale, ok, D0, 0, HEAD_DIM)
    store_rows(dv_ptr + at, dv0, ok, D0, 0, HEAD_DIM)
    if D1 > 0:
        store_rows(dk_ptr + at, dk1 * scale, ok, D1, D0, HEAD_DIM)
        store_rows(dv_ptr + at, dv1, ok, D1, D0, HEAD_DIM)


@jit
def backward_keys(
    dq0, dq1, q0, q1, g0, g1, lse, delta, k_base, v_base, rows, earliest, start, stop, first, last, k_token, v_token,
    scale, BN: tl.constexpr, HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what blocks of keys [start, stop) give to the gradients of a block of queries."""
    for c in range(start, stop, BN):
        columns = c + tl.arange(0, BN)
        ok = (columns >= first) & (columns < last)
        k0 = load_rows(k_base, columns, k_token, ok, D0, 0, HEAD_DIM, MASKED)
        k1 = k0
        scores = tl.dot(q0, k0.T, input_precision="ieee")
        v0 = load_rows(v_base, columns, v_token, ok, D0, 0, HEAD_DIM, MASKED)
        dp = tl.dot(g0, v0.T, input_precision="ieee")
        if D1 > 0:
            k1 = load_rows(k_base, columns, k_token, ok, D1, D0, HEAD_DIM, MASKED)
            scores = tl.dot(q1, k1.T, scores, input_precision="ieee")
            v1 = load_rows(v_base, columns, v_token, ok, D1, D0, HEAD_DIM, MASKED)
            dp = tl.dot(g1, v1.T, dp, input_precision="ieee")
        probs = tl.exp2(scores * scale - lse[:, None])
        if MASKED:
            seen = (columns[None, :] >= earliest[:, None]) & (columns[None, :] <= rows[:, None])
            probs = tl.where(seen, probs, 0.0)
        ds = (probs * (dp - delta[:, None])).to(q0.dtype)
        dq0 = tl.dot(ds, k0, dq0, input_precision="ieee")
        if D1 > 0:
            dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")
    return dq0, dq1


@jit
def flash_backward_q(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, earliest_ptr, scale, q_batch, q_token, q_head, k_batch,
    k_token, k_head, v_batch, v_token, v_head, g_batch, g_token, g_head, seq_len, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq [batch, seq_len, heads, head_dim]; grid: (blocks, heads, batch). scale: log2(e) / sqrt(head_dim)."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, heads = tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    rows = block * BM + tl.arange(0, BM)
    ok = rows < seq_len
    q_base = q_ptr + batch * q_batch + head * q_head
    g_base = grad_ptr + batch * g_batch + head * g_head
    k_base = k_ptr + batch * k_batch + (head // GROUP) * k_head
    v_base = v_ptr + batch * v_batch + (head // GROUP) * v_head
    q0 = load_rows(q_base, rows, q_token, ok, D0, 0, HEAD_DIM, True)
    g0 = load_rows(g_base, rows, g_token, ok, D0, 0, HEAD_DIM, True)
    q1, g1 = q0, g0
    if D1 > 0:
        q1 = load_rows(q_base, rows, q_token, ok, D1, D0, HEAD_DIM, True)
        g1 = load_rows(g_base, rows, g_token, ok, D1, D0, HEAD_DIM, True)
    numbers = (batch * heads + head) * seq_len + rows
    lse = tl.load(lse_ptr + numbers, mask=ok, other=0.0)
    delta = tl.load(delta_ptr + numbers, mask=ok, other=0.0)
    bounds = earliest_ptr + batch * seq_len
    earliest = tl.load(bounds + rows, mask=ok, other=seq_len)
    last = tl.minimum(block * BM + BM, seq_len)
    first = tl.load(bounds + block * BM)
    diagonal = (block * BM) // BN * BN
    whole = tl.minimum(tl.cdiv(tl.load(bounds + last - 1), BN) * BN, diagonal)
    dq0 = tl.zeros((BM, D0), tl.float32)
    dq1 = tl.zeros((BM, D1 if D1 > 0 else 16), tl.float32)
    dq0, dq1 = backward_keys(
        dq0, dq1, q0, q1, g0, g1, lse, delta, k_base, v_base, rows, earliest, first // BN * BN, whole, first, last,
        k_token, v_token, scale, BN, HEAD_DIM, D0, D1, True,
    )  # fmt: skip
    dq0, dq1 = backward_keys(
        dq0, dq1, q0, q1, g0, g1, lse, delta, k_base, v_base, rows, earliest, whole, diagonal, first, last,
        k_token, v_token, scale, BN, HEAD_DIM, D0, D1, False,
    )  # fmt: skip
    dq0, dq1 = backward_keys(
        dq0, dq1, q0, q1, g0, g1, lse, delta, k_base, v_base, rows, earliest, diagonal, last, first, last,
        k_token, v_token, scale, BN, HEAD_DIM, D0, D1, True,
    )  # fmt: skip
    scale = scale * 0.6931471805599453
    at = dq_ptr + ((batch * seq_len + rows)[:, None] * heads + head) * HEAD_DIM
    store_rows(at, dq0 * scale, ok, D0, 0, HEAD_DIM)
    if D1 > 0:
        store_rows(at, dq1 * scale, ok, D1, D0, HEAD_DIM)


class FlashAttention(torch.autograd.Function):
    """Attention by kernels; what is kept for the backward is q, k, v, the output and a number per query and head."""

    @staticmethod
    def forward(ctx, q, k, v, earliest, after):
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        batch, seq_len, heads, head_dim = q.shape
        tiles, _, _ = tiles_of(head_dim, q.itemsize, architecture(q.device.index))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(batch, heads, seq_len, dtype=torch.float32, device=q.device)
        if q.numel():
            d0, d1 = PIECES[padded_head(head_dim)]
            with torch.cuda.device_of(q):
                flash_forward[(-(-seq_len // tiles.rows), heads, batch)](
                    q, k, v, out, lse, earliest, LOG2_E * head_dim**-0.5, *q.stride()[:3], *k.stride()[:3],
                    *v.stride()[:3], seq_len, GROUP=heads // k.shape[2], HEAD_DIM=head_dim, D0=d0, D1=d1, BM=tiles.rows,
                    BN=tiles.columns, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
                )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, earliest, after)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        q, k, v, out, lse, earliest, after = ctx.saved_tensors
        grad = grad.contiguous()
        batch, seq_len, heads, head_dim = q.shape
        _, kv_tiles, q_tiles = tiles_of(head_dim, q.itemsize, architecture(q.device.index))
        delta = torch.empty(lse.shape, dtype=lse.dtype, device=lse.device)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        if not q.numel():
            return dq, dk, dv, None, None
        d0, d1 = PIECES[padded_head(head_dim)]
        strides = [n for x in (q, k, v, grad) for n in x.stride()[:3]]
        scale, kv_heads = LOG2_E * head_dim**-0.5, k.shape[2]
        with torch.cuda.device_of(q):
            flash_delta[(-(-seq_len // DELTA_ROWS), heads, batch)](
                out, grad, delta, *grad.stride()[:3], seq_len, HEAD_DIM=head_dim, D0=d0, D1=d1, BM=DELTA_ROWS
            )
            flash_backward_kv[(-(-seq_len // kv_tiles.columns), kv_heads, batch)](
                q, k, v, grad, lse, delta, dk, dv, after, scale, *strides, seq_len, GROUP=heads // kv_heads,
                HEAD_DIM=head_dim, D0=d0, D1=d1, BM=kv_tiles.rows, BN=kv_tiles.columns, num_warps=kv_tiles.num_warps,
                num_stages=kv_tiles.num_stages,
            )  # fmt: skip
            flash_backward_q[(-(-seq_len // q_tiles.rows), heads, batch)](
                q, k, v, grad, lse, delta, dq, earliest, scale, *strides, seq_len, GROUP=heads // kv_heads,
                HEAD_DIM=head_dim, D0=d0, D1=d1, BM=q_tiles.rows, BN=q_tiles.columns, num_warps=q_tiles.num_warps,
                num_stages=q_tiles.num_stages,
            )  # fmt: skip
        return dq, dk, dv, None, None


def check_inputs(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> None:
    """Raises ValueError for what neither the reference nor kernels can compute."""
    first_key = visible.first_key
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[:2] == k.shape[:2] == first_key.shape
    if not fits or q.shape[3] != k.shape[3] or not k.shape[2] or q.shape[2] % k.shape[2]:
        given = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, first_key {list(first_key.shape)}"
        wanted = "q [batch, seq_len, heads, head_dim], k and v with a divisor of heads, first_key [batch, seq_len]"
        raise ValueError(f"{given} do not fit: should be {wanted}")
    if q.dtype not in (*DTYPES, torch.float64) or not q.dtype == k.dtype == v.dtype:
        given = f"{q.dtype}, {k.dtype} and {v.dtype}"
        raise ValueError(f"q, k and v are {given}: should be the same, one of bfloat16, float16, float32 and float64")
    if first_key.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"first_key is {first_key.dtype}: should be int64 or int32")
    if not q.device == k.device == v.device == first_key.device:
        devices = f"{q.device}, {k.device}, {v.device} and {first_key.device}"
        raise ValueError(f"q, k, v and first_key lie on {devices}: one device, please")


def check_for_kernels(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError for heads that kernels do not take, and for sizes that they do not index: offsets within a row
    or over heads are 32 bits wide."""
    padded_head(q.shape[3])
    rows = {"q": q, "k": k, "v": v}
    spans = {name: max(x.shape[1] * x.stride(1), x.shape[2] * x.stride(2)) for name, x in rows.items()}
    spans["the output"] = q[:1].numel()
    for name, span in spans.items():
        if span >= 2**31:
            raise ValueError(f"a row of {name} spans {span:,} numbers, beyond 2^31: shorter rows, or fewer heads")
    if len(q) > MAX_BATCH:
        raise ValueError(f"{len(q):,} rows: attention kernels take {MAX_BATCH:,} at most")


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over the visible keys, differentiable.

    Grouped-query attention: query head h reads key/value head h // (num_heads // num_kv_heads).

    Shapes: q [batch, seq_len, num_heads, head_dim]; k, v [batch, seq_len, num_kv_heads, head_dim]
        -> [batch, seq_len, num_heads, head_dim]
    Raises: ValueError for shapes, dtypes or devices that do not fit, or are beyond what kernels take.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), eq. 1.
    """
    check_inputs(q, k, v, visible)
    if runs_triton(q):
        check_for_kernels(q, k, v)
        return FlashAttention.apply(q, k, v, *visible.bounds)
    if not q.is_cuda and q.shape[1] <= EXPLICIT_MAX_LEN:
        return ExplicitAttention.apply(q, k, v, visible.bias.to(q.dtype))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [batch, heads, seq_len, head_dim]
    enable_gqa = k.shape[1] != q.shape[1]
    if visible.is_plain_causal:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)
    else:  # never cuDNN: with a mask its gradients can be NaN (pytorch/pytorch#196678)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible.mask, enable_gqa=enable_gqa)
    return out.transpose(1, 2)
