"""Drawing tokens by the inverse of the cumulative distribution, of one shard of the vocabulary.

The weight of an id is exp(logit / temperature - largest). Weights are summed in float64 by blocks of 128 ids; a prefix
sum over all blocks finds the block that a uniform number falls into, another one the id inside it. What has to pass
between shards, the largest logit and the sums of blocks, is handed out and taken in, and so is the same for any number
of shards: `parallel.generation.sample_tokens` communicates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import Tiles, jit, runs_triton, tl

BLOCK = 128  # ids whose weights are summed first; a shard holds whole blocks


def largest_logits(logits: Tensor, num_ids: int) -> Tensor:
    """Of every row's ids below num_ids, -inf where there are none: [n]"""
    return logits[:, :num_ids].amax(1) if num_ids > 0 else logits.new_full((len(logits),), -torch.inf)


class Weights:
    """What the ids of a shard are drawn in proportion to: the reference, which computes them once and keeps them.

    Args: temperature: divides the logits; 0 stands for 1. largest: of every row over all shards; without it this
        shard's, for the caller to reduce in place before anything else is asked for.
    Shapes: logits [n, vocab / shards] float32 at least, -inf where an id does not exist; largest [n]
    """

    def __init__(self, logits: Tensor, temperature: float, largest: Tensor | None = None):
        check(logits)
        self.logits = logits / temperature if temperature not in (0.0, 1.0) else logits
        self.largest = self.logits.amax(1) if largest is None else largest
        self.num_ids, self._kept = logits.shape[1], None

    @property
    def kept(self) -> Tensor:
        """[n, vocab / shards], 0 where an id has been dropped"""
        if self._kept is None:
            self._kept = (self.logits - self.largest[:, None]).exp_()
            self._kept[:, self.num_ids :].fill_(0)
        return self._kept

    def drop_ids(self, num_ids: int) -> None:
        """Ids of the shard from num_ids on weigh nothing any more, and `largest` is that of the others: of this shard,
        for the caller to reduce in place before anything else is asked for."""
        self.num_ids, self._kept = max(num_ids, 0), None
        self.largest = largest_logits(self.logits, num_ids)

    def nats_above(self, largest: Tensor) -> Tensor:
        """How far another `largest` lies above this one: [n], float64"""
        return largest.double() - self.largest

    def drop_below(self, border: Tensor) -> None:
        """What weighs less than its row's border [n] weighs nothing any more."""
        self._kept = self.kept.where(self.kept >= border[:, None], 0)

    def sum_blocks(self) -> Tensor:
        """Float64 [n, blocks of the shard]"""
        return self.kept.view(len(self.kept), -1, BLOCK).sum(2, dtype=torch.float64)

    def border(self, top_k: int, mass: Tensor | None) -> Tensor:
        """The least weight [n] among the top_k largest (0: all) that are also needed to make up `mass` [n] (None: all).

        Ties at the border stay with it. To be asked of the whole vocabulary.
        """
        ordered = self.kept.sort(1, descending=True).values
        border = torch.zeros_like(ordered[:, 0])
        if 0 < top_k < ordered.shape[1]:
            border = ordered[:, top_k - 1]
        if mass is not None:
            before = ordered.cumsum(1, dtype=torch.float64) - ordered  # mass of the likelier ids
            num_kept = (before < mass[:, None]).sum(1)  # at least 1
            border = torch.maximum(border, ordered.gather(1, num_kept[:, None] - 1)[:, 0])
        return border

    def draw(self, prefix: Tensor, noise: Tensor, total: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """One id per row, and its log-probability when the weights of all ids sum to `total`.

        Right where the id's block lies in this shard; elsewhere the numbers mean nothing.

        Args: start: the shard's first id.
        Shapes: prefix [n, all blocks] sums of `sum_blocks` up to each one; noise in [0, 1), total [n]; all float64
            -> [n] of the whole vocabulary's ids, [n] in the logits' dtype
        """
        n, num_ids = self.logits.shape
        point = noise * prefix[:, -1]
        block = (prefix <= point[:, None]).sum(1).clamp(max=prefix.shape[1] - 1)  # [n]
        point = point - F.pad(prefix, (1, 0)).gather(1, block[:, None])[:, 0]
        blocks = self.kept.view(n, -1, BLOCK)
        local_block = (block - start // BLOCK).clamp(0, blocks.shape[1] - 1)
        inside = blocks[torch.arange(n, device=block.device), local_block]  # [n, BLOCK]
        offset = (inside.cumsum(1, dtype=torch.float64) <= point[:, None]).sum(1)
        last_kept = BLOCK - 1 - (inside > 0).flip(1).int().argmax(1)  # rounding must not step past it
        token_ids = block * BLOCK + torch.minimum(offset, last_kept)
        return token_ids, self.logprobs(token_ids - start, total)

    def logprobs(self, local_ids: Tensor, total: Tensor) -> Tensor:
        picked = self.logits.gather(1, local_ids.clamp(0, self.logits.shape[1] - 1)[:, None])[:, 0] - self.largest
        return (picked - total.log()).to(self.logits.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------
#
# Nothing as large as the logits is written: each kernel computes the weights that it needs, all by the same lines, so
# that they are the same. Sums of weights are in float64, weights in float32.

TILES = {
    "sum": Tiles(16, BLOCK, 4, 1),  # blocks of a program
    "border": Tiles(1, 4096, 8, 1),  # rows of a program, ids at a time
    "draw": Tiles(1, BLOCK, 4, 1),  # rows of a program
}
NO_LIMIT = 2**31 - 1
ONE = 0x3F800000  # the bits of 1.0, the largest weight; positive numbers are ordered as their bits are
HALVINGS = 30  # of the numbers from 0 to ONE, until one is left


@jit
def weigh(logits_ptr, largest_ptr, border_ptr, rows, ids, ok, stride, temperature, num_ids, HAS_BORDER: tl.constexpr):
    """Weights [rows, ids], 0 where not ok or dropped. Shapes: rows [rows, 1] that exist, ids [1 or rows, ids]"""
    logits = tl.load(logits_ptr + rows.to(tl.int64) * stride + ids, mask=ok, other=float("-inf"))
    largest = tl.load(largest_ptr + rows)
    weights = tl.exp(tl.div_rn(logits, temperature) - tl.div_rn(largest, temperature))
    weights = tl.where(ok & (ids < num_ids), weights, 0.0)
    if HAS_BORDER:
        weights = tl.where(weights >= tl.load(border_ptr + rows), weights, 0.0)
    return weights


@jit
def sum_kernel(
    logits_ptr, largest_ptr, border_ptr, sums_ptr, stride, temperature, num_ids, num_rows, num_blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, HAS_BORDER: tl.constexpr,
):  # fmt: skip
    """sums [rows, blocks]; grid: the blocks of all rows, BLOCKS to a program."""
    at = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    ok = at < num_rows * num_blocks
    rows = tl.where(ok, at // num_blocks, 0)[:, None]
    ids = (at % num_blocks)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    weights = weigh(
        logits_ptr, largest_ptr, border_ptr, rows, ids, ok[:, None], stride, temperature, num_ids, HAS_BORDER
    )
    tl.store(sums_ptr + at, tl.sum(weights.to(tl.float64), 1), mask=ok)


@jit
def border_kernel(
    logits_ptr, largest_ptr, mass_ptr, border_ptr, stride, temperature, num_ids, num_rows, vocab, top_k,
    ROWS: tl.constexpr, IDS: tl.constexpr, HAS_MASS: tl.constexpr, ONE: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """border [rows]: the least number t above which lie fewer than top_k weights and less than `mass` of them.

    Both hold for every number above the right one and for none below it, and only a weight, or 0, can be it: so its
    bits are found by halving, and are those that a sort would find. grid: rows, ROWS to a program.
    """
    given = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(given, num_rows - 1)
    low = tl.full((ROWS,), -1, tl.int32)  # too small, as is every number up to it
    high = tl.full((ROWS,), ONE, tl.int32)  # large enough
    for _ in range(HALVINGS):
        middle = low + (high - low + 1) // 2
        border = middle.to(tl.float32, bitcast=True)[:, None]
        num_above = tl.zeros((ROWS,), tl.int32)
        mass_above = tl.zeros((ROWS,), tl.float64)
        for first in range(0, vocab, IDS):
            ids = first + tl.arange(0, IDS)[None, :]
            weights = weigh(
                logits_ptr,
                largest_ptr,
                border_ptr,
                rows[:, None],
                ids,
                ids < vocab,
                stride,
                temperature,
                num_ids,
                False,
            )
            num_above += tl.sum((weights > border).to(tl.int32), 1)
            if HAS_MASS:
                mass_above += tl.sum(tl.where(weights > border, weights, 0.0).to(tl.float64), 1)
        large_enough = num_above < top_k
        if HAS_MASS:
            large_enough = large_enough & (mass_above < tl.load(mass_ptr + rows))
        high = tl.where(large_enough, middle, high)
        low = tl.where(large_enough, low, middle)
    tl.store(border_ptr + rows, high.to(tl.float32, bitcast=True), mask=given < num_rows)


@jit
def draw_kernel(
    logits_ptr, largest_ptr, border_ptr, prefix_ptr, noise_ptr, total_ptr, token_ids_ptr, logprobs_ptr, stride,
    temperature, num_ids, num_rows, num_blocks, first_block, num_local_blocks, BLOCK: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, HAS_BORDER: tl.constexpr,
):  # fmt: skip
    """token_ids, logprobs [rows]; grid: rows, ROWS to a program. PADDED: at least num_blocks, which prefix has."""
    given = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(given, num_rows - 1)
    of_row = prefix_ptr + rows.to(tl.int64) * num_blocks
    point = tl.load(noise_ptr + rows) * tl.load(of_row + num_blocks - 1)
    blocks = tl.arange(0, PADDED)[None, :]
    prefix = tl.load(of_row[:, None] + blocks, mask=blocks < num_blocks, other=float("inf"))
    block = tl.minimum(tl.sum((prefix <= point[:, None]).to(tl.int32), 1), num_blocks - 1)
    point = point - tl.load(of_row + block - 1, mask=block > 0, other=0.0)
    local_block = tl.minimum(tl.maximum(block - first_block, 0), num_local_blocks - 1)
    inside = tl.arange(0, BLOCK)[None, :]
    ids = local_block[:, None] * BLOCK + inside
    weights = weigh(
        logits_ptr, largest_ptr, border_ptr, rows[:, None], ids, ids >= 0, stride, temperature, num_ids, HAS_BORDER
    )
    offset = tl.sum((tl.cumsum(weights.to(tl.float64), 1) <= point[:, None]).to(tl.int32), 1)
    offset = tl.minimum(offset, tl.max(tl.where(weights > 0, inside, 0), 1))  # rounding must not step past the last
    token_id = block.to(tl.int64) * BLOCK + offset
    logit = tl.load(logits_ptr + rows.to(tl.int64) * stride + local_block * BLOCK + offset)
    picked = tl.div_rn(logit, temperature) - tl.div_rn(tl.load(largest_ptr + rows), temperature)
    logprob = picked.to(tl.float64) - tl.log(tl.load(total_ptr + rows))
    tl.store(token_ids_ptr + rows, token_id, mask=given < num_rows)
    tl.store(logprobs_ptr + rows, logprob.to(tl.float32), mask=given < num_rows)


class KernelWeights:
    """The same by kernels, which keep nothing but what was dropped; the largest logit is before the temperature."""

    def __init__(self, logits: Tensor, temperature: float, largest: Tensor | None = None):
        check(logits)
        if logits.dtype != torch.float32 or logits.stride(1) != 1:
            given = f"{logits.dtype}, {logits.stride(1)} apart"
            raise ValueError(f"logits are {given}: the sampler's kernels take float32, neighbours in memory")
        self.logits, self.temperature = logits, float(temperature or 1.0)
        self.largest = logits.amax(1) if largest is None else largest
        self.num_ids, self.least = logits.shape[1], None

    def drop_ids(self, num_ids: int) -> None:
        self.num_ids, self.largest = num_ids, largest_logits(self.logits, num_ids)

    def nats_above(self, largest: Tensor) -> Tensor:
        return (largest.double() - self.largest) / self.temperature

    def drop_below(self, border: Tensor) -> None:
        self.least = border

    def weighing(self) -> tuple:
        """Arguments that all kernels take first, and those that they take later."""
        least = self.largest if self.least is None else self.least
        return (self.logits, self.largest, least), (self.logits.stride(0), self.temperature, self.num_ids)

    def sum_blocks(self) -> Tensor:
        (n, vocab), tiles = self.logits.shape, TILES["sum"]
        sums = torch.empty(n, vocab // BLOCK, dtype=torch.float64, device=self.logits.device)
        tensors, numbers = self.weighing()
        if n:
            with torch.cuda.device_of(self.logits):
                sum_kernel[(-(-sums.numel() // tiles.rows),)](
                    *tensors, sums, *numbers, n, vocab // BLOCK, BLOCK=BLOCK, BLOCKS=tiles.rows,
                    HAS_BORDER=self.least is not None, num_warps=tiles.num_warps,
                )  # fmt: skip
        return sums

    def border(self, top_k: int, mass: Tensor | None) -> Tensor:
        (n, vocab), tiles = self.logits.shape, TILES["border"]
        border = torch.empty(n, dtype=torch.float32, device=self.logits.device)
        (logits, largest, _), numbers = self.weighing()
        if n:
            with torch.cuda.device_of(self.logits):
                border_kernel[(-(-n // tiles.rows),)](
                    logits, largest, largest if mass is None else mass, border, *numbers, n, vocab, top_k or NO_LIMIT,
                    ROWS=tiles.rows, IDS=tiles.columns, HAS_MASS=mass is not None, ONE=ONE, HALVINGS=HALVINGS,
                    num_warps=tiles.num_warps,
                )  # fmt: skip
        return border

    def draw(self, prefix: Tensor, noise: Tensor, total: Tensor, start: int) -> tuple[Tensor, Tensor]:
        (n, vocab), tiles, num_blocks = self.logits.shape, TILES["draw"], prefix.shape[1]
        for name, x in (("prefix", prefix), ("noise", noise), ("total", total)):
            if x.dtype != torch.float64 or not x.is_contiguous() or len(x) != n:
                raise ValueError(f"{name} is {x.dtype} {list(x.shape)}, not contiguous float64 of {n} rows")
        token_ids = torch.empty(n, dtype=torch.int64, device=prefix.device)
        logprobs = torch.empty(n, dtype=torch.float32, device=prefix.device)
        tensors, numbers = self.weighing()
        if n:
            with torch.cuda.device_of(self.logits):
                draw_kernel[(-(-n // tiles.rows),)](
                    *tensors, prefix, noise, total, token_ids, logprobs, *numbers, n, num_blocks, start // BLOCK,
                    vocab // BLOCK, BLOCK=BLOCK, PADDED=1 << (num_blocks - 1).bit_length(), ROWS=tiles.rows,
                    HAS_BORDER=self.least is not None, num_warps=tiles.num_warps,
                )  # fmt: skip
        return token_ids, logprobs


def weigh_shard(logits: Tensor, temperature: float, largest: Tensor | None = None) -> Weights | KernelWeights:
    """`Weights` of a shard, by kernels where they run; the likeliest id (temperature 0) is the reference's to find."""
    runs = temperature > 0 and runs_triton(logits)
    return (KernelWeights if runs else Weights)(logits, temperature, largest)


def check(logits: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] % BLOCK or not logits.shape[1]:
        raise ValueError(f"logits are {list(logits.shape)}, not [n, a multiple of {BLOCK}]")
