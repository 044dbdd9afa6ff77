"""Whether NCCL could execute what the ranks of every layout issue, in the order in which they issue it.

Whole iterations of the scripts, played in this process; see `tests/fake_world.py`.
"""

import contextlib
import functools
import io
import itertools
import json
import os
import types
from dataclasses import replace
from unittest import mock

import pytest
import torch

import ilql
import ppo
import reward_model
import sft
from parallel import heartbeat, pipeline, reshard, schedules
from parallel.checkpoint import load_decoder
from parallel.collectives import recv_async_, send_async
from parallel.data import load_tokenizer
from parallel.data_parallel import DataParallel
from parallel.generation import Sampling
from parallel.mesh import Layout, Mesh, RankError, init_mesh
from parallel.model import ScalarHead
from parallel.reshard import Shards
from parallel.reward import save_reward_model
from parallel.schedules import Action, make_schedule
from tasks.random_walks import make_tokenizer
from tests.fake_world import current_rank, execute, find_disorder, forgotten, play
from tests.scripts import TINY_GPT2, make_tiny_model
from tests.test_layouts import cover, show
from tests.test_schedules import receive_ahead

SMALL_GPT2 = {**TINY_GPT2, "n_layer": 5, "n_embd": 16, "n_head": 8, "n_positions": 16}  # tied, learned positions
SMALL_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 23,
    "num_hidden_layers": 5,
    "hidden_size": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,  # fewer than ranks of tp: some lie on several
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
NUM_LAYERS = (2, 3, 5, 8)
MODELS = {"gpt2": SMALL_GPT2, "llama": SMALL_LLAMA}
MANY = [
    (16, Layout(pp=2, tp=2, zero=3, rollout="folded")),
    (32, Layout(pp=4, tp=2, zero=1, schedule="interleaved", num_chunks=2, rollout="rotation")),
    (64, Layout(pp=4, tp=4, rollout="folded")),
]


def worlds():
    """(ranks, layout) of tests/test_layouts.py, those with stages in both ways to generate, and larger ones."""
    for ranks, layout in dict.fromkeys((ranks, layout) for _, _, _, ranks, layout, _ in cover()):
        for rollout in ("rotation", "folded") if layout.pp > 1 else ("auto",):
            yield ranks, replace(layout, rollout=rollout)
    yield from MANY


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with models, a reward model and data; the tokenizer is loaded once, and nothing flushed or drawn."""
    folder = tmp_path_factory.mktemp("order")
    for (name, hf_config), num_layers in itertools.product(MODELS.items(), NUM_LAYERS):
        hf_config = {**hf_config, "n_layer": num_layers, "num_hidden_layers": num_layers}
        make_tiny_model(folder / f"{name}-{num_layers}", hf_config=hf_config)
    mesh = init_mesh()
    decoder = load_decoder(str(folder / "gpt2-2"), mesh, torch.float32, lm_head=False)
    save_reward_model(decoder, ScalarHead(16, mesh, std=0.3), folder / "reward", mesh, make_tokenizer(), 0.0)
    prompts = ["b", "cd", "efg"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": x}) + "\n" for x in prompts))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": x + "abcdef"}) + "\n" for x in prompts))
    pairs = [{"prompt": x, "chosen": f"{x}ab", "rejected": "cdef"[: len(x)]} for x in prompts * 3]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    cached = functools.cache(load_tokenizer)
    with contextlib.ExitStack() as stack:
        for name in ("ppo.load_tokenizer", "sft.load_tokenizer", "tasks.rewards.load_tokenizer"):
            stack.enter_context(mock.patch(name, cached))
        stack.enter_context(mock.patch("parallel.run.draw_curves", lambda *_: None))
        stack.enter_context(mock.patch.object(os, "fsync", lambda _: None))
        stack.enter_context(mock.patch("parallel.data_parallel.HASH_BLOCK", 1 << 12))
        yield folder


def sizes(ranks, layout):
    """Sequences of an optimizer step, 2 or 4 micro-batches of one on each replica."""
    return ranks // (layout.tp * layout.pp) * (4 if layout.pp > 1 else 2)


def num_layers(layout):
    """The fewest that the stages do not divide."""
    return sum(layout.layers_per_stage) or next(n for n in NUM_LAYERS if n > layout.pp * layout.num_chunks - 1)


def ppo_args(files, ranks, layout, model="gpt2", **flags):
    """One iteration of two steps, evaluations before and after it, the best model, a checkpoint and the model saved."""
    flags = {"reward": "tests.letter_reward:share", **flags}
    return ppo.Args(
        model=str(files / f"{model}-{num_layers(layout)}"),
        data=(str(files / "prompts.jsonl"),),
        output_dir=str(files / "run"),
        overwrite=True,
        max_iterations=1,
        eval_samples=0,
        batch_size=sizes(ranks, layout),
        minibatch_size=sizes(ranks, layout),
        microbatch_size=1,
        kl_coef=0.1,
        sampling=Sampling(max_new_tokens=2),
        layout=layout,
        **flags,
    )


def find_in(ranks, main, args):
    with contextlib.redirect_stdout(io.StringIO()):
        return find_disorder(ranks, main, args)


@pytest.mark.parametrize(
    ("i", "ranks", "layout"),
    [(i, *world) for i, world in enumerate(worlds())],
    ids=lambda x: f"{show(x)}-{x.rollout}" if isinstance(x, Layout) else str(x),
)
def test_nccl_can_execute_ppo(i, ranks, layout, files):
    flags = {"value_model": "copy"} if i % 3 == 2 else {}
    if i % 4 == 1:
        flags["reward"] = str(files / "reward")
    model = ("gpt2", "llama")[(i + i // 2) % 2]
    assert find_in(ranks, ppo.main, ppo_args(files, ranks, layout, model, **flags)) is None


LOOPED = dict(schedule="interleaved", num_chunks=2)
OTHERS = [
    (4, Layout(tp=2, zero=3)),
    (4, Layout(pp=2, zero=2, **LOOPED)),
    (4, Layout(pp=2, tp=2, offload=("optimizer",))),
]


@pytest.mark.parametrize("script", [sft, reward_model, ilql], ids=lambda module: module.__name__)
@pytest.mark.parametrize(("ranks", "layout"), OTHERS, ids=lambda x: show(x) if isinstance(x, Layout) else str(x))
def test_nccl_can_execute_the_other_scripts(script, ranks, layout, files):
    """Steps, evaluations, checkpoints and the model; then the start of a resumed run."""
    size = sizes(ranks, layout)
    flags = dict(model=str(files / f"gpt2-{num_layers(layout)}"), output_dir=str(files / "run"), layout=layout)
    flags |= dict(batch_size=size, microbatch_size=1, max_steps=2, save_every=1, eval_every=2)
    if script is not ilql:
        flags["data"] = (str(files / ("texts.jsonl" if script is sft else "pairs.jsonl")),)
    if script is ilql:
        flags |= dict(eval_samples=4, advantage_scales=(2.0,), sampling=Sampling(max_new_tokens=2))
    assert find_in(ranks, script.main, script.Args(**flags, overwrite=True)) is None
    assert (
        find_in(ranks, script.main, script.Args(**flags | {"max_steps": 3}, resume=True, allow_change=("max-steps",)))
        is None
    )


# --- what is planted -------------------------------------------------------------------------------------------------


def ahead(num_actions):
    """Receives issued so many actions before they are needed, as is often done; see tests/test_schedules.py."""

    def program(name, p, m, v):
        if name == "forward":
            schedule = [[Action("F", chunk, i) for chunk in range(v) for i in range(m)]] * p
        else:
            schedule = [make_schedule(name, stage, p, m, v) for stage in range(p)]
        return receive_ahead(schedule, num_actions) if p > 1 else schedule

    return program


def send_then_receive(states, num_tokens, decoder):
    """Every stage sends first."""
    pp, channels = decoder.mesh.pp, decoder.mesh.channels
    following, before = (pp.rank + 1) % pp.size, (pp.rank - 1) % pp.size
    came, pending = None, []
    if num_tokens[pp.rank]:
        pending.append(send_async(states, channels["forward" if following else "wrap_forward"], following))
    if num_tokens[before]:
        came = torch.empty(num_tokens[before], decoder.config.hidden_size, dtype=decoder.dtype)
        pending.append(recv_async_(came, channels["forward" if pp.rank else "wrap_forward"], before))
    for message in pending:
        message.wait()
    return came


def other_first(start_sync=DataParallel.start_sync):
    def start(self, *args):
        start_sync(self, *args)
        places = [i for i, unit in enumerate(self._todo) if ".layers." in unit.name]
        if current_rank() == 1 and len(places) > 1:
            i, j = places[:2]
            self._todo[i], self._todo[j] = self._todo[j], self._todo[i]

    return start


def next_one_first(hold=Shards.hold):
    def reversed_hold(self, now, soon):
        if current_rank() == 1 and now is not None and soon is not None and soon < len(self.sections):
            for unit in self.sections[soon]:
                unit.start_gather()
        hold(self, now, soon)

    return reversed_hold


def heads_in_another_order(finish_gradients=DataParallel.finish_gradients):
    def finish(self):
        if current_rank() == 1:
            self._order.reverse()
        finish_gradients(self)
        if current_rank() == 1:
            self._order.reverse()

    return finish


def metrics_first(reduce_metrics=pipeline.reduce_metrics):
    def reduce(metrics, mesh):
        if current_rank() == 1:
            mesh.sum(1.0, "world")
        found = reduce_metrics(metrics, mesh)
        if current_rank() != 1:
            mesh.sum(1.0, "world")
        return found

    return reduce


def left_out(raise_together=Mesh.raise_together):
    def leave_out(self, error):
        if self.rank != 1 or heartbeat.where().partition(" ")[0] != "saving":
            raise_together(self, error)

    return leave_out


def over_the_other_axis(broadcast_object=Mesh.broadcast_object):
    other = {"pp": "tp", "tp": "pp"}

    def broadcast(self, value, axis="world", source=0):
        if heartbeat.where().startswith("scoring") and current_rank() == 3:
            axis = other.get(axis, axis)
        return broadcast_object(self, value, axis, source)

    return broadcast


def never_waited_for(x, axis, peer):
    return types.SimpleNamespace(wait=lambda: send_async(x, axis, peer) and None, is_done=lambda: False)


def sent_and_forgotten(x, axis, peer):
    send_async(x, axis, peer)
    return types.SimpleNamespace(wait=lambda: None, is_done=lambda: False)


def from_another_stage(name, decoder, stage_of=reshard.stage_of):
    found = stage_of(name, decoder)
    return 1 - found if current_rank() == 0 and name.startswith("layers.0.") else found


def meeting_first(wait_for_all=Mesh.wait_for_all):
    """One rank meets the others while they wait for its part in a collective."""

    def wait(self, *args):
        if current_rank() != 1:
            self.barrier()
        wait_for_all(self, *args)
        if current_rank() == 1:
            self.barrier()

    return wait


def backwards(add_transfers=schedules.add_transfers):
    """The last stage asks for the next micro-batch's states before it sends back its gradients."""

    def add(schedule):
        programs = add_transfers(schedule)
        steps = programs[-1]
        for i in range(len(steps) - 1):
            if getattr(steps[i], "kind", "") == "send" and getattr(steps[i + 1], "kind", "") == "recv":
                steps[i], steps[i + 1] = steps[i + 1], steps[i]
        return programs

    return add


FOUR, TWO = (4, Layout(pp=4, rollout="folded")), (2, Layout(pp=2, rollout="folded"))
ROUND = (2, Layout(pp=2, rollout="rotation", **LOOPED))
NCCL, BOTH = True, False  # where it hangs: gloo would not show the first kind
PLANTED = {  # of parallel/
    "receives one action ahead": (*FOUR, NCCL, "pipeline.make_program", ahead(1)),
    "receives just in time": (*FOUR, NCCL, "pipeline.make_program", ahead(0)),
    "a receive before a send on one stage": (*TWO, NCCL, "pipeline.add_transfers", backwards()),
    "every stage sends first": (*ROUND, NCCL, "generation.rotate", send_then_receive),
    "messages nobody waits for": (*TWO, NCCL, "pipeline.send_async", sent_and_forgotten),
    "messages sent when they are waited for": (*TWO, BOTH, "pipeline.send_async", never_waited_for),
    "gradients of another layer": (2, Layout(zero=1), BOTH, "data_parallel.DataParallel.start_sync", other_first()),
    "weights of another layer": (2, Layout(zero=3), BOTH, "reshard.Shards.hold", next_one_first()),
    "heads before the embedding": (*TWO, BOTH, "data_parallel.DataParallel.finish_gradients", heads_in_another_order()),
    "layers from another stage": (*TWO, BOTH, "reshard.stage_of", from_another_stage),
    "a sum before the metrics'": (4, Layout(tp=2), BOTH, "pipeline.reduce_metrics", metrics_first()),
    "a sum left out of a save": (2, Layout(), BOTH, "mesh.Mesh.raise_together", left_out()),
    "scores over another axis": (4, Layout(tp=2, pp=2), BOTH, "mesh.Mesh.broadcast_object", over_the_other_axis()),
    "a meeting before a collective": (2, Layout(), BOTH, "mesh.Mesh.wait_for_all", meeting_first()),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_disorder_is_caught(name, files):
    ranks, layout, on_nccl_alone, target, replacement = PLANTED[name]
    pipeline.make_program.cache_clear()
    with mock.patch(f"parallel.{target}", replacement), contextlib.redirect_stdout(io.StringIO()):
        try:
            world = play(ranks, ppo.main, ppo_args(files, ranks, layout))
        except RankError as error:
            assert not on_nccl_alone and "order of their collectives" in str(error)
            return
    pipeline.make_program.cache_clear()
    found = execute(world.traces) or next(iter(forgotten(world.traces)), None)
    assert found if on_nccl_alone else world.problem or found
    assert on_nccl_alone == (world.problem is None and all(world.ended)), (world.problem, found)
