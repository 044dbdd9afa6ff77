"""Rehearsals: one process plays any rank of any world on tensors without contents, and counts bytes and traffic.

The project's own code runs (decoder, units, backward, clipping, optimizer, KV cache) under torch's FakeTensorMode and a
process group that sends nothing, so a rank of 512 with a 70B model takes seconds on a laptop. It takes the paths of
GPUs, whose kernels are not launched. Where it reads a number from a tensor, the ledger answers; the two loops over
millions of entries are replaced by single operations.
"""

import contextlib
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.adapters import make_reference, set_trained
from parallel.collectives import Pending, groups, traffic
from parallel.data_parallel import data_parallel
from parallel.footprint import DTYPES, Job, Role, Stage
from parallel.generation import PREFILL_TOKENS, KVCache, Pass, Sampling, lm_logits, rotate, sample_tokens
from parallel.mesh import Layout, Mesh, init_mesh
from parallel.model import Decoder, ScalarHead
from parallel.optim import AdamW, clip_grad_norm
from parallel.pipeline import forward_backward
from parallel.plan import measure_states
from parallel.reshard import rollout_weights
from parallel.tensor import hidden_before, vocab_parallel_logprobs

aten = torch.ops.aten


class Ledger(TorchDispatchMode):
    """Bytes of all storages that live, and their peak.

    Args: num_chosen: how many entries a mask selects.
    """

    def __init__(self, num_chosen: int):
        super().__init__()
        self.num_chosen, self.number = num_chosen, 0  # number: what reading a tensor gives
        self.live = self.peak = 0
        self.sizes: dict[int, int] = {}  # by storage

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        if fn is aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else self.number
        if fn is aten.nonzero.default:
            return torch.empty(self.num_chosen, args[0].dim(), dtype=torch.long)
        if fn in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default):
            args = (args[0], self.number_indices(args[1]), *args[2:])
        out = fn(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.see(x.untyped_storage())
        return out

    def number_indices(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """Masks as the indices of what they select."""
        found = []
        for index in indices:
            if index is not None and index.dtype == torch.bool:
                found += [torch.empty(self.num_chosen, dtype=torch.long) for _ in range(index.dim())]
            else:
                found.append(index)
        return found

    def see(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:
            weakref.finalize(storage, self.forget, key)
        self.live += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.peak = max(self.peak, self.live)

    def forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


class FusedNorm(torch.autograd.Function):
    """What torch's kernel for RMS norms on GPUs allocates and keeps."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
        ctx.save_for_backward(x, weight, scale)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), None


def float32_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """As CUDA: without copies of the factors."""
    return torch.empty(len(a), b.shape[1]) if out is None else out


@contextlib.contextmanager
def gpu_paths() -> Iterator[None]:
    """Has code take the paths of GPUs on CPU tensors, without launching a kernel: results are not defined, sizes are.

    Needs the package triton.
    """
    from triton.runtime.jit import KernelInterface

    modules = "attention", "decode", "linear_logprobs", "sampler", "target_logits"
    patches = [mock.patch(f"kernels.{name}.runs_triton", lambda x: x.dtype != torch.float64) for name in modules]
    launch = mock.patch.object(KernelInterface, "__getitem__", lambda kernel, grid: lambda *args, **kwargs: None)
    patches += [launch, mock.patch("kernels.linear_logprobs.float32_product", float32_product)]
    patches += [mock.patch("kernels.pointwise.RMSNorm", FusedNorm)]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


@contextlib.contextmanager
def fake_world(layout: Layout, world_size: int, rank: int, num_chosen: int) -> Iterator[tuple[Mesh, Ledger]]:
    """The mesh of a rank in a world of which nothing else exists, and the ledger of what it holds.

    Args: num_chosen: how many entries a mask selects.
    """
    assert not dist.is_initialized(), "a rehearsal needs a process of its own"
    ledger = Ledger(num_chosen)
    resize = torch.UntypedStorage.resize_

    def resize_seen(storage, size):
        resize(storage, size)
        ledger.see(storage)

    patches = [
        mock.patch.dict(os.environ, {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}),
        mock.patch("torch.cuda.is_available", lambda: False),
        mock.patch("parallel.optim.sum_of_squares", lambda x: torch.linalg.vector_norm(x, dtype=torch.float64) ** 2),
        mock.patch("parallel.data_parallel._hash", lambda flat: torch.zeros((), dtype=torch.int64)),
        gpu_paths(),
        mock.patch.object(FakeTensor, "data_ptr", lambda self: 0),
        mock.patch.object(Pending, "is_done", lambda self: True),
        mock.patch.object(Mesh, "broadcast_object", lambda self, obj, *_: obj),
        mock.patch.object(torch.UntypedStorage, "resize_", resize_seen),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        try:
            mesh = init_mesh(layout)
            with FakeTensorMode(), ledger:
                yield mesh, ledger
        finally:
            groups.clear()
            dist.destroy_process_group()


@dataclass(frozen=True)
class Rehearsal:
    """What one rank was seen to hold and send."""

    weights: int
    gradients: int
    optimizer: int
    host: int  # bytes in the host's memory
    update: int  # bytes at the peak of an optimizer step, less those
    rollout: int  # and of a generation's forwards
    step_traffic: dict[tuple[str, str], int]
    rollout_traffic: dict[tuple[str, str], int]


def rehearse(
    job: Job,
    layout: Layout,
    world_size: int,
    rank: int = 0,
    make_loss: Callable | None = None,
    make_modules: Callable | None = None,
) -> Rehearsal:
    """Plays a rank's optimizer step and the forwards of a generation.

    Args: make_modules: mesh -> the modules of the roles; None: decoders and scalar heads. make_loss: modules, mesh ->
        loss_fn of `forward_backward`; None: log-probabilities, entropies and scalar heads.
    """
    stage = Stage(job, layout, world_size)
    shape = stage.rows, job.seq_len
    with fake_world(layout, world_size, rank, stage.scored) as (mesh, ledger):
        roles = (make_modules or partial(make_default_modules, job.roles))(mesh)
        model = data_parallel({name: roles[name] for name in roles if job.roles[name].in_units}, mesh, layout)
        optimizer = AdamW(model, 1e-3)
        states = measure_states(model.units, optimizer)
        loss_fn = (make_loss or make_default_loss)(roles, mesh)

        def microbatch() -> dict[str, Tensor]:
            ids = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "position_ids", "first_key")}
            return ids | {"mask": torch.ones(shape, dtype=torch.bool)}

        before, ledger.peak = Counter(traffic()), ledger.live
        ledger.number = stage.num_microbatches  # of all replicas
        model.zero_grad()
        forward_backward(model, [microbatch() for _ in range(stage.num_microbatches)], loss_fn)
        clip_grad_norm(model, 1.0, mesh)
        optimizer.step()
        step_traffic, update = Counter(traffic()) - before, ledger.peak - states[3]

        before, ledger.peak = Counter(traffic()), ledger.live
        if job.rollout:
            play_rollout(job, stage, next(roles[name] for name in stage.decoders), ledger)
        return Rehearsal(
            *states, update, ledger.peak - states[3], dict(step_traffic), dict(Counter(traffic()) - before)
        )


def make_default_modules(roles: dict[str, Role], mesh: Mesh) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {}
    for name, role in roles.items():
        if role.shared:
            modules[name] = make_reference(modules["policy"])
        elif role.in_units:
            modules[name] = make_role(role, mesh if role.trainable else mesh.folded)
    return modules


def make_role(role: Role, mesh: Mesh) -> nn.Module:
    dtype = DTYPES[role.itemsize]
    if role.config is None:
        module = ScalarHead(role.shapes[0][1], mesh, dtype)
    else:
        module = Decoder(role.config, mesh, dtype, seed=None, lm_head=role.lm_head)
        if role.trainable:
            return set_trained(module, role.tuning)
    return module.requires_grad_(role.trainable)


def make_default_loss(roles: dict[str, nn.Module], mesh: Mesh) -> Callable:
    """The loss of every script in its outlines."""

    def loss_fn(hidden, microbatch):
        ids, mask = microbatch["input_ids"], microbatch["mask"]
        loss = torch.zeros(())
        for role, module in roles.items():
            if role in hidden:
                states = hidden_before(hidden[role], mask)
                if module.has_lm_head:
                    logprobs, entropy = vocab_parallel_logprobs(states, module, ids[mask])
                    loss = loss - (logprobs + entropy).sum()
            elif isinstance(module, ScalarHead):
                loss = loss + module(states).sum()
        return loss, {}

    return loss_fn


@torch.no_grad()
def play_rollout(job: Job, stage: Stage, policy: Decoder, ledger: Ledger) -> None:
    """Prefill, the longest sequences' step, and both again: prompts that enter slots that have become free."""
    prompt_len = job.seq_len - job.new_tokens
    ledger.number = int(policy.mesh.layout.rollout == "rotation")  # whether some rank lacks the memory for all layers
    with rollout_weights(policy) as sampler:
        slots = stage.slots
        config = sampler.config.shard(sampler.mesh.tp.size)
        layers = [i for chunk in sampler.chunks for i in chunk]
        groups = range(sampler.mesh.pp.size)
        caches = [KVCache(config, layers, slots, sampler.dtype, torch.device("cpu")) for _ in groups]
        entered = torch.arange(min(max(PREFILL_TOKENS // prompt_len, 1), slots))
        longest = torch.full((slots,), job.seq_len - 2)  # the newest token is drawn from the state of the one before
        for _ in range(2):
            for cache in caches:
                ids = torch.zeros(len(entered), prompt_len, dtype=torch.long)
                prompts = Pass(entered, entered, torch.full((len(entered),), prompt_len), ids, ids)
                play_pass(prompts, sampler, cache)
            ledger.number = job.seq_len - 2
            for cache in caches:
                ids = torch.zeros(slots, 1, dtype=torch.long)
                play_pass(Pass(torch.arange(slots), None, longest, ids, ids), sampler, cache)
    ledger.number = 0


def play_pass(one: Pass, sampler: Decoder, cache: KVCache) -> None:
    """A group's pass through this stage, and the drawing of its tokens."""
    mesh, came = sampler.mesh, one.token_ids
    for i, chunk in enumerate(sampler.chunks):
        states = None
        if not (sampler.is_first and i == 0):
            came = torch.empty(one.token_ids.numel(), sampler.config.hidden_size, dtype=sampler.dtype)
        states = one.forward(sampler, cache, came, chunk)
        if mesh.pp.size > 1:
            is_end = chunk.stop == sampler.config.num_layers
            widths = [0 if is_end or stage != mesh.pp.rank else one.token_ids.numel() for stage in range(mesh.pp.size)]
            rotate(states, widths, sampler)
    if sampler.is_last:
        noise = torch.zeros(len(one.rows), dtype=torch.float64)
        greedy = Sampling(temperature=0.0)  # as evaluations draw: it needs more than sampling
        sample_tokens(lm_logits(sampler, states), noise, greedy, sampler.config.vocab_size, mesh.tp)
