"""The plan against what is allocated and sent: on real ranks in integers, on tensors without contents within 1 %."""

import contextlib
import time
from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest
import torch

from kernels.attention import Visible
from parallel.collectives import traffic
from parallel.data_parallel import data_parallel
from parallel.families import config_from_hf
from parallel.footprint import Job, Role, Stage, scalar_head
from parallel.mesh import Layout, init_mesh
from parallel.model import Decoder, ScalarHead
from parallel.optim import AdamW, clip_grad_norm
from parallel.pipeline import forward_backward
from parallel.plan import (
    describe_memory,
    measure_states,
    read_config,
)
from parallel.rehearsal import make_default_loss, rehearse
from tests.ranks import run_ranks
from tests.test_layouts import CASES

ROWS, SEQ_LEN = 2, 31  # of a micro-batch; under sequence parallelism over 4 ranks two of its tokens are padding


def make_job(config, itemsize=4, seq_len=SEQ_LEN, num_microbatches=2, dp=1, rows=ROWS, rollout=0, new_tokens=0):
    """Policy, reference and value head."""
    roles = {
        "policy": Role(config, itemsize),
        "ref_policy": Role(config, itemsize, trainable=False),
        "value_head": scalar_head(config.hidden_size, itemsize),
    }
    return Job(roles, rows * dp * num_microbatches, rows, seq_len, seq_len - 1, rollout, new_tokens)


# --- integers, on real ranks -----------------------------------------------------------------------------------------


def make_model(case, layout, dtype):
    mesh = init_mesh(layout)
    config = config_from_hf(CASES[case], "test")[0]
    roles = {
        "policy": Decoder(config, mesh, dtype),
        "ref_policy": Decoder(config, mesh, dtype).requires_grad_(False),
        "value_head": ScalarHead(config.hidden_size, mesh, std=0.1),
    }
    model = data_parallel(roles, mesh, layout)
    return config, model, AdamW(model, 1e-3)


def allocated(case, layout, dtype):
    """Bytes of weights, gradients and optimizer state, as they are and by the plan."""
    config, model, optimizer = make_model(case, layout, dtype)
    stage = Stage(make_job(config, dtype.itemsize, dp=model.mesh.dp.size), layout, model.mesh.world_size)
    states = [unit.state() for units in stage.units.values() for unit in units]
    text = describe_memory(model, optimizer)[1]
    return measure_states(model.units, optimizer), tuple(map(sum, zip(*states, strict=True))), text


@pytest.mark.parametrize("case", ["gpt2", "llama"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(("ranks", "tp"), [(2, 1), (4, 1), (4, 2)])
def test_states_are_what_is_allocated(case, zero, ranks, tp):
    for dtype in (torch.float32, torch.bfloat16):
        for real, planned, text in run_ranks(ranks, allocated, case, Layout(tp=tp, zero=zero), dtype):
            assert real == planned
            assert all(name in text for name in ("weights", "gradients", "optimizer", "frozen models"))


def sent(case, layout, num_microbatches):
    """Bytes sent in a step, less the metrics, as they were counted and by the plan."""
    config, model, optimizer = make_model(case, layout, torch.float32)
    mesh = model.mesh
    ids = torch.zeros(ROWS, SEQ_LEN, dtype=torch.long)
    mask = (torch.arange(SEQ_LEN) > 0).expand(ROWS, SEQ_LEN)
    positions = torch.arange(SEQ_LEN).expand(ROWS, SEQ_LEN)
    microbatch = {"input_ids": ids, "position_ids": positions, "first_key": torch.zeros_like(ids), "mask": mask}
    before = Counter(traffic())
    model.zero_grad()
    forward_backward(model, [microbatch] * num_microbatches, make_default_loss(model.roles, mesh))
    clip_grad_norm(model, 1.0, mesh)
    assert optimizer.step()
    found = Counter(traffic()) - before - Counter({("dp", "all_reduce"): 2 * 8 * (mesh.dp.size - 1) // mesh.dp.size})
    job = make_job(config, dp=mesh.dp.size, num_microbatches=num_microbatches)
    stage = Stage(job, layout, mesh.world_size, replica=mesh.dp.rank)
    return dict(found), {key: n for key, n in stage.traffic()["step"].items() if n}


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


def saved(case, layouts):
    """Bytes that a forward pass keeps: of each layer and in all, as they are and by the plan, for each layout."""
    base = config_from_hf(CASES[case], "test")[0]
    results = []
    for layout in layouts:
        totals = []
        for num_layers in (2, 3):
            config, mesh = replace(base, num_layers=num_layers, max_seq_len=256), init_mesh(layout)
            policy, kept = Decoder(config, mesh), {}
            policy.recompute = layout.recompute
            for parameter in policy.parameters():
                kept[parameter.untyped_storage()._cdata] = 0

            def pack(x, kept=kept):
                kept.setdefault(x.untyped_storage()._cdata, x.untyped_storage().nbytes())
                return x

            ids = torch.zeros(2, 151, dtype=torch.long)
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x))
                stack.enter_context(mock.patch("kernels.attention.EXPLICIT_MAX_LEN", 0))
                stack.enter_context(mock.patch.object(Visible, "is_plain_causal", False))
                hidden = policy(ids, torch.zeros_like(ids), torch.zeros_like(ids))
            totals.append(sum(kept.values()))
            del hidden
        stage = Stage(make_job(config, seq_len=151), layout, mesh.world_size)
        role = stage.job.policy
        planned = stage.saved_by_stage() + stage.last_state(role)
        if layout.recompute == "full":  # hooks do not see the rotary tables, which every layer's recomputation shares
            planned -= role.itemsize * stage.tokens * 2 * -(-config.rotary_dim // 2)
        results.append((totals[1] - totals[0], stage.saved_by_layer(role, layout.recompute), totals[1], planned))
    return results


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_saved_activations_are_their_formula(case, tp):
    kinds = [(sp, recompute) for sp in (True, False)[: 1 + (tp > 1)] for recompute in ("none", "selective", "full")]
    layouts = [Layout(tp=tp, sequence_parallel=sp, recompute=recompute) for sp, recompute in kinds]
    for layout, (layer, planned_layer, total, planned) in zip(
        layouts, run_ranks(tp, saved, case, layouts)[0], strict=True
    ):
        assert planned_layer == pytest.approx(layer, rel=5e-3), layout
        assert planned == pytest.approx(total, rel=5e-3), layout


# --- rehearsals ------------------------------------------------------------------------------------------------------

PYTHIA = replace(read_config("tests/configs/gpt-neox-20b"), num_layers=10, hidden_size=2048, num_heads=16)
PYTHIA = replace(PYTHIA, num_kv_heads=16, head_dim=128, ffn_size=8192, rotary_dim=32)
GPT2 = replace(config_from_hf(CASES["gpt2"], "test")[0], num_layers=10, hidden_size=1024, num_heads=16, num_kv_heads=16)
GPT2 = replace(GPT2, head_dim=64, ffn_size=4096, vocab_size=50257, max_seq_len=1024)
QWEN = replace(config_from_hf(CASES["qwen3"], "test")[0], num_layers=10, hidden_size=2048, num_heads=16, num_kv_heads=8)
QWEN = replace(QWEN, head_dim=128, ffn_size=6144, vocab_size=151936)
LLAMA = replace(read_config("tests/configs/llama-2-70b"), num_layers=6)
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


def check(config, ranks, layout, itemsize=2, rank=0, **sizes):
    job = make_job(config, itemsize, dp=ranks // layout.tp, **sizes)
    found = rehearse(job, layout, ranks, rank)
    planned = Stage(job, layout, ranks, replica=rank // layout.tp)
    states = [sum(x) for x in zip(*(unit.state() for units in planned.units.values() for unit in units), strict=True)]
    assert tuple(states) == (found.weights, found.gradients, found.optimizer)
    phases = planned.memory().phases
    assert sum(states) + sum(phases["update"].values()) == pytest.approx(found.update, rel=0.01)
    if job.rollout:
        assert sum(states) + sum(phases["rollout"].values()) == pytest.approx(found.rollout, rel=0.01)
    metrics = 2 * 8 * (planned.dp - 1) // planned.dp
    sent = Counter(found.step_traffic) - Counter({("dp", "all_reduce"): metrics})
    assert dict(sent) == {key: n for key, n in planned.traffic()["step"].items() if n}


@pytest.mark.parametrize("cell", CELLS)
def test_plan_equals_a_rehearsal(cell):
    config, ranks, layout, rows = CELLS[cell]
    rollout = dict(rollout=16 * ranks, new_tokens=256) if cell in ("neox", "gpt2", "qwen3, gathered") else {}
    check(config, ranks, layout, 4 if "float32" in cell else 2, rank=ranks - 1, seq_len=1024, rows=rows, **rollout)


BIG = {
    "gpt-neox-20b on 8": ("gpt-neox-20b", 8, Layout(tp=8)),
    "gpt-neox-20b on 96": ("gpt-neox-20b", 96, Layout(tp=8, zero=1, recompute="selective")),
    "llama-2-70b on 512": ("llama-2-70b", 512, Layout(tp=8, zero=3, recompute="full")),
    "llama-3-70b on 512": ("llama-3-70b", 512, Layout(tp=8, zero=1, recompute="full")),
}


@pytest.mark.parametrize("name", BIG)
def test_plan_equals_a_rehearsal_of_a_large_model(name):
    folder, ranks, layout = BIG[name]
    config = read_config(f"tests/configs/{folder}")
    started = time.process_time()
    check(config, ranks, layout, seq_len=config.max_seq_len, rows=1, num_microbatches=1 + (layout.zero > 1))
    assert time.process_time() - started < 20
