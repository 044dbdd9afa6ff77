"""The plan against what is allocated and sent: on real ranks in integers, on tensors without contents within 1 %."""

import contextlib
import importlib
import json
import os
import re
import shlex
import sys
import time
import weakref
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import tyro

import ppo
from parallel.adapters import Lora, Tuning, make_reference, set_trained, shares_weights
from parallel.checkpoint import read_config
from parallel.collectives import traffic
from parallel.data_parallel import data_parallel
from parallel.families import config_from_hf
from parallel.footprint import Job, Role, Stage, memory, scalar_head
from parallel.generation import Sampling, generate
from parallel.mesh import Layout, init_mesh
from parallel.model import Decoder, ScalarHead
from parallel.optim import AdamW, clip_grad_norm
from parallel.pipeline import forward_backward, forward_folded, forward_only
from parallel.plan import GIB, describe_memory, explain_oom, measure_states, options, recommend, settle
from parallel.rehearsal import gpu_paths, make_default_loss, rehearse
from parallel.reshard import rollout_weights
from parallel.run import launch
from parallel.tensor import hidden_before, vocab_parallel_logprobs
from tests.ranks import run_ranks
from tests.scripts import ROOT
from tests.test_layouts import CASES

WHOLE = Tuning()  # all of the policy trains
ROWS, SEQ_LEN = 2, 31  # of a micro-batch; under sequence parallelism over 4 ranks two of its tokens are padding


def make_job(
    config,
    itemsize=4,
    seq_len=SEQ_LEN,
    num_microbatches=2,
    dp=1,
    rows=ROWS,
    rollout=0,
    new_tokens=0,
    tuning=WHOLE,
    pp=1,
):
    """Policy, reference and value head."""
    roles = {
        "policy": Role(config, itemsize, tuning=tuning),
        "ref_policy": Role(config, itemsize, trainable=False, tuning=tuning, shared=shares_weights(tuning, pp)),
        "value_head": scalar_head(config.hidden_size, itemsize),
    }
    return Job(roles, rows * dp * num_microbatches, rows, seq_len, seq_len - 1, rollout, new_tokens)


# --- integers, on real ranks -----------------------------------------------------------------------------------------


def make_model(case, layout, dtype, tuning=WHOLE):
    mesh = init_mesh(layout)
    config = replace(config_from_hf(CASES[case], "test")[0], num_layers=5 if layout.pp > 1 or tuning != WHOLE else 2)
    policy = set_trained(Decoder(config, mesh, dtype), tuning)
    roles = {
        "policy": policy,
        "ref_policy": make_reference(policy) or Decoder(config, mesh.folded, dtype).requires_grad_(False),
        "value_head": ScalarHead(config.hidden_size, mesh, std=0.1),
    }
    model = data_parallel(roles, mesh, layout)
    return config, model, AdamW(model, 1e-3)


def stage_of(job, mesh):
    return Stage(job, mesh.layout, mesh.world_size, mesh.pp.rank, mesh.dp.rank)


def all_states(stage):
    """Bytes of weights, gradients, optimizer state, and what is in the host's memory."""
    states = [unit.state() for units in stage.units.values() for unit in units]
    return tuple(map(sum, zip(*states, strict=True)))


def allocated(case, layout, dtype, tuning=WHOLE):
    """Bytes of states, as they are and by the plan, and what a run says of them."""
    config, model, optimizer = make_model(case, layout, dtype, tuning)
    job = make_job(config, dtype.itemsize, dp=model.mesh.dp.size, tuning=tuning, pp=layout.pp)
    planned = all_states(stage_of(job, model.mesh))
    return measure_states(model.units, optimizer), planned, describe_memory(model, optimizer)


@pytest.mark.parametrize("case", ["gpt2", "llama"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(("ranks", "tp"), [(2, 1), (4, 1), (4, 2)])
def test_states_are_what_is_allocated(case, zero, ranks, tp):
    for dtype in (torch.float32, torch.bfloat16):
        for real, planned, text in run_ranks(ranks, allocated, case, Layout(tp=tp, zero=zero), dtype):
            assert real == planned
            assert all(name in text for name in ("weights", "gradients", "optimizer", "frozen models"))


LOOPED = dict(pp=2, schedule="interleaved", num_chunks=2)
PIPED = [(2, Layout(pp=2)), (4, Layout(pp=4, schedule="gpipe")), (4, Layout(pp=2, tp=2, zero=1))]
PIPED += [(4, Layout(pp=2, tp=2, sequence_parallel=False, recompute="full")), (4, Layout(pp=2, zero=1))]
PIPED += [(4, Layout(pp=2, zero=3)), (4, Layout(pp=2, zero=3, schedule="gpipe")), (4, Layout(pp=2, zero=2))]
PIPED += [(2, Layout(**LOOPED)), (4, Layout(zero=3, **LOOPED)), (4, Layout(tp=2, recompute="selective", **LOOPED))]


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_states_of_stages_are_what_is_allocated(case):
    for i, (ranks, layout) in enumerate(PIPED):
        results = run_ranks(ranks, allocated, case, layout, (torch.float32, torch.bfloat16)[i % 2])
        for rank, (real, planned, _) in enumerate(results):
            assert real == planned, (layout, rank)
        assert len({real for real, *_ in results}) > 1, "stages should differ"


OFFLOADED = [(1, Layout()), (2, Layout()), (2, Layout(zero=1)), (2, Layout(zero=3)), (4, Layout(pp=2, zero=1))]


@pytest.mark.parametrize("offload", [("optimizer",), ("frozen",), ("optimizer", "frozen")], ids=str)
def test_what_is_offloaded_is_counted_apart(offload):
    for i, (ranks, layout) in enumerate(OFFLOADED):
        dtype, layout = (torch.float32, torch.bfloat16)[i % 2], replace(layout, offload=offload)
        results = (
            [allocated("llama", layout, dtype)] if ranks == 1 else run_ranks(ranks, allocated, "llama", layout, dtype)
        )
        for real, planned, text in results:
            assert real == planned, (layout, real, planned)
            assert real[3] > 0 and "host memory" in text
            assert "optimizer" in offload or real[2] > 0


def less_metrics(sent, stage):
    """Bytes sent in a step less those of numbers: of micro-batches, the loss, and both on their way between stages."""
    number = 2 * 8 * (stage.dp - 1) // stage.dp
    found = Counter(sent) - Counter({("dp", "all_reduce"): number * (1 + stage.is_last)})
    assert found.pop(("pp", "broadcast"), 0) < 1000
    return dict(found)


def make_microbatch():
    ids = torch.zeros(ROWS, SEQ_LEN, dtype=torch.long)
    mask = (torch.arange(SEQ_LEN) > 0).expand(ROWS, SEQ_LEN)
    positions = torch.arange(SEQ_LEN).expand(ROWS, SEQ_LEN)
    return {"input_ids": ids, "position_ids": positions, "first_key": torch.zeros_like(ids), "mask": mask}


def sent(case, layout, num_microbatches, tuning=WHOLE):
    """Bytes sent in a step, less the metrics, as they were counted and by the plan."""
    config, model, optimizer = make_model(case, layout, torch.float32, tuning)
    mesh = model.mesh
    before = Counter(traffic())
    model.zero_grad()
    forward_backward(model, [make_microbatch()] * num_microbatches, make_default_loss(model.roles, mesh))
    clip_grad_norm(model, 1.0, mesh)
    assert optimizer.step()
    sizes = dict(dp=mesh.dp.size, num_microbatches=num_microbatches, tuning=tuning, pp=layout.pp)
    stage = stage_of(make_job(config, **sizes), mesh)
    found = less_metrics(Counter(traffic()) - before, stage)
    return found, {key: n for key, n in stage.step_traffic().items() if n}


LAYOUTS = [(2, Layout(tp=1, zero=zero)) for zero in range(4)]
LAYOUTS += [(4, Layout(tp=2, zero=zero, sequence_parallel=sp)) for zero in range(4) for sp in (True, False)]
LAYOUTS += [(4, Layout(tp=4)), (4, Layout(tp=4, sequence_parallel=False, recompute="full"))]
LAYOUTS += [(4, Layout(tp=2, zero=3, recompute="full")), (4, Layout(tp=2, zero=1, recompute="selective"))]
LAYOUTS += [(2, Layout(zero=zero, reduce_dtype="bfloat16")) for zero in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_traffic_is_what_is_sent(case):
    half = list(CASES).index(case) % 2
    for i, (ranks, layout) in enumerate(LAYOUTS[half::2]):
        for rank, (found, planned) in enumerate(run_ranks(ranks, sent, case, layout, 1 + i % 2)):
            assert found == planned, (layout, rank)


@pytest.mark.parametrize("case", CASES)
def test_traffic_of_stages_is_what_is_sent(case):
    half = list(CASES).index(case) % 2
    for ranks, layout in PIPED[half::2]:
        results = run_ranks(ranks, sent, case, layout, 4)
        for rank, (found, planned) in enumerate(results):
            assert found == planned, (layout, rank)
        assert all(found["pp", "send"] for found, _ in results)


def sent_for_a_rollout(case, layout, tuning=WHOLE):
    """Bytes sent for samples that all have their full length, and to describe them, as counted and by the plan."""
    config, model, _ = make_model(case, layout, torch.float32, tuning)
    mesh, policy, new_tokens = model.mesh, model.roles["policy"], 6
    before = Counter(traffic())
    with rollout_weights(policy) as sampler:
        mine = range(8)[sampler.mesh.dp.rank :: sampler.mesh.dp.size]
        prompts = [[7] * (SEQ_LEN - new_tokens)] * len(mine)
        sampling = Sampling(max_new_tokens=new_tokens)
        generate(sampler, prompts, sampling, eos_ids=[], sample_ids=list(mine), seed=1, num_ids=config.vocab_size - 2)
    microbatches, ref_policy = [make_microbatch()] * 3, model.roles["ref_policy"]

    def read(decoder, hidden, microbatch):
        mask = microbatch["mask"]
        vocab_parallel_logprobs(hidden_before(hidden, mask), decoder, microbatch["input_ids"][mask])

    shared = {} if ref_policy.trunk is None else {"ref_policy": ref_policy}
    decoders = {"policy": policy} | shared
    forward_only(decoders, microbatches, lambda hidden, x: [read(decoders[role], hidden[role], x) for role in hidden])
    for microbatch, hidden in () if shared else forward_folded(ref_policy, microbatches, mesh):
        read(ref_policy, hidden, microbatch)
    sizes = dict(dp=mesh.dp.size, rollout=8, new_tokens=new_tokens, tuning=tuning, pp=layout.pp)
    job = replace(make_job(config, **sizes), described=3 * ROWS * mesh.dp.size)
    found = Counter(traffic()) - before
    return dict(found), {key: n for key, n in stage_of(job, mesh).rollout_traffic().items() if n}


ROLLOUTS = [(2, Layout(tp=2)), (4, Layout(tp=2, zero=3)), (2, Layout(pp=2, rollout="folded"))]
ROLLOUTS += [(2, Layout(pp=2, rollout="rotation")), (4, Layout(pp=2, tp=2, rollout="folded"))]
ROLLOUTS += [(4, Layout(pp=2, tp=2, rollout="rotation")), (4, Layout(pp=2, zero=3, rollout="folded"))]
ROLLOUTS += [(4, Layout(pp=2, zero=3, rollout="rotation")), (4, Layout(tp=2, rollout="rotation", **LOOPED))]


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_traffic_of_rollouts_is_what_is_sent(case):
    for ranks, layout in ROLLOUTS:
        for rank, (found, planned) in enumerate(run_ranks(ranks, sent_for_a_rollout, case, layout)):
            assert found == planned, (layout, rank)


TUNINGS = {
    "lora": Tuning(lora=Lora(rank=4)),
    "lora of some": Tuning(lora=Lora(rank=4, targets=("qkv", "ffn_out"))),
    "upper layers": Tuning(unfrozen_layers=2),
    "parts": Tuning(freeze=("embedding", "layers.0-1", "layers.*.attn_out", "*_norm.*")),
    "lora above": Tuning(unfrozen_layers=2, lora=Lora(rank=4)),
    "lora of a head": Tuning(lora=Lora(rank=4, targets=("attn_out", "lm_head"))),
    "lora of a head alone": Tuning(lora=Lora(rank=4, targets=("lm_head",))),
    "lora of the last stage": Tuning(freeze=("layers.0-3",), lora=Lora(rank=4)),
    "learned positions": Tuning(freeze=("embedding", "layers.0-2", "final_norm")),
}
TUNED = [(1, Layout()), (2, Layout(zero=3)), (4, Layout(tp=2, zero=1)), (4, Layout(tp=4, sequence_parallel=False))]
TUNED += [(4, Layout(tp=2, zero=3, recompute="full")), (2, Layout(pp=2, rollout="folded"))]
TUNED += [(4, Layout(pp=2, zero=3, rollout="folded"))]
TUNED += [
    (4, Layout(pp=2, tp=2, recompute="selective", rollout="rotation")),
    (2, Layout(zero=2, offload=("optimizer", "frozen"))),
]


def tuned(case, layout, tuning):
    """States, bytes sent in a step and in a rollout: as they are, and by the plan."""
    states = allocated(case, layout, torch.float32, tuning)[:2]
    return states, sent(case, layout, 4, tuning), sent_for_a_rollout(case, layout, tuning)


@pytest.mark.parametrize("name", TUNINGS)
def test_plan_knows_what_trains(name):
    """Integers on real ranks: adapters, frozen parts, and references that share."""
    for i, (ranks, layout) in enumerate(TUNED):
        cases = ("gpt_neox", "llama") if "head" in name else ("gpt2", "llama", "qwen3")
        cases = ("gpt2",) if name == "learned positions" else cases
        tuning, case = TUNINGS[name], cases[i % len(cases)]
        if layout.pp > 1 and tuning.unfrozen_layers:
            continue
        results = [tuned(case, layout, tuning)] if ranks == 1 else run_ranks(ranks, tuned, case, layout, tuning)
        for rank, found in enumerate(results):
            for what, (real, planned) in zip(("states", "step", "rollout"), found, strict=True):
                assert real == planned, (case, layout, rank, what)


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        (dict(unfrozen_layers=16), "--unfrozen-layers 16 of 16 layers"),
        (dict(freeze=("layer.0",)), "--freeze layer.0 is no part of this model"),
        (dict(lora=Lora(rank=4096)), "--lora.rank 4096 is more than the model's width 2048"),
    ],
)
def test_plan_refuses_what_a_run_refuses(tuning, message):
    with pytest.raises(ValueError, match=message):
        ppo.Args(model=f"{ROOT}/tests/configs/pythia-1b", **tuning).job()


GPTJ = dict(model_type="gptj", vocab_size=131, n_layer=2, n_embd=48, n_head=8, n_positions=64, rotary_dim=4)


@dataclass(eq=False)
class Kept:
    """A tensor that a backward will read, for as long as it may."""

    x: torch.Tensor


def saved(case, layouts, tuning=WHOLE):
    """Bytes that a forward pass keeps: of each layer and in all, as they are and by the plan, for each layout."""
    base = config_from_hf({**CASES, "gptj": GPTJ}[case], "test")[0]
    results = []
    for layout in layouts:
        totals = []
        for num_layers in (2, 3):
            config, mesh = replace(base, num_layers=num_layers, max_seq_len=256, head_dim=32), init_mesh(layout)
            policy, kept = set_trained(Decoder(config, mesh), tuning), weakref.WeakSet()
            policy.recompute = layout.recompute

            def pack(x, kept=kept):
                kept.add(holder := Kept(x))
                return holder

            ids = torch.zeros(2, 151, dtype=torch.long)
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.x))
                stack.enter_context(gpu_paths())
                hidden = policy(ids, torch.zeros_like(ids), torch.zeros_like(ids))
            storages = {holder.x.untyped_storage()._cdata: holder.x.untyped_storage() for holder in kept}
            weights = {parameter.untyped_storage()._cdata for parameter in policy.parameters()}
            totals.append(sum(storage.nbytes() for key, storage in storages.items() if key not in weights))
            del hidden
        stage = Stage(make_job(config, seq_len=151, tuning=tuning), layout, mesh.world_size)
        role = stage.job.policy
        planned = stage.saved_by_chunk(0) + stage.last_state(role)
        if layout.recompute == "full":  # hooks do not see rotary tables and bounds, which all recomputations share
            planned -= role.itemsize * stage.tokens * 2 * -(-config.rotary_dim // 2) + 8 * stage.places
        results.append((totals[1] - totals[0], stage.saved_by_layer(role, layout.recompute), totals[1], planned))
    return results


@pytest.mark.parametrize("case", [*CASES, "gptj"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_saved_activations_are_their_formula(case, tp):
    pytest.importorskip("triton")
    kinds = [(sp, recompute) for sp in (True, False)[: 1 + (tp > 1)] for recompute in ("none", "selective", "full")]
    layouts = [Layout(tp=tp, sequence_parallel=sp, recompute=recompute) for sp, recompute in kinds]
    for layout, (layer, planned_layer, total, planned) in zip(
        layouts, run_ranks(tp, saved, case, layouts)[0], strict=True
    ):
        assert planned_layer == pytest.approx(layer, rel=5e-3), layout
        assert planned == pytest.approx(total, rel=5e-3), layout


@pytest.mark.parametrize(
    ("case", "tuning"),
    [
        ("gptj", Tuning(lora=Lora(rank=4))),
        ("qwen3", Tuning(lora=Lora(rank=4))),
        ("llama", Tuning(unfrozen_layers=1)),
        ("gpt2", Tuning(freeze=("embedding", "position_embedding"), lora=Lora(rank=4, targets=("ffn_out",)))),
        ("gpt_neox", Tuning(freeze=("embedding", "layers.*.attn_norm", "layers.*.ffn_in", "layers.*.attn_out"))),
    ],
)
def test_saved_activations_of_what_trains_are_their_formula(case, tuning):
    pytest.importorskip("triton")
    layouts = [Layout(recompute=recompute) for recompute in ("none", "selective", "full")]
    for layout, (_, _, total, planned) in zip(layouts, saved(case, layouts, tuning), strict=True):
        assert planned == pytest.approx(total, rel=5e-3), layout


# --- rehearsals ------------------------------------------------------------------------------------------------------

PYTHIA = replace(read_config(f"{ROOT}/tests/configs/gpt-neox-20b"), num_layers=8, hidden_size=2048, num_heads=16)
PYTHIA = replace(PYTHIA, num_kv_heads=16, head_dim=128, ffn_size=8192, rotary_dim=32)
GPT2 = replace(config_from_hf(CASES["gpt2"], "test")[0], num_layers=8, hidden_size=1024, num_heads=16, num_kv_heads=16)
GPT2 = replace(GPT2, head_dim=64, ffn_size=4096, vocab_size=50257, max_seq_len=1024)
QWEN = replace(config_from_hf(CASES["qwen3"], "test")[0], num_layers=8, hidden_size=2048, num_heads=16, num_kv_heads=8)
QWEN = replace(QWEN, head_dim=128, ffn_size=6144, vocab_size=151936)
LLAMA = replace(read_config(f"{ROOT}/tests/configs/llama-2-70b"), num_layers=6)
CELLS = {
    "gpt2": (GPT2, 1, Layout(), 2),
    "gpt2, shared": (GPT2, 4, Layout(tp=2, zero=2, recompute="selective"), 2),
    "neox": (PYTHIA, 2, Layout(tp=2), 2),
    "neox, gathered": (PYTHIA, 8, Layout(zero=3, recompute="full"), 4),
    "neox, float32": (PYTHIA, 8, Layout(tp=4, zero=3), 4),
    "qwen3": (QWEN, 4, Layout(tp=2, zero=1), 2),
    "qwen3, gathered": (QWEN, 4, Layout(zero=3, recompute="selective"), 2),
    "llama": (LLAMA, 16, Layout(tp=8, zero=1, sequence_parallel=False), 2),
    "llama, more ranks than key/value heads": (LLAMA, 32, Layout(tp=16, zero=2), 2),
}


def check(config, ranks, layout, itemsize=2, rank=0, tuning=WHOLE, **sizes):
    """The plan of a rank against its rehearsal: states and traffic in integers, peaks within 1 %."""
    pytest.importorskip("triton")
    dp = ranks // layout.tp // layout.pp
    job = make_job(config, itemsize, dp=dp, tuning=tuning, pp=layout.pp, **sizes)
    found = rehearse(job, layout, ranks, rank)
    planned = Stage(job, layout, ranks, stage=rank // (layout.tp * dp), replica=rank // layout.tp % dp)
    states = all_states(planned)
    assert states == (found.weights, found.gradients, found.optimizer, found.host)
    phases, on_device = planned.memory().phases, sum(states[:3])
    assert on_device + sum(phases["update"].values()) == pytest.approx(found.update, rel=0.01)
    if job.rollout:
        assert on_device + sum(phases["rollout"].values()) == pytest.approx(found.rollout, rel=0.01)
    assert less_metrics(found.step_traffic, planned) == {key: n for key, n in planned.step_traffic().items() if n}


@pytest.mark.parametrize("cell", CELLS)
def test_plan_equals_a_rehearsal(cell):
    config, ranks, layout, rows = CELLS[cell]
    rollout = dict(rollout=16 * ranks, new_tokens=256) if cell in ("neox", "gpt2", "qwen3, gathered") else {}
    check(config, ranks, layout, 4 if "float32" in cell else 2, rank=ranks - 1, seq_len=1024, rows=rows, **rollout)


def test_plan_knows_the_logits_of_a_rollout():
    """Which are most of it where the vocabulary is large and responses are short."""
    check(QWEN, 2, Layout(tp=2), seq_len=64, rows=2, rollout=2048, new_tokens=48)


TUNED_CELLS = {
    "neox, adapters": (PYTHIA, 2, Layout(tp=2), 2, "lora"),
    "neox, some adapters": (PYTHIA, 2, Layout(tp=2), 2, "lora of some"),
    "neox, an adapter of the head": (PYTHIA, 2, Layout(tp=2), 2, "lora of a head"),
    "neox, an adapter of the head, gathered": (PYTHIA, 8, Layout(zero=3), 4, "lora of a head"),
    "neox, adapters, gathered": (PYTHIA, 8, Layout(zero=3, recompute="full"), 4, "lora"),
    "qwen3, upper layers": (QWEN, 4, Layout(tp=2, zero=1), 2, "upper layers"),
    "neox, parts": (PYTHIA, 2, Layout(), 2, "parts"),
}


@pytest.mark.parametrize("cell", TUNED_CELLS)
def test_plan_of_what_trains_equals_a_rehearsal(cell):
    config, ranks, layout, rows, name = TUNED_CELLS[cell]
    sizes = dict(seq_len=768, rows=rows, rollout=16 * ranks, new_tokens=256)
    check(config, ranks, layout, rank=ranks - 1, tuning=TUNINGS[name], **sizes)


STAGES = {
    "neox": (PYTHIA, 4, Layout(pp=4), 4),
    "neox, gathered": (PYTHIA, 8, Layout(pp=4, zero=3, recompute="full"), 4),
    "neox, folded": (PYTHIA, 4, Layout(pp=2, zero=3, schedule="gpipe", rollout="folded"), 4),
    "neox, rotating": (PYTHIA, 4, Layout(pp=2, tp=2, zero=1, recompute="full", rollout="rotation"), 4),
    "qwen3": (QWEN, 4, Layout(pp=2, tp=2, zero=1), 2),
    "qwen3, rotating": (QWEN, 4, Layout(zero=3, recompute="selective", rollout="rotation", **LOOPED), 2),
    "gpt2, folded": (GPT2, 2, Layout(rollout="folded", **LOOPED), 2),
    "gpt2": (GPT2, 4, Layout(pp=2, schedule="gpipe", zero=2), 4),
    "llama, offloaded": (LLAMA, 8, Layout(pp=2, tp=4, offload=("optimizer", "frozen")), 1),
}


@pytest.mark.parametrize("cell", STAGES)
def test_plan_of_every_stage_equals_a_rehearsal(cell):
    config, ranks, layout, num_microbatches = STAGES[cell]
    config = replace(config, num_layers=5 if layout.pp == 2 else 8)
    rollout = dict(rollout=16 * ranks, new_tokens=256) if "rotating" in cell or "folded" in cell else {}
    for stage in range(layout.pp):
        rank = (stage + 1) * ranks // layout.pp - 1
        check(config, ranks, layout, rank=rank, seq_len=768, num_microbatches=num_microbatches, **rollout)


BIG = {
    "gpt-neox-20b on 96": ("gpt-neox-20b", 96, Layout(tp=8, zero=1, recompute="selective")),
    "llama-3-70b on 512, stages": ("llama-3-70b", 512, Layout(tp=8, pp=8, zero=1, recompute="full")),
    "gpt-neox-20b on 96, stages": ("gpt-neox-20b", 96, Layout(tp=4, pp=4, zero=1)),
    "llama-3-70b on 512": ("llama-3-70b", 512, Layout(tp=8, zero=1)),
    "llama-3-70b on 512, recomputed": ("llama-3-70b", 512, Layout(tp=8, zero=2, recompute="full")),
    "gpt-neox-20b on 8": ("gpt-neox-20b", 8, Layout(tp=8)),
    "gpt-neox-20b on 8, stages": ("gpt-neox-20b", 8, Layout(tp=2, pp=4, rollout="rotation")),
    "llama-2-70b on 512": ("llama-2-70b", 512, Layout(tp=8, zero=3, recompute="full")),
    "llama-2-70b on 512, stages": (
        "llama-2-70b",
        512,
        Layout(tp=8, zero=1, pp=4, schedule="interleaved", num_chunks=2),
    ),
}
ALL = pytest.mark.skipif(not os.environ.get("ALL_LARGE_MODELS"), reason="two minutes more: set ALL_LARGE_MODELS=1")


@pytest.mark.parametrize("name", [*list(BIG)[:2], *(pytest.param(name, marks=ALL) for name in list(BIG)[2:])])
def test_plan_equals_a_rehearsal_of_a_large_model(name):
    folder, ranks, layout = BIG[name]
    config = read_config(f"{ROOT}/tests/configs/{folder}")
    sizes = dict(
        seq_len=config.max_seq_len, rows=1, num_microbatches=layout.pp if layout.pp > 1 else 1 + layout.zero // 2
    )
    if layout.rollout != "auto":
        sizes |= dict(rollout=64, new_tokens=config.max_seq_len // 2)
    started = time.process_time()
    check(config, ranks, layout, rank=ranks - 1, **sizes)
    assert time.process_time() - started < 20
    if layout.pp > 1 and os.environ.get("ALL_LARGE_MODELS"):
        check(config, ranks, layout, rank=0, **sizes)


# --- choosing, and what a user sees ----------------------------------------------------------------------------------

NEOX = read_config(f"{ROOT}/tests/configs/gpt-neox-20b")


def test_recommended_layouts_fit():
    job = make_job(NEOX, 2, seq_len=2048, num_microbatches=8, dp=12, rows=1)
    found = recommend(job, Layout(), 96, 80)
    every = {str(option.layout): option for option in options(job, Layout(), 96, 80)}
    assert 0 < len(found) < len(every)
    for option in found:
        assert memory(job, option.layout, 96).total == option.memory.total <= 80 * GIB
    assert all(
        option.memory.total > 80 * GIB
        for name, option in every.items()
        if name not in map(str, (x.layout for x in found))
    )
    seconds = [sum(option.seconds.values()) for option in found]
    assert seconds == sorted(seconds)


def test_what_divides_more_holds_less():
    job = make_job(NEOX, 2, seq_len=2048, num_microbatches=8, dp=12, rows=1)

    def total(**changes):
        return memory(job, Layout(**{"tp": 8, **changes}), 96).total

    assert total() > total(zero=1) > total(zero=2) > total(zero=3)
    assert total() > total(recompute="selective") > total(recompute="full")
    assert total(sequence_parallel=False) > total() and total(tp=4) > total()


SCRIPTS = ("sft", "ppo", "reward_model", "ilql")


def plan_of(script, *flags):
    """Calls a script's main as the command line does."""
    module = importlib.import_module(script)
    module.main(tyro.cli(module.Args, args=[str(flag) for flag in flags]))


def test_the_readme_shows_what_is_saved():
    """Its table of savers, row by row."""
    sizes = "--dtype bfloat16 --batch-size 512 --minibatch-size 512 --microbatch-size 4 --prompt-tokens 512"
    sizes += f" --sampling.max-new-tokens 53 --model {ROOT}/tests/configs/pythia-6.9b"
    text = (ROOT / "README.md").read_text().partition("## Less memory")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (everything trains|`(--[^`]+)`.*?) \| ([\d.| ]+) \|$", text, re.MULTILINE)
    assert len(rows) >= 6
    for name, flags, numbers in rows:
        args = tyro.cli(ppo.Args, args=[*sizes.split(), *flags.split()])
        found = memory(args.job(), args.layout, 8)
        held = [found.held.get(x, 0) for x in ("weights", "gradients", "optimizer", "ref policy")]
        held.append(found.phases["update"]["activations"])
        for shown, nbytes in zip(numbers.split(" | "), held, strict=True):
            assert abs(float(shown) - nbytes / GIB) <= (0.051 if float(shown) >= 0.1 else 0.006), (name, shown)
        if "host" in name:
            assert float(re.search(r"\(([\d.]+) in", name)[1]) == pytest.approx(found.host / GIB, abs=0.06)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_print_their_plan(script, tmp_path, capsys, monkeypatch):
    """From a config alone, in an empty folder in which nothing is written."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CASES["qwen3"]))
    flags = ["--model", folder, "--world-size", 4, "--layout.tp", 2, "--layout.zero", 1, "--plan", 24]
    plan_of(script, *flags, *(("--reward", folder, "--value-model", "copy") if script == "ppo" else ()))
    out = capsys.readouterr().out
    words = ["weights", "gradients", "optimizer", "+ in the update", "tp all_gather", "recommended: --layout.tp"]
    words += {"sft": [], "ppo": ["ref policy", "KV cache", "value model", "reward model", "+ in the score"]}.get(
        script, ["head"]
    )
    assert all(word in out for word in words), out
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_heads_of_ilql_are_counted():
    """Roles as ilql.py makes them: states in integers, a step's peak within 1 %."""
    ilql = importlib.import_module("ilql")
    args = ilql.Args(
        model=f"{ROOT}/tests/configs/gpt-neox-20b", dtype="bfloat16", batch_size=2, microbatch_size=1, max_len=512
    )
    job = replace(args.job(), rollout=0)
    config = replace(PYTHIA, num_layers=4)
    n = config.hidden_size
    swap = {6144: n, 12288: 2 * n}
    roles = {
        name: replace(
            role,
            config=config if role.config else None,
            shapes=tuple(tuple(swap.get(x, x) for x in shape) for shape in role.shapes),
        )
        for name, role in job.roles.items()
    }
    job = replace(job, roles=roles)

    def make_modules(mesh):
        def heads(vocab_size, dtype, count):
            made = [ilql.MLPHead(config.hidden_size, vocab_size, dtype, mesh, seed) for seed in range(count)]
            return torch.nn.ModuleList(made) if count > 1 else made[0]

        return {  # as ilql.make_heads makes them, which converts modules: tensors without contents cannot do that
            "policy": Decoder(config, mesh, torch.bfloat16, seed=None),
            "q_heads": heads(config.vocab_size, torch.bfloat16, 2),
            "value_head": heads(None, torch.float32, 1),
            "target_q_heads": heads(config.vocab_size, torch.float32, 2).requires_grad_(False),
        }

    def make_loss(roles, mesh):
        def loss_fn(hidden, microbatch):
            fields = {name: torch.zeros(microbatch["input_ids"].shape) for name in ("rewards",)}
            fields |= {name: microbatch["mask"] for name in ("action_mask", "terminal")}
            targets = roles["target_q_heads"]
            return ilql.ilql_loss(hidden, {**microbatch, **fields}, roles, targets, args, 100)

        return loss_fn

    pytest.importorskip("triton")
    layout = Layout(tp=2, zero=1)
    found = rehearse(job, layout, 4, make_loss=make_loss, make_modules=make_modules)
    held = memory(job, layout, 4)
    states = sum(nbytes for name, nbytes in held.held.items() if name not in ("CUDA context", "target q heads"))
    assert states == found.weights + found.gradients + found.optimizer
    total = sum(held.phases["update"].values()) + states + held.held["target q heads"]
    assert total == pytest.approx(found.update, rel=0.01)


@pytest.mark.parametrize("script", SCRIPTS)
def test_impossible_plans_are_refused(script, tmp_path):
    model = ROOT / "tests/configs/gpt-neox-20b"
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        plan_of(script, "--model", tmp_path, "--plan", 80, "--world-size", 8)
    with pytest.raises(ValueError, match="--layout.tp 5 does not divide the 8 processes"):
        plan_of(script, "--model", model, "--plan", 80, "--world-size", 8, "--layout.tp", 5)
    with pytest.raises(ValueError, match="--layout.tp 7 does not divide 64 heads"):
        plan_of(script, "--model", model, "--plan", 80, "--world-size", 7, "--layout.tp", 7, "--batch-size", 128)
    with pytest.raises(ValueError, match="no multiple of 9 replicas"):
        plan_of(script, "--model", model, "--plan", 80, "--world-size", 9, "--batch-size", 128)
    with pytest.raises(ValueError, match="--plan -1 should be a number of at least 0"):
        importlib.import_module(script).Args(plan=-1)


def test_a_plan_that_fits_nowhere_says_so(capsys):
    model = ROOT / "tests/configs/llama-2-70b"
    plan_of("sft", "--model", model, "--plan", 24, "--world-size", 4, "--dtype", "bfloat16")
    assert "no layout of 4 ranks fits 24 GiB: take more ranks" in capsys.readouterr().out


LARGE = ["--model", str(ROOT / "tests/configs/gpt-neox-20b"), "--dtype", "bfloat16", "--microbatch-size", "8"]


def test_out_of_memory_is_explained(monkeypatch, capsys):
    """By component, with the layouts that need less; under the error, where a script's main runs out of memory."""
    sft = importlib.import_module("sft")

    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(sft, "init_mesh", run_out)
    monkeypatch.setattr("sys.argv", ["sft.py", *LARGE, "--batch-size", "64", "--layout.zero", "1"])
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit) as stop:
        launch(sft.main, sft.Args)
    text = capsys.readouterr().err
    assert stop.value.code == 1 and "out of memory in" in text and "Tried to allocate 2 GiB" in text
    assert all(f"  {name} " in text for name in ("weights", "gradients", "optimizer", "+ in the update")), text
    assert "smaller --microbatch-size" in text and "layouts that need less" in text
    assert "--layout.tp 8 --layout.zero 0 --layout.recompute full" in text


def test_layouts_that_fit_this_gpu_are_named(monkeypatch):
    args = tyro.cli(importlib.import_module("sft").Args, args=[*LARGE, "--batch-size", "64"])
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for gib, expected in (
        (80, "layouts that fit the 80.0 GiB"),
        (40, "--layout.offload optimizer"),
        (8, "no layouts that"),
    ):
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda gib=gib: SimpleNamespace(total_memory=gib * GIB))
        text = explain_oom(args)
        assert expected in text, text
        for option in recommend(args.job(), Layout(), 8, gib):
            assert memory(args.job(), option.layout, 8).total <= gib * GIB


def test_offloading_is_recommended_where_nothing_else_fits():
    job = make_job(NEOX, 2, seq_len=2048, num_microbatches=8, dp=8, rows=1)
    gib = min(option.memory.total for option in options(job, Layout(), 8, 1e9)) / GIB
    assert all(not option.layout.offload for option in recommend(job, Layout(), 8, gib + 1))
    found = recommend(job, Layout(), 8, gib - 1)
    assert found and all(option.layout.offload == ("optimizer", "frozen") and option.memory.host for option in found)


def test_rollouts_fold_where_there_is_room():
    job = make_job(NEOX, 2, seq_len=2048, num_microbatches=4, dp=1, rows=1, rollout=64, new_tokens=1024)
    layout = Layout(tp=2, pp=4)
    assert settle(job, layout, 8, 1000).rollout == "folded"
    assert settle(job, layout, 8, 80).rollout == "rotation"
    assert settle(job, Layout(tp=8), 8, 80).rollout == "auto"
    least = Stage(job, replace(layout, rollout="rotation"), 8).rollout()["KV cache"]
    assert least < Stage(job, Layout(tp=2), 2).rollout()["KV cache"], "own layers alone"


def test_the_readme_shows_this_plan(capsys):
    readme = (ROOT / "README.md").read_text()
    section = readme[readme.index("## Memory before the run") : readme.index("## Flags that matter")]
    blocks = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    command, shown = blocks
    script, *flags = shlex.split(command.replace("\\\n", " "))[1:]
    with contextlib.chdir(ROOT):
        plan_of(script.removesuffix(".py"), *flags)
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in shown.splitlines() if line != "..."]
    assert len(lines) > 5 and [line for line in printed if line in lines] == lines
