"""Data parallelism: replicas see different rows, and their gradients are summed while the backward pass still runs.

Parameters are moved into flat units, one per layer, which are at once what is reduced, what the optimizer steps over
and what a checkpoint reads. A unit holds parameters of one type that are all trainable or all frozen:

    flat       every parameter of the unit, contiguous; each `parameter.data` is a view of it
    flat_grad  their gradients in float32 (float64 for float64 parameters), each `parameter.grad` a view; None if frozen

Gradients are summed, never averaged: a loss carries 1 / num_tokens of the whole batch (see the scripts), so neither
the number of replicas nor that of micro-batches changes a gradient.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from parallel.collectives import Axis, Pending, RankError, all_gather, all_reduce_, all_reduce_async_
from parallel.mesh import Layout, Mesh
from parallel.tensor import Placement, fill_local, full_tensor, placements

ALIGNMENT = 64  # entries; every parameter begins at a multiple, as fast matrix products on any device want it
HASH_BLOCK = 1 << 20  # entries


class Unit:
    """Some parameters of one role, of one type and all trainable or all frozen, in one contiguous tensor.

    Matrices lie before vectors, so that weight decay, which is for matrices, is one slice: flat[:num_decayed].
    """

    def __init__(self, name: str, parameters: dict[str, nn.Parameter], placed: dict[str, Placement]):
        ordered = sorted(parameters.items(), key=lambda item: item[1].dim() < 2)  # stable
        self.name = name
        self.names = [name for name, _ in ordered]
        self.parameters = [parameter for _, parameter in ordered]
        self.shapes = [parameter.shape for parameter in self.parameters]
        self.placements = [placed[name] for name in self.names]
        self.offsets = []
        size = self.num_decayed = 0
        for parameter in self.parameters:
            self.offsets.append(size)
            size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
            if parameter.dim() >= 2:
                self.num_decayed = size
        first = self.parameters[0]
        self.trainable = first.requires_grad
        self.flat = torch.zeros(size, dtype=first.dtype, device=first.device)
        self.flat_grad: Tensor | None = None
        if self.trainable:
            grad_dtype = torch.promote_types(first.dtype, torch.float32)
            self.flat_grad = torch.zeros(size, dtype=grad_dtype, device=first.device)
        for i, parameter in enumerate(self.parameters):
            view = self.view(self.flat, i)
            view.copy_(parameter.data)
            parameter.data = view
            if self.flat_grad is not None:
                if parameter.dtype != self.flat_grad.dtype:
                    parameter.grad_dtype = self.flat_grad.dtype  # autograd then accumulates in it
                parameter.grad = self.view(self.flat_grad, i)

        # of the reduction under way
        self.num_unfinished = 0  # parameters whose gradient is not complete
        self.pending: Pending | None = None
        self.bucket: Tensor | None = None  # what is being reduced: flat_grad, or its copy in bfloat16
        self.local_sum: Tensor | None = None  # of this rank's flat_grad before the reduction: finite or not

    def view(self, flat: Tensor, i: int) -> Tensor:
        """The part of a tensor laid out like `flat` that belongs to the i-th parameter, in its shape."""
        return flat[self.offsets[i] : self.offsets[i] + self.shapes[i].numel()].view(self.shapes[i])

    def counted_slices(self, tp: Axis) -> list[tuple[int, int]]:
        """Parts of flat_grad that count in the norm of all gradients: what several ranks of tp hold counts on one."""
        if tp.size == 1:
            return [(0, len(self.flat))]
        found = []
        for offset, shape, placement in zip(self.offsets, self.shapes, self.placements, strict=True):
            if placement.dim is None:
                found += [(offset, offset + shape.numel())] * (tp.rank == 0)
                continue
            row, start = shape[1:].numel(), 0
            for here, length, count in placement.shared_intervals(tp.size):
                found.append((offset + start * row, offset + here * row))
                start = here + length
                if tp.rank % (tp.size // count) == 0:  # the first of those that hold this head
                    found.append((offset + here * row, offset + start * row))
            found.append((offset + start * row, offset + shape.numel()))
        return found


class DataParallel:
    """The roles of a script over data-parallel replicas; `units` in the order in which modules were registered.

    Every trainable parameter's last gradient of a step fires a hook; a unit whose parameters have all fired is reduced
    at once, while the backward pass goes on to earlier layers. Units are launched in one fixed order, the reverse of
    registration, on all ranks, whatever the order in which they become ready.
    Communication: one all-reduce of each trainable unit's gradients over dp per optimizer step; at construction one
    all-reduce of [2 * units] hashes.
    Raises: RankError if the replicas do not begin with equal weights.
    """

    def __init__(self, roles: dict[str, nn.Module], mesh: Mesh, layout: Layout):
        self.roles = roles
        self.mesh = mesh
        self.reduce_in_bfloat16 = layout.reduce_dtype == "bfloat16"
        self.grad_norm: float | None = None  # set by clip_grad_norm, read by the optimizer
        self.grad_divisor = 1.0
        self.units = make_units(roles)
        self._order = [unit for unit in reversed(self.units) if unit.trainable]
        self._num_launched = 0
        self._syncing = False
        if mesh.dp.size > 1:
            check_replicas_equal(self.units, mesh)
            for unit in self._order:
                for parameter in unit.parameters:
                    parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, unit))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Full names, <role>.<name in its module>, and parameters; a tied one appears once."""
        for unit in self.units:
            yield from zip(unit.names, unit.parameters, strict=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Trainable parameters by full name, in full shapes without padding; the frozen come from where they were.

        Communication: one all-gather over tp per parameter sharded there; without tp they are views.
        """
        return {name: full_tensor(p, placement, self.mesh.tp) for name, p, placement in self._trainable()}

    def _trainable(self) -> Iterator[tuple[str, Tensor, Placement]]:
        for unit in self.units:
            if unit.trainable:
                for name, parameter, placement in zip(unit.names, unit.parameters, unit.placements, strict=True):
                    yield name, parameter.detach(), placement

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Copies the parameters of a `state_dict`; optimizer state (<name>|...) is passed over.

        Raises: ValueError naming a tensor that is missing, of another shape, or of no parameter here.
        """
        known = {name for name, _, _ in self._trainable()}
        unknown = sorted(name for name in tensors if "|" not in name and name not in known)
        if unknown:
            raise ValueError(f"the checkpoint has a tensor {unknown[0]} that is not here: it is of another model")
        for name, parameter, placement in self._trainable():
            full = saved_tensor(tensors, name, placement.full_shape(parameter.shape))
            fill_local(parameter, full, placement, self.mesh.tp)

    def zero_grad(self) -> None:
        """Gradients to 0, in place: they stay views of their units."""
        self.grad_norm = None
        for unit in self._order:
            unit.flat_grad.zero_()

    def start_sync(self) -> None:
        """To be called before the last backward pass of a step: from now on a finished unit is reduced."""
        for unit in self._order:
            unit.num_unfinished = len(unit.parameters)
            for name, parameter, offset in zip(unit.names, unit.parameters, unit.offsets, strict=True):
                place = unit.flat_grad.data_ptr() + offset * unit.flat_grad.itemsize
                assert parameter.grad is not None and parameter.grad.data_ptr() == place, (
                    f"{name}.grad was replaced: clear gradients with DataParallel.zero_grad only"
                )
        self._syncing = True
        self._num_launched = 0

    def finish_sync(self) -> None:
        """Reduces what the backward pass did not reach (unused parameters) and returns when all sums are there."""
        assert self._syncing, "finish_sync without start_sync"
        self._syncing = False
        if self.mesh.dp.size > 1:
            for unit in self._order[self._num_launched :]:
                self._launch(unit)
            for unit in self._order:
                unit.pending.wait()
                if unit.bucket is not unit.flat_grad:
                    unit.flat_grad.copy_(unit.bucket)
                unit.pending = unit.bucket = None
        if self.mesh.tp.size > 1:
            for unit in self._order:
                sum_partial_gradients(unit, self.mesh.tp)

    def _on_gradient(self, unit: Unit, parameter: nn.Parameter) -> None:
        """The hook: a parameter's gradient is complete, shared uses included."""
        if not self._syncing:
            return
        unit.num_unfinished -= 1
        while self._num_launched < len(self._order) and self._order[self._num_launched].num_unfinished == 0:
            self._launch(self._order[self._num_launched])
            self._num_launched += 1

    def _launch(self, unit: Unit) -> None:
        unit.local_sum = unit.flat_grad.sum()
        unit.bucket = unit.flat_grad.bfloat16() if self.reduce_in_bfloat16 else unit.flat_grad
        unit.pending = all_reduce_async_(unit.bucket, self.mesh.dp)


@torch.no_grad()
def sum_partial_gradients(unit: Unit, tp: Axis) -> None:
    """Completes the gradients of what several ranks of tp hold but use for different heads or tokens.

    Those are replicated parameters whose placement says so, and key/value heads that lie on several ranks: their
    gradients are laid out as if every rank had all heads, others' being 0.
    Communication: one all-reduce over tp, if the unit has any.
    """
    views, places, wide = [], [], []
    for i, placement in enumerate(unit.placements):
        grad = unit.view(unit.flat_grad, i)
        if placement.is_partial:
            views.append(grad)
            places.append(0)
            wide.append(grad[None])
        for start, length, count in placement.shared_intervals(tp.size) if placement.dim == 0 else []:
            views.append(grad[start : start + length])
            places.append(tp.rank * count // tp.size)
            wide.append(grad.new_zeros(count, *views[-1].shape))
            wide[-1][places[-1]] = views[-1]
    if not views:
        return
    total = torch.cat([x.flatten() for x in wide])
    all_reduce_(total, tp)
    for view, place, x, summed in zip(views, places, wide, total.split([x.numel() for x in wide]), strict=True):
        view.copy_(summed.view_as(x)[place])


def data_parallel(roles: dict[str, nn.Module], mesh: Mesh, layout: Layout) -> DataParallel:
    """Moves the parameters of all roles into flat units and keeps the replicas' gradients equal."""
    return DataParallel(roles, mesh, layout)


def make_units(roles: dict[str, nn.Module]) -> list[Unit]:
    """Units of every role: what is registered before `layers`, each layer, what comes after.

    Trainable and frozen parameters, and parameters of different types, lie in different units.
    A parameter used twice belongs to the unit of its first use.
    """
    groups: dict[tuple, dict[str, nn.Parameter]] = {}
    placed: dict[str, Placement] = {}
    seen: set[nn.Parameter] = set()
    for role, module in roles.items():
        placed |= {f"{role}.{name}": placement for name, placement in placements(module).items()}
        layered = isinstance(getattr(module, "layers", None), nn.ModuleList)
        section = f"{role}.input" if layered else role
        for name, parameter in module.named_parameters():
            if layered and name.startswith("layers."):
                section = ".".join([role, *name.split(".")[:2]])  # <role>.layers.<i>
            elif layered and section != f"{role}.input":
                section = f"{role}.output"
            if parameter not in seen:
                seen.add(parameter)
                key = (section, parameter.requires_grad, parameter.dtype)
                groups.setdefault(key, {})[f"{role}.{name}"] = parameter
    return [Unit(section, parameters, placed) for (section, _, _), parameters in groups.items()]


def saved_tensor(tensors: dict[str, Tensor], name: str, shape: list[int]) -> Tensor:
    """tensors[name], if it is there and of this shape; else ValueError."""
    if name not in tensors:
        raise ValueError(f"the checkpoint has no tensor {name}: it belongs to another model or was saved without it")
    if list(tensors[name].shape) != shape:
        raise ValueError(
            f"{name} is {list(tensors[name].shape)} in the checkpoint but {shape} here: it is of another model"
        )
    return tensors[name]


@torch.no_grad()
def check_replicas_equal(units: list[Unit], mesh: Mesh) -> None:
    """Raises RankError naming the first unit whose bits are not the same on all replicas."""
    hashes = torch.stack([_hash(unit.flat) for unit in units])  # [units]
    bounds = torch.cat([hashes, ~hashes])  # ~ reverses the order of integers: one maximum gives both bounds
    all_reduce_(bounds, mesh.dp, "max")
    largest, smallest = bounds[: len(units)], ~bounds[len(units) :]
    for unit, differs in zip(units, (largest != smallest).tolist(), strict=True):
        if differs:
            raise RankError(
                f"the {mesh.dp.size} replicas begin with different weights in {unit.name} ({unit.names[0]}, ...): "
                "build every replica from the same files and the same seed"
            )


@torch.no_grad()
def describe_nonfinite(model: DataParallel, mesh: Mesh) -> str | None:
    """Which parameters have a NaN or infinite gradient here, and from which replicas it came; None if none has.

    Communication: one all-gather of [units] sums over dp.
    """
    bad = []  # (full name, position of its unit)
    trainable = [unit for unit in model.units if unit.trainable]
    for i, unit in enumerate(trainable):
        for j, name in enumerate(unit.names):
            if not unit.view(unit.flat_grad, j).isfinite().all():
                bad.append((name, i))
    if not bad:
        return None
    sums = [unit.flat_grad.sum() if unit.local_sum is None else unit.local_sum for unit in trainable]
    sums = all_gather(torch.stack([x.double() for x in sums])[None], mesh.dp)  # [dp, units]
    nonfinite = ~sums[:, sorted({i for _, i in bad})].isfinite()
    ranks = nonfinite.any(1).nonzero().flatten().tolist()
    name, more = bad[0][0], f" and {len(bad) - 1} more parameters" if len(bad) > 1 else ""
    where = f"on rank {', '.join(map(str, ranks))}" if ranks else "in the sum over ranks, finite on each"
    return f"non-finite gradient of {name}{more}, {where}"


def _hash(flat: Tensor) -> Tensor:
    """An int64 of the bits and their places."""
    bits = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    weights = torch.arange(1, HASH_BLOCK + 1, device=flat.device) * 0x9E3779B97F4A7C1 | 1  # odd: no bit is lost
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for block in bits.split(HASH_BLOCK):
        total = total * 0x100000001B3 + (block.long() * weights[: len(block)]).sum()  # modulo 2^64
    return total
