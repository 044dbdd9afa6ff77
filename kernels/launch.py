"""Which implementation of an operation runs, and what all kernels share.

On GPUs from sm_80 on kernels are Triton's; on CPUs, on older GPUs, without Triton and in float64 the reference in
PyTorch runs, which every file of this folder holds beside its kernels. What kernels do not take is refused, never left
to the reference. The environment variable KERNELS forces one: `reference`, or `triton` (on a CPU then in Triton's
interpreter: set TRITON_INTERPRET=1, too).

The table of tile sizes stands in each file beside its kernels, since what a row and a column of a tile are differs from
one to the next, and only those of attention and decoding depend on the head dim.
"""

import functools
import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    jit, next_power_of_2 = triton.jit, triton.next_power_of_2
else:  # kernels are then never launched; their files annotate with strings, so that nothing of tl is looked up
    triton = tl = None

    def jit(fn):
        return fn


MIN_CAPABILITY = (8, 0)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Blocks are powers of 2: a head lies in one or two pieces, so that nothing of these is read or computed for padding.
PIECES = {32: (32, 0), 64: (64, 0), 80: (64, 16), 96: (64, 32), 128: (128, 0), 256: (256, 0)}


class Tiles(NamedTuple):
    """How a kernel cuts its work: rows and columns of a block, warps of a program, stages of its loads' pipeline."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


@functools.cache
def _say_once(text: str) -> None:
    print(text, flush=True)


@functools.cache
def architecture(device_index: int | None) -> int:
    """90 or 80: which rows of a table of tiles a GPU takes; without one those of sm_90."""
    if not torch.cuda.is_available():
        return 90
    return 90 if torch.cuda.get_device_capability(device_index)[0] >= 9 else 80


def runs_triton(x: Tensor) -> bool:
    """Whether kernels run on tensors like x.

    Raises: ValueError if KERNELS asks for what cannot be, or for something else.
    """
    forced = os.environ.get("KERNELS", "")
    if forced == "reference":
        return False
    if forced not in ("", "triton"):
        raise ValueError(f"KERNELS={forced}: takes reference or triton")
    if not forced and not x.is_cuda:
        return False
    if forced and triton is None:
        raise ValueError("KERNELS=triton, but the package triton is not installed")
    if forced and not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("KERNELS=triton on a CPU: set TRITON_INTERPRET=1, which interprets kernels slowly")
    if forced and x.dtype == torch.float64:
        raise ValueError("KERNELS=triton, but kernels take bfloat16, float16 and float32, not float64")
    capability = MIN_CAPABILITY if forced else torch.cuda.get_device_capability(x.device)
    reason = None
    if capability < MIN_CAPABILITY:
        reason = f"this GPU is sm_{capability[0]}{capability[1]} and Triton's need sm_80"
    elif triton is None:
        reason = "the package triton is not installed"
    elif x.dtype == torch.float64:
        reason = "Triton's take bfloat16, float16 and float32, not float64"
    if reason is not None:
        _say_once(f"kernels: PyTorch, since {reason}")
    return reason is None


def padded_head(head_dim: int) -> int:
    """The head dim of `PIECES` as which kernels run one: itself, or the next larger, whose last features are masked.

    Raises: ValueError if there is none.
    """
    for size in PIECES:
        if head_dim <= size:
            return size
    given = f"heads of {head_dim}: kernels take at most {max(PIECES)}"
    raise ValueError(f"{given} (without padding {', '.join(map(str, PIECES))}); KERNELS=reference takes any")


def differentiable_once(backward):
    """A backward that refuses to be differentiated: what it computes from saved tensors has no graph.

    torch's own `once_differentiable` refuses only where the incoming gradient has one.
    """

    @functools.wraps(backward)
    def run(ctx, *grads):
        if torch.is_grad_enabled():
            raise ValueError("kernels have no second derivative: take gradients without create_graph=True")
        return backward(ctx, *grads)

    return run


def overlaps_itself(x: Tensor) -> bool:
    """Whether two entries of x may share memory, so that it must not be written to."""
    span = 1  # of the dimensions so far, from the closest entries to those furthest apart
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride < span:
            return x.numel() > 0
        span += stride * (size - 1)
    return False
