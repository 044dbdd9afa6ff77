"""The mesh: which processes there are, along which axes they lie, and how they agree.

Three axes, each of which may have size 1: dp (replicas that see different data), pp (stages of the model, not used
yet), tp (slices of a layer): rank = dp_rank * tp + tp_rank, so that the ranks of a replica, which talk most, are
neighbours. In a plain Python shell, or under a launcher that starts one process, every axis has size 1, no process
group exists, and all functions below are the identity.
"""

import math
import os
import pickle
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import heartbeat, order
from parallel.collectives import Axis, RankError, all_gather, all_reduce_, broadcast_, groups

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # a second, dense bfloat16, by part of the GPU's name
# A rank that does not come to a collective for so long hangs. Start-up, loading, rewards and writing, which may take
# longer on one rank, end in `wait_for_all`; what is left is compilation, and the pieces of one large checkpoint.
GROUP_TIMEOUT = timedelta(minutes=10)
START_TIMEOUT = timedelta(hours=2)  # until all processes are there, some of which may have to fetch a model


@dataclass(frozen=True)
class Layout:
    """How the work is laid over the processes; the product of the sizes is the number of processes."""

    dp: int = 0
    """data-parallel replicas; 0 = what the other axes leave"""
    tp: int = 1
    """tensor parallelism: ranks among which the heads and columns of every layer are divided"""
    sequence_parallel: bool = True
    """with tp: divides also what lies between the layers' matrices, by tokens; no more traffic, less memory"""
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
    sequence_parallel: bool = False  # over tp

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

    def describe(self) -> str:
        """The layout in words."""
        tokens = ", tokens divided between matrices" if self.sequence_parallel else ""
        axes = [f"data parallel {self.dp.size}"] + [f"tensor parallel {self.tp.size}{tokens}"] * (self.tp.size > 1)
        return f"{' x '.join(axes)} (processes: {self.world_size}), on {self.device}"

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

    def gather_objects(self, obj: Any, axis: str = "world") -> list:
        """One picklable object of each rank of an axis, as a list in rank order on all of them; for small things."""
        over = getattr(self, axis)
        if over.size == 1:
            return [obj]
        data = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)
        sizes = all_gather(torch.tensor([data.numel()], device=self.device), over).tolist()
        padded = torch.zeros(1, max(sizes), dtype=torch.uint8, device=self.device)
        padded[0, : data.numel()] = data.to(self.device)
        rows = all_gather(padded, over).cpu()  # [size, bytes of the largest]
        return [pickle.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def broadcast_object(self, obj: Any, axis: str = "world") -> Any:
        """The picklable object that the axis's first rank passed, on all of its ranks."""
        over = getattr(self, axis)
        if over.size == 1:
            return obj
        data = torch.frombuffer(bytearray(pickle.dumps(obj if over.rank == 0 else None)), dtype=torch.uint8)
        size = torch.tensor([data.numel()], device=self.device)
        broadcast_(size, over)
        message = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if over.rank == 0:
            message.copy_(data)
        broadcast_(message, over)
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

    def at(self, phase: str, iteration: int | None = None) -> None:
        """Notes what this rank is doing from now on, for error messages; None = still in the same iteration."""
        heartbeat.at(phase, iteration)

    def wait_for_all(self, what: str, timeout: float = math.inf) -> None:
        """Returns when every rank has come here, one that is busy for long, too: see `heartbeat.wait_for_all`."""
        if self.world_size > 1:
            heartbeat.wait_for_all(what, timeout)

    def barrier(self) -> None:
        """Returns when every rank has come here; one that is busy should not be long."""
        self._reduce(0.0, "world", "max")

    def close(self) -> None:
        """Ends the process group; waits for all ranks, since one that leaves early breaks those still at work."""
        if dist.is_initialized():
            self.barrier()
            groups.clear()
            dist.destroy_process_group()

    def _reduce(self, x, axis: str, op: str):
        number = not isinstance(x, Tensor)
        total = torch.tensor(float(x), dtype=torch.float64) if number else x.detach()
        total = total.to(self.device, copy=True)
        all_reduce_(total, getattr(self, axis), op)
        return total.item() if number else total.to(x.device)


def init_mesh(layout: Layout = Layout(), config=None) -> Mesh:
    """Joins the processes that the launcher started (RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them).

    Args: config: DecoderConfig of the model to be divided, if there is one.
    Raises: ValueError if the layout does not fit processes or model, or the processes do not fit the GPUs. No group has
        been made then, and no rank waits for another.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    check_layout(layout, world_size, config)
    order.records.clear()
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
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=START_TIMEOUT))
        # A launcher that restarts the ranks keeps its store: without a prefix they would read dead addresses.
        store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        heartbeat.start(store, rank, world_size)
        heartbeat.wait_for_all("all processes to start", START_TIMEOUT.total_seconds())
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT)
    num_replicas = world_size // layout.tp
    return Mesh(
        dp=make_axis("dp", [[i * layout.tp + j for i in range(num_replicas)] for j in range(layout.tp)], rank, store),
        pp=Axis("pp", 1, 0),
        tp=make_axis("tp", [[i * layout.tp + j for j in range(layout.tp)] for i in range(num_replicas)], rank, store),
        world=Axis("world", world_size, rank, store=store),
        device=device,
        sequence_parallel=layout.sequence_parallel and layout.tp > 1,
    )


def make_axis(name: str, rows: list[list[int]], rank: int, store) -> Axis:
    """The axis along the row of ranks that holds this one. Every rank calls it with all rows, in the same order."""
    for ranks in map(tuple, rows):
        if 1 < len(ranks) < dist.get_world_size() and ranks not in groups:
            groups[ranks] = dist.new_group(ranks, timeout=GROUP_TIMEOUT)
    mine = next(tuple(ranks) for ranks in rows if rank in ranks)
    return Axis(name, len(mine), mine.index(rank), mine if mine in groups else None, store)


def check_layout(layout: Layout, world_size: int, config=None) -> None:
    """Raises ValueError, with what would fit, unless the layout fits the number of processes and the model.

    Args: config: DecoderConfig of the model; None checks the processes alone.
    """
    takes = "" if config is None else f" with a model of {config.describe_sizes()}"
    fitting = [n for n in range(1, world_size + 1) if world_size % n == 0 and (config is None or config.fits_tp(n))]
    if layout.tp < 1 or world_size % layout.tp:
        raise ValueError(
            f"--layout.tp {layout.tp} does not divide the {world_size} processes{takes}: give one of "
            f"{', '.join(map(str, fitting))}, or start torchrun --nproc-per-node {max(layout.tp, 1)}"
        )
    if layout.dp not in (0, world_size // layout.tp):
        needed = max(layout.dp, 1) * layout.tp
        raise ValueError(
            f"--layout.dp {layout.dp} x --layout.tp {layout.tp} needs {needed} processes, but {world_size} were "
            f"started: leave --layout.dp out (or give {world_size // layout.tp}), or start torchrun "
            f"--nproc-per-node {needed}"
        )
    if config is not None and not config.fits_tp(layout.tp):
        raise ValueError(
            f"--layout.tp {layout.tp} does not divide this model's {config.describe_sizes()}: with {world_size} "
            f"processes it takes {' or '.join(f'--layout.tp {n}' for n in fitting)}"
        )


def _describe(error: Exception) -> str:
    """The message of an error that names the culprit itself; any other error with its type."""
    return str(error) if isinstance(error, ValueError | OSError | RankError) else f"{type(error).__name__}: {error}"
