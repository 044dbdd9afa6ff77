"""`--plan`: what a run would hold and send per rank, and which layouts fit, from flags and a config.json alone.

No GPU, network, weights or process group are needed. `footprint.py` has the formulas.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from parallel.data_parallel import DataParallel
from parallel.footprint import Job, Memory, Stage, memory
from parallel.mesh import Layout
from parallel.optim import AdamW
from parallel.schedules import idle_share

GIB = 2**30
MACHINE = 8  # ranks of a machine: the most for tp, and within them bytes are fast
FLOPS, FAST, SLOW = 400e12, 300e9, 40e9  # a second: work of an H100 in practice; bytes within and between machines
EXTRA_WORK = {"none": 0.0, "selective": 0.03, "full": 1 / 3}  # of recomputation, as a share of the step's
SHOWN = 6  # layouts


def print_plan(args) -> None:
    """Prints the plan of a script's flags: of `plan` GiB a rank, `world_size`, `layout` and what `job()` says."""
    world_size = args.world_size or int(os.environ.get("WORLD_SIZE", 1))
    if int(os.environ.get("RANK", 0)) == 0:
        print(describe_plan(args.job(), args.layout, world_size, args.plan))


def explain_oom(args) -> str:
    """For a run of these flags that has no memory left: where it went by the plan, and layouts that need less."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    job = args.job()
    found = memory(job, args.layout, world_size)
    smaller = [option for option in options(job, args.layout, world_size) if option.memory.total < found.total]
    smaller.sort(key=lambda option: option.memory.total)
    lines = ["out of memory; by the plan a rank holds", *memory_lines(found)]
    lines += ["what needs less, at the same result:" if smaller else "no other layout of these ranks needs less:"]
    lines += [f"  {option}" for option in smaller[:SHOWN]]
    return "\n".join([*lines, "  a smaller --microbatch-size, shorter sequences, or more ranks"])


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
        host, state = [*host, *state, *(grad for _, grad in optimizer._grads.values())], []
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
        parts = ", ".join(f"{name} {x:.2g}" for name, x in self.seconds.items() if x)
        idle = f", {self.bubble:.0%} idle" if self.bubble else ""
        total = sum(self.seconds.values())
        return f"{flags(self.layout):58} {show(self.memory.total):>10}  {total:6.2g} s a step ({parts}{idle})"


def flags(layout: Layout) -> str:
    """A layout as flags, as far as it is not the default."""
    shown = [
        f"--layout.{f.name} {getattr(layout, f.name)}"
        for f in fields(layout)
        if f.name in ("tp", "pp", "zero", "recompute")
    ]
    return " ".join(shown)


def options(job: Job, layout: Layout, world_size: int) -> Iterator[Option]:
    """All layouts of so many ranks that model and batch allow; what else the given one says stays."""
    sizes = [n for n in range(1, world_size + 1) if world_size % n == 0]
    for tp in [n for n in sizes if n <= MACHINE]:
        for pp in sizes:
            for zero in (0, 1, 2, 3) if pp == 1 else (0, 1):  # 2 and 3 would repeat their traffic for every micro-batch
                for recompute in EXTRA_WORK:
                    changes = {"tp": tp, "dp": 0, "pp": pp, "zero": zero, "recompute": recompute}
                    changes |= {"schedule": "1f1b", "num_chunks": 1, "layers_per_stage": ()}
                    try:
                        yield make_option(job, replace(layout, **changes), world_size)
                    except ValueError:  # does not divide
                        break


def make_option(job: Job, layout: Layout, world_size: int) -> Option:
    found = memory(job, layout, world_size)
    stage = Stage(job, layout, world_size, found.stage)
    if layout.zero and stage.dp == 1:
        raise ValueError("one replica has nothing to share out")
    bubble = idle_share(layout.schedule, stage.pp, stage.num_microbatches, layout.num_chunks)
    entries = sum(unit.size for name in stage.decoders for unit in stage.units[name])
    work = 6 * entries * stage.num_microbatches * stage.tokens / FLOPS * (1 + EXTRA_WORK[layout.recompute])
    seconds = {"work": work / (1 - bubble)}
    for (axis, _), nbytes in stage.step_traffic().items():
        ranks = {"tp": stage.tp, "dp": stage.tp * stage.dp}.get(axis, world_size)
        seconds[axis] = seconds.get(axis, 0.0) + nbytes / (FAST if ranks <= MACHINE else SLOW)
    return Option(layout, found, seconds, bubble)


def recommend(job: Job, layout: Layout, world_size: int, gib: float) -> list[Option]:
    """The layouts that fit so many GiB a rank, by estimated seconds of a step."""
    fitting = [option for option in options(job, layout, world_size) if option.memory.total <= gib * GIB]
    return sorted(fitting, key=lambda option: (sum(option.seconds.values()), option.memory.total))


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
    return [*lines, f"  {'at the peak':20}{show(found.total):>10}  in the {found.phase}"]


def describe_plan(job: Job, layout: Layout, world_size: int, gib: float) -> str:
    """The plan as lines: memory, traffic, idle share, layouts that fit. Raises: ValueError for an impossible layout."""
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
        lines.append(f"idle share of the pipeline {idle:.1%}")
    fitting = recommend(job, layout, world_size, gib)
    if not fitting:
        least = min(options(job, layout, world_size), key=lambda option: option.memory.total, default=None)
        hint = f"; the least is\n  {least}" if least else ""
        return "\n".join([*lines, f"no layout of {world_size} ranks fits {gib:g} GiB: take more ranks{hint}"])
    lines.append(f"layouts that fit {gib:g} GiB a rank, by the estimated time of a step")
    lines += [f"  {option}" for option in fitting[:SHOWN]]
    best = fitting[0]
    is_least = best is min(fitting, key=lambda option: sum(option.seconds.values()) - option.seconds["work"])
    reason = "least time for traffic" if is_least else "shortest step: less work or idle time outweighs its traffic"
    return "\n".join([*lines, f"recommended: {flags(best.layout)}, {reason}"])
