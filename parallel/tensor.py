"""Tensor and sequence parallelism: layers divided over the tp axis, and what a script reads from hidden states.

A layer's matrices come in pairs (Shoeybi et al. 2019, arXiv 1909.08053): the first is divided by its outputs, the
second by its inputs, so that one sum per pair is all that the ranks exchange. Under sequence parallelism (Korthikanti
et al. 2022, arXiv 2205.05198) that sum becomes a reduce-scatter over tokens and the next pair begins with an
all-gather: norms and the residual stream then hold tokens / tp each. With one rank every layer is a plain one.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear_logprobs import linear_logprobs
from kernels.target_logits import target_logits
from parallel.collectives import (
    Axis,
    all_gather,
    all_reduce_,
    all_reduce_async_,
    copy_to_tp,
    reduce_from_tp,
    reduce_scatter_async,
    scatter_to_sp,
)

NO_AXIS = Axis("tp", 1, 0)  # of products that are summed elsewhere, if at all
VOCAB_MULTIPLE = 128  # rows of each vocabulary shard are padded to this, the block in which sampling sums probabilities

# --- where a parameter lies -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placement:
    """Which part of a full tensor a rank of the tp axis holds, and whether its gradient is a part of a sum over tp.

    The sharded dimension of the full tensor consists of sections, say of all query heads, all key heads and all value
    heads; each section, of `count` blocks of `block` entries, is divided over the ranks block by block. A section with
    fewer blocks than ranks lies on several ranks each.
    """

    dim: int | None = None  # the sharded dimension; None: every rank holds all of it
    sections: tuple[tuple[int, int], ...] = ()  # (count, block) along it
    is_partial: bool = False  # replicated, but the gradient is to be summed over tp
    vocab_size: int | None = None  # rows of the full tensor that exist outside; behind them lies padding

    def intervals(self, rank: int, size: int) -> list[tuple[int, int, int]]:
        """(start here, length, start in the full tensor) along the sharded dimension."""
        here, full, found = 0, 0, []
        for count, block in self.sections:
            length = max(count // size, 1) * block
            found.append((here, length, full + (rank * count // size) * block))
            here, full = here + length, full + count * block
        return found

    def shared_intervals(self, size: int) -> list[tuple[int, int, int]]:
        """Of `intervals`, as (start, length, number of blocks), those that lie on several ranks."""
        here, found = 0, []
        for count, block in self.sections:
            if count < size:
                found.append((here, block, count))
            here += max(count // size, 1) * block
        return found

    def full_shape(self, shape: torch.Size) -> list[int]:
        """Shape of the full tensor without padding, from that of a part."""
        full = list(shape)
        if self.dim is not None:
            full[self.dim] = sum(count * block for count, block in self.sections)
        if self.vocab_size is not None:
            full[0] = self.vocab_size
        return full

    def boxes(self, shape: torch.Size, axis: Axis) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """(slices here, slices of the full tensor without padding) of each contiguous part of this rank."""
        full = self.full_shape(shape)
        dim = self.dim or 0
        intervals = [(0, full[0], 0)] if self.dim is None else self.intervals(axis.rank, axis.size)
        found = []
        for here, length, there in intervals:
            length = min(length, full[dim] - there)
            if length > 0:
                box = [slice(0, n) for n in full]
                box[dim] = slice(here, here + length)
                full_box = [slice(0, n) for n in full]
                full_box[dim] = slice(there, there + length)
                found.append((tuple(box), tuple(full_box)))
        return found


REPLICATED = Placement()


def placements(module: nn.Module) -> dict[str, Placement]:
    """Placement of every parameter, by its name in the module; layers say theirs in an attribute `placements`."""
    found = {}
    for path, layer in module.named_modules():
        own = getattr(layer, "placements", {})
        for name, _ in layer.named_parameters(recurse=False):
            found[f"{path}.{name}" if path else name] = own.get(name, REPLICATED)
    return found


@torch.no_grad()
def place_vocab(module: nn.Module, names: tuple[str, ...], vocab_size: int, axis: Axis) -> None:
    """Divides parameters of a module whose rows are the vocabulary, drawn in full, over the axis, and pads them."""
    rows = padded_vocab_size(vocab_size, axis.size)
    placement = Placement(0, ((rows, 1),), vocab_size=vocab_size)
    module.placements = {**getattr(module, "placements", {}), **dict.fromkeys(names, placement)}
    for name in names:
        parameter = getattr(module, name)
        full = parameter.data
        parameter.data = full.new_empty(rows // axis.size, *full.shape[1:])
        fill_local(parameter, full, placement, axis)


@torch.no_grad()
def full_tensor(local: Tensor, placement: Placement, axis: Axis) -> Tensor:
    """The full tensor, without padding, from the parts of all ranks of the axis; a view where the part is the whole.

    Communication: one all-gather over tp if it is sharded there.
    """
    if placement.dim is None or axis.size == 1:
        return local[: placement.full_shape(local.shape)[0]] if local.dim() else local
    full = local.new_empty(placement.full_shape(local.shape))
    for rank, part in enumerate(all_gather(local[None], axis)):
        for here, there in placement.boxes(local.shape, Axis(axis.name, axis.size, rank)):
            full[there] = part[here]
    return full


@torch.no_grad()
def fill_local(local: Tensor, full: Tensor, placement: Placement, axis: Axis) -> None:
    """Copies this rank's part of a full tensor without padding; padding becomes 0."""
    if placement.vocab_size is not None:
        local.zero_()
    for here, there in placement.boxes(local.shape, axis):
        local[here] = full[there]


# --- layers ---------------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A low-rank update B A of a layer's weight W, which stays as it is: x W^T + scale (x A^T) B^T.

    Of a layer divided by outputs B is divided like W and every rank has A; of one divided by inputs, the reverse. What
    every rank has gets a part of its gradient on each; the layer says no more to other ranks than without it.

    Args: placement: that of W.
    Shapes: a [rank, inputs here], b [outputs here, rank]
    Source: Hu et al. 2021 (arXiv 2106.09685), eq. 3.
    """

    def __init__(self, weight: Tensor, placement: "Placement", rank: int, scale: float, axis: Axis):
        super().__init__()
        self.scale = scale
        self.a = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.b = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        whole = Placement(is_partial=axis.size > 1)
        self.placements = {"a": placement, "b": whole} if placement.dim == 1 else {"a": whole, "b": placement}

    @property
    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        return self.a, self.b, self.scale


class Linear(nn.Linear):
    """x W^T + b with weight [out_features, in_features]; its parameters start uninitialised."""

    packed = None  # the weight in oneDNN's layout, see `packed_weights`

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype):
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)
        self.adapter: Adapter | None = None  # see parallel/adapters.py

    def reset_parameters(self) -> None:
        """Leaves them: `initialise` or a checkpoint fills them."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
        if self.adapter is None:
            return F.linear(x, self.weight, bias)
        return AdaptedProduct.apply(x, self.weight, bias, *self.adapter.low_rank, NO_AXIS, False)

    def merged_weight(self) -> Tensor:
        """The weight with its adapter's update in it; differentiable in the adapter alone."""
        return self.weight if self.adapter is None else MergedWeight.apply(self.weight, *self.adapter.low_rank)


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale B A of this rank, summed in at least float32; no gradient."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(wide), b.detach().to(wide), a.detach().to(wide), alpha=scale).to(weight.dtype)


class MergedWeight(torch.autograd.Function):
    """`merge`, for what reads a weight rather than its product: keeps A and B, not W."""

    @staticmethod
    def forward(ctx, weight, a, b, scale):
        ctx.save_for_backward(a, b)
        ctx.scale = scale
        return merge(weight, a, b, scale)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return None, (b.t() @ grad) * ctx.scale, (grad @ a.t()) * ctx.scale, None


class ColumnParallelLinear(Linear):
    """The first of a pair: each rank computes some of the outputs of all tokens.

    Args: sections: of the outputs, see `Placement`.
    Shapes: x [tokens, in_features], under sequence parallelism [tokens / tp, in_features] -> [tokens, outputs here]
    Communication: backward one sum over tp, overlapped with the weight's gradient; under sequence parallelism one
        all-gather forward, and backward one more (the gathered x is not kept) and a reduce-scatter.
    """

    def __init__(self, in_features: int, sections: tuple, bias: bool, dtype: torch.dtype, axis: Axis):
        super().__init__(in_features, sum(max(n // axis.size, 1) * block for n, block in sections), bias, dtype)
        self.axis = axis
        self.placements = dict.fromkeys(("weight", "bias"), Placement(0, tuple(sections)))

    def forward(self, x: Tensor, sharded_tokens: bool = False) -> Tensor:
        if self.axis.size == 1 or not torch.is_grad_enabled():
            return self.product(all_gather(x, self.axis) if sharded_tokens else x, self.bias)
        low_rank = (None, None, 0.0) if self.adapter is None else self.adapter.low_rank
        return AdaptedProduct.apply(x, self.weight, self.bias, *low_rank, self.axis, sharded_tokens)


class AdaptedProduct(torch.autograd.Function):
    """x W^T + b, and an adapter's scale (x A^T) B^T, for W and B divided by outputs over an axis; the backward sums the
    gradient of x over it while it computes those of the weights. Neither way makes a second tensor like x or y."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale, axis, sharded_tokens):
        ctx.save_for_backward(x, weight, a, b)
        ctx.settings = scale, axis, sharded_tokens, bias is not None
        x = all_gather(x, axis) if sharded_tokens else x
        y = F.linear(x, weight, bias)
        return y if a is None else y.addmm_(F.linear(x, a), b.t(), alpha=scale)

    @staticmethod
    def backward(ctx, grad):
        x, weight, a, b = ctx.saved_tensors
        scale, axis, sharded_tokens, has_bias = ctx.settings
        grad_x = grad @ weight
        if a is not None:
            grad_low = (grad @ b) * scale  # of x A^T: [tokens, rank]
            grad_x.addmm_(grad_low, a)
        reads_x = ctx.needs_input_grad[1] or a is not None
        if sharded_tokens:
            grad_x, pending = reduce_scatter_async(grad_x, axis)
            x = all_gather(x, axis) if reads_x else None
        else:
            pending = all_reduce_async_(grad_x, axis)
        grad_weight = grad.t() @ x if ctx.needs_input_grad[1] else None
        grad_bias = grad.sum(0) if has_bias and ctx.needs_input_grad[2] else None
        grad_a = grad_b = None
        if a is not None:
            grad_a, grad_b = grad_low.t() @ x, (grad.t() @ F.linear(x, a)) * scale
        pending.wait()
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, None, None, None


class RowParallelLinear(Linear):
    """The second of a pair: each rank knows some of the inputs, the outputs are summed, then the bias is added once.

    Args: sections: of the inputs, see `Placement`. shards_tokens: whether training shards its outputs by tokens.
    Shapes: x [tokens, inputs here] -> [tokens, out_features], under sequence parallelism [tokens / tp, out_features]
    Communication: forward one sum over tp; under sequence parallelism a reduce-scatter, backward an all-gather.
    """

    def __init__(
        self, sections: tuple, out_features: int, bias: bool, dtype: torch.dtype, axis: Axis, shards_tokens: bool
    ):
        super().__init__(sum(max(n // axis.size, 1) * block for n, block in sections), out_features, bias, dtype)
        self.axis = axis
        self.placements = {"weight": Placement(1, tuple(sections)), "bias": Placement(is_partial=shards_tokens)}

    def forward(self, x: Tensor, sharded_tokens: bool = False) -> Tensor:
        if self.axis.size == 1:
            return self.product(x, self.bias)
        x = self.product(x, None)
        x = scatter_to_sp(x, self.axis) if sharded_tokens else reduce_from_tp(x, self.axis)
        return x if self.bias is None else x + self.bias


class VocabParallelEmbedding(nn.Module):
    """Rows of a matrix by token id, each rank holding some; also the weight of a tied LM head.

    Shapes: token_ids [tokens] -> [tokens, hidden_size], under sequence parallelism [tokens / tp, hidden_size]
    Communication: as `RowParallelLinear`.
    """

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype, axis: Axis):
        super().__init__()
        self.axis = axis
        rows = padded_vocab_size(vocab_size, axis.size) // axis.size
        self.start = axis.rank * rows  # first token id here
        self.weight = nn.Parameter(torch.empty(rows, hidden_size, dtype=dtype))
        self.placements = {"weight": Placement(0, ((rows * axis.size, 1),), vocab_size=vocab_size)}

    def forward(self, token_ids: Tensor, sharded_tokens: bool = False) -> Tensor:
        if self.axis.size == 1:
            return F.embedding(token_ids, self.weight)
        local_ids = token_ids - self.start
        is_here = (local_ids >= 0) & (local_ids < len(self.weight))
        x = F.embedding(local_ids.where(is_here, 0), self.weight) * is_here[:, None]
        return scatter_to_sp(x, self.axis) if sharded_tokens else reduce_from_tp(x, self.axis)


class VocabParallelHead(Linear):
    """An LM head of its own: the rows of its weight are divided over the vocabulary. Scripts read weight and bias."""

    def __init__(self, hidden_size: int, vocab_size: int, bias: bool, dtype: torch.dtype, axis: Axis):
        rows = padded_vocab_size(vocab_size, axis.size) // axis.size
        super().__init__(hidden_size, rows, bias, dtype)
        self.placements = dict.fromkeys(
            ("weight", "bias"), Placement(0, ((rows * axis.size, 1),), vocab_size=vocab_size)
        )


def padded_vocab_size(vocab_size: int, num_shards: int) -> int:
    """Rows of a vocabulary such that every shard holds whole blocks of VOCAB_MULTIPLE."""
    multiple = VOCAB_MULTIPLE * num_shards
    return -(-vocab_size // multiple) * multiple


@contextmanager
def packed_weights(module: nn.Module, num_rows: int):
    """On a CPU, also holds the weights in oneDNN's blocked layout: with few rows its products are a third faster.

    For forwards of about num_rows rows without gradient; the weights must not change meanwhile.
    """
    linears = [m for m in module.modules() if isinstance(m, Linear) and m.weight.dtype == torch.float32]
    if not torch.backends.mkldnn.is_available() or any(m.weight.is_cuda for m in linears):
        linears = []
    try:
        for linear in linears:
            linear.packed = torch.ops.mkldnn._reorder_linear_weight(linear.merged_weight().detach(), num_rows)
        yield
    finally:
        for linear in linears:
            linear.packed = None


# --- from hidden states to what a script reads ----------------------------------------------------------------------


def hidden_before(hidden: Tensor, token_mask: Tensor) -> Tensor:
    """Hidden state of the position before each masked token: what predicts the token, and what its value is read from.

    The one place where positions are shifted to tokens; everything else is indexed by the token it is about.

    Shapes: hidden [batch, seq_len, hidden_size], token_mask bool [batch, seq_len] -> [num_masked, hidden_size]
    Raises: ValueError if a masked token is the first of its row.
    """
    rows, positions = token_mask.nonzero(as_tuple=True)  # [num_masked] each, in row-major order
    if (positions == 0).any():
        raise ValueError("the first token of a row has no state before it and cannot carry a loss")
    return hidden[rows, positions - 1]


def vocab_parallel_logits(hidden, weight, bias, token_ids, vocab_size, axis: Axis, temperature=1.0):
    """What a head says of each token, differentiable: its logit, log-probability and the distribution's entropy.

    Args: hidden: what the head reads. axis: over which the vocabulary is divided. temperature: divides the logits.
    Shapes: hidden [tokens, n], weight [padded_vocab / tp, n], bias [padded_vocab / tp] or None, token_ids [tokens]
        -> three of [tokens], float32 or float64; log-probability and entropy in nats
    Communication: over tp one all-reduce (max) of [tokens] and one (sum) of [3, tokens], backward one of [tokens, n].
    """
    hidden = copy_to_tp(hidden, axis)
    start = axis.rank * len(weight)
    largest, sum_exp, target, weighted = linear_logprobs(
        hidden, weight, token_ids, bias=bias, temperature=temperature, vocab_start=start, vocab_size=vocab_size
    )
    if axis.size > 1:  # with e = exp(l - m) of a shard and M >= m: sum_j e_j (l_j - M) = T + (m - M) S
        over_all = largest.clone()
        all_reduce_(over_all, axis, "max")
        shift = largest - over_all
        scale = shift.exp()
        parts = torch.stack((sum_exp * scale, target, (weighted + shift * sum_exp) * scale))
        sum_exp, target, weighted = reduce_from_tp(parts, axis)
        largest = over_all
    log_sum = sum_exp.log()
    return target, target - largest - log_sum, log_sum - weighted / sum_exp


def vocab_parallel_logprobs(hidden: Tensor, decoder, token_ids: Tensor, temperature: float = 1.0):
    """Log-probability of each token and entropy of the distribution it was drawn from, in nats, differentiable.

    Args: hidden: the states before the tokens. decoder: whose LM head is read. temperature: divides the logits.
    Shapes: hidden [tokens, hidden_size], token_ids [tokens] -> two of [tokens], float32 or float64
    Communication: that of `vocab_parallel_logits`.
    """
    return vocab_parallel_logits(
        hidden,
        decoder.lm_head_weight,
        decoder.lm_head_bias,
        token_ids,
        decoder.config.vocab_size,
        decoder.mesh.tp,
        temperature,
    )[1:]


def vocab_parallel_target(hidden: Tensor, weight: Tensor, bias: Tensor, token_ids: Tensor, axis: Axis) -> Tensor:
    """A head's logit of each token alone, by a row of its weight; no gradient.

    Shapes: hidden [tokens, n], weight [padded_vocab / tp, n], bias [padded_vocab / tp], token_ids [tokens] -> [tokens]
    Communication: over tp one all-reduce of [tokens].
    """
    target = target_logits(hidden, weight, token_ids, bias, axis.rank * len(weight))
    all_reduce_(target, axis)
    return target
