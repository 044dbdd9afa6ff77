"""Pipeline schedules, without a process: order, idle time and memory against formulas, messages under NCCL's rules."""

import itertools
from collections import Counter

import pytest

from parallel.schedules import (
    CHANNELS,
    SCHEDULES,
    Action,
    Transfer,
    add_transfers,
    channels_are_ordered,
    check_layers_per_stage,
    check_schedule,
    idle_share,
    layers_of_stage,
    make_schedule,
    peak_in_flight,
    simulate,
    split_layers,
    transfers_of,
)

ONE_COMMUNICATOR = dict.fromkeys(CHANNELS, "all")
ONE_PER_DIRECTION = {channel: channel.removeprefix("wrap_") for channel in CHANNELS}
ONE_FOR_WRAPS = {channel: "wrap" if channel.startswith("wrap") else channel for channel in CHANNELS}
DURATIONS = [(1.0, 1.0, 1.0), (1.0, 1.2, 0.8)]  # of F, B, W


def all_stages(name, p, m, v=1):
    return [SCHEDULES[name](stage, p, m, v) for stage in range(p)]


def cases(name):
    """(p, m, v): every number of stages up to 16, micro-batches from 1 to 8 p where they matter."""
    for p in range(1, 17):
        if name == "interleaved":  # the long runs where they are cheap
            yield from ((p, k * p, v) for v in (1, 2, 3, 4) for k in ((1, 2, 3, 8) if p <= 5 else (1, 2)))
            continue
        fewer = {1, 2, p // 2 or 1, p - 1 or 1}  # than stages
        yield from ((p, m, 1) for m in sorted(fewer | {p, p + 1, 2 * p - 1, 3 * p + 1} | ({8 * p} if p < 9 else set())))
    yield 16, 128, 4 if name == "interleaved" else 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_matches_formulas(name):
    for p, m, v in cases(name):
        schedule = all_stages(name, p, m, v)
        for durations in DURATIONS if p * m * v < 1000 else DURATIONS[1:]:
            result = simulate(schedule, durations)  # raises unless all work is done, once, without deadlock
            bubble = idle_share(name, p, m, v, durations)
            if name == "zb_h1" and m < 2 * p - 1:  # too few micro-batches to fill the cool-down: at least not worse
                assert bubble - 1e-12 < result.bubble < idle_share("1f1b", p, m, v, durations) + 1e-12
            else:
                assert result.bubble == pytest.approx(bubble, rel=0, abs=1e-12), (p, m, v, durations)
            assert result.makespan * (1 - result.bubble) == pytest.approx(v * m * sum(durations))
        peaks = [peak_in_flight(name, stage, p, m, v) for stage in range(p)]
        assert result.peak_in_flight == peaks, (p, m, v)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_does_everything_once_in_order(name):
    """Counted here without the simulator; ascending micro-batches make gradients equal bit for bit in all schedules."""
    for p, k, v in itertools.product((1, 2, 3, 5), (1, 2, 3), (1, 3) if name == "interleaved" else (1,)):
        m = k * p if name == "interleaved" else k * p - 1 or 1
        for actions in all_stages(name, p, m, v):
            order = {(kind, chunk): [] for kind in "FBW" for chunk in range(v)}
            for action in actions:
                for kind in action.kind:
                    order[kind, action.chunk].append(action.microbatch)
            assert order == dict.fromkeys(order, list(range(m))), (p, m, v)


def test_schedules_match_worked_examples():
    """p = 4, m = 8 with equal F, B and W: 1F1B .273, interleaved .158 and .086, ZB-H1 .111."""
    bubbles = [simulate(all_stages(*case)).bubble for case in [("1f1b", 4, 8), ("interleaved", 4, 8, 2)]]
    bubbles += [simulate(all_stages(*case)).bubble for case in [("interleaved", 4, 8, 4), ("zb_h1", 4, 8)]]
    assert [round(bubble, 3) for bubble in bubbles] == [0.273, 0.158, 0.086, 0.111]
    kinds = " ".join(f"{action.kind}{action.microbatch}" for action in make_schedule("1f1b", 1, 4, 4))
    assert kinds == "F0 F1 F2 BW0 F3 BW1 BW2 BW3"
    kinds = " ".join(f"{action.kind}{action.microbatch}" for action in make_schedule("zb_h1", 2, 3, 4))
    assert kinds == "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3"


@pytest.mark.parametrize("name", SCHEDULES)
def test_channels_are_ordered_in_every_schedule(name):
    """Also where all channels are one communicator: what one queue of a GPU for all of them comes to."""
    for p, m, v in cases(name):
        programs = add_transfers(all_stages(name, p, m, v))
        assert channels_are_ordered(programs), (p, m, v)
        assert channels_are_ordered(programs, ONE_COMMUNICATOR), (p, m, v)
        if p * m * v < 200:
            forwards = [Action("F", chunk, i) for chunk in range(v) for i in range(m)]
            assert channels_are_ordered(add_transfers([forwards] * p), ONE_COMMUNICATOR), (p, m, v)


def receive_ahead(schedule, ahead):
    """Transfers as they are often placed: a receive so many actions before the one that needs it."""
    p, v = len(schedule), 1 + max(action.chunk for actions in schedule for action in actions)
    programs = []
    for stage, actions in enumerate(schedule):
        ends = [transfers_of(action, stage, p, v) for action in actions]
        receives = [receive for receive, _ in ends]
        steps = receives[:ahead]
        for i, (action, (_, send)) in enumerate(zip(actions, ends, strict=True)):
            steps += [*receives[i + ahead :][:1], action, send]
        programs.append([step for step in steps if step is not None])
    return programs


def test_one_communicator_deadlocks_one_f_one_b():
    """With receives just in time only one micro-batch is safe (72 of these 84 cases are not); ahead, none is."""
    unsafe = 0
    for p, m in itertools.product(range(2, 14), range(1, 8)):
        schedule = all_stages("1f1b", p, m)
        just_in_time = channels_are_ordered(receive_ahead(schedule, 0), ONE_COMMUNICATOR)
        assert just_in_time == (m == 1), (p, m)
        assert not channels_are_ordered(receive_ahead(schedule, 1), ONE_COMMUNICATOR), (p, m)
        unsafe += not just_in_time
    assert unsafe == 72


@pytest.mark.parametrize("p", [2, 3, 4, 5])
def test_interleaving_without_wrap_twins_deadlocks(p):
    for k, v, ahead in itertools.product((1, 2, 4), (2, 3), (0, 1)):
        programs = receive_ahead(all_stages("interleaved", p, k * p, v), ahead)
        assert not channels_are_ordered(programs, ONE_COMMUNICATOR), (k, v, ahead)
        assert not channels_are_ordered(programs, ONE_PER_DIRECTION), (k, v, ahead)
        # One communicator for both wraps is safe by luck alone: where receives happen to be issued ahead.
        assert channels_are_ordered(programs, ONE_FOR_WRAPS) == (ahead == 1 or k == 1), (k, v, ahead)


def test_receives_two_ahead_deadlock():
    assert not channels_are_ordered(receive_ahead(all_stages("1f1b", 4, 8), 2))
    assert not channels_are_ordered(receive_ahead(all_stages("interleaved", 4, 8, 2), 2))


@pytest.mark.parametrize(("name", "p", "m", "v"), [("1f1b", 4, 6, 1), ("interleaved", 2, 4, 3), ("zb_h1", 3, 5, 1)])
def test_transfers_match_between_stages(name, p, m, v):
    """Each message once at both ends, each receive before the action that needs it, each send right behind its own."""
    ends = Counter()
    schedule = all_stages(name, p, m, v)
    for stage, (actions, steps) in enumerate(zip(schedule, add_transfers(schedule), strict=True)):
        assert [step for step in steps if isinstance(step, Action)] == actions
        for at, step in enumerate(steps):
            if isinstance(step, Action):
                continue
            source, target = (stage, step.peer) if step.kind == "send" else (step.peer, stage)
            ends[source, target, step.channel, step.chunk, step.microbatch] += 1 if step.kind == "send" else -1
            kinds = ("F",) if step.channel.endswith("forward") else ("B", "BW")
            if step.kind == "send":
                before = steps[at - 1]
                assert isinstance(before, Action) and before.kind in kinds and before.microbatch == step.microbatch
            else:
                [user] = [i for i, x in enumerate(steps) if x[1:] == step[3:] and x[0] in kinds]
                assert user > at
    assert not any(ends.values()) and len(ends) == 2 * m * (p * v - 1)
    assert {channel for _, _, channel, _, _ in ends} == set(CHANNELS if v > 1 else CHANNELS[:2])


def test_messages_travel_while_stages_work():
    """1F1B on two stages: the second one issues the receive of a micro-batch before it works on the one before."""
    steps = add_transfers(all_stages("1f1b", 2, 3))[1]
    assert [step for step in steps if not isinstance(step, Transfer)] == all_stages("1f1b", 2, 3)[1]
    receive = steps.index(Transfer("recv", 0, "forward", 1 - 1, 1))
    assert receive < steps.index(Action("BW", 0, 0))


def test_transfers_of_a_wrap():
    """Two stages of two chunks: the first stage sends its gradients of chunk 1 round to the last stage's chunk 0."""
    steps = add_transfers(all_stages("interleaved", 2, 2, 2))[0]
    assert Transfer("recv", 1, "wrap_forward", 1, 0) in steps
    assert Transfer("send", 1, "wrap_backward", 0, 0) in steps
    assert add_transfers(all_stages("interleaved", 1, 2, 2)) == all_stages("interleaved", 1, 2, 2)


PLANTED = [("gpipe", 3, 4, 1), ("1f1b", 3, 4, 1), ("interleaved", 2, 4, 2), ("zb_h1", 3, 5, 1)]


@pytest.mark.parametrize(("name", "p", "m", "v"), PLANTED)
def test_simulator_rejects_dropped_and_repeated_actions(name, p, m, v):
    for stage in range(p):
        for at in range(len(all_stages(name, p, m, v)[stage])):
            dropped, repeated = all_stages(name, p, m, v), all_stages(name, p, m, v)
            action = dropped[stage].pop(at)
            repeated[stage].insert(at, action)
            with pytest.raises(ValueError, match=f"stage {stage} never does|deadlock: .*stage"):
                simulate(dropped)
            with pytest.raises(ValueError, match=f"stage {stage} does . twice"):
                simulate(repeated)


@pytest.mark.parametrize(("name", "p", "m", "v"), PLANTED)
def test_swapped_transfers_are_caught(name, p, m, v):
    programs = add_transfers(all_stages(name, p, m, v))
    for stage in range(p):
        places = [at for at, step in enumerate(programs[stage]) if isinstance(step, Transfer)]
        for a, b in itertools.combinations(places, 2):
            swapped = [list(program) for program in programs]
            swapped[stage][a], swapped[stage][b] = swapped[stage][b], swapped[stage][a]
            if programs[stage][a][:3] == programs[stage][b][:3]:
                assert not channels_are_ordered(swapped), (stage, a, b)


@pytest.mark.parametrize(("name", "p", "m", "v"), PLANTED)
def test_swapped_actions_are_caught(name, p, m, v):
    """Two actions of one kind: messages in another order. A forward and its own backward: a deadlock."""
    for stage in range(p):
        for a, b in itertools.combinations(range(len(all_stages(name, p, m, v)[stage])), 2):
            schedule = all_stages(name, p, m, v)
            first, second = schedule[stage][a], schedule[stage][b]
            schedule[stage][a], schedule[stage][b] = second, first
            if first.kind == second.kind != "W" and first.chunk == second.chunk:
                assert not channels_are_ordered(receive_ahead(schedule, 1)), (stage, first, second)
            if first.kind == "F" and second.kind in ("B", "BW") and first[1:] == second[1:]:
                with pytest.raises(ValueError, match="deadlock"):
                    simulate(schedule)


def test_deadlock_names_stages_and_actions():
    schedule = all_stages("1f1b", 2, 2)
    schedule[0].reverse()
    with pytest.raises(ValueError) as caught:
        simulate(schedule)
    assert str(caught.value) == (
        "deadlock: stage 0 waits before Action(kind='BW', chunk=0, microbatch=1); "
        "stage 1 waits before Action(kind='F', chunk=0, microbatch=0)"
    )


@pytest.mark.parametrize(
    ("case", "text"),
    [
        (("1f2b", 2, 2), "--layout.schedule 1f2b is not one of gpipe, 1f1b, interleaved, zb_h1"),
        (("1f1b", 2, 0), "with 0 micro-batches: at least 1"),
        (("1f1b", 2, 2, 2), "--layout.num-chunks 2 with --layout.schedule 1f1b: only interleaved"),
        (("interleaved", 2, 2, 1), "--layout.num-chunks 1: give 2 or more, or --layout.schedule 1f1b"),
        (("interleaved", 4, 6, 2), "groups of the 4 stages, which do not divide 6: use 4 or 8 micro-batches, or "),
        (("interleaved", 4, 3, 2), "groups of the 4 stages, which do not divide 3: use 4 micro-batches, or "),
    ],
)
def test_check_schedule_rejects(case, text):
    with pytest.raises(ValueError, match=text):
        check_schedule(*case)


def test_split_layers_matches_brute_force():
    """The least largest stage over all splits, and in each stage the least largest chunk for its layers."""
    for p, v, costs in itertools.product((1, 2, 3, 4), (1, 2), ((0, 0), (0.3, 0.7), (0, 1.2), (2.5, 3))):
        for num_layers in range(p * v, 10):
            extra = [0.0] * (p * v)
            extra[0] += costs[0]
            extra[-1] += costs[1]

            def largest_stage(split, extra=extra, p=p):
                return max(sum(split[s::p]) + sum(extra[s::p]) for s in range(p))

            split = split_layers(num_layers, p, v, *costs)
            check_layers_per_stage(split, num_layers, p, v)
            everything = [
                other
                for cuts in itertools.combinations(range(1, num_layers), p * v - 1)
                for other in [[b - a for a, b in itertools.pairwise([0, *cuts, num_layers])]]
            ]
            assert largest_stage(split) == pytest.approx(min(map(largest_stage, everything))), (p, v, num_layers)
            for s in range(p):
                alike = [other[s::p] for other in everything if sum(other[s::p]) == sum(split[s::p])]
                chunks = [[n + x for n, x in zip(other, extra[s::p], strict=True)] for other in [split[s::p], *alike]]
                assert max(chunks[0]) == pytest.approx(min(map(max, chunks))), (p, v, num_layers, s)


def test_split_layers_of_odd_sizes():
    assert split_layers(7, 3) == [2, 2, 3]  # the last stage holds the fewest micro-batches
    assert split_layers(80, 4, head_cost=1.2) == [20, 20, 21, 19]
    assert split_layers(10, 2, 2) == [2, 2, 3, 3]
    assert layers_of_stage([2, 2, 3, 3], 1, 2) == [range(2, 4), range(7, 10)]


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ((3, 4), "3 layers cannot fill 4 stages of 1 chunks: at most --layout.pp 3$"),
        ((6, 4, 2), "6 layers cannot fill 4 stages of 2 chunks: at most --layout.pp 3 or --layout.num-chunks 1"),
        ((2, 3, 4), "at most --layout.pp 2 --layout.num-chunks 1"),
    ],
)
def test_split_layers_rejects_too_few_layers(case, text):
    with pytest.raises(ValueError, match=text):
        split_layers(*case)


@pytest.mark.parametrize("layers", [[4, 4], [3, 3, 3], [4, 3, 0], [4, 5, -1]])
def test_layers_per_stage_rejects(layers):
    with pytest.raises(ValueError, match="must be 3 numbers of at least 1 with the sum 8, .*; for example 2 3 3"):
        check_layers_per_stage(layers, 8, 3)
