"""From hidden states to log-probabilities and entropies without a [tokens, vocab] tensor.

The logits l = (h W^T + b) / temperature of one vocabulary shard exist for one chunk of tokens at a time, in the forward
and again in the backward, unless all tokens fit one chunk: then its exponentials are kept for the backward. A shard
knows, per token and with m the largest logit (a constant for the gradient),

    S = sum_j exp(l_j - m)        z = l_target        T = sum_j exp(l_j - m) (l_j - m)

from which, once the shards are merged (`parallel.tensor.vocab_parallel_logprobs`),

    log p(target) = z - m - log S        entropy = log S - T / S
"""

import torch

CHUNK_ELEMENTS = 1 << 23  # logits that the backward holds at a time: 32 MiB in float32
BLOCK_ELEMENTS, BLOCK_ROWS = (
    1 << 18,
    256,
)  # of the forward, whose passes over a block stay in the cache; at least so many


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
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, None, grad_bias, None, None, None


def linear_logprobs(hidden, weight, token_ids, bias=None, temperature=1.0, vocab_start=0, vocab_size=None):
    """What one vocabulary shard knows of each token's log-probability and entropy, differentiable.

    Args: vocab_start: first token id of this shard. vocab_size: ids of the whole vocabulary; rows of the shard beyond
        it are padding and take no part (default: no padding). A shard of padding alone has the smallest number as max.
    Shapes: hidden [tokens, hidden_size], weight [vocab / tp, hidden_size], bias [vocab / tp], token_ids [tokens]
    Returns: (max, sum of exp, target logit, weighted sum), each [tokens], in float32 or float64; the target logit is 0
        where another shard holds the token; no gradient flows through max.
    """
    num_valid = weight.shape[0] if vocab_size is None else max(0, min(len(weight), vocab_size - vocab_start))
    return LinearLogprobs.apply(hidden, weight, token_ids, bias, temperature, vocab_start, num_valid)
