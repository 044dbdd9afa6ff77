"""The mesh: which processes there are, along which axes they lie, and how they agree.

Three axes, each of which may have size 1: dp (replicas that see different data), pp (stages of the model), tp (slices
of a layer), tp innermost. Today only dp grows. In a plain Python shell, or under a launcher that starts one process,
every axis has size 1, no process group exists, and all functions below are the identity.
"""

import os
import pickle
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import Axis, RankError, all_gather, all_reduce_, broadcast_

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # a second, dense bfloat16, by part of the GPU's name
# A rank that does not come to a collective for so long is lost. A dead one is seen at once by its closed connections;
# one that lives may be busy with a slow reward or a large checkpoint.
GROUP_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Layout:
    """How the work is laid over the processes; the product of the sizes is the number of processes."""

    dp: int = 0
    """data-parallel replicas; 0 = all processes"""
    zero: Literal[0, 1, 2, 3] = 0
    """what the replicas share out: 1 optimizer state, 2 gradients too, 3 weights too (Rajbhandari 2019, 1910.02054)"""
    recompute: Literal["none", "selective", "full"] = "none"
    """what a backward computes again: nothing, norms and activation functions, or layers from their inputs"""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """type in which gradients are summed over the replicas; bfloat16 halves the traffic and rounds"""


@dataclass(frozen=True)
class Mesh:
    """The ranks and their axes, as seen from one of them."""

    dp: Axis
    pp: Axis
    tp: Axis
    world: Axis = field(repr=False)  # all processes
    device: torch.device

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def world_size(self) -> int:
        return self.world.size

    @property
    def is_logger(self) -> bool:
        """Whether this is the one rank that prints and writes."""
        return self.rank == 0

    def utilisation(self, flops: float, seconds: float) -> dict[str, float]:
        """{"mfu": share of the peak that flops in seconds on all ranks are}, empty where the peak is not known."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        peak = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
        return {"mfu": flops / seconds / (peak * self.world_size)} if peak else {}

    def sum(self, x, axis: str):
        """Sum over an axis: of a tensor as a new tensor, of a number (in float64) as a float."""
        return self._reduce(x, axis, "sum")

    def max(self, x, axis: str):
        """Maximum over an axis: of a tensor as a new tensor, of a number (in float64) as a float."""
        return self._reduce(x, axis, "max")

    def all_gather(self, x: Tensor, axis: str) -> Tensor:
        """[n, ...] -> [size * n, ...] in rank order; n must be equal on all ranks."""
        return all_gather(x.to(self.device), getattr(self, axis)).to(x.device)

    def gather_objects(self, obj: Any) -> list:
        """One picklable object of each rank, as a list in rank order on every rank; meant for small things."""
        if self.world_size == 1:
            return [obj]
        data = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)
        sizes = all_gather(torch.tensor([data.numel()], device=self.device), self.world).tolist()
        padded = torch.zeros(1, max(sizes), dtype=torch.uint8, device=self.device)
        padded[0, : data.numel()] = data.to(self.device)
        rows = all_gather(padded, self.world).cpu()  # [world_size, bytes of the largest]
        return [pickle.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def broadcast_object(self, obj: Any) -> Any:
        """The picklable object that rank 0 passed, on every rank."""
        if self.world_size == 1:
            return obj
        data = torch.frombuffer(bytearray(pickle.dumps(obj if self.rank == 0 else None)), dtype=torch.uint8)
        size = torch.tensor([data.numel()], device=self.device)
        broadcast_(size, self.world)
        message = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            message.copy_(data)
        broadcast_(message, self.world)
        return pickle.loads(message.cpu().numpy().tobytes())

    def raise_together(self, error: Exception | None) -> None:
        """Raises on all ranks if any rank has an error; every rank must call it, with None where all is well.

        Raises: RankError with the message of the first failing rank, the same on every rank.
        """
        if self._reduce(float(error is not None), "world", "max") == 0:
            return
        messages = self.gather_objects(None if error is None else _describe(error))
        rank, message = next((rank, message) for rank, message in enumerate(messages) if message is not None)
        raise RankError(f"rank {rank}: {message}" if self.world_size > 1 else message) from error

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        self._reduce(0.0, "world", "max")

    def close(self) -> None:
        """Ends the process group; waits for all ranks, since one that leaves early breaks those still at work."""
        if dist.is_initialized():
            self.barrier()
            dist.destroy_process_group()

    def _reduce(self, x, axis: str, op: str):
        number = not isinstance(x, Tensor)
        total = torch.tensor(float(x), dtype=torch.float64) if number else x.detach()
        total = total.to(self.device, copy=True)
        all_reduce_(total, getattr(self, axis), op)
        return total.item() if number else total.to(x.device)


def init_mesh(layout: Layout = Layout()) -> Mesh:
    """Joins the processes that the launcher started (RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them).

    Raises: ValueError if the layout does not fit the processes, or the processes do not fit the GPUs.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    check_layout(layout, world_size)
    if torch.cuda.is_available():
        num_gpus = torch.cuda.device_count()
        if local_size > num_gpus:
            raise ValueError(
                f"{local_size} processes on a machine with {num_gpus} GPUs: start --nproc-per-node {num_gpus}, "
                "or hide the GPUs with CUDA_VISIBLE_DEVICES="
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")

    store = None
    if world_size > 1 and not dist.is_initialized():
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=GROUP_TIMEOUT))
        # A launcher that restarts the ranks keeps its store: without a prefix they would read dead addresses.
        store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT)
    return Mesh(
        dp=Axis("dp", world_size, rank, store=store),  # pp and tp being 1, the replicas are all the processes
        pp=Axis("pp", 1, 0),
        tp=Axis("tp", 1, 0),
        world=Axis("world", world_size, rank, store=store),
        device=device,
    )


def check_layout(layout: Layout, world_size: int) -> None:
    """Raises ValueError, with what would fit, unless the layout's axes multiply to the number of processes."""
    if layout.dp not in (0, world_size):
        raise ValueError(
            f"--layout.dp {layout.dp} needs {layout.dp} processes, but {world_size} were started: leave --layout.dp "
            f"out (or give {world_size}), or start torchrun --nproc-per-node {max(layout.dp, 1)}"
        )


def _describe(error: Exception) -> str:
    """The message of an error that names the culprit itself; any other error with its type."""
    return str(error) if isinstance(error, ValueError | OSError | RankError) else f"{type(error).__name__}: {error}"
