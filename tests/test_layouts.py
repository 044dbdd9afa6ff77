"""Every layout against one process: a step of each script, gradients compared in full; generation token by token."""

import hashlib
from dataclasses import replace
from functools import partial

import pytest
import torch

import ilql
import ppo
import reward_model
import sft
from parallel.data import Example, pack_batch, pad_batch
from parallel.data_parallel import data_parallel
from parallel.families import config_from_hf
from parallel.generation import Sampling, generate
from parallel.mesh import Layout, init_mesh
from parallel.model import Decoder, ScalarHead
from parallel.optim import clip_grad_norm
from parallel.pipeline import forward_backward
from parallel.tensor import fill_local, full_tensor, padded_vocab_size, placements
from tests.ranks import run_ranks

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


def step(case, script, dtype, layout, size):
    """Metrics, gradient norm and all gradients in full shapes, of one step with micro-batches of `size` sequences."""
    mesh, dtype = init_mesh(layout), getattr(torch, dtype)
    config = config_from_hf(CASES[case], "test")[0]
    roles, microbatches, loss_fn = MAKE[script](config, mesh, dtype, size)
    for module in roles.values():
        draw(module, mesh)
    model = data_parallel(roles, mesh, layout)
    model.zero_grad()
    metrics = forward_backward(model, list(microbatches), loss_fn)
    norm = clip_grad_norm(model, 1.0, mesh)
    gradients = {}
    for unit in model.units:
        for i, (name, placement) in enumerate(zip(unit.names, unit.placements, strict=True)):
            gradients[unit.name, name] = full_tensor(unit.view(unit.flat_grad, i), placement, mesh.tp).clone()
    return metrics, norm, gradients


def worst_difference(actual, expected):
    """Largest difference of a gradient, relative to the largest entry of its unit, and the parameter's name."""
    assert actual.keys() == expected.keys()
    largest: dict[str, float] = {}
    for (unit, _), gradient in expected.items():
        largest[unit] = max(largest.get(unit, 0.0), gradient.abs().max().item())
    differences = {
        name: (actual[unit, name] - gradient).abs().max().item() / largest[unit]
        for (unit, name), gradient in expected.items()
    }
    return max((x, name) for name, x in differences.items())


def cover():
    """(case, script, dtype, ranks, layout, sequences of a micro-batch): every pair of values of two of them."""
    layouts = [(2, Layout(tp=2)), (2, Layout(tp=2, sequence_parallel=False)), (4, Layout(tp=4)), (4, Layout(tp=2))]
    layouts += [(4, Layout(tp=4, sequence_parallel=False)), (8, Layout(tp=4)), (8, Layout(tp=8)), (8, Layout())]
    layouts += [(8, Layout(tp=2, sequence_parallel=False))]
    for i, (ranks, layout) in enumerate(layouts):
        for j, case in enumerate(CASES):
            if layout.tp <= 8:
                script = SCRIPTS[(i + j) % 4]
                dtype = "float64" if (i + 2 * j) % 3 == 0 else "float32"
                yield case, script, dtype, ranks, layout, (1, 2, 8)[(i + j) % 3]


def show(value):
    return f"tp{value.tp}{'sp' * value.sequence_parallel}" if isinstance(value, Layout) else str(value)


@pytest.mark.parametrize(("case", "script", "dtype", "ranks", "layout", "size"), list(cover()), ids=show)
def test_step_equals_one_process(case, script, dtype, ranks, layout, size):
    results = run_ranks(ranks, step, case, script, dtype, layout, size)
    expected_metrics, expected_norm, expected = step(case, script, dtype, Layout(), 8)
    loss_tol, grad_tol = DTYPES[dtype]
    for metrics, norm, gradients in results:
        for name, value in expected_metrics.items():
            assert abs(metrics[name] - value) <= 1e-6 * max(1, abs(value)), (name, metrics[name], value)
        assert abs(metrics["loss"] - expected_metrics["loss"]) <= loss_tol * max(1, abs(expected_metrics["loss"]))
        assert norm == pytest.approx(expected_norm, rel=loss_tol)
        worst, name = worst_difference(gradients, expected)
        assert worst <= grad_tol, (name, worst)


def sample(case, dtype, layout, sampling, fold=1):
    """Tokens and log-probabilities of a generation, and those that training computes of the same tokens."""
    mesh = init_mesh(layout)
    policy = Decoder(config_from_hf(CASES[case], "test")[0], mesh, getattr(torch, dtype))
    draw(policy, mesh)
    prompts = [ids[:n] for ids, n in zip(sequences(), NUM_PROMPT, strict=True)]
    generation = generate(
        policy,
        prompts,
        sampling,
        eos_ids=[5],
        sample_ids=list(range(8)),
        seed=3,
        num_ids=VOCAB - 2,
        num_slots=4,
    )
    return generation.input_ids, generation.logprobs, generation.finished


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=20), Sampling(temperature=0, max_new_tokens=20)])
def test_generation_equals_one_process(case, ranks, sampling):
    for dtype in ("float32", "float64"):
        expected_ids, expected_logprobs, expected_finished = sample(case, dtype, Layout(), sampling)
        assert len(set(expected_ids.flatten().tolist())) > 20
        for ids, logprobs, finished in run_ranks(ranks, sample, case, dtype, Layout(tp=ranks), sampling):
            assert torch.equal(ids, expected_ids) and torch.equal(finished, expected_finished)
            torch.testing.assert_close(logprobs, expected_logprobs, rtol=0, atol=1e-5 if dtype == "float32" else 1e-12)


def test_truncated_sampling_equals_one_process():
    sampling = Sampling(max_new_tokens=20, top_k=40, top_p=0.8, temperature=1.3)
    expected = sample("llama", "float32", Layout(), sampling)[0]
    for ids, _, _ in run_ranks(4, sample, "llama", "float32", Layout(tp=4), sampling):
        assert torch.equal(ids, expected)


def test_vocabulary_is_padded_for_every_shard():
    assert [padded_vocab_size(VOCAB, n) for n in (1, 2, 4)] == [256, 256, 512]


def test_a_model_that_does_not_divide_is_refused():
    config = config_from_hf(CASES["llama"], "test")[0]
    with pytest.raises(ValueError, match="--layout.tp 3 does not divide 8 heads, 2 key/value heads.*takes 1, 2, 4, 8"):
        config.shard(3)
    with pytest.raises(ValueError, match="does not divide"):
        replace(config, ffn_size=50).shard(4)
