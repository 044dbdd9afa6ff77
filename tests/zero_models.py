"""Small decoders of four families and a step over them, for tests of sharding and recomputation on several ranks."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.collectives import all_gather, traffic
from parallel.data_parallel import data_parallel
from parallel.mesh import Layout, init_mesh
from parallel.model import Decoder, ScalarHead
from parallel.optim import AdamW, clip_grad_norm
from parallel.pipeline import forward_backward
from parallel.tensor import hidden_before, vocab_parallel_logprobs

BATCH, SEQ_LEN = 8, 9


def make_roles(config, mesh, dtype, frozen=()):
    policy = Decoder(config, mesh, dtype, seed=3)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(frozen)))
    ref_policy = Decoder(config, mesh, dtype, seed=4).requires_grad_(False)
    return {
        "policy": policy,
        "ref_policy": ref_policy,
        "value_head": ScalarHead(config.hidden_size, mesh, torch.promote_types(dtype, torch.float32), std=0.5),
    }


def make_microbatches(mesh, step, num_microbatches, vocab_size):
    """This rank's rows, and the number of loss tokens of all ranks."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(vocab_size, (BATCH, SEQ_LEN), generator=generator)
    mask = torch.rand(BATCH, SEQ_LEN, generator=generator) < 0.7
    mask[:, 0] = False
    local = [x[mesh.dp.rank :: mesh.dp.size].chunk(num_microbatches) for x in (ids, mask)]
    microbatches = [{**unpacked(ids), "mask": mask} for ids, mask in zip(*local, strict=True)]
    return microbatches, mask.sum()


def unpacked(ids):
    """A micro-batch of one sequence a row."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return {"input_ids": ids, "position_ids": positions, "first_key": torch.zeros_like(ids)}


def make_loss(roles, num_tokens, with_values=True):
    def loss_fn(hidden, microbatch):
        ids, mask = microbatch["input_ids"], microbatch["mask"]
        where = ids, microbatch["position_ids"], microbatch["first_key"]
        hidden = hidden_before(hidden["policy"], mask)
        logprobs, entropy = vocab_parallel_logprobs(hidden, roles["policy"], ids[mask])
        with torch.no_grad():
            states = hidden_before(roles["ref_policy"](*where), mask)
            ref_logprobs, _ = vocab_parallel_logprobs(states, roles["ref_policy"], ids[mask])
        values = roles["value_head"](hidden) if with_values else torch.zeros_like(logprobs)
        losses = (logprobs - ref_logprobs).square() + (values - 1).square() - logprobs - 0.1 * entropy
        return losses.sum() / num_tokens, {"entropy": entropy.detach().sum() / num_tokens}

    return loss_fn


def full_gradients(model):
    """Gradients by name from all ranks; under zero 0 they are there."""
    gradients = {}
    for unit in model.units:
        if unit.trainable:
            flat = all_gather(unit.own(unit.flat_grad), unit.dp) if unit.zero else unit.flat_grad
            gradients |= {name: unit.view(flat, i).clone() for i, name in enumerate(unit.names)}
    return gradients


def full_weights(model):
    """Weights by name from all ranks; what should be whole is taken as it lies."""
    weights = {}
    for unit in model.units:
        flat = unit.flat if unit.flat.numel() == unit.size else all_gather(unit.flat, unit.dp)
        weights |= {name: unit.view(flat, i).clone() for i, name in enumerate(unit.names)}
    return weights


def train(config, layout=None, dtype="float32", num_steps=1, num_microbatches=1, frozen=(), values_on=None, spoil=None):
    """Gradients of the first step, weights after the last, metrics with norms, and bytes sent in the first step.

    Args: values_on: ranks whose loss reads the value head; None = all. spoil: plants a bug into the model.
    """
    layout = layout or Layout()
    mesh = init_mesh()
    roles = make_roles(config, mesh, getattr(torch, dtype), frozen)
    model = data_parallel(roles, mesh, layout)
    if spoil is not None:
        spoil(model)
    optimizer = AdamW(model, 1e-2, weight_decay=0.1)
    gradients, metrics, sent = {}, [], {}
    for step in range(num_steps):
        microbatches, num_tokens = make_microbatches(mesh, step, num_microbatches, config.vocab_size)
        before = traffic()
        model.zero_grad()
        loss_fn = make_loss(roles, num_tokens, values_on is None or mesh.rank in values_on)
        metrics.append(forward_backward(model, microbatches, loss_fn))
        reduced = traffic()
        if step == 0:
            gradients = full_gradients(model)
        gathered = traffic()
        metrics[-1]["grad_norm"] = clip_grad_norm(model, 0.05, mesh)
        assert optimizer.step()
        if step == 0:
            keys = [key for key in traffic() if key[0] == "dp"]
            sent = {op: reduced.get((axis, op), 0) - before.get((axis, op), 0) for axis, op in keys}
            sent["step"] = sum(traffic().get(key, 0) - gathered.get(key, 0) for key in keys)
    return gradients, full_weights(model), metrics, sent


class LiveBytes(TorchDispatchMode):
    """The largest sum of the bytes of all storages that operations returned or were given, while it is active."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        out = fn(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.storages[storage._cdata] = weakref.ref(storage)
        alive = {place: ref() for place, ref in self.storages.items()}
        self.storages = {place: self.storages[place] for place, storage in alive.items() if storage is not None}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive.values() if storage is not None))
        return out
