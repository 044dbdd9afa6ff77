"""Every layout against one process: a step of each script, gradients compared in full; generation token by token."""

import hashlib
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import ilql
import ppo
import reward_model
import sft
from kernels.linear_logprobs import linear_logprobs
from parallel.adapters import Tuning, set_trained
from parallel.checkpoint import load_decoder, save_decoder
from parallel.collectives import Pending, _Conjugate, all_gather, reduce_from_tp, reduce_scatter, traffic
from parallel.data import Example, pack_batch, pad_batch
from parallel.data_parallel import DataParallel, data_parallel
from parallel.families import config_from_hf
from parallel.generation import Sampling, generate
from parallel.mesh import Layout, init_mesh
from parallel.model import Decoder, ScalarHead
from parallel.optim import AdamW, clip_grad_norm
from parallel.pipeline import Walk, forward_backward
from parallel.reshard import Shards, rollout_weights
from parallel.reward import save_reward_model
from parallel.tensor import Placement, fill_local, padded_vocab_size, placements
from parallel.training_state import load_training_state, save_training_state
from tasks.random_walks import make_tokenizer
from tests.ranks import Pool, run_ranks
from tests.scripts import TINY_GPT2, make_tiny_model, read_rows, run_on_ranks
from tests.states import full_tensors
from tests.test_checkpoint import peak_of

VOCAB = 131  # divides by nothing
SIZES = dict(vocab_size=VOCAB, num_hidden_layers=2, hidden_size=48, num_attention_heads=8, max_position_embeddings=64)
LLAMA = dict(**SIZES, intermediate_size=56, num_key_value_heads=2)
CASES = {
    "gpt2": dict(
        model_type="gpt2",
        vocab_size=VOCAB,
        bos_token_id=None,
        eos_token_id=5,
        n_layer=2,
        n_embd=48,
        n_head=8,
        n_positions=64,
    ),
    "gpt_neox": dict(model_type="gpt_neox", **SIZES, intermediate_size=56),
    "llama": dict(model_type="llama", **LLAMA, attention_bias=True),
    "qwen3": dict(model_type="qwen3", **LLAMA, head_dim=16, tie_word_embeddings=True),
}
ALL = Tuning()  # everything trains
SCRIPTS = ("sft", "ppo", "reward_model", "ilql")
DTYPES = {"float32": (1e-6, 5e-6), "float64": (1e-13, 1e-12)}  # tolerance of the loss, and of a gradient
LENGTHS = (9, 2, 17, 5, 30, 3, 12, 8)  # tokens of the batch's sequences
NUM_PROMPT = (4, 1, 8, 4, 3, 1, 11, 2)  # those before the response, which may be a single token


def draw(module, mesh, seed=0):
    """Fills a module's parameters with numbers that do not depend on the layout."""
    placed = placements(module)
    for name, parameter in module.named_parameters():
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        full = 0.1 * torch.randn(placed[name].full_shape(parameter.shape), generator=generator, dtype=torch.float64)
        fill_local(parameter, full + (parameter.dim() == 1 and "norm" in name), placed[name], mesh.tp)


def sequences(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def random_like(mask, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(mask.shape, generator=generator, dtype=torch.float64) * mask


def make_sft(config, mesh, dtype, size):
    """Roles, this rank's micro-batches of `size` sequences, and the loss function of a step; so for every script."""
    policy = Decoder(config, mesh, dtype)
    examples = [Example(ids, [t >= n for t in range(len(ids))]) for ids, n in zip(sequences(), NUM_PROMPT, strict=True)]
    for example in examples[:2]:  # a micro-batch, and on eight ranks two of them, without loss
        example.loss_mask = [False] * len(example.loss_mask)
    num_tokens = sum(sum(example.loss_mask) for example in examples)
    microbatches = sft.make_microbatches(share(examples, mesh), sft.Args(microbatch_size=size), mesh.device)
    return {"policy": policy}, microbatches, partial(sft.sft_loss, policy=policy, num_tokens=num_tokens)


def make_ppo(config, mesh, dtype, size):
    roles = {"policy": Decoder(config, mesh, dtype), "value_head": ScalarHead(config.hidden_size, mesh, dtype)}
    fields, seq_lens = pad_batch({"input_ids": sequences()})
    position = torch.arange(fields["input_ids"].shape[1])
    mask = (position >= torch.tensor(NUM_PROMPT)[:, None]) & (position < seq_lens[:, None])
    fields["response_mask"] = mask
    for i, name in enumerate(("old_logprobs", "advantages", "values", "returns")):
        fields[name] = random_like(mask, i).to(dtype)
    fields["old_logprobs"] = 0.1 * fields["old_logprobs"] - 4.9 * mask  # about the log-probability of a random token
    microbatches = [
        pack_batch(fields, seq_lens, rows) for rows in torch.tensor(share(range(len(LENGTHS)), mesh)).split(size)
    ]
    args = ppo.Args(entropy_coef=0.1, sampling=Sampling(temperature=0.7))
    return roles, microbatches, partial(ppo.minibatch_loss, roles=roles, args=args, num_tokens=mask.sum())


def make_reward_model(config, mesh, dtype, size):
    roles = {
        "reward_model": Decoder(config, mesh, dtype, lm_head=False),
        "reward_head": ScalarHead(config.hidden_size, mesh, dtype),
    }
    both = zip(sequences(), reversed(sequences(seed=2)), strict=True)  # no text twice: its gradients would cancel
    pairs = [reward_model.Pair(chosen, rejected, margin=len(chosen) / 100) for chosen, rejected in both]
    microbatches = reward_model.make_microbatches(
        share(pairs, mesh), reward_model.Args(microbatch_size=size), mesh.device
    )
    return roles, microbatches, partial(reward_model.pair_loss, roles=roles, num_pairs=len(pairs))


def make_ilql(config, mesh, dtype, size):
    args = ilql.Args(num_q_heads=2, microbatch_size=size)
    heads = ilql.make_heads(config, args, dtype, mesh)
    targets = heads.pop("target_q_heads")
    draw(targets, mesh, seed=1)
    dialogues = []
    for i, (ids, n) in enumerate(zip(sequences(), NUM_PROMPT, strict=True)):
        mask = torch.tensor([t >= n and (t - n) % 4 != 2 for t in range(len(ids))])  # every fourth is another's
        last = mask.nonzero().max()
        terminal = [t == last for t in range(len(ids))]
        dialogues.append(ilql.Dialogue(ids, mask.tolist(), random_like(mask, i).tolist(), terminal))
    num_actions = sum(sum(dialogue.action_mask) for dialogue in dialogues)
    roles = {"policy": Decoder(config, mesh, dtype), **heads}
    loss_fn = partial(ilql.ilql_loss, roles=roles, target_q_heads=targets, args=args, num_actions=num_actions)
    return roles, ilql.make_microbatches(share(dialogues, mesh), args, mesh.device), loss_fn


MAKE = dict(zip(SCRIPTS, (make_sft, make_ppo, make_reward_model, make_ilql), strict=True))


def share(items, mesh):
    size = len(items) // mesh.dp.size
    return list(items)[mesh.dp.rank * size : (mesh.dp.rank + 1) * size]


def half_step(case, script, dtype, layout, size, num_layers=2, tuning=ALL):
    """The model with its gradients, metrics and gradient norm, of a step with micro-batches of `size` sequences."""
    mesh, dtype = init_mesh(layout), getattr(torch, dtype)
    config = replace(config_from_hf(CASES[case], "test")[0], num_layers=num_layers)
    roles, microbatches, loss_fn = MAKE[script](config, mesh, dtype, size)
    for module in roles.values():
        if isinstance(module, Decoder):
            set_trained(module, tuning)
        draw(module, mesh)
    model = data_parallel(roles, mesh, layout)
    model.sent_before = Counter(traffic())
    model.zero_grad()
    metrics = forward_backward(model, list(microbatches), loss_fn)
    return model, metrics, clip_grad_norm(model, 1.0, mesh)


def step(*args):
    """Metrics, gradient norm and, on the first stage, all gradients in full shapes, by (unit, name)."""
    model, metrics, norm = half_step(*args)
    gradients = {}  # shared out, they are put together on the first replica alone
    for unit in [unit for unit in model.units if unit.trainable]:
        flat = unit.own(unit.flat_grad) if unit.zero else unit.flat_grad
        gradients |= {(unit.name, name): x.clone() for name, x in full_tensors(unit, flat).items()}
    of_stages = model.mesh.gather_objects(gradients, "pp")
    gradients = {name: x for of_stage in reversed(of_stages) for name, x in of_stage.items()}
    for of_stage in of_stages:
        for name, x in of_stage.items():
            assert torch.equal(x, gradients[name]), f"{name} differs between stages"
    return metrics, norm, gradients if model.mesh.pp.rank == 0 else {}


def worst_difference(actual, expected):
    """Largest difference of a gradient, relative to the largest entry of its unit, and the parameter's name."""
    actual, units = {name: x for (_, name), x in actual.items()}, {name: unit for unit, name in expected}
    assert actual.keys() == units.keys()
    largest: dict[str, float] = {}
    for (unit, _), gradient in expected.items():
        largest[unit] = max(largest.get(unit, 0.0), gradient.abs().max().item())
    differences = {
        name: (actual[name] - gradient).abs().max().item() / largest[unit]
        for (unit, name), gradient in expected.items()
    }
    return max((x, name) for name, x in differences.items())


NOTHING = Pending(None, None, "")
SHARED, COUNTED = "parallel.tensor.Placement.shared_intervals", "parallel.data_parallel.Unit.counted_slices"


def gather_and_sum(x, axis):
    """The gather of sharded consumers, whose gradients are summed, where they are replicated."""
    return _Conjugate.apply(x, lambda x: all_gather(x, axis), lambda grad: reduce_scatter(grad, axis))


def from_the_first_shard(*args, vocab_start, **kwargs):
    return linear_logprobs(*args, vocab_start=0, **kwargs)


def biased_row(self, x, sharded_tokens=False):
    return reduce_from_tp(self.product(x, self.bias), self.axis)


def cover():
    """(case, script, dtype, ranks, layout, sequences of a micro-batch): every pair of values of two of them."""
    layouts = [(2, Layout(tp=2)), (2, Layout(tp=2, sequence_parallel=False)), (4, Layout(tp=4)), (4, Layout(tp=2))]
    layouts += [(4, Layout(tp=4, sequence_parallel=False)), (8, Layout(tp=4)), (8, Layout(tp=8)), (8, Layout())]
    layouts += [(8, Layout(tp=2, sequence_parallel=False))]
    products = [(4, Layout(tp=2, zero=zero, recompute=r)) for zero, r in ((1, "none"), (2, "full"), (3, "selective"))]
    products += [(4, Layout(tp=2, zero=3, recompute="full", sequence_parallel=False)), (2, Layout(zero=3))]
    products += [(8, Layout(tp=2, zero=3)), (8, Layout(tp=4, zero=1, recompute="selective")), (2, Layout(zero=2))]
    for i, (ranks, layout) in enumerate(layouts + products):
        for j, case in enumerate(CASES):
            if i < len(layouts) or (i + j) % 2 == 0:
                script = SCRIPTS[(i + j // 2) % 4] if i >= len(layouts) else SCRIPTS[(i + j) % 4]
                dtype = "float64" if (i + 2 * j) % 3 == 0 else "float32"
                yield case, script, dtype, ranks, layout, (1, 2, 8)[(i + j) % 3]
    # pipelines of five layers, which no number of stages divides, with 1, 2 and 4 micro-batches
    looped = dict(schedule="interleaved", num_chunks=2)
    piped = [(2, Layout(pp=2), 1), (2, Layout(pp=2, schedule="gpipe"), 4), (2, Layout(pp=2, **looped), 2)]
    piped += [(4, Layout(pp=4), 4), (4, Layout(pp=4, schedule="gpipe"), 2), (4, Layout(pp=2, tp=2), 2)]
    piped += [(4, Layout(pp=2, tp=2, sequence_parallel=False), 4), (4, Layout(pp=2, tp=2, **looped), 4)]
    piped += [(4, Layout(pp=2, zero=zero, recompute=r), 2) for zero, r in ((0, "full"), (1, "none"), (3, "selective"))]
    piped += [(4, Layout(pp=2, zero=2, **looped), 2), (4, Layout(pp=2, zero=3, recompute="full", **looped), 4)]
    piped += [(4, Layout(pp=2, layers_per_stage=(4, 1)), 4), (4, Layout(pp=2, zero=3, schedule="gpipe"), 4)]
    piped += [(8, Layout(pp=2, tp=2, zero=zero), 2) for zero in (0, 1, 3)] + [(8, Layout(pp=4, tp=2), 4)]
    piped += [(8, Layout(pp=2, tp=4, recompute="full"), 1), (8, Layout(pp=4, zero=1), 2)]
    piped += [(8, Layout(pp=2, tp=2, zero=2, recompute="selective", **looped), 2), (8, Layout(pp=2, zero=2), 2)]
    for i, (ranks, layout, num_microbatches) in enumerate(piped):
        size = 8 * layout.pp * layout.tp // ranks // num_microbatches
        for j, case in enumerate(CASES):
            if (i + j) % 2 == 0:
                dtype = "float64" if (i + j // 2) % 3 == 0 else "float32"
                yield case, SCRIPTS[(i // 2 + j // 2 + j) % 4], dtype, ranks, layout, size


def show(value):
    if not isinstance(value, Layout):
        return str(value)
    stages = f"pp{value.pp}-{value.schedule}-" if value.pp > 1 else ""
    return f"{stages}tp{value.tp}{'sp' * value.sequence_parallel}-zero{value.zero}-{value.recompute}"


def check_step(case, script, dtype, ranks, layout, size, tuning=ALL):
    """Metrics, norm and gradients of every rank against those of one process."""
    num_layers = 5 if layout.pp > 1 else 2
    results = run_ranks(ranks, step, case, script, dtype, layout, size, num_layers, tuning)
    expected_metrics, expected_norm, expected = step(case, script, dtype, Layout(), 8, num_layers, tuning)
    loss_tol, grad_tol = DTYPES[dtype]
    for metrics, norm, gradients in results:
        for name, value in expected_metrics.items():
            assert abs(metrics[name] - value) <= 1e-6 * max(1, abs(value)), (name, metrics[name], value)
        assert abs(metrics["loss"] - expected_metrics["loss"]) <= loss_tol * max(1, abs(expected_metrics["loss"]))
        assert norm == pytest.approx(expected_norm, rel=loss_tol)
        if gradients:
            worst, name = worst_difference(gradients, expected)
            assert worst <= grad_tol, (name, worst)
    assert results[0][2]


@pytest.mark.parametrize(("case", "script", "dtype", "ranks", "layout", "size"), list(cover()), ids=show)
def test_step_equals_one_process(case, script, dtype, ranks, layout, size):
    check_step(case, script, dtype, ranks, layout, size)


def sample(case, dtype, layout, sampling, num_layers=2):
    """Which prompts this rank had, and tokens and log-probabilities that a generation gave them."""
    mesh = init_mesh(layout)
    config = replace(config_from_hf(CASES[case], "test")[0], num_layers=num_layers)
    policy = Decoder(config, mesh, getattr(torch, dtype))
    draw(policy, mesh)
    data_parallel({"policy": policy}, mesh, layout)
    prompts = [ids[:n] for ids, n in zip(sequences(), NUM_PROMPT, strict=True)]
    with rollout_weights(policy) as sampler:
        mine = list(range(8))[sampler.mesh.dp.rank :: sampler.mesh.dp.size]
        generation = generate(
            sampler,
            [prompts[i] for i in mine],
            sampling,
            eos_ids=[5],
            sample_ids=mine,
            seed=3,
            num_ids=VOCAB - 2,
            num_slots=3,
        )
    logprobs = [generation.logprobs[row, : generation.seq_lens[row]] for row in range(len(mine))]
    return mine, generation.response_ids(), logprobs, generation.finished


def assert_same_samples(results, expected, dtype):
    for mine, ids, logprobs, finished in results:
        for row, i in enumerate(mine):
            assert ids[row] == expected[1][i] and finished[row] == expected[3][i]
            tolerance = 1e-5 if dtype == "float32" else 1e-12
            torch.testing.assert_close(logprobs[row], expected[2][i], rtol=0, atol=tolerance)
    assert {i for mine, *_ in results for i in mine} == set(range(8))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=12), Sampling(temperature=0, max_new_tokens=12)])
def test_generation_equals_one_process(case, ranks, sampling):
    for dtype in ("float32", "float64") if sampling.temperature > 0 else ("float32",):
        expected = sample(case, dtype, Layout(), sampling)
        assert len({i for ids in expected[1] for i in ids}) > 20 * (sampling.temperature > 0)
        assert_same_samples(run_ranks(ranks, sample, case, dtype, Layout(tp=ranks), sampling), expected, dtype)


PIPED = [
    (2, Layout(pp=2)),
    (4, Layout(pp=4)),
    (4, Layout(pp=2, tp=2)),
    (4, Layout(pp=2, zero=3)),
    (2, Layout(pp=2, schedule="interleaved", num_chunks=2)),
    (8, Layout(pp=2, tp=2, zero=1)),
]


@pytest.mark.parametrize("rollout", ["rotation", "folded"])
@pytest.mark.parametrize(("ranks", "layout"), PIPED, ids=show)
def test_generation_through_stages_equals_one_process(ranks, layout, rollout):
    """Sequences that go round the stages, or stages that are replicas meanwhile."""
    for i, case in enumerate(CASES):
        if ranks < 8 or i < 2:
            dtype = "float64" if (i + ranks) % 2 else "float32"
            expected = sample(case, dtype, Layout(), Sampling(max_new_tokens=12), 5)
            results = run_ranks(
                ranks, sample, case, dtype, replace(layout, rollout=rollout), Sampling(max_new_tokens=12), 5
            )
            assert_same_samples(results, expected, dtype)
            assert len({tuple(mine) for mine, *_ in results}) == ranks // layout.tp // (
                layout.pp if rollout == "rotation" else 1
            )


def test_truncated_sampling_equals_one_process():
    sampling = Sampling(max_new_tokens=20, top_k=40, top_p=0.8, temperature=1.3)
    expected = sample("llama", "float32", Layout(), sampling)
    assert_same_samples(run_ranks(4, sample, "llama", "float32", Layout(tp=4), sampling), expected, "float32")


def states_of_uneven_rows(case, layout):
    """Hidden states of rows whose tokens the ranks do not divide."""
    mesh = init_mesh(layout)
    policy = Decoder(config_from_hf(CASES[case], "test")[0], mesh, torch.float64)
    draw(policy, mesh)
    ids = torch.arange(33).view(3, 11)
    return policy(ids, torch.arange(11).expand(3, 11), torch.zeros_like(ids)).detach()


@pytest.mark.parametrize("case", CASES)
def test_tokens_need_not_divide(case):
    expected = states_of_uneven_rows(case, Layout())
    for states in run_ranks(4, states_of_uneven_rows, case, Layout(tp=4)):
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-12)


# --- bugs that are caught --------------------------------------------------------------------------------------------

BUGS = {  # what is replaced by what; on a layout where it matters
    "no sum behind a column": (4, "llama", False, "parallel.tensor.all_reduce_async_", lambda x, axis: NOTHING),
    "no sum behind a row": (2, "gpt2", False, "parallel.tensor.reduce_from_tp", lambda x, axis: x),
    "no sum before the head": (2, "gpt2", True, "parallel.tensor.copy_to_tp", lambda x, axis: x),
    "partial gradients forgotten": (2, "gpt_neox", True, "parallel.data_parallel.sum_partial_gradients", lambda *_: 0),
    "norms of heads taken as whole": (2, "qwen3", False, "parallel.model.Placement", lambda **_: Placement()),
    "shared key/value heads forgotten": (4, "llama", True, SHARED, lambda self, size: []),
    "norm counted on every rank": (2, "gpt2", True, COUNTED, lambda self: [(0, self.size)]),
    "the whole gradient behind the gather": (2, "gpt2", True, "parallel.model.split_back", gather_and_sum),
    "labels of the first shard": (2, "gpt2", False, "parallel.tensor.linear_logprobs", from_the_first_shard),
    "bias of a row on every rank": (2, "gpt2", False, "parallel.tensor.RowParallelLinear.forward", biased_row),
}


def step_with_bug(bug, script):
    ranks, case, sequence_parallel, target, replacement = BUGS[bug]
    with mock.patch(target, replacement):
        return step(case, script, "float64", Layout(tp=ranks, sequence_parallel=sequence_parallel), 4)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug):
    ranks, case, *_ = BUGS[bug]
    _, expected_norm, expected = step(case, "sft", "float64", Layout(), 8)
    caught = 0.0
    for _, norm, gradients in run_ranks(ranks, step_with_bug, bug, "sft"):
        caught = max(caught, worst_difference(gradients, expected)[0], abs(norm / expected_norm - 1))
    assert caught >= 1e-3


def skip_units(kind):
    """A reduction that leaves out what several stages hold: the heads, or the tied embedding."""
    launch = DataParallel._launch

    def skipping(self, unit):
        if not (unit.chunk is None and unit.name.endswith(".embedding") == (kind == "embedding")):
            launch(self, unit)

    return skipping


def neighbours_labels(walk_forward=Walk.forward):
    def forward(self, action, last_part):
        walk_forward(self, action, lambda hidden, i: last_part(hidden, (i + 1) % len(self.microbatches)))

    return forward


def stale_weights(enter=Shards.enter):
    def once(self, section, x):
        enter(self, section, x)
        for unit in self.sections[section]:  # as if the gather had not come
            unit.full.mul_(0.5)

    return once


PIPELINE_BUGS = {
    "tied embedding of one end": (
        2,
        Layout(pp=2),
        "sft",
        "parallel.data_parallel.DataParallel._launch",
        skip_units("embedding"),
    ),
    "heads of one stage": (2, Layout(pp=2), "ppo", "parallel.data_parallel.DataParallel._launch", skip_units("heads")),
    "labels of the next micro-batch": (2, Layout(pp=2), "sft", "parallel.pipeline.Walk.forward", neighbours_labels()),
    "norm of one stage": (2, Layout(pp=2), "sft", "parallel.optim.gather_in_order", lambda x, mesh: x),
    "stale gather": (4, Layout(pp=2, zero=3), "sft", "parallel.reshard.Shards.enter", stale_weights()),
}


def step_with_pipeline_bug(bug):
    _, layout, script, target, replacement = PIPELINE_BUGS[bug]
    with mock.patch(target, replacement):
        model, _, norm = half_step("gpt2", script, "float64", layout, 1, 5)
    gradients = {}
    for unit in model.units:
        gradients |= full_tensors(unit, unit.own(unit.flat_grad) if unit.zero else unit.flat_grad)
    return norm, gradients


@pytest.mark.parametrize("bug", PIPELINE_BUGS)
def test_planted_bugs_of_pipelines_are_caught(bug):
    ranks, _, script, *_ = PIPELINE_BUGS[bug]
    _, expected_norm, expected = step("gpt2", script, "float64", Layout(), 8, 5)
    expected = {name: (x, max(x.abs().max().item(), 1e-9)) for (_, name), x in expected.items()}
    caught = 0.0
    for norm, gradients in run_ranks(ranks, step_with_pipeline_bug, bug):
        caught = max(caught, abs(norm / expected_norm - 1))
        for name, x in gradients.items():
            caught = max(caught, (x - expected[name][0]).abs().max().item() / expected[name][1])
    assert caught >= 1e-3


# --- odd cases -------------------------------------------------------------------------------------------------------


def unequal_step(layout, counts):
    """Gradients of a step in which each replica has cut its rows into another number of micro-batches."""
    mesh = init_mesh(layout)
    config = replace(config_from_hf(CASES["gpt2"], "test")[0], num_layers=5)
    roles, microbatches, loss_fn = make_sft(config, mesh, torch.float64, 8 // mesh.dp.size // counts[mesh.dp.rank])
    draw(roles["policy"], mesh)
    model = data_parallel(roles, mesh, layout)
    model.zero_grad()
    metrics = forward_backward(model, list(microbatches), loss_fn)
    gradients = {}
    for unit in [unit for unit in model.units if unit.trainable]:
        flat = unit.own(unit.flat_grad) if unit.zero else unit.flat_grad
        gradients |= {name: x.clone() for name, x in full_tensors(unit, flat).items()}
    return metrics["loss"], gradients


@pytest.mark.parametrize(
    ("ranks", "layout"), [(2, Layout()), (2, Layout(zero=2)), (2, Layout(zero=3)), (4, Layout(pp=2, zero=1))], ids=show
)
def test_replicas_may_have_different_numbers_of_microbatches(ranks, layout):
    """The shorter replica runs its last one again, for nothing; the longer one's sums wait for it."""
    metrics, _, expected = step("gpt2", "sft", "float64", Layout(), 8, 5)
    expected = {name: x for (_, name), x in expected.items()}
    found = set()
    for loss, gradients in run_ranks(ranks, unequal_step, layout, (1, 4)):
        assert loss == pytest.approx(metrics["loss"], rel=1e-13)
        for name, x in gradients.items():
            assert (x - expected[name]).abs().max() <= 1e-12 * expected[name].abs().max().clamp(min=1e-3), name
        found |= gradients.keys()
    assert found == expected.keys()


def step_twice(layout):
    """The same step in the same processes: gradients and loss, twice."""
    results = []
    for _ in range(2):
        model, metrics, norm = half_step("llama", "ppo", "float32", layout, 2, 5)
        results.append((metrics, norm, [unit.flat_grad.clone() for unit in model.units]))
    (metrics, norm, first), (again_metrics, again_norm, second) = results
    return metrics == again_metrics and norm == again_norm and all(map(torch.equal, first, second))


def test_pipelines_repeat_bit_for_bit():
    assert all(run_ranks(4, step_twice, Layout(pp=2, zero=1)) + run_ranks(4, step_twice, Layout(pp=2, tp=2)))


# --- traffic ---------------------------------------------------------------------------------------------------------


def traffic_of_step(case, layout):
    before = half_step(case, "sft", "float32", layout, 8)[0].sent_before
    return {key: n - before[key] for key, n in traffic().items() if key[0] == "tp" and n > before[key]}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_traffic_is_its_closed_form(case, tp, sequence_parallel):
    """Bytes of one micro-batch in float32, as a ring sends them: all-reduce 2 (tp - 1) / tp, the others half of it."""
    layout = Layout(tp=tp, sequence_parallel=sequence_parallel)
    config = config_from_hf(CASES[case], "test")[0]
    _, [microbatch], _ = make_sft(config, init_mesh(), torch.float32, 8)
    tokens = microbatch["input_ids"].numel()
    tokens += -tokens % tp if sequence_parallel else 0
    scored = int(microbatch["loss_mask"].sum())
    hidden, layers = config.hidden_size, config.num_layers
    activations, heads = tokens * hidden * 4, 4 * scored + scored * hidden  # the heads': 4 numbers and a state a token
    vectors = (1 + 2 * layers) * (2 if config.norm == "layernorm" else 1) * hidden
    vectors += layers * hidden * (config.attn_out_bias + config.ffn_bias)
    vectors += config.max_seq_len * hidden * config.learned_positions
    partial_sums = vectors if sequence_parallel else 0
    partial_sums += layers * 2 * config.head_dim * config.qk_norm
    if tp > config.num_kv_heads:  # keys and values, as if every rank had all heads
        partial_sums += layers * 2 * config.num_kv_heads * config.head_dim * (hidden + config.qkv_bias)
    expected = {("tp", "all_reduce"): 2 * (heads * 4 + partial_sums * 4)}
    if sequence_parallel:
        expected["tp", "all_gather"] = (6 * layers + 2) * activations
        expected["tp", "reduce_scatter"] = (4 * layers + 1) * activations
    else:
        expected["tp", "all_reduce"] += 2 * (4 * layers + 1) * activations
    expected = {key: n * (tp - 1) // tp for key, n in expected.items()}
    for found in run_ranks(tp, traffic_of_step, case, layout):
        assert found == expected


# --- files -----------------------------------------------------------------------------------------------------------


def load_and_save(source, target, layout):
    mesh = init_mesh(layout)
    decoder = load_decoder(str(source), mesh, torch.float32)
    model = data_parallel({"policy": decoder}, mesh, layout)
    save_decoder(decoder, target, mesh)
    return decoder.num_parameters, entries_of_layers(model)


def entries_of_layers(model):
    return sum(unit.flat.numel() for unit in model.units if ".layers." in unit.name)


@pytest.mark.parametrize("case", CASES)
def test_folders_are_read_and_written_in_parts(case, tmp_path):
    """What several ranks write is what they read, and each held its part of the matrices."""
    decoder = Decoder(config_from_hf(CASES[case], "test")[0], init_mesh())
    decoder.hf_config = {**CASES[case], "architectures": ["x"]}
    draw(decoder, init_mesh())
    save_decoder(decoder, tmp_path / "one", init_mesh())
    whole = entries_of_layers(data_parallel({"policy": decoder}, init_mesh(), Layout()))
    layouts = [(4, Layout(tp=4)), (2, Layout(pp=2)), (4, Layout(pp=2, tp=2))]
    layouts += [(4, Layout(zero=3)), (4, Layout(tp=2, zero=3)), (4, Layout(pp=2, zero=3))]
    for ranks, layout in layouts:
        found = run_ranks(ranks, load_and_save, tmp_path / "one", tmp_path / show(layout), layout)
        for num_parameters, held in found:
            assert num_parameters == decoder.num_parameters and held < 1.2 * whole / ranks
        one, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("one", show(layout)))
        assert one.keys() == parts.keys() and all(torch.equal(one[name], parts[name]) for name in one)


def peak_of_load(folder, layout):
    """Most memory while a decoder is loaded, as a multiple of what this rank then holds of it."""
    mesh = init_mesh(layout)

    def load(name):
        return data_parallel({"policy": load_decoder(str(folder / name), mesh, torch.float32)}, mesh, layout)

    load("small")  # what is made once in a process
    model, peak = peak_of(lambda: load("large"))
    gradients = sum(unit.flat_grad.nbytes for unit in model.units)
    return (peak - gradients) / sum(unit.flat.nbytes for unit in model.units)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(zero=3), Layout(pp=2)], ids=show)
def test_a_rank_reads_its_part_and_no_more(layout, tmp_path):
    config = {**CASES["gpt_neox"], "vocab_size": 4000, "hidden_size": 512, "intermediate_size": 2048}
    config |= {"num_attention_heads": 8, "num_hidden_layers": 16}
    for name, changes in (("small", {"hidden_size": 64, "intermediate_size": 64}), ("large", {})):
        decoder = Decoder(config_from_hf({**config, **changes}, "test")[0], init_mesh())
        decoder.hf_config = {**config, **changes}
        save_decoder(decoder, tmp_path / name, init_mesh())
    del decoder
    pool = Pool(2)  # without freed memory to use again
    results, problems = pool.run(peak_of_load, (tmp_path, layout), 60)
    pool.kill()
    assert not problems and all(0.9 < peak < 1.05 for peak in results), (problems, results)


def train_a_little(case, layout, num_steps, folder, resume=False):
    """Loss of each step from the checkpoint in a folder, or from the start; then there is one of the end."""
    mesh = init_mesh(layout)
    config = config_from_hf(CASES[case], "test")[0]
    roles, microbatches, loss_fn = make_ilql(config, mesh, torch.float32, 4)
    for module in roles.values():
        draw(module, mesh)
    model = data_parallel(roles, mesh, layout)
    optimizer = AdamW(model, lr=1e-3, weight_decay=0.1)
    stored = [*model.pieces(), *optimizer.pieces()]
    if resume:
        load_training_state(folder, stored, mesh)
    microbatches, losses = list(microbatches), []
    for _ in range(num_steps):
        model.zero_grad()
        losses.append(forward_backward(model, microbatches, loss_fn)["loss"])
        clip_grad_norm(model, 1.0, mesh)
        optimizer.step()
    if not resume:
        save_training_state(folder, num_steps, stored, {}, 1, mesh)
    return losses


@pytest.mark.parametrize("case", ["gpt2", "qwen3"])
def test_state_goes_on_under_another_layout(case, tmp_path):
    """Three steps on one process, the next eight on it and, from its state, on others, and back."""
    layouts = [(2, Layout(tp=2)), (4, Layout(tp=4, sequence_parallel=False))]
    layouts += [(2, Layout(pp=2)), (4, Layout(pp=2, tp=2)), (4, Layout(pp=2, zero=3))]
    train_a_little(case, Layout(), 3, tmp_path / "one")
    expected = train_a_little(case, Layout(), 8, tmp_path / "one", True)
    for ranks, layout in layouts:
        for losses in run_ranks(ranks, train_a_little, case, layout, 8, tmp_path / "one", True):
            assert losses == pytest.approx(expected, rel=1e-6, abs=1e-6)
        folder = tmp_path / show(layout)
        run_ranks(ranks, train_a_little, case, layout, 3, folder)
        losses = train_a_little(case, Layout(), 8, folder, True)
        assert losses == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_vocabulary_is_padded_for_every_shard():
    assert [padded_vocab_size(VOCAB, n) for n in (1, 2, 4)] == [256, 256, 512]


def test_a_model_that_does_not_divide_is_refused():
    config = config_from_hf(CASES["llama"], "test")[0]
    with pytest.raises(ValueError, match="--layout.tp 3 does not divide 8 heads, 2 key/value heads.*takes 1, 2, 4, 8"):
        config.shard(3)
    with pytest.raises(ValueError, match="does not divide"):
        replace(config, ffn_size=50).shard(4)


# --- the scripts -----------------------------------------------------------------------------------------------------

SHORT = {
    "ppo": ("--batch-size", 16, "--minibatch-size", 8, "--microbatch-size", 2, "--eval-samples", 20, "--kl-coef", 0.1),
    "sft": ("--batch-size", 8, "--max-steps", 4),
    "reward_model": ("--batch-size", 8, "--max-steps", 4),
    "ilql": ("--batch-size", 8, "--max-steps", 4, "--eval-samples", 20, "--advantage-scales", 0, 2),
}
COUNTED_REWARD = """
import os

def reward(samples):
    with open("calls.txt", "a") as file:
        file.write(f"{os.environ.get('RANK', 0)} {len(samples)}\\n")
    return [sum(letter < "k" for letter in s.response) / max(len(s.response), 1) for s in samples]
"""
VARYING = re.compile("seconds|tokens_per_second|rollout_mismatch|log_ratio")


@pytest.mark.parametrize("script", SHORT)
def test_scripts_run_alike_under_another_layout(script, tmp_path):
    """Rows of metrics and the trained model of one process and of several; ppo.py through stages in both ways."""
    model = make_tiny_model(tmp_path / "tiny", hf_config={**TINY_GPT2, "n_layer": 4 if script == "ppo" else 2})
    (tmp_path / "mine.py").write_text(COUNTED_REWARD)
    flags = ["--model", model, *SHORT[script]]
    flags += ["--reward", "mine.py:reward"] if script in ("ppo", "ilql") else []
    flags += ["--max-iterations", 2, "--eval-every", 2] if script == "ppo" else ["--eval-every", 4]
    layouts = {
        "one": (1, ()),
        "tp": (2, ("--layout.tp", 2)),
        "pp": (2, ("--layout.pp", 2, "--layout.rollout", "folded")),
    }
    if script == "ppo":
        layouts["both"] = 4, ("--layout.tp", 2)
        layouts["zero"] = 2, ("--layout.zero", 3, "--layout.recompute", "full")
        looped = ("--layout.schedule", "interleaved", "--layout.num-chunks", 2, "--layout.zero", 2)
        layouts["looped"] = 4, ("--layout.pp", 2, *looped, "--layout.offload", "optimizer", "frozen")
        layouts["all"] = 8, ("--layout.tp", 2, "--layout.pp", 2, "--layout.zero", 1, "--layout.rollout", "rotation")
    callers = {"one": {0}, "tp": {0}, "pp": {0, 1}, "both": {0, 2}, "zero": {0, 1}}  # of the reward
    callers |= {"looped": {0, 1, 2, 3}, "all": {0, 2}}
    runs = {}
    for name, (ranks, layout) in layouts.items():
        run_on_ranks(f"{script}.py", *flags, *layout, "--output-dir", name, cwd=tmp_path, ranks=ranks)
        runs[name] = read_rows(tmp_path / name) + read_rows(tmp_path / name, "eval")
        runs[name].append(load_file(tmp_path / name / "model/model.safetensors"))
        if script == "ppo":
            calls = [tuple(map(int, line.split())) for line in (tmp_path / "calls.txt").read_text().splitlines()]
            (tmp_path / "calls.txt").unlink()
            assert {rank for rank, _ in calls} == callers[name]
            assert sum(number for _, number in calls) == 2 * (20 + 20) + 2 * 16
    *expected_rows, expected_weights = runs.pop("one")
    for *rows, weights in runs.values():
        for row, expected in zip(rows, expected_rows, strict=True):
            for key, value in expected.items():
                if isinstance(value, float) and not VARYING.search(key):
                    assert row[key] == pytest.approx(value, rel=2e-5, abs=2e-6), key
                elif key == "rollout_hash":
                    assert row[key] == value
        for name, weight in expected_weights.items():
            assert (weights[name] - weight).abs().max() <= 1e-4, name


def test_a_divided_reward_model_scores_alike(tmp_path):
    """All ranks of a replica score together, and a value model that starts from it is divided, too."""
    mesh = init_mesh()
    model = make_tiny_model(tmp_path / "tiny")
    decoder, head = load_decoder(str(model), mesh, torch.float32, lm_head=False), ScalarHead(32, mesh, std=0.3)
    save_reward_model(decoder, head, tmp_path / "rm", mesh, make_tokenizer(), 0.1)
    flags = ("--model", model, "--reward", "rm", "--value-model", "rm", "--value-lr", 1e-3, *SHORT["ppo"])
    rows = []
    for name, ranks, layout in (
        ("one", 1, ()),
        ("tp", 2, ("--layout.tp", 2)),
        ("pp", 2, ("--layout.pp", 2, "--layout.rollout", "rotation")),
    ):
        where = (*layout, "--max-iterations", 2, "--output-dir", name)
        run_on_ranks("ppo.py", *flags, *where, cwd=tmp_path, ranks=ranks)
        rows.append([(x["score"], x["value_loss"], x["rollout_hash"]) for x in read_rows(tmp_path / name)])
    assert rows[0][-1][0] != rows[0][0][0]
    for one, *others in zip(*rows, strict=True):
        for other in others:
            assert one == pytest.approx(other, rel=1e-5)
