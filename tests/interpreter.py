"""Kernels on a CPU: `run_interpreted(fn, *args)` calls fn in a process in which Triton's interpreter runs them.

The interpreter computes bfloat16 wrongly and without a word: it multiplies bit patterns, and rounds toward zero. Here
it is mended: products decode their operands, stores round to the nearest even number, and arithmetic on bfloat16 that a
kernel should have done in float32 raises. Where a GPU's max of a NaN and a number gives the number, so does this one.
Every nested call of a function of triton.language would patch that module once more, which is most of the time: here
once.
"""

import ctypes
import mmap
import multiprocessing
import os
import traceback
from contextlib import contextmanager
from unittest import mock

import pytest

ENVIRONMENT = {"TRITON_INTERPRET": "1", "KERNELS": "triton", "CUDA_VISIBLE_DEVICES": ""}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # threads of numpy's products spin
TIMEOUT = 300.0  # seconds for one call
_workers: list = []  # one process, and the pipe to it


def run_interpreted(fn, *args):
    """fn(*args), a function of a module, in the interpreter's process; fails the test if it raises."""
    if not _workers:
        context = multiprocessing.get_context("spawn")  # Triton reads its environment when it is imported
        pipe, far_end = context.Pipe()
        process = context.Process(target=work, args=(far_end,), daemon=True)
        with mock.patch.dict(os.environ, ENVIRONMENT):
            process.start()
        far_end.close()
        _workers[:] = process, pipe
    process, pipe = _workers
    pipe.send((fn, args))
    problem = f"no result within {TIMEOUT:.0f} s"
    if pipe.poll(TIMEOUT):
        try:
            succeeded, result = pipe.recv()
            if succeeded:
                return result
            problem = result
        except EOFError:
            process.join(1)
            problem = f"the interpreter died with exit code {process.exitcode}: an address out of bounds?"
    if not problem.startswith("Traceback"):
        process.kill()
        _workers.clear()
    pytest.fail(problem, pytrace=False)


def work(pipe) -> None:
    import torch

    torch.set_num_threads(1)
    mend_interpreter()
    while True:
        try:
            fn, args = pipe.recv()
            torch.manual_seed(0)
            pipe.send((True, fn(*args)))
        except EOFError:
            os._exit(0)
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def measure_slopes(loss, inputs, gradients, widths):
    """(slope by the gradient, slopes by differences over three widths, each half of the one before) of a loss in a
    random direction of each input."""
    import torch

    rows = []
    for i, gradient in enumerate(gradients):
        direction = torch.randn(gradient.shape)

        def moved(width, i=i, direction=direction):
            return loss(*(x.detach() + width * direction if i == j else x.detach() for j, x in enumerate(inputs)))

        slopes = [(moved(width) - moved(-width)).item() / (2 * width) for width in widths]
        rows.append(((gradient.double() * direction).sum().item(), slopes))
    return rows


def check_slopes(rows):
    for exact, slopes in rows:
        errors = [abs(slope - exact) / abs(exact) for slope in slopes]
        assert errors[2] < 2e-3 and errors[2] < max(errors[0] / 12, 1e-5), (exact, slopes)  # 1/16 but for rounding


class Fence:
    """Tensors that hold NaNs (integers: a large negative number) until they are written, with the same before them, and
    behind them memory that nobody may touch: the process ends there."""

    WIDTH = 1 << 16  # bytes before a tensor

    def __init__(self):
        self.buffers = []

    def empty(self, *shape, dtype=None, device=None):
        import torch

        shape, dtype, page = (
            torch.Size(shape[0] if isinstance(shape[0], tuple) else shape),
            dtype or torch.float32,
            mmap.PAGESIZE,
        )
        size = -(-(self.WIDTH + shape.numel() * dtype.itemsize) // page) * page
        memory = mmap.mmap(-1, size + page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), page, 0) == 0  # PROT_NONE
        buffer = torch.frombuffer(memory, dtype=dtype, count=size // dtype.itemsize)
        buffer.fill_(torch.nan if dtype.is_floating_point else -12345)
        self.buffers.append((buffer, shape.numel()))
        return buffer[len(buffer) - shape.numel() :].view(shape)

    def around(self, x):
        return None if x is None else self.empty(*x.shape, dtype=x.dtype).copy_(x)

    @contextmanager
    def around_everything(self):
        """Whatever is made by torch.empty lies in such memory; that around it is looked at in the end."""
        import torch

        with mock.patch.object(torch, "empty", self.empty):
            yield
        for i, (buffer, size) in enumerate(self.buffers):
            before = buffer[: len(buffer) - size]
            untouched = before.isnan() if buffer.is_floating_point() else before == -12345
            assert untouched.all(), f"written before buffer {i} of {size} entries"


def mend_interpreter() -> None:
    """Makes the interpreter compute what a GPU does; to be called in a process that has not run a kernel."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def decode(bits):
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def encode(x):
        bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)

    def converting(original):
        def convert(self, x, target, *rest):
            source, wanted = x.dtype.scalar, target.scalar
            if source == tl.bfloat16 and wanted == tl.float32:
                return handle(decode(x.data), wanted)
            if source == tl.float32 and wanted == tl.bfloat16:
                return handle(encode(x.data), wanted)
            return original(self, x, target, *rest)

        return convert

    def operand(x):
        if x.dtype.scalar == tl.bfloat16:
            return decode(x.data)
        return x.data.astype(np.float32) if x.data.dtype == np.float16 else x.data

    def dot(self, a, b, total, *rest, original=builder.create_dot):
        if not a.dtype.scalar.is_floating() or a.dtype.scalar.primitive_bitwidth < 16:
            return original(self, a, b, total, *rest)
        product = np.matmul(operand(a), operand(b)) + total.data
        return handle(product.astype(total.data.dtype), total.dtype.scalar)

    def binary(self, a, b, op, original=builder.binary_op):
        if tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar) and op not in (np.equal, np.not_equal):
            raise TypeError("arithmetic on bfloat16: convert with .to(tl.float32) first")
        return original(self, a, b, op)

    def reduce(self, inputs, original=interpreter.ReduceOps.apply_impl):
        if any(getattr(x.dtype, "scalar", x.dtype) == tl.bfloat16 for x in inputs):
            raise TypeError("a reduction of bfloat16: convert with .to(tl.float32) first")
        return original(self, inputs)

    builder.cast_impl = converting(builder.cast_impl)
    builder.create_fp_to_fp = converting(builder.create_fp_to_fp)
    builder.create_dot, builder.binary_op = dot, binary
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    interpreter.ReduceOps.apply_impl = reduce

    patch_tensor, patch_language, patched = interpreter._patch_lang_tensor, interpreter._patch_lang, set()

    def with_index(tensor, *scope):  # numpy from 2.4 on takes no array for a loop's bound
        out = patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.reshape(-1)[0])
        return out

    class Kept:
        def restore(self):
            pass

    def patch_once(fn):
        modules = tuple(sorted(id(x) for x in fn.__globals__.values() if x is tl or x is tl.core))
        if modules not in patched:
            patched.add(modules)
            patch_language(fn)
        return Kept()

    interpreter._patch_lang_tensor, interpreter._patch_lang = with_index, patch_once
