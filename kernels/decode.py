"""Attention of generation: one new token per sequence against its KV cache. The reference in PyTorch."""

import torch
from torch import Tensor


def decode_bias(lens: Tensor, max_len: int, window: int | None = None) -> Tensor:
    """0 for the cached keys that the token at position lens - 1 sees, -inf for the others.

    Shapes: lens [num_sequences], counting the new token -> float32 [num_sequences, 1, 1, max_len]
    """
    key = torch.arange(max_len, device=lens.device)
    hidden_from_query = key >= lens[:, None]
    if window is not None:
        hidden_from_query |= key < lens[:, None] - window
    bias = torch.zeros(hidden_from_query.shape, device=lens.device).masked_fill_(hidden_from_query, -torch.inf)
    return bias[:, None, None]


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v for one query per sequence; no gradient.

    Args: bias: what `decode_bias` made, once a step for all layers that share a window.
    Shapes: q [num_sequences, num_heads, head_dim]; k_cache, v_cache [num_sequences, num_kv_heads, max_len, head_dim];
        bias [num_sequences, 1, 1, max_len] -> [num_sequences, num_heads, head_dim]
    """
    num_sequences, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    q = (q * head_dim**-0.5).view(num_sequences, num_kv_heads, num_heads // num_kv_heads, head_dim)
    probs = (q @ k_cache.transpose(-1, -2)).add_(bias.to(q.dtype)).softmax(-1)  # [num_sequences, kv, group, max_len]
    return (probs @ v_cache).reshape(num_sequences, num_heads, head_dim)
