"""Pipeline schedules as data: in which order a stage works, what it sends and receives, and proofs of both.

The model is cut into num_stages * num_chunks parts. Stage s (a rank of the pp axis) holds num_chunks of them: its chunk
c is part c * num_stages + s, so with more than one chunk a micro-batch goes round the stages num_chunks times.
A schedule is one list of actions per stage. All of them visit the micro-batches of a chunk in ascending order, so
that every schedule adds the same gradients in the same order.

| schedule | idle share of the time | activations held at once by stage s, in chunks |
|---|---|---|
| gpipe | (p - 1) / (m + p - 1) | m |
| 1f1b | (p - 1) / (m + p - 1) | min(p - s, m) |
| interleaved | (p - 1) / (v m + p - 1) | min(2 (p - s) - 1 + (v - 1) p, v m) |
| zb_h1 | (p - 1) (F + B - W) / (m (F + B + W) + (p - 1) (F + B - W)), from m = 2 p - 1 on | min(p, m) |

for p stages, m micro-batches, v chunks of a stage, and the durations F, B, W of the three kinds of work.
"""

from collections import defaultdict, deque
from typing import Literal, NamedTuple

CHANNELS = ("forward", "backward", "wrap_forward", "wrap_backward")


class Action(NamedTuple):
    """One piece of a stage's work: F forward, B backward of the input only, W of the weights, BW both at once."""

    kind: Literal["F", "B", "W", "BW"]
    chunk: int
    microbatch: int


class Transfer(NamedTuple):
    """One end of a message: activations from an F to the next, or gradients from a B to the next."""

    kind: Literal["send", "recv"]
    peer: int  # stage at the other end
    channel: str  # one of CHANNELS
    chunk: int  # of the receiver, on both ends: so the two ends of a message differ in kind and peer only
    microbatch: int


class Simulation(NamedTuple):
    """What a schedule costs; times in the unit of the durations."""

    makespan: float
    bubble: float  # share of makespan that the stages idle
    peak_in_flight: list[int]  # by stage: the most chunks whose activations (F to W) are held at once
    ends: dict[tuple[str, int, int], float]  # when F, B or W of a part and micro-batch has ended


def gpipe(stage: int, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> list[Action]:
    """All forwards, then all backwards.

    Source: Huang et al. 2019 (arXiv 1811.06965), section 2.
    """
    return _alternate(*_in_order(num_microbatches), num_warmup=num_microbatches)


def one_f_one_b(stage: int, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> list[Action]:
    """Warm-up forwards until the first micro-batch can come back, then one forward and one backward in turn.

    Source: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2.1 (PipeDream-Flush).
    """
    return _alternate(*_in_order(num_microbatches), num_warmup=num_stages - 1 - stage)


def interleaved(stage: int, num_stages: int, num_microbatches: int, num_chunks: int) -> list[Action]:
    """1F1B over several chunks: num_stages micro-batches at a time go through all chunks; num_stages divides them.

    Source: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2.2.
    """
    forwards, backwards = [], []
    for first in range(0, num_microbatches, num_stages):
        group = range(first, first + num_stages)
        forwards += [Action("F", chunk, i) for chunk in range(num_chunks) for i in group]
        backwards += [Action("BW", chunk, i) for chunk in reversed(range(num_chunks)) for i in group]
    # To the last stage and back (2 per stage), after the first group has gone through all chunks but the last.
    return _alternate(forwards, backwards, num_warmup=2 * (num_stages - 1 - stage) + (num_chunks - 1) * num_stages)


def zb_h1(stage: int, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> list[Action]:
    """1F1B whose weight gradients come `stage` micro-batches late: the last ones fill the idle time at the end.

    Source: Qi et al. 2023 (arXiv 2401.10241), section 2 (ZB-H1).
    """
    actions = []
    for action in one_f_one_b(stage, num_stages, num_microbatches):
        if action.kind == "F":
            actions.append(action)
            continue
        actions.append(Action("B", 0, action.microbatch))
        if action.microbatch >= stage:
            actions.append(Action("W", 0, action.microbatch - stage))
    return actions + [Action("W", 0, i) for i in range(max(num_microbatches - stage, 0), num_microbatches)]


SCHEDULES = {"gpipe": gpipe, "1f1b": one_f_one_b, "interleaved": interleaved, "zb_h1": zb_h1}  # --layout.schedule


def make_schedule(name: str, stage: int, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> list[Action]:
    """The actions of one stage under the schedule of that name; see `check_schedule` for what it raises."""
    check_schedule(name, num_stages, num_microbatches, num_chunks)
    return SCHEDULES[name](stage, num_stages, num_microbatches, num_chunks)


def check_schedule(name: str, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> None:
    """Raises ValueError, with what would fit, unless the schedule exists and can run these numbers."""
    if name not in SCHEDULES:
        raise ValueError(f"--layout.schedule {name} is not one of {', '.join(SCHEDULES)}")
    if num_microbatches < 1:
        raise ValueError(f"--layout.schedule {name} with {num_microbatches} micro-batches: at least 1 is needed")
    if name != "interleaved":
        if num_chunks != 1:
            raise ValueError(
                f"--layout.num-chunks {num_chunks} with --layout.schedule {name}: only interleaved has several chunks "
                "in a stage; give --layout.num-chunks 1 or --layout.schedule interleaved"
            )
        return
    if num_chunks < 2:
        raise ValueError(
            f"--layout.schedule interleaved with --layout.num-chunks {num_chunks}: give 2 or more, or "
            "--layout.schedule 1f1b, which holds fewer activations"
        )
    if rest := num_microbatches % num_stages:
        fitting = [n for n in (num_microbatches - rest, num_microbatches - rest + num_stages) if n]
        raise ValueError(
            f"--layout.schedule interleaved takes micro-batches in groups of the {num_stages} stages, which do not "
            f"divide {num_microbatches}: use {' or '.join(map(str, fitting))} micro-batches, or --layout.schedule 1f1b"
        )


def idle_share(name: str, p: int, m: int, v: int = 1, durations: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> float:
    """Of the time of a step, by the formulas at the head of this file: p stages, m micro-batches, v chunks."""
    forward, backward, weight = durations
    if name == "zb_h1":
        idle = (p - 1) * (forward + backward - weight)
        return idle / (m * sum(durations) + idle)
    return (p - 1) / (v * m + p - 1)


def peak_in_flight(name: str, stage: int, p: int, m: int, v: int = 1) -> int:
    """The most chunks whose activations a stage holds at once, likewise."""
    return {
        "gpipe": m,
        "1f1b": min(p - stage, m),
        "interleaved": min(2 * (p - stage) - 1 + (v - 1) * p, v * m),
        "zb_h1": min(p, m),
    }[name]


def add_transfers(schedule: list[list[Action]]) -> list[list[Action | Transfer]]:
    """Each stage's actions with its sends and receives between them, in the order in which it issues them.

    An action waits for its own receive; a send follows the action whose result it carries and is not waited for. Every
    message has a time, when its sender is done in `simulate`, and all stages issue their sends and receives in the
    order of these times: a receive hence stands before the action during which its message comes, so that it travels
    while the stage is at work. One order for all is what keeps stages from waiting for each other for ever, even where
    what a rank issues runs strictly one by one and a send ends when it is received, as NCCL may have it: the earliest
    unfinished message is always the next for both of its ends. Each channel is still a communicator of its own, so
    that a late message does not hold up what goes another way.
    """
    num_stages = len(schedule)
    num_chunks = 1 + max(action.chunk for actions in schedule for action in actions)
    ends = simulate(schedule).ends
    programs = []
    for stage, actions in enumerate(schedule):
        receives, sends = [], {}
        for action in actions:
            kind, part = action.kind[0], action.chunk * num_stages + stage
            receive, send = transfers_of(action, stage, num_stages, num_chunks)
            if receive is not None:
                source = part - 1 if kind == "F" else part + 1
                receives.append((ends[kind, source, action.microbatch], receive.channel, source, receive))
            sends[action] = (ends[kind, part, action.microbatch], send.channel if send else "", part, send)
        receives.sort(reverse=True)
        program: list[Action | Transfer] = []
        for action in actions:
            while receives and receives[-1][:3] < sends[action][:3]:
                program.append(receives.pop()[3])
            program += [action] if sends[action][3] is None else [action, sends[action][3]]
        programs.append(program)
    return programs


def transfers_of(
    action: Action, stage: int, num_stages: int, num_chunks: int
) -> tuple[Transfer | None, Transfer | None]:
    """What an action receives and what it sends: None at the ends of the model, for W, and within a single stage."""
    direction, step = ("forward", 1) if action.kind == "F" else ("backward", -1)
    part, num_parts = action.chunk * num_stages + stage, num_stages * num_chunks

    def message(kind: str, source: int, target: int) -> Transfer | None:
        if action.kind == "W" or num_stages == 1 or not (0 <= source < num_parts and 0 <= target < num_parts):
            return None
        channel = direction if source // num_stages == target // num_stages else f"wrap_{direction}"
        peer = (source if kind == "recv" else target) % num_stages
        return Transfer(kind, peer, channel, target // num_stages, action.microbatch)

    return message("recv", part - step, part), message("send", part, part + step)


def simulate(schedule: list[list[Action]], durations: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Simulation:
    """Plays the actions of all stages, each as soon as its stage is free and its input is there; messages take no time.

    Args: durations: of F, B and W for one chunk and micro-batch; BW takes B + W.
    Raises: ValueError, naming stages and actions, if they wait for each other, or if a stage does not do F, B and W (or
        all stages F alone) of every chunk and micro-batch exactly once.
    """
    num_stages = len(schedule)
    cells = {(action.chunk, action.microbatch) for actions in schedule for action in actions}
    last_part = max(chunk for chunk, _ in cells) * num_stages + num_stages - 1
    duration = dict(zip("FBW", durations, strict=True))
    done: dict[tuple[str, int, int], float] = {}  # when F, B or W of a part and micro-batch ended
    position, clock = [0] * num_stages, [0.0] * num_stages  # of each stage: its next action, the end of its last
    in_flight, peak = [0] * num_stages, [0] * num_stages

    def inputs(kind: str, part: int, i: int) -> list[tuple[str, int, int]]:
        if kind == "F":
            return [("F", part - 1, i)] if part > 0 else []
        if kind == "W":
            return [("B", part, i)]
        return [("F", part, i)] + ([("B", part + 1, i)] if part < last_part else [])

    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(schedule):
            while position[stage] < len(actions):
                kind, chunk, i = action = actions[position[stage]]
                part = chunk * num_stages + stage
                needs = inputs(kind, part, i)
                if not all(need in done for need in needs):
                    break
                clock[stage] = max([clock[stage], *(done[need] for need in needs)]) + sum(duration[x] for x in kind)
                for x in kind:
                    if (x, part, i) in done:
                        raise ValueError(f"stage {stage} does {x} twice: {action}")
                    done[x, part, i] = clock[stage]
                in_flight[stage] += ("F" in kind) - ("W" in kind)
                peak[stage] = max(peak[stage], in_flight[stage])
                position[stage] += 1
                moved = True

    if waiting := [stage for stage, actions in enumerate(schedule) if position[stage] < len(actions)]:
        names = "; ".join(f"stage {stage} waits before {schedule[stage][position[stage]]}" for stage in waiting)
        raise ValueError(f"deadlock: {names}")
    kinds = "FBW" if any(action.kind != "F" for actions in schedule for action in actions) else "F"
    for stage in range(num_stages):
        for kind in kinds:
            if missing := [cell for cell in cells if (kind, cell[0] * num_stages + stage, cell[1]) not in done]:
                raise ValueError(f"stage {stage} never does {kind} of (chunk, micro-batch) {min(missing)}")
    makespan = max(clock)
    busy = len(cells) * sum(duration[kind] for kind in kinds)  # the same work on every stage
    return Simulation(makespan, 1 - busy / makespan, peak, done)


def channels_are_ordered(programs: list[list[Action | Transfer]], communicator: dict[str, str] | None = None) -> bool:
    """Whether all stages come to their end where sends and receives run in issue order and meet, as NCCL's do.

    Plays the lists of `add_transfers`: on each communicator a stage has one queue, whose first transfer ends when it
    is the first at its peer as well. False if queues wait for each other, or if a pair sends in another order than it
    receives (where NCCL would hand over the wrong message). Who goes first changes nothing in such a play, so one play
    decides. Tests on gloo cannot show this: there nothing waits in one queue for what was issued before.

    Args: communicator: the communicator of each channel; default: each has its own.
    """
    communicator = communicator or {channel: channel for channel in CHANNELS}
    num_stages = len(programs)
    num_chunks = 1 + max(step.chunk for program in programs for step in program)
    steps = [deque(program) for program in programs]
    queues: dict[tuple[int, str], deque[Transfer]] = defaultdict(deque)  # issued and not ended, by stage, communicator
    missing: set[tuple[int, Transfer]] = set()  # receives issued and not ended, by stage

    moved = True
    while moved:
        moved = False
        for stage, todo in enumerate(steps):
            while todo:
                if isinstance(todo[0], Transfer):
                    queues[stage, communicator[todo[0].channel]].append(todo[0])
                    if todo[0].kind == "recv":
                        missing.add((stage, todo[0]))
                elif (stage, transfers_of(todo[0], stage, num_stages, num_chunks)[0]) in missing:
                    break
                todo.popleft()
                moved = True
        for (stage, name), queue in list(queues.items()):
            while queue and queue[0].kind == "send":
                receive = queue[0]._replace(kind="recv", peer=stage)
                other = queues[queue[0].peer, name]
                if not other or other[0] != receive:
                    break
                missing.remove((queue[0].peer, receive))
                queue.popleft()
                other.popleft()
                moved = True
    return not any(steps) and not any(queues.values())


def split_layers(
    num_layers: int, num_stages: int, num_chunks: int = 1, embedding_cost: float = 0.0, head_cost: float = 0.0
) -> list[int]:
    """How many layers each part gets, in the order of the model, so that the most expensive stage costs least.

    Within a stage the most expensive chunk costs least. Among equals the later gets the layer, since earlier stages
    and chunks hold the activations of more micro-batches. Every part gets a layer.

    Args: embedding_cost, head_cost: of the first and the last part, in units of one layer.
    Raises: ValueError, with what would fit, if there are fewer layers than parts.
    """
    if num_layers < num_stages * num_chunks:
        fitting = [f"--layout.pp {num_layers // num_chunks}"] if num_layers >= num_chunks else []
        fitting += [f"--layout.num-chunks {num_layers // num_stages}"] if num_layers >= num_stages else []
        raise ValueError(
            f"{num_layers} layers cannot fill {num_stages} stages of {num_chunks} chunks: at most "
            + (" or ".join(fitting) or f"--layout.pp {num_layers} --layout.num-chunks 1")
        )

    def fill(total: int, least: int, costs: list[float]) -> list[int]:
        """Spreads total layers over places that cost something before, so that the largest cost is least."""
        counts = [least] * len(costs)
        for _ in range(total - least * len(costs)):
            counts[min(range(len(costs)), key=lambda place: (costs[place] + counts[place], -place))] += 1
        return counts

    extra = [0.0] * (num_stages * num_chunks)  # by part
    extra[0] += embedding_cost
    extra[-1] += head_cost
    per_stage = fill(num_layers, num_chunks, [sum(extra[stage::num_stages]) for stage in range(num_stages)])
    per_chunk = [fill(total, 1, extra[stage::num_stages]) for stage, total in enumerate(per_stage)]
    return [per_chunk[stage][chunk] for chunk in range(num_chunks) for stage in range(num_stages)]


def check_layers_per_stage(layers_per_stage: list[int], num_layers: int, num_stages: int, num_chunks: int = 1) -> None:
    """Raises ValueError, with a split that fits, unless every part is given a layer and all layers are given."""
    num_parts = num_stages * num_chunks
    if len(layers_per_stage) != num_parts or min(layers_per_stage) < 1 or sum(layers_per_stage) != num_layers:
        fitting = " ".join(map(str, split_layers(num_layers, num_stages, num_chunks)))
        raise ValueError(
            f"--layout.layers-per-stage {' '.join(map(str, layers_per_stage))} ({len(layers_per_stage)} numbers, sum "
            f"{sum(layers_per_stage)}) must be {num_parts} numbers of at least 1 with the sum {num_layers}, in the "
            f"order of the model ({num_stages} stages, {num_chunks} times); for example {fitting}"
        )


def layers_of_stage(layers_per_stage: list[int], stage: int, num_stages: int) -> list[range]:
    """The layers of each chunk of a stage."""
    firsts = [sum(layers_per_stage[:part]) for part in range(len(layers_per_stage))]
    parts = range(stage, len(layers_per_stage), num_stages)
    return [range(firsts[part], firsts[part] + layers_per_stage[part]) for part in parts]


def _in_order(num_microbatches: int) -> tuple[list[Action], list[Action]]:
    """The forwards and the whole backwards of a stage of one chunk."""
    return [Action("F", 0, i) for i in range(num_microbatches)], [Action("BW", 0, i) for i in range(num_microbatches)]


def _alternate(forwards: list[Action], backwards: list[Action], num_warmup: int) -> list[Action]:
    """Warm-up: num_warmup forwards; steady: one forward, one backward; cool-down: the remaining backwards."""
    actions = forwards[:num_warmup]
    for forward, backward in zip(forwards[num_warmup:], backwards, strict=False):
        actions += [forward, backward]
    return actions + backwards[max(len(forwards) - num_warmup, 0) :]
