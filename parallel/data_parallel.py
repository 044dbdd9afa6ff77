"""Data parallelism: replicas see different rows; gradients are summed, and what they hold shared out, by one class.

Parameters are moved into flat units, one per layer, which are at once what is reduced, what is shared out, what the
optimizer steps over and what a checkpoint reads. A unit holds parameters of one type, all trainable or all frozen. Of
its `size` entries this rank owns `part`, one of dp equal slices:

    zero        weights `flat`         gradients `flat_grad`    optimizer state    reduction
    0 (DDP)     whole                  whole                    whole              all-reduce with the last micro-batch
    1           whole                  whole                    part               reduce-scatter, likewise
    2           whole                  part                     part               reduce-scatter with each micro-batch
    3           part, whole in use     part                     part               as 2

Gradients are in float32 (float64 for float64 parameters) and are summed, never averaged: a loss carries 1 / num_tokens
of the whole batch (see the scripts), so neither the number of replicas nor that of micro-batches changes a gradient.
With pipeline stages two kinds of units have more replicas: heads, which every stage holds and the last one uses, and a
tied embedding, which both ends hold. Their sum over those ranks is taken once, after all micro-batches; it adds the
replicas' and the stages' parts alike.
Source: Rajbhandari et al. 2019 (arXiv 1910.02054); one unit per layer: Zhao et al. 2023 (2304.11277).
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from parallel.collectives import (
    Axis,
    Pending,
    RankError,
    all_gather,
    all_gather_async_,
    all_reduce_,
    all_reduce_async_,
    reduce_scatter_async_,
)
from parallel.mesh import Layout, Mesh
from parallel.model import Decoder
from parallel.reshard import Shards, free_units
from parallel.tensor import Placement, placements
from parallel.training_state import Piece, make_pieces

ALIGNMENT = 64  # entries; every parameter begins at a multiple, as fast matrix products on any device want it
HASH_BLOCK = 1 << 16  # entries


class Unit:
    """Some parameters of one role, of one type and all trainable or all frozen, laid out in one contiguous tensor.

    Matrices lie before vectors, so that weight decay, which is for matrices, is one slice: entries [0, num_decayed).
    The layout is padded once so that every rank's part has the same length; no collective needs a padded copy.

    Args: dp: the ranks that hold a copy of it, among which it is summed and shared out.
    """

    def __init__(
        self, name: str, parameters: dict[str, nn.Parameter], placed: dict[str, Placement], dp: Axis, mesh: Mesh
    ):
        ordered = sorted(parameters.items(), key=lambda item: item[1].dim() < 2)  # stable
        self.name, self.dp, self.tp = name, dp, mesh.tp
        self.zero = 0  # what of it its replicas share out
        self.chunk: int | None = 0  # of its stage; None: backward passes of several stages complete its gradient
        self.names = [name for name, _ in ordered]
        self.parameters = [parameter for _, parameter in ordered]
        self.shapes = [parameter.shape for parameter in self.parameters]
        self.placements = [placed[name] for name in self.names]
        self.offsets = []
        end = self.num_decayed = 0
        for parameter in self.parameters:
            self.offsets.append(end)
            end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
            if parameter.dim() >= 2:
                self.num_decayed = end
        share = -(-end // (ALIGNMENT * self.dp.size)) * ALIGNMENT
        self.size = share * self.dp.size
        self.part = slice(self.dp.rank * share, (self.dp.rank + 1) * share)
        first = self.parameters[0]
        self.trainable = first.requires_grad
        self.is_offloaded = False
        self.full: Tensor | None = None  # under zero 3: what the parameters view, with storage only while in use
        self.flat: Tensor | None = None  # None until weights are read
        if first.untyped_storage().nbytes():
            self.flat = torch.zeros(self.size, dtype=first.dtype, device=first.device)
            for i, parameter in enumerate(self.parameters):
                view = self.view(self.flat, i)
                view.copy_(parameter.data)
                parameter.data = view
        self.gathering: Pending | None = None
        self.flat_grad: Tensor | None = None  # None if frozen

        # of the reduction under way
        self.num_unfinished = 0  # parameters whose gradient is not complete
        self.bucket: Tensor | None = None  # what is reduced, whole: flat_grad itself, or this micro-batch's gradients
        self.pending: Pending | None = None
        self.local_sum: Tensor | None = None  # of this rank's gradients before the reduction: finite or not

    def allocate_gradients(self) -> None:
        """Where gradients are summed: the whole unit, which parameter.grad views; from zero 2 on this rank's part."""
        first = self.parameters[0]
        dtype = torch.promote_types(first.dtype, torch.float32)
        share = self.part.stop - self.part.start
        self.flat_grad = torch.zeros(self.size if self.zero < 2 else share, dtype=dtype, device=first.device)
        for i, parameter in enumerate(self.parameters):
            if parameter.dtype != dtype:
                parameter.grad_dtype = dtype  # autograd then accumulates in it
            if self.zero < 2:
                parameter.grad = self.view(self.flat_grad, i)

    def view(self, whole: Tensor, i: int) -> Tensor:
        """The i-th parameter in a whole tensor of this layout, in its shape."""
        return whole[self.offsets[i] : self.offsets[i] + self.shapes[i].numel()].view(self.shapes[i])

    def overlap(self, i: int) -> tuple[slice, slice]:
        """What this rank's part holds of the i-th parameter: the entries of the part, and those of the parameter."""
        start = min(max(self.offsets[i], self.part.start), self.part.stop)
        stop = max(min(self.offsets[i] + self.shapes[i].numel(), self.part.stop), start)
        return (
            slice(start - self.part.start, stop - self.part.start),
            slice(start - self.offsets[i], stop - self.offsets[i]),
        )

    def own(self, flat: Tensor) -> Tensor:
        """This rank's part of `flat`, `flat_grad` or optimizer state, whether that is whole or the part alone."""
        return flat[self.part] if flat.numel() == self.size else flat

    def tensors(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The parameters' entries of `flat` or optimizer state by name, as far as this rank of tp holds them: views, or
        where replicas hold parts, gathered on the first replica alone. Communication: then one all-gather over dp."""
        if flat.numel() != self.size:
            flat = all_gather(flat, self.dp)
            if self.dp.rank > 0:
                return
        for i, name in enumerate(self.names):
            yield name, self.view(flat, i)

    def pieces(self, flat: Tensor, suffix: str = "") -> Iterator[Piece]:
        """What this rank holds of `flat` or optimizer state, for a checkpoint: of a whole unit the first replica writes
        all, of a shared one each its part."""
        is_whole = flat.numel() == self.size
        for i, (name, shape, placement) in enumerate(zip(self.names, self.shapes, self.placements, strict=True)):
            here, there = self.overlap(i)
            entries, first = (self.view(flat, i).view(-1), 0) if is_whole else (flat[here], there.start)
            is_written = self.dp.rank == 0 or not is_whole
            yield from make_pieces(name + suffix, entries, first, shape, placement, self.tp, is_written)

    # --- tensor parallelism ---

    def partial_slices(self) -> list[tuple[int, int, int, int]]:
        """(start, stop, count, place) of gradients to be summed over tp.

        Those are of replicated parameters whose placement says so (count 1), and of key/value heads that lie on several
        ranks: this rank has head `place` of `count`.
        """
        found = []
        for offset, shape, placement in zip(self.offsets, self.shapes, self.placements, strict=True):
            if placement.is_partial:
                found.append((offset, offset + shape.numel(), 1, 0))
            row = shape[1:].numel()
            for start, length, count in placement.shared_intervals(self.tp.size) if placement.dim == 0 else []:
                place = self.tp.rank * count // self.tp.size
                found.append((offset + start * row, offset + (start + length) * row, count, place))
        return found

    def counted_slices(self) -> list[tuple[int, int]]:
        """What counts in the norm of all gradients: what several ranks of tp hold counts on the first of them."""
        if self.tp.size == 1:
            return [(0, self.size)]
        found = []
        for offset, shape, placement in zip(self.offsets, self.shapes, self.placements, strict=True):
            if placement.dim is None:
                found += [(offset, offset + shape.numel())] * (self.tp.rank == 0)
                continue
            row, start = shape[1:].numel(), 0
            for here, length, count in placement.shared_intervals(self.tp.size):
                found.append((offset + start * row, offset + here * row))
                start = here + length
                if self.tp.rank % (self.tp.size // count) == 0:  # the first of those that hold this head
                    found.append((offset + here * row, offset + start * row))
            found.append((offset + start * row, offset + shape.numel()))
        return found

    # --- zero 3: whole only while in use ---

    @torch.no_grad()
    def read(self, decoder: Decoder, offload: bool) -> None:
        """Fills the weights of a decoder from its files: under zero 3 this rank's part and no more."""
        dtype, device = self.parameters[0].dtype, self.parameters[0].device
        if self.zero < 3:
            whole = self.flat = torch.zeros(self.size, dtype=dtype, device=device)
        else:
            whole = self.full = torch.empty(self.size, dtype=dtype, device=device)
        for i, parameter in enumerate(self.parameters):
            parameter.data = self.view(whole, i)
        if self.zero == 3:
            self.is_offloaded = offload
            self.free()
            share, place = self.part.stop - self.part.start, "cpu" if offload else device
            self.flat = torch.zeros(share, dtype=dtype, device=place, pin_memory=offload and whole.is_cuda)
        for i, name in enumerate(self.names):
            here, there = self.overlap(i)
            out, first = (self.flat[here], there.start) if self.zero == 3 else (self.view(self.flat, i).view(-1), 0)
            if len(out):
                decoder.files.read(decoder, name.partition(".")[2], out, first)

    def shard(self, offload: bool = False) -> None:
        """Keeps this rank's part of the weights, offloaded in the host's memory.

        The parameters stay what they are, views of a storage now empty.
        """
        self.full, part = self.flat, self.flat[self.part]
        self.flat = on_host(part) if offload else part.clone()
        self.is_offloaded = offload
        self.free()

    @property
    def is_whole(self) -> bool:
        return self.full is None or self.full.untyped_storage().nbytes() > 0

    def start_gather(self) -> None:
        if not self.is_whole:
            self.full.untyped_storage().resize_(self.full.nbytes)
            part = self.flat
            if self.is_offloaded:
                part = self.full[self.part]
                part.copy_(self.flat, non_blocking=True)
            self.gathering = all_gather_async_(self.full, part, self.dp, self.name)

    def finish_gather(self) -> None:
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering = None

    def free(self) -> None:
        self.finish_gather()
        self.full.untyped_storage().resize_(0)


class DataParallel:
    """The roles of a script over data-parallel replicas; `units` in the order in which modules were registered.

    Every trainable parameter's gradient fires a hook; a unit whose parameters have all fired is reduced at once, while
    the backward pass goes on to earlier layers. Units are launched in one fixed order, the reverse of registration, on
    all ranks, whatever the order in which they become ready.
    Heads, that is roles without layers, keep whole weights under zero 3: losses read them anywhere.
    Communication: over dp, per trainable unit, an all-reduce (zero 0) or reduce-scatter (zero 1) of gradients per step
        or a reduce-scatter per micro-batch (zero 2 and 3); the optimizer gathers updated weights (zero 1 and 2). Zero 3
        gathers each decoder's units in every forward, and layers again in the backward, so that replicas must make
        the same passes through the same units. At construction `check_replicas_equal`.
    Raises: RankError if ranks do not begin with equal weights where they should.
    """

    def __init__(self, roles: dict[str, nn.Module], mesh: Mesh, layout: Layout):
        self.roles, self.mesh, self.layout = roles, mesh, layout
        self.decoders = {  # those that train, stage by stage: what `forward_backward` runs
            role: module for role, module in roles.items() if isinstance(module, Decoder) and trains(module)
        }
        self.reduce_in_bfloat16 = layout.reduce_dtype == "bfloat16"
        self.grad_norm: float | None = None  # set by clip_grad_norm, read by the optimizer
        self.grad_divisor = 1.0
        self.units = make_units(roles, mesh)
        self._order = [unit for unit in reversed(self.units) if unit.trainable]
        self._todo: list[Unit] = []  # to be reduced in the backward pass under way, in this order
        self._in_flight: list[Unit] = []
        self._whole: Counter[Unit] = Counter()  # units of zero 3 that are gathered: see Shards
        for unit in self.units:
            if unit.dp.size > 1:  # one replica has nothing to share out
                unit.zero = layout.zero if unit.chunk is not None else min(layout.zero, 1)
        units_of = {role: [unit for unit in self.units if unit.name.partition(".")[0] == role] for role in roles}
        for role, module in roles.items():
            if isinstance(module, Decoder):
                is_frozen = role not in self.decoders
                offload = is_frozen and "frozen" in layout.offload
                for unit in units_of[role]:
                    if offload or (is_frozen and mesh.pp.size > 1):
                        unit.zero = 3  # not pipelined: a copy of all layers on every stage would be too much
                    if unit.flat is None:
                        unit.read(module, offload)
                module.files = None
        mesh.wait_for_all("the models to be read")
        check_replicas_equal(self.units, mesh, "build every replica from the same files and the same seed")
        for role, module in roles.items():
            if isinstance(module, Decoder):
                module.recompute = layout.recompute
                for unit in units_of[role]:
                    if unit.zero == 3 and unit.full is None:
                        unit.shard(role not in self.decoders and "frozen" in layout.offload)
                sections = [self.units_with(parameters) for parameters in module.sections()]
                if any(unit.zero == 3 for section in sections for unit in section):
                    module.shards = Shards(sections, units_of[role], self._whole)
        for unit in self._order:
            unit.allocate_gradients()
            if unit.dp.size > 1:
                for i, parameter in enumerate(unit.parameters):
                    parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, unit, i))

    def units_with(self, parameters: list[nn.Parameter]) -> list[Unit]:
        """The units that any of the parameters lies in."""
        wanted = set(parameters)
        return [unit for unit in self.units if not wanted.isdisjoint(unit.parameters)]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Full names, <role>.<name in its module>, and parameters; a tied one appears once."""
        for unit in self.units:
            yield from zip(unit.names, unit.parameters, strict=True)

    def pieces(self) -> Iterator[Piece]:
        """What a checkpoint holds of the trainable parameters; the frozen come from where they were."""
        for unit in self.units:
            if unit.trainable:
                yield from unit.pieces(unit.flat)

    def zero_grad(self) -> None:
        """Gradients to 0, in place: they stay views of their units. From zero 2 on they lose their storage, which comes
        back with the first sum: a forward before it has more room."""
        self.grad_norm = None
        for unit in self._order:
            if unit.zero >= 2:
                unit.flat_grad.untyped_storage().resize_(0)
            else:
                unit.flat_grad.zero_()
            unit.local_sum = None

    def start_sync(self, is_last: bool, chunk: int = 0) -> None:
        """To be called before a micro-batch's backward pass through a chunk of the stage.

        From now on a unit whose gradient is finished is reduced, if it is time: under zero 0 and 1 with is_last alone.
        """
        self._todo = [unit for unit in self._order if unit.chunk == chunk and (is_last or unit.zero >= 2)]
        for unit in self._todo:
            unit.num_unfinished = len(unit.parameters)
            for i, (name, parameter) in enumerate(zip(unit.names, unit.parameters, strict=True)):
                expected = unit.view(unit.flat_grad, i).data_ptr() if unit.zero < 2 else None
                found = None if parameter.grad is None else parameter.grad.data_ptr()
                assert found == expected, f"{name}.grad was replaced: clear gradients with DataParallel.zero_grad only"

    def finish_sync(self) -> None:
        """Reduces what the backward pass did not reach (unused parameters); from zero 2 on returns with the sums."""
        self._launch_ready(everything=True)
        if any(unit.zero >= 2 for unit in self._in_flight):
            self._settle()
        free_units(self._whole)

    def finish_gradients(self) -> None:
        """To be called once after all backward passes of a step: returns when all sums are there."""
        for unit in self._order:
            if unit.chunk is None:
                self._launch(unit)
        self._settle()
        if self.mesh.tp.size > 1:
            for unit in self._order:
                sum_partial_gradients(unit)
        for unit in self._whole:  # what waits for a backward pass that does not come
            self._whole[unit] = 0
        free_units(self._whole)

    def _on_gradient(self, unit: Unit, i: int, parameter: nn.Parameter) -> None:
        """The hook: the i-th parameter's gradient of this backward pass is complete, shared uses included."""
        if unit.zero >= 2:
            assert unit in self._todo, "a backward pass outside forward_backward: nothing would reduce its gradients"
            if unit.bucket is None:
                self._settle()  # the bucket before is freed: there is one at a time, unless uses of units interleave
                unit.bucket = unit.flat_grad.new_zeros(unit.size)
            unit.view(unit.bucket, i).copy_(parameter.grad)
            parameter.grad = None
        unit.num_unfinished -= 1
        self._launch_ready()

    def _launch_ready(self, everything: bool = False) -> None:
        while self._todo and (everything or self._todo[0].num_unfinished == 0):
            self._launch(self._todo.pop(0))

    def _launch(self, unit: Unit) -> None:
        if unit.dp.size == 1:
            return
        if unit.zero < 2:
            unit.bucket = unit.flat_grad
        elif unit.bucket is None:  # unused on this rank, perhaps not on others
            unit.bucket = unit.flat_grad.new_zeros(unit.size)
        local_sum = unit.bucket.sum()
        unit.local_sum = local_sum if unit.local_sum is None else unit.local_sum + local_sum
        if self.reduce_in_bfloat16:
            unit.bucket = unit.bucket.bfloat16()
        reduce = reduce_scatter_async_ if unit.zero else all_reduce_async_
        unit.pending = reduce(unit.bucket, unit.dp, tag=unit.name)
        self._in_flight.append(unit)

    def _settle(self) -> None:
        """Waits for the reductions under way and puts their sums where they belong."""
        for unit in self._in_flight:
            unit.pending.wait()
            storage = unit.flat_grad.untyped_storage()
            if not storage.nbytes():
                storage.resize_(unit.flat_grad.nbytes)
                unit.flat_grad.copy_(unit.bucket[unit.part])
            elif unit.zero >= 2:
                unit.flat_grad += unit.bucket[unit.part]
            elif unit.bucket is not unit.flat_grad:
                unit.flat_grad.copy_(unit.bucket)
            unit.pending = unit.bucket = None
        self._in_flight.clear()


@torch.no_grad()
def sum_partial_gradients(unit: Unit) -> None:
    """Completes the gradients of what several ranks of tp hold but use for different heads or tokens.

    Heads that lie on several ranks are laid out as if every rank had all of them, others' gradients being 0.
    Communication: one all-reduce over tp, if the unit has any.
    """
    grad = unit.own(unit.flat_grad) if unit.zero else unit.flat_grad
    first = unit.part.start if unit.zero else 0  # entry of the unit where grad begins
    views, places, wide = [], [], []
    for start, stop, count, place in unit.partial_slices():
        view = grad[max(start - first, 0) : max(stop - first, 0)]
        views.append(view)
        places.append(place)
        wide.append(view.new_zeros(count, len(view)))
        wide[-1][place] = view
    total = torch.cat([x.flatten() for x in wide]) if wide else grad[:0]
    if total.numel() == 0:
        return
    all_reduce_(total, unit.tp)
    for view, place, x, summed in zip(views, places, wide, total.split([x.numel() for x in wide]), strict=True):
        view.copy_(summed.view_as(x)[place])


def trains(decoder: Decoder) -> bool:
    """Whether any part of a decoder trains, if not on this stage then on another: frozen ones have no stages, but for a
    reference that shares its weights with one that trains."""
    return any(p.requires_grad for p in decoder.parameters()) or (decoder.mesh.pp.size > 1 and decoder.trunk is None)


def on_host(x: Tensor) -> Tensor:
    """A copy in the host's memory, from where a GPU can read it while it works."""
    return torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x)


def data_parallel(roles: dict[str, nn.Module], mesh: Mesh, layout: Layout) -> DataParallel:
    """Moves the parameters of all roles into flat units and keeps the replicas' gradients equal."""
    return DataParallel(roles, mesh, layout)


def make_units(roles: dict[str, nn.Module], mesh: Mesh) -> list[Unit]:
    """Units of every role: what is registered before `layers`, each layer, what comes after.

    Trainable and frozen parameters, and parameters of different types, lie in different units.
    A parameter used twice belongs to the unit of its first use.
    """
    groups: dict[tuple, dict[str, nn.Parameter]] = {}
    placed: dict[str, Placement] = {}
    places: dict[str, tuple[Axis, int | None]] = {}  # section -> replicas and chunk
    seen: set[nn.Parameter] = set()
    for role, module in roles.items():
        placed |= {f"{role}.{name}": placement for name, placement in placements(module).items()}
        layers = getattr(module, "layers", None)
        section = f"{role}.input" if layers is not None else role
        of_stages = isinstance(module, Decoder) and module.mesh.pp.size > 1
        for name, parameter in module.named_parameters():
            place = (module.mesh.dp, 0) if isinstance(module, Decoder) else (mesh.dp, 0)
            if layers is not None and name.startswith("layers."):
                section = ".".join([role, *name.split(".")[:2]])  # <role>.layers.<i>
                if of_stages:
                    index = int(name.split(".")[1])
                    place = mesh.dp, next(c for c, chunk in enumerate(module.chunks) if index in chunk)
            elif layers is not None and section != f"{role}.input":
                section = f"{role}.output"
                if of_stages:
                    place = mesh.dp, len(module.chunks) - 1
            unit_name = section
            if of_stages and module.ties_lm_head and name == "embedding.weight":
                unit_name, place = f"{role}.embedding", (mesh.ends, None)
            elif mesh.pp.size > 1 and layers is None:
                place = mesh.folded_dp, None
            if parameter not in seen:
                seen.add(parameter)
                places[unit_name] = place
                groups.setdefault((unit_name, parameter.requires_grad, parameter.dtype), {})[f"{role}.{name}"] = (
                    parameter
                )
    units = []
    for (section, _, _), parameters in groups.items():
        dp, chunk = places[section]
        units.append(Unit(section, parameters, placed, dp, mesh))
        units[-1].chunk = chunk
    return units


@torch.no_grad()
def check_replicas_equal(units: list[Unit], mesh: Mesh, advice: str) -> None:
    """Returns if weights that several ranks hold have the same bits on all of them.

    Among replicas those are units, unless zero 3 divides them; over tp what is replicated, and heads on several ranks.
    Communication: one all-gather of hashes over each axis along which units have replicas and one over tp, one
        all-reduce of a number.
    Raises: RankError on all ranks, naming unit or parameter and the ranks that differ, with the advice.
    """
    found = None
    for axis in dict.fromkeys(unit.dp for unit in units):
        here = [unit for unit in units if unit.dp == axis and unit.full is None]
        found = found or find_difference([(f"{u.name} ({u.names[0]}, ...)", u.flat, axis.size) for u in here], axis)
    found = found or find_difference([part for unit in units for part in parts_in_common(unit)], mesh.tp)
    mesh.raise_together(None if found is None else RankError(f"{found}; {advice}"))


def parts_in_common(unit: Unit) -> Iterator[tuple[str, Tensor, int]]:
    """Names and weights of a unit that several ranks of tp hold, as far as this replica has them; by how many."""
    first = 0 if unit.flat.numel() == unit.size else unit.part.start  # entry of the unit where flat begins
    for name, offset, shape, placement in zip(unit.names, unit.offsets, unit.shapes, unit.placements, strict=True):
        intervals = placement.shared_intervals(unit.tp.size) if placement.dim == 0 else []
        row = shape[1:].numel()
        parts = [(offset + start * row, offset + (start + length) * row, count) for start, length, count in intervals]
        parts += [(offset, offset + shape.numel(), 1)] * (placement.dim is None)
        for start, stop, count in parts:
            yield name, unit.flat[max(start - first, 0) : max(stop - first, 0)], unit.tp.size // count


def find_difference(parts: list[tuple[str, Tensor, int]], axis: Axis) -> str | None:
    """What to say of the first part whose bits differ among the ranks of an axis that hold it; None if none does.

    Args: parts: names, tensors, and how many neighbours hold the same.
    """
    if axis.size == 1 or not parts:
        return None
    rows = all_gather(torch.stack([_hash(x) for _, x, _ in parts])[None], axis).tolist()  # [size][parts]
    ranks = axis.ranks or range(axis.size)
    for i, (name, _, together) in enumerate(parts):
        for first in range(0, axis.size, together):
            held = {ranks[j]: rows[j][i] for j in range(first, first + together)}
            [(most, count)] = Counter(held.values()).most_common(1)
            if count < together:
                wrong = [rank for rank, x in held.items() if x != most or 2 * count <= together]
                others = "each other" if 2 * count <= together else f"the other {count}"
                return f"weights of {name} on rank {', '.join(map(str, wrong))} differ from {others} over {axis.name}"
    return None


@torch.no_grad()
def describe_nonfinite(model: DataParallel, mesh: Mesh) -> str | None:
    """Which parameters have a NaN or infinite gradient here, and from which replicas it came; None if none has.

    Communication: one all-reduce (max) of [parameters] flags and one all-gather of [units] sums over dp.
    """
    trainable = [unit for unit in model.units if unit.trainable]
    places = [(unit, i) for unit in trainable for i in range(len(unit.names))]
    if not places:  # a stage all of whose parts are frozen
        return None
    flags = [~unit.own(unit.flat_grad)[unit.overlap(i)[0]].isfinite().all() for unit, i in places]
    flags = torch.stack(flags).to(torch.uint8)
    all_reduce_(flags, mesh.dp, "max")
    bad = [places[k] for k in flags.nonzero().flatten().tolist()]
    if not bad:
        return None
    sums = [unit.flat_grad.sum() if unit.local_sum is None else unit.local_sum for unit in trainable]
    sums = all_gather(torch.stack([x.double() for x in sums])[None], mesh.dp)  # [dp, units]
    nonfinite = ~sums[:, sorted({trainable.index(unit) for unit, _ in bad})].isfinite()
    ranks = nonfinite.any(1).nonzero().flatten().tolist()
    (unit, i), more = bad[0], f" and {len(bad) - 1} more parameters" if len(bad) > 1 else ""
    where = f"on rank {', '.join(map(str, ranks))}" if ranks else "in the sum over ranks, finite on each"
    return f"non-finite gradient of {unit.names[i]}{more}, {where}"


def _hash(flat: Tensor) -> Tensor:
    """An int64 of the bits and their places."""
    bits = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    weights = (
        torch.arange(1, min(HASH_BLOCK, len(bits)) + 1, device=flat.device) * 0x9E3779B97F4A7C1 | 1
    )  # odd: no bit is lost
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for block in bits.split(HASH_BLOCK):
        total = total * 0x100000001B3 + (block.long() * weights[: len(block)]).sum()  # modulo 2^64
    return total
