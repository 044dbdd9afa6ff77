"""`--plan`: what a run would hold and send per rank, and which layouts fit, from flags and a config.json alone.

No GPU, network, weights or process group are needed. `footprint.py` has the formulas.
"""

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch

from parallel.data_parallel import DataParallel
from parallel.footprint import Job, Memory, Stage, memory
from parallel.mesh import Layout, check_layout
from parallel.optim import AdamW
from parallel.schedules import idle_share

GIB = 2**30
MACHINE = 8  # ranks of a machine: the most for tp, and within them bytes are fast
FLOPS, FAST, SLOW = 400e12, 300e9, 40e9  # a second: work of an H100 in practice; bytes within and between machines
HOST = 25e9  # bytes a second between a GPU and the host's memory, which several ranks share
EXTRA_WORK = {"none": 0.0, "selective": 0.03, "full": 1 / 3}  # of recomputation, as a share of the step's
SHOWN = 6  # layouts
RARE = ("pp", "schedule", "num_chunks", "layers_per_stage", "offload")  # flags shown where they are not the default


def print_plan(args) -> None:
    """Prints the plan of a script's flags: of `plan` GiB a rank, `world_size`, `layout` and what `job()` says."""
    world_size = args.world_size or int(os.environ.get("WORLD_SIZE", 1))
    if int(os.environ.get("RANK", 0)) == 0:
        print(describe_plan(args.job(), args.layout, world_size, args.plan))


def explain_oom(args) -> str:
    """For a run of these flags whose memory has run out: where it goes by the plan, and layouts that fit this GPU, or
    without one need less."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    gib = torch.cuda.get_device_properties().total_memory / GIB if torch.cuda.is_available() else 0.0
    try:
        job = args.job()
        layout = settle(job, args.layout, world_size, gib or math.inf)
        found = memory(job, layout, world_size)
    except (ValueError, OSError) as error:
        return f"there is no plan of it: {error}"
    if gib:
        fitting, what = recommend(job, layout, world_size, gib), f"layouts that fit the {gib:.1f} GiB of this GPU"
    else:
        fitting, what = options(job, layout, world_size, math.inf), "layouts that need less"
        fitting = sorted(fitting, key=lambda option: option.memory.total)
    fitting = [option for option in fitting if option.memory.total < found.total]
    lines = ["by the plan a rank holds", *memory_lines(found), what if fitting else f"no {what}"]
    lines += [f"  {option}" for option in fitting[:SHOWN]]
    return "\n".join([*lines, "or a smaller --microbatch-size, shorter sequences, more ranks"])


def describe_memory(model: DataParallel, optimizer: AdamW) -> str:
    """For a run's opening block: what this rank holds, measured from the tensors themselves."""
    weights, gradients, state, host = measure_states(model.units, optimizer)
    frozen = measure_states([unit for unit in model.units if not unit.trainable], None)[0]
    parts = {"weights": weights - frozen, "gradients": gradients, "optimizer": state, "frozen models": frozen}
    parts["host memory"] = host
    return ", ".join(f"{name} {show(n)}" for name, n in parts.items() if n) + " on a rank"


def measure_states(units, optimizer: AdamW | None) -> tuple[int, int, int, int]:
    """Bytes allocated for weights, gradients and optimizer state, and for what lies in the host's memory; what several
    tensors share counts for the first."""
    weights = [x for unit in units for x in (unit.flat, *unit.parameters) if not (unit.is_offloaded and x is unit.flat)]
    gradients = [unit.flat_grad for unit in units if unit.trainable]
    state = [x for of_unit in optimizer.state.values() for x in of_unit.values()] if optimizer else []
    host = [unit.flat for unit in units if unit.is_offloaded]
    if optimizer and optimizer.offload:
        host, state = [*host, *state, *(grad for _, grad in optimizer.grads.values())], []
    seen: set[int] = set()
    totals = []
    for tensors in (weights, gradients, state, host):
        storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
        totals.append(sum(nbytes for key, nbytes in storages.items() if key not in seen))
        seen |= storages.keys()
    return tuple(totals)


# --- layouts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """A layout, what it needs, and a rough estimate of its step in seconds, by what takes them; nothing overlaps."""

    layout: Layout
    memory: Memory
    seconds: dict[str, float]
    bubble: float

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        parts = ", ".join(f"{name} {x:.2g}" for name, x in self.seconds.items() if x > 0.002 * total)
        idle = f", {self.bubble:.0%} idle" if self.bubble else ""
        return f"{flags(self.layout):68} {show(self.memory.total):>10}  {total:6.2g} s a step ({parts}{idle})"


def flags(layout: Layout) -> str:
    """A layout as flags, as far as layouts are compared here or it is not the default."""
    shown = []
    for f in fields(layout):
        value = getattr(layout, f.name)
        if f.name in ("tp", "zero", "recompute") or (f.name in RARE and value != f.default):
            text = " ".join(map(str, value)) if isinstance(value, tuple) else value
            shown.append(f"--layout.{f.name.replace('_', '-')} {text}")
    return " ".join(shown)


def settle(job: Job, layout: Layout, world_size: int, gib: float) -> Layout:
    """The layout with what --layout.rollout auto comes to where a rank has so many GiB: see `reshard.folds`."""
    if layout.pp == 1 or layout.rollout != "auto" or not job.rollout:
        return layout
    stages = [Stage(job, layout, world_size, i) for i in range(layout.pp)]
    needed = [sum(stage.held()[0].values()) + 2 * stage.rollout()["gathered weights"] for stage in stages]
    return replace(layout, rollout="folded" if max(needed) <= gib * GIB else "rotation")


def options(job: Job, layout: Layout, world_size: int, gib: float) -> Iterator[Option]:
    """All layouts of so many ranks that model and batch allow; what else the given one says stays."""
    sizes = [n for n in range(1, world_size + 1) if world_size % n == 0]
    for tp, pp in itertools.product([n for n in sizes if n <= MACHINE], sizes):
        if world_size % (tp * pp):
            continue
        for zero in (0, 1, 2, 3) if pp == 1 else (0, 1):  # 2 and 3 would repeat their traffic for every micro-batch
            for recompute in EXTRA_WORK:
                changes = {"tp": tp, "dp": 0, "pp": pp, "zero": zero, "recompute": recompute}
                changes |= {"schedule": "1f1b", "num_chunks": 1, "layers_per_stage": ()}
                try:
                    found = settle(job, replace(layout, **changes), world_size, gib)
                    yield make_option(job, found, world_size)
                except ValueError:  # does not divide
                    break


def make_option(job: Job, layout: Layout, world_size: int) -> Option:
    stages = [Stage(job, layout, world_size, i) for i in range(layout.pp)]
    found, stage = max(((stage.memory(), stage) for stage in stages), key=lambda pair: pair[0].total)
    if layout.zero and stage.dp == 1:
        raise ValueError("one replica has nothing to share out")
    bubble = idle_share(layout.schedule, stage.pp, stage.num_microbatches, layout.num_chunks)
    per_stage = [[unit for name in stage.decoders for unit in stage.units[name]] for stage in stages]
    units = per_stage[found.stage]
    busiest = max(sum(unit.size for unit in units) for units in per_stage)
    work = 6 * busiest * stage.num_microbatches * stage.tokens / FLOPS
    seconds = {"work": work * (1 + EXTRA_WORK[layout.recompute]) / (1 - bubble)}
    for (axis, _), nbytes in stage.step_traffic().items():
        ranks = {"tp": stage.tp, "dp": stage.tp * stage.dp}.get(axis, world_size)
        seconds[axis] = seconds.get(axis, 0.0) + nbytes / (FAST if ranks <= MACHINE else SLOW)
    if "optimizer" in layout.offload:  # gradients to the host, weights back, and what its step reads and writes
        moved = sum((unit.wide + unit.itemsize) * (unit.share if unit.zero else unit.size) for unit in units)
        seconds["host"] = (moved + 2 * found.host) / HOST
    return Option(layout, found, seconds, bubble)


def recommend(job: Job, layout: Layout, world_size: int, gib: float) -> list[Option]:
    """The layouts that fit so many GiB a rank, by estimated seconds of a step.

    Where none fits, those that do with optimizer state and frozen models in the host's memory.
    """

    def fitting(layout: Layout) -> list[Option]:
        found = [option for option in options(job, layout, world_size, gib) if option.memory.total <= gib * GIB]
        return sorted(found, key=lambda option: (sum(option.seconds.values()), option.memory.total))

    is_frozen = any(role.config and not role.trainable for role in job.roles.values())
    return fitting(layout) or fitting(replace(layout, offload=("optimizer", "frozen") if is_frozen else ("optimizer",)))


# --- text ------------------------------------------------------------------------------------------------------------


def show(nbytes: float) -> str:
    """Bytes as people read them."""
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}" if nbytes < 100 * size else f"{nbytes / size:,.0f} {unit}"
    return f"{nbytes:.0f} B"


def memory_lines(found: Memory) -> list[str]:
    lines = [f"  {name:20}{show(nbytes):>10}" for name, nbytes in found.held.items() if nbytes]
    for phase, parts in found.phases.items():
        lines.append(
            f"  {'+ in the ' + phase:20}{show(sum(parts.values())):>10}  "
            + ", ".join(f"{name} {show(nbytes)}" for name, nbytes in parts.items() if nbytes > 0)
        )
    lines.append(f"  {'at the peak':20}{show(found.total):>10}  in the {found.phase}")
    return lines + [f"  {'host memory':20}{show(found.host):>10}  beside it"] * (found.host > 0)


def describe_plan(job: Job, layout: Layout, world_size: int, gib: float) -> str:
    """The plan as lines: memory, traffic, idle share, layouts that fit. Raises: ValueError for an impossible layout."""
    check_layout(layout, world_size)
    layout = settle(job, layout, world_size, gib)
    found = memory(job, layout, world_size)
    stage = Stage(job, layout, world_size, found.stage)
    where = f", of stage {found.stage}, which holds most" if stage.pp > 1 else ""
    lines = [
        f"{flags(layout)} on {world_size} ranks: data parallel {stage.dp}",
        f"an optimizer step: {stage.num_microbatches} micro-batches x {stage.rows} sequences x {job.seq_len:,} tokens",
        f"bytes of a rank{where}",
        *memory_lines(found),
    ]
    for what, sent in (("an optimizer step", stage.step_traffic()), ("a rollout, at most", stage.rollout_traffic())):
        if any(sent.values()):
            lines.append(f"sent by a rank in {what}")
            lines += [f"  {axis + ' ' + op:20}{show(n):>10}" for (axis, op), n in sorted(sent.items()) if n]
    if stage.pp > 1:
        idle = idle_share(layout.schedule, stage.pp, stage.num_microbatches, layout.num_chunks)
        mode = {"folded": "; in a rollout every stage has all layers", "rotation": "; in a rollout sequences go round"}
        lines.append(f"idle share of the pipeline {idle:.1%}{mode.get(layout.rollout, '')}")
    fitting = recommend(job, layout, world_size, gib)
    if not fitting:
        every = options(job, replace(layout, offload=("optimizer",)), world_size, gib)
        least = min(every, key=lambda option: option.memory.total, default=None)
        hint = f"; the least is\n  {least}" if least else ""
        return "\n".join([*lines, f"no layout of {world_size} ranks fits {gib:g} GiB: take more ranks{hint}"])
    lines.append(f"layouts that fit {gib:g} GiB a rank, by the estimated time of a step")
    lines += [f"  {option}" for option in fitting[:SHOWN]]
    best = fitting[0]
    is_least = best is min(fitting, key=lambda option: sum(option.seconds.values()) - option.seconds["work"])
    reason = "least time for traffic" if is_least else "shortest step: less work or idle time outweighs its traffic"
    if best.layout.offload and not layout.offload:
        reason += "; nothing fits without the host's memory"
    return "\n".join([*lines, f"recommended: {flags(best.layout)}, {reason}"])
