"""A head's logit of one id per row, by a row of its weight: no product with the vocabulary, and no gradient.

It is all that ILQL's loss needs of the target Q heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.launch import DTYPES, Tiles, jit, runs_triton, tl

TILES = Tiles(8, 512, 4, 1)  # rows and features of a block


def target_logits_reference(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Tensor, vocab_start: int
) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    local_ids = token_ids - vocab_start
    is_here = (local_ids >= 0) & (local_ids < len(weight))
    local_ids = local_ids.where(is_here, 0)
    logits = torch.linalg.vecdot(hidden.to(dtype), weight[local_ids].to(dtype)) + bias[local_ids].to(dtype)
    return logits.where(is_here, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Kernel
# ---------------------------------------------------------------------------------------------------------------------


@jit
def target_logits_kernel(
    hidden_ptr, weight_ptr, bias_ptr, ids_ptr, out_ptr, hidden_stride, weight_stride, num_rows, width, vocab_start,
    num_local, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [rows]; grid: rows, ROWS to a program. Rows of the weight that no id names are not read."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    local_id = tl.load(ids_ptr + row, mask=row < num_rows, other=-1).to(tl.int64) - vocab_start
    is_here = (row < num_rows) & (local_id >= 0) & (local_id < num_local)
    hidden_row = hidden_ptr + row[:, None] * hidden_stride
    weight_row = weight_ptr + local_id[:, None] * weight_stride
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        ok = is_here[:, None] & (column < width)
        h = tl.load(hidden_row + column, mask=ok, other=0.0).to(tl.float32)
        w = tl.load(weight_row + column, mask=ok, other=0.0).to(tl.float32)
        total += tl.sum(h * w, 1)
    total += tl.load(bias_ptr + local_id, mask=is_here, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, total, mask=row < num_rows)


def target_logits_by_kernel(hidden, weight, token_ids, bias, vocab_start) -> Tensor:
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
    (num_rows, width), out = hidden.shape, torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    if num_rows:
        with torch.cuda.device_of(hidden):
            target_logits_kernel[(-(-num_rows // TILES.rows),)](
                hidden, weight, bias.contiguous(), token_ids.contiguous(), out, hidden.stride(0), weight.stride(0),
                num_rows, width, vocab_start, len(weight), ROWS=TILES.rows, COLUMNS=TILES.columns,
                num_warps=TILES.num_warps,
            )  # fmt: skip
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Public function
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def target_logits(hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Tensor, vocab_start: int = 0) -> Tensor:
    """weight[id] . hidden + bias[id] of each row's id, 0 where another shard of the vocabulary holds it; no gradient.

    Args: vocab_start: first token id of this shard.
    Shapes: hidden [tokens, n], weight [vocab / tp, n], token_ids [tokens], bias [vocab / tp] -> [tokens], in float32
        or float64
    Raises: ValueError if shapes, dtypes or devices do not fit.
    """
    fits = hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1]
    if not fits or token_ids.shape != hidden.shape[:1] or bias.shape != weight.shape[:1]:
        given = f"{list(hidden.shape)}, {list(weight.shape)}, {list(token_ids.shape)}, {list(bias.shape)}"
        raise ValueError(f"shapes {given}: should be hidden [tokens, n], weight [vocab, n], ids [tokens], bias [vocab]")
    if not hidden.dtype == weight.dtype == bias.dtype or hidden.dtype not in (*DTYPES, torch.float64):
        given = f"{hidden.dtype}, {weight.dtype}, {bias.dtype}"
        raise ValueError(f"dtypes {given}: should be the same, one of bfloat16, float16, float32 and float64")
    if token_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"token_ids are {token_ids.dtype}: should be int64 or int32")
    if not hidden.device == weight.device == bias.device == token_ids.device:
        raise ValueError(f"tensors on {hidden.device}, {weight.device}, {bias.device}, {token_ids.device}: one, please")
    if runs_triton(hidden):
        return target_logits_by_kernel(hidden, weight, token_ids, bias, vocab_start)
    return target_logits_reference(hidden, weight, token_ids, bias, vocab_start)
