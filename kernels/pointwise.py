"""Rotary embedding, gated activation and RMS norm, each with a backward of its own.

Autograd would record every product of these formulas and write its gradient to memory; by hand a forward and a backward
read and write their tensors once or twice, which is what they cost where the matrix products are small.

Nothing here has a Triton kernel, nor has PPO's token loss or GAE, until a measurement asks for one. An update of 512
responses of 565 tokens, 4 epochs of 16 micro-batches, takes about 30 s; at 5 microseconds a launch the loop of GAE is
6 ms of it (2 launches a position) and the token loss 30 ms (94 a micro-batch, forward and backward): 0.1 %. Turning
moves 6 numbers for each that it turns, a kernel would move 2; for GPT-NeoX of width 2048 that is 2 ns per token and
layer beside the 127 ns of its products (4.3 TB/s, 790 TFLOP/s), 1.5 %; new tokens are turned by `decode.append`. A norm
joined with the sum before it would save reading 2048 numbers, 1 ns. torch.compile joins all but the loop of GAE;
`tests/bench_kernels.py` times eager and compiled.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import overlaps_itself


class Rotate(torch.autograd.Function):
    """(a, b) -> (a cos - b sin, b cos + a sin); the backward turns the other way."""

    @staticmethod
    def forward(ctx, x, cos, sin, num_heads, head_dim, interleaved):
        ctx.mark_dirty(x)
        ctx.save_for_backward(cos, sin)
        ctx.where = num_heads, head_dim, interleaved
        return Rotate.turn_(x, cos, sin, *ctx.where)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return Rotate.turn_(grad.clone(), cos, -sin, *ctx.where), None, None, None, None, None

    @staticmethod
    def turn_(x, cos, sin, num_heads, head_dim, interleaved):
        turned = x.view(len(x), -1, head_dim)[:, :num_heads, : 2 * cos.shape[-1]]
        a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
        b_cos, a_sin = b * cos, a * sin
        a.mul_(cos).addcmul_(b, sin, value=-1)
        torch.add(b_cos, a_sin, out=b)
        return x


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int, head_dim: int, interleaved: bool) -> Tensor:
    """Turns, in place, the first 2 * cos.shape[-1] features of the first num_heads heads.

    The pairs are features (2i, 2i + 1) if interleaved, else (i, i + rotary_dim / 2).

    Shapes: x [tokens, heads * head_dim]; cos, sin [tokens, 1, rotary_dim / 2], or [1, 1, ...] for all
    Raises: ValueError if they do not fit, or two features of x share their memory.
    Source: Su et al. 2021 (arXiv 2104.09864), eq. 34.
    """
    fits = x.ndim == 2 and cos.shape == sin.shape and cos.ndim == 3 and cos.shape[:2] in ((len(x), 1), (1, 1))
    if not fits or x.shape[1] % head_dim or x.shape[1] < num_heads * head_dim or not 2 * cos.shape[2] <= head_dim:
        given = f"x {list(x.shape)} of {num_heads} heads of {head_dim}, cos {list(cos.shape)}, sin {list(sin.shape)}"
        raise ValueError(f"{given} do not fit: should be x [tokens, heads * head_dim], cos, sin [tokens, 1, pairs]")
    if not x.device == cos.device == sin.device:
        raise ValueError(f"x, cos and sin lie on {x.device}, {cos.device} and {sin.device}: one device, please")
    if overlaps_itself(x):
        raise ValueError(f"x has the strides {x.stride()}: features that share memory cannot be turned in place")
    return Rotate.apply(x, cos, sin, num_heads, head_dim, interleaved)


class GatedActivation(torch.autograd.Function):
    """The backward writes both gradients into one tensor where autograd would join two."""

    @staticmethod
    def forward(ctx, x, activation):
        ctx.save_for_backward(x)
        ctx.activation = activation
        gate, up = x.chunk(2, -1)
        return activation(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, -1)
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.activation(gate)
        torch.mul(grad, activated.detach(), out=grad_up)
        grad_gate.copy_(torch.autograd.grad(activated, gate, grad * up)[0])
        return grad_x, None


def gated_activation(x: Tensor, activation) -> Tensor:
    """activation(gate) * up of x = [gate | up] (Shazeer 2020, arXiv 2002.05202): [tokens, 2 * n] -> [tokens, n]"""
    return GatedActivation.apply(x, activation)


class RMSNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x^2) + eps), n = x r and g = dy * weight: dx = r (g - n mean(g n)), dweight = sum(dy n)"""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (torch.linalg.vecdot(wide, wide) / x.shape[-1] + eps).rsqrt_().unsqueeze(-1)  # [..., 1]
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad.to(normed.dtype) * weight
        mean = torch.linalg.vecdot(grad, normed).div_(x.shape[-1]).unsqueeze(-1)
        return grad.addcmul_(normed, mean, value=-1).mul_(scale).to(x.dtype), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, statistics in at least float32.

    On a GPU torch's fused kernel.

    Shapes: x [..., size], weight [size] -> x's
    Source: Zhang & Sennrich 2019 (arXiv 1910.07467), eq. 4.
    """
    if x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return RMSNorm.apply(x, weight, eps)
