"""Which implementation of an operation runs, and the tile sizes that kernels run with.

On GPUs from sm_80 on kernels are Triton's; on CPUs, on older GPUs and without Triton the reference in PyTorch runs,
which every file of this folder holds beside its kernels. The environment variable KERNELS forces one: `reference`, or
`triton` (on a CPU then in Triton's interpreter: set TRITON_INTERPRET=1, too).
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
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if forced and triton is None:
        raise ValueError("KERNELS=triton, but the package triton is not installed")
    if not x.is_cuda:
        if forced and not interpreted:
            raise ValueError("KERNELS=triton on a CPU: set TRITON_INTERPRET=1, which interprets kernels slowly")
        return bool(forced)
    if forced:
        return True
    capability = torch.cuda.get_device_capability(x.device)
    if capability < MIN_CAPABILITY:
        _say_once(f"kernels: PyTorch, since this GPU is sm_{capability[0]}{capability[1]} and Triton's need sm_80")
        return False
    if triton is None:
        _say_once("kernels: PyTorch, since the package triton is not installed")
        return False
    return True


def has_kernels(name: str, head_dim: int, head_dims: tuple[int, ...]) -> bool:
    """Whether there are kernels for heads of this size; if not, PyTorch takes them, and says so once.

    Raises: ValueError if KERNELS=triton forces what there is not.
    """
    if head_dim in head_dims:
        return True
    text = f"kernels of {name} take head dims {', '.join(map(str, head_dims))}, not {head_dim}"
    if os.environ.get("KERNELS"):
        raise ValueError(text)
    _say_once(f"kernels: PyTorch; those of {text.removeprefix('kernels of ')}")
    return False


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
