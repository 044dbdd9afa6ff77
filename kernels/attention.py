"""Causal attention over packed documents: the reference in PyTorch.

`first_key` says who may look where: the query at position q of a row sees the keys k with
max(first_key[q], q - window + 1) <= k <= q. One integer per token expresses packing, right padding (causality hides
what comes later) and sliding windows. `decode.py` holds the one-query-per-sequence form that generation uses.
"""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

EXPLICIT_MAX_LEN = 128  # up to this row length two batched matrix products and a softmax beat the fused CPU kernel


class Visible:
    """Which keys each query of a batch sees; made once a forward for all layers that share a window.

    Shapes: first_key [batch, seq_len], the first position of each token's document in row coordinates.
    """

    def __init__(self, first_key: Tensor, window: int | None = None):
        self.first_key, self.window = first_key, window

    @cached_property
    def mask(self) -> Tensor:
        """Bool [batch, 1, seq_len (query), seq_len (key)]; the 1 stands for the heads."""
        seq_len = self.first_key.shape[1]
        position = torch.arange(seq_len, device=self.first_key.device)  # [seq_len]
        earliest = self.first_key
        if self.window is not None:
            earliest = torch.maximum(earliest, position - self.window + 1)  # [batch, seq_len]
        return ((position >= earliest[:, :, None]) & (position <= position[:, None]))[:, None]

    @cached_property
    def bias(self) -> Tensor:
        """0 where `mask` is True, -inf elsewhere."""
        return torch.zeros(self.mask.shape, device=self.mask.device).masked_fill_(~self.mask, -torch.inf)

    @cached_property
    def is_plain_causal(self) -> bool:
        """Every row is one document that each of its queries sees whole."""
        seq_len = self.first_key.shape[1]
        return (self.window is None or self.window >= seq_len) and not bool(self.first_key.any())


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


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over the visible keys, differentiable.

    Grouped-query attention: query head h reads key/value head h // (num_heads // num_kv_heads).

    Shapes: q [batch, seq_len, num_heads, head_dim]; k, v [batch, seq_len, num_kv_heads, head_dim]
        -> [batch, seq_len, num_heads, head_dim]
    Source: Vaswani et al. 2017 (arXiv 1706.03762), eq. 1.
    """
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
