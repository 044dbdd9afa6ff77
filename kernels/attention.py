"""Causal attention over packed documents: the reference in PyTorch.

`first_key` says who may look where: the query at position q of a row sees the keys k with
max(first_key[q], q - window + 1) <= k <= q. One integer per token expresses packing, right padding (causality hides what
comes later) and sliding windows. `decode.py` holds the one-query-per-sequence form that generation uses.
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


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over the visible keys, differentiable.

    Grouped-query attention: query head h reads key/value head h // (num_heads // num_kv_heads).

    Shapes: q [batch, seq_len, num_heads, head_dim]; k, v [batch, seq_len, num_kv_heads, head_dim]
        -> [batch, seq_len, num_heads, head_dim]
    Source: Vaswani et al. 2017 (arXiv 1706.03762), eq. 1.
    """
    batch, seq_len, num_heads, head_dim = q.shape
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [batch, heads, seq_len, head_dim]
    if q.is_cuda or seq_len > EXPLICIT_MAX_LEN:
        enable_gqa = k.shape[1] != num_heads
        if visible.is_plain_causal:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)
        else:  # never cuDNN: with a mask its gradients can be NaN (pytorch/pytorch#196678)
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible.mask, enable_gqa=enable_gqa)
        return out.transpose(1, 2)
    if k.shape[1] != num_heads:
        k, v = (x.repeat_interleave(num_heads // k.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.reshape(-1, seq_len, head_dim) for x in (q * head_dim**-0.5, k, v))  # [batch * heads, seq, head_dim]
    scores = torch.bmm(q, k.transpose(1, 2)).view(batch, num_heads, seq_len, seq_len)
    probs = scores.add_(visible.bias.to(scores.dtype)).softmax(-1)
    return torch.bmm(probs.view(-1, seq_len, seq_len), v).view(batch, num_heads, seq_len, head_dim).transpose(1, 2)
