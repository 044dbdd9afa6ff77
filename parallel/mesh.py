"""The mesh: which processes there are, along which axes they lie, and how they agree.

Three axes, each of which may have size 1: dp (replicas that see different data), pp (stages of the model), tp (slices
of a layer): rank = (pp_rank * dp + dp_rank) * tp + tp_rank. Ranks that talk most, those of tp, are neighbours; stages,
which talk least, lie farthest apart. In a plain Python shell, or under a launcher that starts one process, every axis
has size 1, no process group exists, and all functions below are the identity.
"""

import itertools
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import heartbeat, order
from parallel.collectives import Axis, RankError, all_gather, all_reduce_, broadcast_, groups, recv_async_, send_async
from parallel.schedules import CHANNELS, check_schedule

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
    pp: int = 1
    """pipeline parallelism: stages, each with some of the layers, through which micro-batches flow"""
    schedule: Literal["1f1b", "gpipe", "interleaved"] = "1f1b"
    """order in which a stage takes micro-batches, see parallel/schedules.py"""
    num_chunks: int = 1
    """with interleaved: how many separate pieces of the model a stage holds; less idle time, more messages"""
    layers_per_stage: tuple[int, ...] = ()
    """layers of each stage (of each piece, in the model's order); none = divided by cost"""
    zero: Literal[0, 1, 2, 3] = 0
    """what the replicas share out: 1 optimizer state, 2 gradients too, 3 weights too (Rajbhandari 2019, 1910.02054)"""
    recompute: Literal["none", "selective", "full"] = "none"
    """what a backward computes again: nothing, norms and activation functions, or layers from their inputs"""
    offload: tuple[Literal["optimizer", "frozen"], ...] = ()
    """what lies in the host's memory: the optimizer's state, which then steps there; weights of frozen models"""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """type in which gradients are summed over the replicas; bfloat16 halves the traffic and rounds"""
    traffic: bool = False
    """print at the end what a rank has sent, by axis and operation"""
    rollout: Literal["auto", "folded", "rotation"] = "auto"
    """generation with pp: folded = every stage has all layers meanwhile and is a replica; rotation = sequences go round
    the stages; auto = folded where the memory is there"""


@dataclass(frozen=True)
class Mesh:
    """The ranks and their axes, as seen from one of them."""

    dp: Axis
    pp: Axis
    tp: Axis
    world: Axis = field(repr=False)  # all processes
    folded_dp: Axis = field(repr=False)  # pp x dp: what dp is where stages are replicas
    ends: Axis = field(repr=False)  # first and last stage x dp: who holds a tied embedding
    channels: dict[str, Axis] = field(repr=False)  # of pp, by name of parallel/schedules.py
    device: torch.device
    layout: Layout = Layout()

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def world_size(self) -> int:
        return self.world.size

    @property
    def sequence_parallel(self) -> bool:
        """Whether tokens are divided over tp between the layers' matrices."""
        return self.layout.sequence_parallel and self.tp.size > 1

    @property
    def folded(self) -> "Mesh":
        """The same ranks without stages: each stage is pp times as many replicas, numbered as they are."""
        return replace(self, dp=self.folded_dp, pp=Axis("pp", 1, 0))

    @property
    def is_logger(self) -> bool:
        """Whether this is the one rank that prints and writes."""
        return self.rank == 0

    def describe(self) -> str:
        """The layout in words."""
        tokens = ", tokens divided between matrices" if self.sequence_parallel else ""
        axes = [f"data parallel {self.dp.size}"] + [f"tensor parallel {self.tp.size}{tokens}"] * (self.tp.size > 1)
        if self.pp.size > 1:
            chunks = f" of {self.layout.num_chunks} pieces" if self.layout.num_chunks > 1 else ""
            axes.append(f"pipeline stages {self.pp.size}{chunks}, {self.layout.schedule}")
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

    def broadcast_object(self, obj: Any, axis: str = "world", source: int = 0) -> Any:
        """The picklable object that one rank of the axis passed, the first unless said, on all of its ranks."""
        over = getattr(self, axis)
        if over.size == 1:
            return obj
        data = torch.frombuffer(bytearray(pickle.dumps(obj if over.rank == source else None)), dtype=torch.uint8)
        size = torch.tensor([data.numel()], device=self.device)
        broadcast_(size, over, source)
        message = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if over.rank == source:
            message.copy_(data)
        broadcast_(message, over, source)
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


def init_mesh(layout: Layout = Layout(), config=None, batch: tuple[int, int] | None = None) -> Mesh:
    """Joins the processes that the launcher started (RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them).

    Args: config, batch: of the model to be divided and of a step, see `check_layout`.
    Raises: ValueError if the layout does not fit processes or model, or the processes do not fit the GPUs. No group has
        been made then, and no rank waits for another.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    check_layout(layout, world_size, config, batch)
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
    tp, pp = layout.tp, layout.pp
    dp = world_size // (tp * pp)

    def axis(name: str, ranks_of: Callable[[int, int, int], list[int]], channel: str = "") -> Axis:
        """The axis whose ranks `ranks_of` gives for each place (pp, dp, tp) of the mesh."""
        places = itertools.product(range(pp), range(dp), range(tp))
        return make_axis(name, [ranks_of(*place) for place in places], rank, store, channel)

    def at(i: int, j: int, k: int) -> int:
        return (i * dp + j) * tp + k

    def along_pp(_, j: int, k: int) -> list[int]:
        return [at(i, j, k) for i in range(pp)]

    names = CHANNELS if layout.num_chunks > 1 else CHANNELS[:2]
    mesh = Mesh(
        dp=axis("dp", lambda i, _, k: [at(i, j, k) for j in range(dp)]),
        pp=axis("pp", along_pp),
        tp=axis("tp", lambda i, j, _: [at(i, j, k) for k in range(tp)]),
        world=Axis("world", world_size, rank, store=store),
        folded_dp=axis("dp", lambda _i, _j, k: [at(i, j, k) for i in range(pp) for j in range(dp)]),
        ends=axis("ends", lambda _i, _j, k: [at(i, j, k) for i in sorted({0, pp - 1}) for j in range(dp)]),
        channels={name: axis("pp", along_pp, name) for name in names} if pp > 1 else {},
        device=device,
        layout=layout,
    )
    open_channels(mesh)
    return mesh


def lone_mesh() -> Mesh:
    """This process by itself, on the CPU, whatever others there are."""
    sizes = ("dp", "pp", "tp", "world", "folded_dp", "ends")
    axes = {name: Axis(name.removeprefix("folded_"), 1, 0) for name in sizes}
    return Mesh(**axes, channels={}, device=torch.device("cpu"))


def make_axis(name: str, rows: list[list[int]], rank: int, store, channel: str = "") -> Axis:
    """The axis along the row of ranks that holds this one; every process calls it with all rows, in the same order.

    A rank may be in no row: the axis then has size 1. A channel gets groups of its own.
    """
    everyone = 1 if not dist.is_initialized() else dist.get_world_size()
    for ranks in map(tuple, rows):
        if 1 < len(ranks) and (len(ranks) < everyone or channel) and (ranks, channel) not in groups:
            groups[ranks, channel] = dist.new_group(ranks, timeout=GROUP_TIMEOUT)
    mine = next((tuple(ranks) for ranks in rows if rank in ranks), (rank,))
    return Axis(name, len(mine), mine.index(rank), mine if (mine, channel) in groups else None, store, channel)


def open_channels(mesh: Mesh) -> None:
    """Sends a first message along every channel, one after the other: NCCL connects a pair when it first talks, and
    blocks meanwhile whoever calls it."""
    for name, channel in mesh.channels.items():
        hops = [(i, i + 1) for i in range(channel.size - 1)] if "wrap" not in name else [(channel.size - 1, 0)]
        for source, target in hops if name.endswith("forward") else [hop[::-1] for hop in hops]:
            message = torch.zeros(1, device=mesh.device)
            if channel.rank == source:
                send_async(message, channel, target).wait()
            elif channel.rank == target:
                recv_async_(message, channel, source).wait()


def check_layout(layout: Layout, world_size: int, config=None, batch: tuple[int, int] | None = None) -> None:
    """Raises ValueError, with what would fit, unless the layout fits the number of processes and the model.

    Args: config: DecoderConfig of the model; None checks the processes alone. batch: sequences of an optimizer step,
        over all replicas, and of a micro-batch.
    """
    takes = "" if config is None else f" with a model of {config.describe_sizes()}"
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    fits = {"tp": lambda n: config is None or config.fits_tp(n)}
    fits["pp"] = lambda n: config is None or n * layout.num_chunks <= config.num_layers
    for name, size in (("tp", layout.tp), ("pp", layout.pp)):
        fitting = [n for n in divisors if fits[name](n)]
        if size not in divisors:
            raise ValueError(
                f"--layout.{name} {size} does not divide the {world_size} processes{takes}: give one of "
                f"{', '.join(map(str, fitting))}, or start torchrun --nproc-per-node {max(size, 1)}"
            )
        if not fits[name](size):
            what = config.describe_sizes()
            if name == "pp":
                what = f"{config.num_layers} layers into {layout.num_chunks} pieces for each stage"
            raise ValueError(
                f"--layout.{name} {size} does not divide this model's {what}: with {world_size} processes it takes "
                f"{' or '.join(f'--layout.{name} {n}' for n in fitting)}"
            )
    model_ranks = layout.tp * layout.pp
    if world_size % model_ranks or layout.dp not in (0, world_size // model_ranks):
        needed = max(layout.dp, 1) * model_ranks
        sizes = [f"--layout.{name} {n}" for name, n in vars(layout).items() if name in ("dp", "tp", "pp") and n > 1]
        hint = ""
        if layout.dp and world_size % model_ranks == 0:
            hint = f"leave --layout.dp out (or give {world_size // model_ranks}), or "
        raise ValueError(
            f"{' x '.join(sizes) or '--layout.dp 1'} needs {needed} processes, but {world_size} were started: "
            f"{hint}start torchrun --nproc-per-node {needed}"
        )
    if layout.num_chunks > 1 and layout.schedule != "interleaved":
        raise ValueError(
            f"--layout.num-chunks {layout.num_chunks} with --layout.schedule {layout.schedule}: only interleaved has "
            "several pieces in a stage; add --layout.schedule interleaved"
        )
    if layout.schedule == "interleaved" and layout.pp > 1 and layout.num_chunks < 2:
        raise ValueError("--layout.schedule interleaved needs --layout.num-chunks 2 or more; with one piece use 1f1b")
    if layout.pp > 1 and config is not None:
        config.layers_by_part(layout)
    if layout.pp > 1 and batch is not None:
        share = batch[0] * model_ranks // world_size
        check_schedule(layout.schedule, layout.pp, -(-share // batch[1]), layout.num_chunks)


def _describe(error: Exception) -> str:
    """The message of an error that names the culprit itself; any other error with its type."""
    return str(error) if isinstance(error, ValueError | OSError | RankError) else f"{type(error).__name__}: {error}"
