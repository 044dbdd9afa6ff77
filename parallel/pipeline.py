"""One step's forward and backward passes over its micro-batches, through all stages of the model.

With one stage this is the plain loop: forward, loss, backward, micro-batch by micro-batch. With more, each stage walks
its program (`schedules.add_transfers`): it runs its layers on what the stage before has sent and sends on the result;
the last stage computes the loss, and gradients come back the same way. Every stage has all micro-batches, which are
small beside activations: what a message holds, and how long it is, need never be said.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from parallel.collectives import Pending, all_reduce_, recv_async_, send_async
from parallel.data_parallel import DataParallel
from parallel.mesh import Mesh
from parallel.model import Decoder
from parallel.schedules import Action, Transfer, add_transfers, make_schedule, transfers_of


def forward_backward(
    model: DataParallel,
    microbatches: list[dict],
    loss_fn: Callable[[dict[str, Tensor], dict], tuple[Tensor, dict[str, Tensor]]],
) -> dict[str, float]:
    """Adds the gradients of the summed loss over all micro-batches of all replicas to those of the model.

    A replica with fewer micro-batches than others repeats its last one, whose loss then counts 0 times.

    Args: microbatches: of this replica, the same on all of its ranks; dicts with input_ids, position_ids and first_key
        [rows, row_len]. loss_fn: called on the last stage with the hidden states [rows, row_len, hidden_size] of each
        decoder that trains, by role, and the micro-batch; gives the loss, already divided by the num_tokens of the
        whole batch, and metrics, 0-dim tensors of which the same names appear everywhere.
    Communication: gradients as `DataParallel` reduces them, during the backward passes; over pp two messages per
        micro-batch and border between parts; one all-reduce (max) of the number of micro-batches and one (sum) of the
        metrics over dp, one (max) if there are names that begin with max_; one broadcast of the metrics over pp.
    Returns: "loss" and every metric, summed over micro-batches and replicas (max_...: their maximum), as floats.
    """
    assert microbatches, "a replica without a micro-batch does not know the names of the metrics"
    mesh = model.mesh
    mesh.at("update")
    num = int(mesh.max(len(microbatches), "dp"))
    walk = Walk(model.decoders, mesh, microbatches + microbatches[-1:] * (num - len(microbatches)))
    total: dict[str, Tensor] = {}

    def last_part(hidden: dict[str, Tensor], i: int) -> Tensor:
        loss, metrics = loss_fn(hidden, walk.microbatches[i])
        if i >= len(microbatches):
            return loss * 0
        for name, value in {"loss": loss, **metrics}.items():
            value = value.detach().double()
            if name in total:
                value = torch.maximum(total[name], value) if name.startswith("max_") else total[name] + value
            total[name] = value
        return loss

    for action in walk.steps(make_program(mesh.layout.schedule, mesh.pp.size, num, mesh.layout.num_chunks)):
        if action.kind == "F":
            walk.forward(action, last_part)
        else:
            model.start_sync(action.microbatch == num - 1, action.chunk)
            walk.backward(action)
            model.finish_sync()
    model.finish_gradients()
    is_last = mesh.pp.rank == mesh.pp.size - 1
    return mesh.broadcast_object(reduce_metrics(total, mesh) if is_last else None, "pp", mesh.pp.size - 1)


@torch.no_grad()
def forward_only(
    decoders: dict[str, Decoder], microbatches: list[dict], fn: Callable[[dict[str, Tensor], dict], object]
) -> list[tuple[dict, object]]:
    """(micro-batch, fn(hidden, micro-batch)) of each micro-batch, without gradient; on the last stage, [] on others.

    Args: decoders, by role; fn: as the loss_fn of `forward_backward`.
    Communication: over pp one message per micro-batch and border between parts.
    """
    mesh = next(iter(decoders.values())).mesh
    walk = Walk(decoders, mesh, microbatches)
    results = []

    def last_part(hidden: dict[str, Tensor], i: int) -> None:
        results.append((microbatches[i], fn(hidden, microbatches[i])))

    num_chunks = mesh.layout.num_chunks if mesh.pp.size > 1 else 1
    for action in walk.steps(make_program("forward", mesh.pp.size, len(microbatches), num_chunks)):
        walk.forward(action, last_part)
    return results


def forward_folded(decoder: Decoder, microbatches: list[dict], mesh: Mesh) -> Iterator[tuple[dict, Tensor]]:
    """Yields (micro-batch, hidden states) of this stage's share of its replica's micro-batches.

    For a frozen decoder, which lies on the folded mesh: stages divide the work as replicas do. All make as many passes,
    because the weights may be gathered on their way; a last one may be idle.

    Args: mesh: that of the stages. Communication: over dp and pp that of the decoder.
    """
    mine = microbatches[mesh.pp.rank :: mesh.pp.size]
    num = -(-len(microbatches) // mesh.pp.size)
    for i, microbatch in enumerate(mine + microbatches[:1] * (num - len(mine))):
        with torch.no_grad():
            hidden = decoder(microbatch["input_ids"], microbatch["position_ids"], microbatch["first_key"])
        if i < len(mine):
            yield microbatch, hidden


@functools.lru_cache(maxsize=64)
def make_program(name: str, num_stages: int, num_microbatches: int, num_chunks: int) -> list[list[Action | Transfer]]:
    """Actions and transfers of every stage; "forward": the forward passes alone, chunk by chunk."""
    if num_stages == 1:
        name, num_chunks = "1f1b" if name != "forward" else name, 1
    if name == "forward":
        actions = [Action("F", chunk, i) for chunk in range(num_chunks) for i in range(num_microbatches)]
        return add_transfers([actions] * num_stages) if actions else [[]] * num_stages
    return add_transfers([make_schedule(name, s, num_stages, num_microbatches, num_chunks) for s in range(num_stages)])


class Walk:
    """What a stage holds while it walks its program: messages under way, and of each forward what its backward needs.

    Shapes: a message holds the states [tokens / tp, hidden_size] of every decoder, or their gradients, in one row.
    """

    def __init__(self, decoders: dict[str, Decoder], mesh: Mesh, microbatches: list[dict]):
        self.decoders, self.mesh, self.microbatches = decoders, mesh, microbatches
        self.num_parts = mesh.pp.size * (mesh.layout.num_chunks if mesh.pp.size > 1 else 1)
        self.arriving: dict[tuple, tuple[Tensor, Pending]] = {}  # by (channel, chunk, micro-batch)
        self.leaving: list[tuple[Tensor, Pending]] = []
        self.inputs: dict[tuple[int, int], dict[str, Tensor]] = {}  # by (chunk, micro-batch): leaves, by role
        self.outputs: dict[tuple[int, int], list] = {}  # the loss, or where the gradients of the states sent enter
        self.outbox: dict[str, Tensor] = {}  # what the last action has to send

    def steps(self, programs: list[list[Action | Transfer]]) -> Iterator[Action]:
        """Yields this stage's actions one by one, their input being there; sends and receives between them."""
        for step in programs[self.mesh.pp.rank]:
            if isinstance(step, Action):
                yield step
            elif step.kind == "recv":
                entries = sum(rows * width for rows, width in self.shapes(step.microbatch).values())
                dtype = next(iter(self.decoders.values())).dtype
                message = torch.empty(entries, dtype=dtype, device=self.mesh.device)
                pending = recv_async_(message, self.mesh.channels[step.channel], step.peer)
                self.arriving[step.channel, step.chunk, step.microbatch] = message, pending
            else:
                rows = [x.flatten() for x in self.outbox.values()]
                message = rows[0] if len(rows) == 1 else torch.cat(rows)
                self.outbox = {}
                self.leaving = [(x, pending) for x, pending in self.leaving if not pending.is_done()]
                self.leaving.append((message, send_async(message, self.mesh.channels[step.channel], step.peer)))
        for _, pending in self.leaving:
            pending.wait()

    def shapes(self, i: int) -> dict[str, tuple[int, int]]:
        """[rows, width] of what lies between two layers, by role."""
        tokens = self.microbatches[i]["input_ids"].numel()
        if self.mesh.sequence_parallel:
            tokens = -(-tokens // self.mesh.tp.size)
        return {role: (tokens, decoder.config.hidden_size) for role, decoder in self.decoders.items()}

    def receive(self, action: Action) -> dict[str, Tensor]:
        """What another stage has sent for this action, by role; {} at the ends of the model."""
        transfer, _ = transfers_of(action, self.mesh.pp.rank, self.mesh.pp.size, self.num_parts // self.mesh.pp.size)
        if transfer is None:
            return {}
        message, pending = self.arriving.pop((transfer.channel, action.chunk, action.microbatch))
        pending.wait()
        shapes = self.shapes(action.microbatch)
        pieces = message.split([rows * width for rows, width in shapes.values()])
        return {role: piece.view(shape) for (role, shape), piece in zip(shapes.items(), pieces, strict=True)}

    def forward(self, action: Action, last_part: Callable[[dict[str, Tensor], int], Tensor | None]) -> None:
        """A chunk's layers on a micro-batch; behind the last part, what the caller makes of the hidden states."""
        _, chunk, i = action
        microbatch, inputs = self.microbatches[i], self.receive(action)
        part = chunk * self.mesh.pp.size + self.mesh.pp.rank
        states, forks = {}, {}
        starts = {x.trunk: x.chunks[0].start for x in self.decoders.values() if x.trunk is not None}
        branches = {trunk: start for trunk, start in starts.items() if start and part == 0}
        for role, decoder in self.decoders.items():
            x = microbatch["input_ids"]
            if part > 0:
                x = inputs[role] = inputs[role].requires_grad_(torch.is_grad_enabled())
            layers = decoder.chunks[chunk]
            where = microbatch["position_ids"], microbatch["first_key"]
            branch = branches.get(decoder)
            if branch is not None:  # what both of them read is computed once
                x = forks[decoder] = decoder(x, *where, layers=range(branch))
                layers = range(branch, layers.stop)
            elif layers.start > 0 and part == 0:
                x = forks[decoder.trunk]
            states[role] = decoder(x, *where, layers=layers)
        if part == self.num_parts - 1:
            for decoder in self.decoders.values():
                if decoder.shards is not None:
                    decoder.shards.need_output()
            outputs = [last_part(states, i)]
        else:
            self.outbox = {role: x.detach() for role, x in states.items()}
            outputs = []
            if torch.is_grad_enabled():  # the states themselves may go once they are sent
                edge = torch.autograd.graph.get_gradient_edge
                outputs = [edge(x) if x.requires_grad else None for x in states.values()]  # None: all is frozen
        if torch.is_grad_enabled():
            self.inputs[chunk, i], self.outputs[chunk, i] = inputs, outputs

    def backward(self, action: Action) -> None:
        """The gradients of a chunk's weights, and those of its inputs, which the stage before waits for."""
        _, chunk, i = action
        inputs, outputs = self.inputs.pop((chunk, i)), self.outputs.pop((chunk, i))
        gradients = list(self.receive(action).values()) or [None]
        pairs = [(x, grad) for x, grad in zip(outputs, gradients, strict=True) if x is not None]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))
        self.outbox = {role: torch.zeros_like(x) if x.grad is None else x.grad for role, x in inputs.items()}


def reduce_metrics(metrics: dict[str, Tensor], mesh: Mesh) -> dict[str, float]:
    """0-dim tensors to floats, summed over dp (names that begin with max_: their maximum); one transfer to the host."""
    sums = [name for name in metrics if not name.startswith("max_")]
    maxima = [name for name in metrics if name.startswith("max_")]
    parts = []
    for names, op in ((sums, "sum"), (maxima, "max")):
        if names:
            part = torch.stack([metrics[name].to(mesh.device) for name in names])
            all_reduce_(part, mesh.dp, op)
            parts.append(part)
    return dict(zip(sums + maxima, torch.cat(parts).tolist(), strict=True))
