"""From hidden states to log-probabilities and entropies without a [tokens, vocab] tensor.

The logits l = (h W^T + b) / temperature of one vocabulary shard exist for one chunk of tokens at a time, in the forward
and again in the backward, unless all tokens fit one chunk: then they are kept for the backward. A shard knows, per
token and with m the largest logit (a constant for the gradient),

    S = sum_j exp(l_j - m)        z = l_target        T = sum_j exp(l_j - m) (l_j - m)

from which, once the shards are merged (`parallel.tensor.vocab_parallel_logprobs`),

    log p(target) = z - m - log S        entropy = log S - T / S

Parts of a vocabulary a and b join, with M the larger of their m, as S = sum S_i exp(m_i - M) and
T = sum (T_i + (m_i - M) S_i) exp(m_i - M). Gradients, with e_j = exp(l_j - m):

    dS/dl_j = e_j        dT/dl_j = e_j (1 + l_j - m)        dz/dl_j = [j = target]

On a GPU training is three matrix products around two kernels that each read a chunk of logits once: one for
(m, S, z, T), one for the gradient; 16-bit factors are summed in float32 and logits never rounded. A forward without
gradient writes no logits at all in 16 bits: a program keeps a tile of them. In float32 it takes the path of training,
whose products are faster there, and equals it to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.launch import DTYPES, Tiles, architecture, differentiable_once, jit, runs_triton, tl, triton

CHUNK_ELEMENTS = 1 << 23  # logits that the backward holds at a time: 32 MiB in float32
BLOCK_ELEMENTS, BLOCK_ROWS = (
    1 << 18,
    256,
)  # of the forward, whose passes over a block stay in the cache; at least so many


# ---------------------------------------------------------------------------------------------------------------------
# Reference
# ---------------------------------------------------------------------------------------------------------------------


def chunk_logits(hidden, weight, bias, temperature, num_valid):
    """Logits of one chunk in at least float32 (float64 stays), padded vocabulary rows cut off: [chunk, num_valid]."""
    weight = weight[:num_valid]
    logits = torch.addmm(bias[:num_valid], hidden, weight.t()) if bias is not None else hidden @ weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.div_(temperature) if temperature != 1.0 else logits


class LinearLogprobs(torch.autograd.Function):
    """(max, S, z, T) of one vocabulary shard; several chunks recompute their logits in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, token_ids, bias, temperature, vocab_start, num_valid):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        largest, sum_exp, target, weighted = torch.zeros(4, len(hidden), dtype=dtype, device=hidden.device)
        if num_valid == 0:  # nothing but padding here
            largest.fill_(torch.finfo(dtype).min)
        chunk = max(1, CHUNK_ELEMENTS // max(num_valid, 1))
        ctx.kept = None
        if 0 < len(hidden) <= chunk:
            ctx.kept = torch.empty(len(hidden), num_valid, dtype=dtype, device=hidden.device)
        block = min(chunk, max(BLOCK_ROWS, BLOCK_ELEMENTS // max(num_valid, 1)))
        for i in range(0, len(hidden) if num_valid else 0, block):
            rows = slice(i, i + block)
            logits = chunk_logits(hidden[rows], weight, bias, temperature, num_valid)
            local_ids = token_ids[rows] - vocab_start  # [chunk], outside [0, num_valid) when another shard holds it
            is_here = (local_ids >= 0) & (local_ids < num_valid)
            picked = logits.gather(1, local_ids.clamp(0, num_valid - 1)[:, None])[:, 0]
            target[rows] = torch.where(is_here, picked, 0.0)
            largest[rows] = logits.amax(1)
            logits -= largest[rows, None]
            exp = logits.exp() if ctx.kept is None else torch.exp(logits, out=ctx.kept[rows])
            sum_exp[rows] = exp.sum(1)
            weighted[rows] = torch.linalg.vecdot(exp, logits)
        ctx.save_for_backward(hidden, weight, token_ids, bias, largest)
        ctx.settings = temperature, vocab_start, num_valid, chunk
        ctx.mark_non_differentiable(largest)
        ctx.set_materialize_grads(False)  # a loss without entropy has no gradient for T
        return largest, sum_exp, target, weighted

    @staticmethod
    @differentiable_once
    def backward(ctx, _, grad_sum_exp, grad_target, grad_weighted):
        hidden, weight, token_ids, bias, largest = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # becomes the gradient; a second backward would compute it again
        temperature, vocab_start, num_valid, chunk = ctx.settings
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=largest.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=largest.dtype) if ctx.needs_input_grad[3] else None
        for i in range(0, len(hidden) if num_valid else 0, chunk):
            rows = slice(i, i + chunk)
            exp = kept
            if exp is None:
                exp = chunk_logits(hidden[rows], weight, bias, temperature, num_valid).sub_(largest[rows, None]).exp_()
            # with e = exp(l - m): dS/dl = e, dT/dl = e + e log e, dz/dl = 1 at the target
            weighted = (
                None if grad_weighted is None else torch.xlogy(exp, exp).add_(exp).mul_(grad_weighted[rows, None])
            )
            grad = exp.zero_() if grad_sum_exp is None else exp.mul_(grad_sum_exp[rows, None])
            if weighted is not None:
                grad += weighted
            if grad_target is not None:
                local_ids = token_ids[rows] - vocab_start
                is_here = (local_ids >= 0) & (local_ids < num_valid)
                grad_here = torch.where(is_here, grad_target[rows], 0.0)
                grad.scatter_add_(1, local_ids.clamp(0, num_valid - 1)[:, None], grad_here[:, None])
            if temperature != 1.0:
                grad /= temperature
            if grad_bias is not None:
                grad_bias[:num_valid] += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight[:num_valid]
            if grad_weight is not None:
                grad_weight[:num_valid] += grad.t() @ hidden[rows]
            del exp, weighted, grad  # before the next chunk's
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, None, grad_bias, None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------

MAX_SIZE = 1 << 30  # of a dimension: kernels count rows, columns and features in int32, and offsets in int64
CHUNK_ROWS = 4096  # more would not make the products faster
WORKSPACE_BYTES = 1 << 30  # a chunk's logits in float32 and, beside them, their gradient in 16 bits
SUM_ELEMENTS = 1 << 26  # of the weight's gradient that are computed in float32 and added at a time: 256 MiB
TILES = {90: Tiles(128, 128, 8, 4), 80: Tiles(128, 128, 8, 3)}  # of the fused forward, by architecture
DEPTH = 64  # features of a tile of inputs
SLICE_BLOCKS = 16  # blocks of columns of a program; fixed, so that a row's sums do not depend on the batch
GROUP_BLOCKS = 16  # blocks of rows that are worked on together: they and the weights stay in the L2 cache
ROW_TILES = Tiles(1, 4096, 8, 1)  # of the kernels that read logits from memory


@jit
def join(largest, sum_exp, weighted, other_largest, other_sum_exp, other_weighted):
    """(m, S, T) of two parts of a vocabulary together; a part of nothing has the lowest number as m."""
    both = tl.maximum(largest, other_largest)
    shift, other_shift = largest - both, other_largest - both
    scale, other_scale = tl.exp(shift), tl.exp(other_shift)
    weighted = (weighted + shift * sum_exp) * scale
    other_weighted = (other_weighted + other_shift * other_sum_exp) * other_scale
    return both, sum_exp * scale + other_sum_exp * other_scale, weighted + other_weighted


@jit
def join_block(largest, sum_exp, target, weighted, logits, columns, targets, num_valid):
    """(m, S, z, T) of each row together with a block of its logits. Shapes: [rows] but [rows, columns], [columns]"""
    target += tl.sum(tl.where(columns[None, :] == targets[:, None], logits, 0.0), 1)
    logits = tl.where((columns < num_valid)[None, :], logits, -3.4e38)  # finite, so that exp(l - m) (l - m) is 0
    block_largest = tl.max(logits, 1)
    shifted = logits - block_largest[:, None]
    exp = tl.exp(shifted)
    block_sum, block_weighted = tl.sum(exp, 1), tl.sum(exp * shifted, 1)
    largest, sum_exp, weighted = join(largest, sum_exp, weighted, block_largest, block_sum, block_weighted)
    return largest, sum_exp, target, weighted


@jit
def store_statistics(out_ptr, stride, is_row, largest, sum_exp, target, weighted):
    tl.store(out_ptr, largest, mask=is_row)
    tl.store(out_ptr + stride, sum_exp, mask=is_row)
    tl.store(out_ptr + 2 * stride, target, mask=is_row)
    tl.store(out_ptr + 3 * stride, weighted, mask=is_row)


@jit
def local_targets(ids_ptr, rows, is_row, vocab_start, num_valid):
    """The column of each row's token in this shard, -1 where another shard holds it."""
    ids = tl.load(ids_ptr + rows, mask=is_row, other=-1).to(tl.int64) - vocab_start
    return tl.where((ids >= 0) & (ids < num_valid), ids, -1).to(tl.int32)


@jit
def add_bias(products, bias_ptr, columns, num_valid):
    if bias_ptr is not None:
        products += tl.load(bias_ptr + columns, mask=columns < num_valid, other=0.0).to(tl.float32)[None, :]
    return products


@jit
def fused_statistics_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,  # or None
    ids_ptr,
    parts_ptr,  # [slices, 4, num_rows]: m, S, z, T of each slice of the vocabulary
    num_rows,
    num_valid,
    width,
    hidden_stride,
    weight_stride,
    vocab_start,
    scale,  # 1 / temperature
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Each program: a block of rows and a slice of the vocabulary, a tile of logits at a time."""
    num_blocks, num_slices = tl.cdiv(num_rows, ROWS), tl.cdiv(num_valid, SLICE)
    group, place = tl.program_id(0) // (GROUP * num_slices), tl.program_id(0) % (GROUP * num_slices)
    group_size = tl.minimum(num_blocks - group * GROUP, GROUP)
    rows = (group * GROUP + place % group_size) * ROWS + tl.arange(0, ROWS)
    part = place // group_size
    is_row = rows < num_rows
    targets = local_targets(ids_ptr, rows, is_row, vocab_start, num_valid)
    hidden_rows = hidden_ptr + rows[:, None].to(tl.int64) * hidden_stride

    largest = tl.full((ROWS,), -3.4e38, tl.float32)
    zero = tl.zeros((ROWS,), tl.float32)
    sum_exp, target, weighted = zero, zero, zero
    for start in range(part * SLICE, tl.minimum((part + 1) * SLICE, num_valid), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_column = columns < num_valid
        weight_rows = weight_ptr + columns[:, None].to(tl.int64) * weight_stride
        logits = add_bias(tl.zeros((ROWS, COLUMNS), tl.float32), bias_ptr, columns, num_valid)
        for k in range(0, width, DEPTH):
            features = k + tl.arange(0, DEPTH)
            is_feature = (features < width)[None, :]
            h = tl.load(hidden_rows + features[None, :], mask=is_row[:, None] & is_feature, other=0.0)
            w = tl.load(weight_rows + features[None, :], mask=is_column[:, None] & is_feature, other=0.0)
            logits = tl.dot(h, tl.trans(w), logits)
        largest, sum_exp, target, weighted = join_block(
            largest, sum_exp, target, weighted, logits * scale, columns, targets, num_valid
        )
    stride = tl.cast(num_rows, tl.int64)
    store_statistics(parts_ptr + part * 4 * stride + rows, stride, is_row, largest, sum_exp, target, weighted)


@jit
def merge_slices_kernel(parts_ptr, out_ptr, num_rows, num_slices, ROWS: tl.constexpr):
    """[slices, 4, num_rows] -> [4, num_rows], slice by slice."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    stride = tl.cast(num_rows, tl.int64)
    largest = tl.full((ROWS,), -3.4e38, tl.float32)
    zero = tl.zeros((ROWS,), tl.float32)
    sum_exp, target, weighted = zero, zero, zero
    for part in range(num_slices):
        ptr = parts_ptr + part * 4 * stride + rows
        other_largest = tl.load(ptr, mask=is_row, other=0.0)
        other_sum_exp = tl.load(ptr + stride, mask=is_row, other=0.0)
        target += tl.load(ptr + 2 * stride, mask=is_row, other=0.0)
        other_weighted = tl.load(ptr + 3 * stride, mask=is_row, other=0.0)
        largest, sum_exp, weighted = join(largest, sum_exp, weighted, other_largest, other_sum_exp, other_weighted)
    store_statistics(out_ptr + rows, stride, is_row, largest, sum_exp, target, weighted)


@jit
def load_logits(products_ptr, bias_ptr, rows, is_row, columns, stride, num_valid, scale):
    """Logits from products h W^T. The mask is that of whole rows, whose loads are wide: undefined beyond num_valid."""
    offsets = rows[:, None].to(tl.int64) * stride + columns[None, :]
    products = tl.load(products_ptr + offsets, mask=is_row[:, None] & (columns < stride)[None, :], other=0.0)
    return add_bias(products, bias_ptr, columns, num_valid) * scale


@jit
def row_statistics_kernel(
    products_ptr,  # [num_rows, num_valid] with a stride
    bias_ptr,  # or None
    ids_ptr,
    out_ptr,  # [4, num_rows] with a stride: m, S, z, T
    num_rows,
    num_valid,
    stride,
    out_stride,
    vocab_start,
    scale,  # 1 / temperature
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each program: some rows, a block of columns at a time."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    targets = local_targets(ids_ptr, rows, is_row, vocab_start, num_valid)
    largest = tl.full((ROWS,), -3.4e38, tl.float32)
    zero = tl.zeros((ROWS,), tl.float32)
    sum_exp, target, weighted = zero, zero, zero
    for start in range(0, num_valid, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        logits = load_logits(products_ptr, bias_ptr, rows, is_row, columns, stride, num_valid, scale)
        largest, sum_exp, target, weighted = join_block(
            largest, sum_exp, target, weighted, logits, columns, targets, num_valid
        )
    store_statistics(out_ptr + rows, tl.cast(out_stride, tl.int64), is_row, largest, sum_exp, target, weighted)


@jit
def row_gradient_kernel(
    products_ptr,  # [num_rows, num_valid] with a stride
    bias_ptr,  # or None
    ids_ptr,
    largest_ptr,  # [num_rows]
    grads_ptr,  # [3, num_rows] with a stride: of S, z, T
    out_ptr,  # of the products, in the inputs' dtype, or in their place
    num_rows,
    num_valid,
    stride,  # of products and of their gradient
    grads_stride,
    vocab_start,
    scale,  # 1 / temperature
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each program: a block of rows and columns."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_row = rows < num_rows
    targets = local_targets(ids_ptr, rows, is_row, vocab_start, num_valid)
    largest = tl.load(largest_ptr + rows, mask=is_row, other=0.0)
    grad_sum_exp = tl.load(grads_ptr + rows, mask=is_row, other=0.0)
    grad_target = tl.load(grads_ptr + tl.cast(grads_stride, tl.int64) + rows, mask=is_row, other=0.0)
    grad_weighted = tl.load(grads_ptr + 2 * tl.cast(grads_stride, tl.int64) + rows, mask=is_row, other=0.0)
    logits = load_logits(products_ptr, bias_ptr, rows, is_row, columns, stride, num_valid, scale)
    shifted = logits - largest[:, None]
    grad = tl.exp(shifted) * (grad_sum_exp[:, None] + grad_weighted[:, None] * (1.0 + shifted))
    grad += tl.where(columns[None, :] == targets[:, None], grad_target[:, None], 0.0)
    offsets = rows[:, None].to(tl.int64) * stride + columns[None, :]
    is_inside = is_row[:, None] & (columns < stride)[None, :]
    tl.store(out_ptr + offsets, (grad * scale).to(out_ptr.dtype.element_ty), mask=is_inside)


def fused_statistics(hidden, weight, token_ids, bias, temperature, vocab_start, num_valid) -> Tensor:
    """(m, S, z, T) of each row from 16-bit inputs, without gradient: [4, tokens]."""
    tiles = TILES[architecture(hidden.device.index)]
    slice_size, num_rows = SLICE_BLOCKS * tiles.columns, len(hidden)
    num_slices = triton.cdiv(num_valid, slice_size)
    parts = torch.empty(num_slices, 4, num_rows, dtype=torch.float32, device=hidden.device)
    fused_statistics_kernel[triton.cdiv(num_rows, tiles.rows) * num_slices,](
        hidden,
        weight,
        bias,
        token_ids,
        parts,
        num_rows,
        num_valid,
        hidden.shape[1],
        hidden.stride(0),
        weight.stride(0),
        vocab_start,
        1 / temperature,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=DEPTH,
        SLICE=slice_size,
        GROUP=GROUP_BLOCKS,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    out = torch.empty(4, num_rows, dtype=torch.float32, device=hidden.device)
    merge_slices_kernel[triton.cdiv(num_rows, 128),](parts, out, num_rows, num_slices, ROWS=128, num_warps=4)
    return out


def float32_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, summed and returned in float32; CUDA alone does so without float32 copies of the factors."""
    if a.dtype != torch.float32 and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


# ---------------------------------------------------------------------------------------------------------------------
# Autograd and the public function
# ---------------------------------------------------------------------------------------------------------------------


def chunk_rows(stride: int, dtype: torch.dtype) -> int:
    """Rows whose logits exist at a time, `stride` in each, and in 16 bits their gradient beside them."""
    itemsize = 4 if dtype == torch.float32 else 4 + dtype.itemsize
    return min(CHUNK_ROWS, max(WORKSPACE_BYTES // (itemsize * stride), 1))


class KernelLinearLogprobs(torch.autograd.Function):
    """`LinearLogprobs` with kernels; what one chunk holds is kept for the backward, several are computed again."""

    @staticmethod
    def forward(ctx, hidden, weight, token_ids, bias, temperature, vocab_start, num_valid):
        num_rows = len(hidden)
        statistics = torch.empty(4, num_rows, dtype=torch.float32, device=hidden.device)
        stride = triton.cdiv(num_valid, 64) * 64  # whole lines of the cache, whatever the vocabulary
        chunk = min(num_rows, chunk_rows(stride, hidden.dtype))
        workspace = torch.empty(chunk, stride, dtype=torch.float32, device=hidden.device)
        for i in range(0, num_rows, chunk):
            products = workspace[: num_rows - i, :num_valid]
            float32_product(hidden[i : i + chunk], weight[:num_valid].t(), out=products)
            row_statistics_kernel[triton.cdiv(len(products), ROW_TILES.rows),](
                products,
                bias,
                token_ids[i:],
                statistics[:, i:],
                len(products),
                num_valid,
                stride,
                num_rows,
                vocab_start,
                1 / temperature,
                ROWS=ROW_TILES.rows,
                COLUMNS=ROW_TILES.columns,
                num_warps=ROW_TILES.num_warps,
            )
        largest, sum_exp, target, weighted = statistics
        ctx.kept = workspace if chunk == num_rows else None
        ctx.save_for_backward(hidden, weight, token_ids, bias, largest)
        ctx.settings = temperature, vocab_start, num_valid, chunk, stride
        ctx.mark_non_differentiable(largest)
        ctx.set_materialize_grads(False)
        return largest, sum_exp, target, weighted

    @staticmethod
    @differentiable_once
    def backward(ctx, _, *grads):
        hidden, weight, token_ids, bias, largest = ctx.saved_tensors
        temperature, vocab_start, num_valid, chunk, stride = ctx.settings
        kept, ctx.kept = ctx.kept, None  # becomes the gradient; a second backward would compute it again
        workspace, device = kept, hidden.device
        if kept is None:
            workspace = torch.empty(chunk, stride, dtype=torch.float32, device=device)
        out = workspace
        if hidden.dtype != torch.float32:
            out = torch.empty(chunk, stride, dtype=hidden.dtype, device=device)
        grads = torch.stack([torch.zeros_like(largest) if grad is None else grad for grad in grads])  # [3, tokens]
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[3] else None
        step = max(SUM_ELEMENTS // (64 * hidden.shape[1]), 1) * 64
        for i in range(0, len(hidden), chunk):
            some = hidden[i : i + chunk]
            products, grad = (x[: len(some), :num_valid] for x in (workspace, out))
            if kept is None:
                float32_product(some, weight[:num_valid].t(), out=products)
            row_gradient_kernel[triton.cdiv(len(some), ROW_TILES.rows), triton.cdiv(stride, ROW_TILES.columns)](
                products,
                bias,
                token_ids[i:],
                largest[i:],
                grads[:, i:],
                grad,
                len(some),
                num_valid,
                stride,
                len(hidden),
                vocab_start,
                1 / temperature,
                ROWS=ROW_TILES.rows,
                COLUMNS=ROW_TILES.columns,
                num_warps=ROW_TILES.num_warps,
            )
            if grad_bias is not None:
                grad_bias[:num_valid] += grad.sum(0, dtype=torch.float32)
            if grad_hidden is not None:
                grad_hidden[i : i + chunk] = float32_product(grad, weight[:num_valid])
            for j in range(0, num_valid if grad_weight is not None else 0, step):
                grad_weight[:num_valid][j : j + step] += float32_product(grad[:, j : j + step].t(), some)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, None, grad_bias, None, None, None


def check_inputs(hidden, weight, token_ids, bias, temperature) -> None:
    """Raises ValueError for what neither the reference nor kernels can compute."""
    named = {"hidden": hidden, "weight": weight, "token_ids": token_ids} | ({} if bias is None else {"bias": bias})
    shapes = {name: list(x.shape) for name, x in named.items()}
    fits = hidden.ndim == weight.ndim == 2 and token_ids.ndim == 1 and hidden.shape[1] == weight.shape[1]
    if not fits or len(token_ids) != len(hidden) or (bias is not None and bias.shape != weight.shape[:1]):
        expected = "hidden [tokens, n], weight [vocab, n], token_ids [tokens], bias [vocab]"
        raise ValueError(f"shapes {shapes} do not fit: should be {expected}")
    if len({x.device for x in named.values()}) > 1:
        raise ValueError(f"tensors on several devices: { {name: str(x.device) for name, x in named.items()} }")
    floating = [x for x in (hidden, weight, bias) if x is not None]
    if len({x.dtype for x in floating}) > 1 or hidden.dtype not in (*DTYPES, torch.float64):
        given = {name: str(x.dtype) for name, x in named.items() if name != "token_ids"}
        raise ValueError(f"dtypes {given}: should be the same, one of bfloat16, float16, float32 and float64")
    if token_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"token_ids are {token_ids.dtype}: should be int64 or int32")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: should be above 0")


def linear_logprobs(hidden, weight, token_ids, bias=None, temperature=1.0, vocab_start=0, vocab_size=None):
    """What one vocabulary shard knows of each token's log-probability and entropy, differentiable.

    Args: vocab_start: first token id of this shard. vocab_size: ids of the whole vocabulary; rows of the shard beyond
        it are padding and take no part (default: no padding). A shard of padding alone has the smallest number as max.
    Shapes: hidden [tokens, hidden_size], weight [vocab / tp, hidden_size], bias [vocab / tp], token_ids [tokens]
    Returns: (max, sum of exp, target logit, weighted sum), each [tokens], in float32 or float64; the target logit is 0
        where another shard holds the token; no gradient flows through max.
    Raises: ValueError for shapes, dtypes, devices or a temperature that do not fit, or are beyond what kernels index.
    """
    check_inputs(hidden, weight, token_ids, bias, temperature)
    num_valid = weight.shape[0] if vocab_size is None else max(0, min(len(weight), vocab_size - vocab_start))
    inputs = (hidden, weight, token_ids, bias, temperature, vocab_start, num_valid)
    if not runs_triton(hidden) or num_valid == 0 or hidden.numel() == 0:
        return LinearLogprobs.apply(*inputs)
    if max(*hidden.shape, *weight.shape) > MAX_SIZE:
        shapes = f"hidden {list(hidden.shape)}, weight {list(weight.shape)}"
        raise ValueError(f"{shapes}: kernels count up to {MAX_SIZE} rows and columns; KERNELS=reference takes more")
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
    inputs = (hidden, weight, token_ids.contiguous(), bias if bias is None else bias.contiguous(), *inputs[4:])
    with torch.cuda.device_of(hidden):
        trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
        if trains or hidden.dtype == torch.float32:
            return KernelLinearLogprobs.apply(*inputs)
        return tuple(fused_statistics(*inputs))
