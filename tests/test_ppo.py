"""What ppo.py computes, against enumeration, brute force and numbers worked out by hand."""

import itertools
import sys
from functools import partial

import pytest
import torch

import ppo
from parallel.data import pack_batch
from parallel.data_parallel import data_parallel
from parallel.generation import Generation, Sampling, generate
from parallel.mesh import Layout, init_mesh
from parallel.model import Decoder, DecoderConfig, ScalarHead
from parallel.optim import AdamW, clip_grad_norm
from parallel.pipeline import forward_backward
from tests.scripts import states_of

EOS = 3
TEMPERATURE = 0.7
KL_COEF = 0.3
TINY = DecoderConfig(
    num_layers=1,
    hidden_size=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    ffn_size=12,
    vocab_size=4,
    max_seq_len=8,
    norm="layernorm",
    norm_eps=1e-5,
    activation="gelu_tanh",
    gated=False,
    learned_positions=True,
    qkv_bias=True,
    attn_out_bias=True,
    ffn_bias=True,
    tied_embeddings=True,
    init_std=0.7,
)
PROMPT = [1, 2]


def make_args(**changes):
    args = ppo.Args(sampling=Sampling(temperature=TEMPERATURE, max_new_tokens=4), **changes)
    return args


def make_generation(prompts, responses, dtype=torch.float64, pad_to=0):
    """A Generation that holds the given responses; log-probabilities are left at 0."""
    rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    seq_lens = torch.tensor([len(row) for row in rows])
    prompt_lens = torch.tensor([len(prompt) for prompt in prompts])
    width = max(pad_to, int(seq_lens.max()))
    position = torch.arange(width)
    return Generation(
        input_ids=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        prompt_lens=prompt_lens,
        seq_lens=seq_lens,
        response_mask=(position >= prompt_lens[:, None]) & (position < seq_lens[:, None]),
        logprobs=torch.zeros(len(rows), width, dtype=dtype),
        finished=torch.tensor([response[-1] == EOS for response in responses]),
        kept_mass=1.0,
    )


# --- the exact gradient ---------------------------------------------------------------------------------------------


def all_responses():
    """Every response of at most 4 tokens over 4 symbols: those that end in the EOS, and those cut at 4 tokens."""
    symbols = [token for token in range(4) if token != EOS]
    ended = [[*head, EOS] for n in range(4) for head in itertools.product(symbols, repeat=n)]
    return ended + [list(ids) for ids in itertools.product(symbols, repeat=4)]


def log_probability(decoder, ids):
    """log p of each token after the prompt at the sampling temperature, straight from the logits. [response_len]"""
    x = torch.tensor([ids])
    hidden = decoder(x, torch.arange(len(ids))[None], torch.zeros_like(x))[0]
    logits = (hidden @ decoder.lm_head_weight.t())[:, : TINY.vocab_size] / TEMPERATURE
    return torch.stack([logits[t - 1].log_softmax(0)[ids[t]] for t in range(len(PROMPT), len(ids))])


def exact_setting():
    mesh = init_mesh()
    policy, ref_policy = Decoder(TINY, mesh, torch.float64, seed=1), Decoder(TINY, mesh, torch.float64, seed=2)
    responses = all_responses()
    scores = torch.randn(len(responses), generator=torch.Generator().manual_seed(4), dtype=torch.float64).tolist()
    return mesh, policy, ref_policy, responses, scores


def true_gradient(policy, ref_policy, responses, scores):
    """Gradient of E[score] - kl_coef * KL(policy || reference), by summing over all responses."""
    objective = 0.0
    for response, score in zip(responses, scores, strict=True):
        logprob = log_probability(policy, PROMPT + response).sum()
        with torch.no_grad():
            ref_logprob = log_probability(ref_policy, PROMPT + response).sum()
        objective = objective + logprob.exp() * (score - KL_COEF * (logprob - ref_logprob))
    return torch.autograd.grad(objective, list(policy.parameters()))


def describe(roles, generation, microbatch_size):
    """`describe_tokens` of all rows in order."""
    microbatches = torch.arange(len(generation.seq_lens)).split(microbatch_size)
    return ppo.describe_tokens(roles, generation, TEMPERATURE, microbatches)


def script_gradient(mesh, policy, ref_policy, responses, scores):
    """The gradient that ppo.py's functions give on the first minibatch, weighted by the responses' probabilities."""
    args = make_args(kl_coef=KL_COEF, gamma=1.0, gae_lambda=1.0)
    roles = {"policy": policy, "ref_policy": ref_policy}
    generation = make_generation([PROMPT] * len(responses), responses)
    mask = generation.response_mask
    old_logprobs, ref_logprobs, values = describe(roles, generation, 50)
    token_scores = ppo.place_scores(scores, mask, torch.float64)
    token_scores = ppo.shape_scores(token_scores, generation.finished, mask, None, 0.0)
    rewards, _ = ppo.shape_rewards(token_scores, old_logprobs, ref_logprobs, mask, KL_COEF)
    advantages = ppo.compute_gae(rewards, values, mask, 1.0, 1.0)
    fields = {"input_ids": generation.input_ids, "response_mask": mask, "old_logprobs": old_logprobs}
    fields["advantages"] = advantages
    total = [torch.zeros_like(p) for p in policy.parameters()]
    for i, response in enumerate(responses):
        probability = log_probability(policy, PROMPT + response).sum().exp().detach()
        microbatch = pack_batch(fields, generation.seq_lens, torch.tensor([i]))
        loss, _ = ppo.minibatch_loss(states_of(roles, microbatch), microbatch, roles, args, num_tokens=1)
        grads = torch.autograd.grad(loss, list(policy.parameters()))
        total = [t - probability * g for t, g in zip(total, grads, strict=True)]
    return total


def relative_error(actual, expected):
    largest = max(e.abs().max() for e in expected)
    return max((a - e).abs().max() for a, e in zip(actual, expected, strict=True)) / largest


def test_gradient_matches_enumeration_of_all_responses():
    mesh, policy, ref_policy, responses, scores = exact_setting()
    assert len(responses) == 1 + 3 + 9 + 27 + 81
    total = sum(log_probability(policy, PROMPT + r).sum().exp().item() for r in responses)
    assert abs(total - 1) < 1e-12
    expected = true_gradient(policy, ref_policy, responses, scores)
    actual = script_gradient(mesh, policy, ref_policy, responses, scores)
    assert relative_error(actual, expected) < 1e-10


def score_one_token_early(monkeypatch):
    original = ppo.last_token_mask
    monkeypatch.setattr(ppo, "last_token_mask", lambda mask: original(mask).roll(-1, 1))


def edit_response_mask(monkeypatch, edit):
    original = make_generation

    def edited(*args):
        generation = original(*args)
        generation.response_mask = edit(generation)
        return generation

    monkeypatch.setattr(sys.modules[__name__], "make_generation", edited)


def leave_out_the_eos(monkeypatch):
    # as where the padding id is the EOS and the mask is made from it; a lone EOS stays, to have somewhere for its score
    edit_response_mask(
        monkeypatch,
        lambda g: g.response_mask & ((g.input_ids != EOS) | (g.response_mask.sum(1, keepdim=True) == 1)),
    )


def train_on_a_prompt_token(monkeypatch):
    edit_response_mask(monkeypatch, lambda g: g.response_mask | g.response_mask.roll(-1, 1))


def read_the_state_after_the_token(monkeypatch):
    monkeypatch.setattr(ppo, "hidden_before", lambda hidden, mask: hidden[mask])


def forget_the_temperature(monkeypatch):
    original = ppo.vocab_parallel_logprobs
    monkeypatch.setattr(ppo, "vocab_parallel_logprobs", lambda h, d, ids, temperature: original(h, d, ids, 1.0))


def penalise_k3(monkeypatch):
    def shape_rewards(token_scores, old_logprobs, ref_logprobs, mask, kl_coef):
        log_ratio = (ref_logprobs - old_logprobs) * mask
        kl = log_ratio.exp() - 1 - log_ratio
        return token_scores - kl_coef * kl, kl

    monkeypatch.setattr(ppo, "shape_rewards", shape_rewards)


PLANTS = [
    score_one_token_early,
    leave_out_the_eos,
    train_on_a_prompt_token,
    read_the_state_after_the_token,
    forget_the_temperature,
    penalise_k3,
]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda f: f.__name__)
def test_enumeration_catches_planted_bug(plant, monkeypatch):
    mesh, policy, ref_policy, responses, scores = exact_setting()
    expected = true_gradient(policy, ref_policy, responses, scores)
    plant(monkeypatch)
    assert relative_error(script_gradient(mesh, policy, ref_policy, responses, scores), expected) > 1e-3


# --- where scores, masks and KL lie: worked out by hand -------------------------------------------------------------

# prompt, response, EOS ids -> finished, response_mask over the padded row of 7, position of the score, positions in KL
CASES = {
    "EOS sampled": ([1, 2], [0, 2, 3], [3], True, [0, 0, 1, 1, 1, 0, 0], 4),
    "padding id equals EOS": ([1, 2], [2, 0], [0], True, [0, 0, 1, 1, 0, 0, 0], 3),
    "cut by length": ([1, 2], [2, 1, 1, 2], [3], False, [0, 0, 1, 1, 1, 1, 0], 5),
    "one token, the EOS": ([1, 2, 1], [3], [3], True, [0, 0, 0, 1, 0, 0, 0], 3),
    "one prompt token, cut": ([2], [1, 1, 1, 1], [3], False, [0, 1, 1, 1, 1, 0, 0], 4),
    "second of several EOS ids": ([1, 2], [2, 0], [3, 0], True, [0, 0, 1, 1, 0, 0, 0], 3),
    "stop sequence": ([1, 2], [2, 1, 2], [3], True, [0, 0, 1, 1, 1, 0, 0], 4),
}


def sample_exactly(prompt, response, eos_ids, stop_fn):
    """Generates with logits that leave one choice per step."""
    tokens = iter([*response, *[2] * 8])

    def logits_fn(hidden):
        logits = torch.full((len(hidden), 128), -torch.inf)
        logits[:, next(tokens)] = 0.0
        return logits

    decoder = Decoder(TINY, init_mesh(), seed=1)
    sampling = Sampling(max_new_tokens=4)
    options = dict(eos_ids=eos_ids, sample_ids=[0], seed=0, stop_fn=stop_fn, logits_fn=logits_fn)
    return generate(decoder, [prompt], sampling, **options)


@pytest.mark.parametrize("case", CASES)
def test_score_mask_and_kl_match_hand_computed(case):
    prompt, response, eos_ids, finished, mask, score_position = CASES[case]
    stop_fn = (lambda rows: [ids[-2:] == [1, 2] for ids in rows]) if case == "stop sequence" else None
    generation = sample_exactly(prompt, response, eos_ids, stop_fn)
    width = generation.input_ids.shape[1]
    assert generation.response_ids() == [response]
    assert generation.finished.tolist() == [finished]
    assert generation.response_mask[0].int().tolist() == mask[:width]
    placed = ppo.place_scores([5.0], generation.response_mask, torch.float64)
    assert placed[0].tolist() == [5.0 if t == score_position else 0.0 for t in range(width)]
    # log-probabilities that differ from the reference's by 1 nat everywhere, padding and prompt included
    old, ref = torch.full((1, width), -1.0), torch.full((1, width), -2.0)
    rewards, kl = ppo.shape_rewards(placed, old, ref, generation.response_mask, kl_coef=0.5)
    assert kl[0].int().tolist() == mask[:width] and kl.sum() == len(response)
    assert rewards.sum() == 5.0 - 0.5 * len(response)


def test_dense_scores_lie_token_by_token():
    generation = make_generation([[1], [1, 2]], [[2, 3], [0, 1, 2]])
    placed = ppo.place_scores([[1.0, 2.0], [3.0, 4.0, 5.0]], generation.response_mask, torch.float64)
    assert placed.tolist() == [[0, 1, 2, 0, 0], [0, 0, 3, 4, 5]]


def test_missing_eos_replaces_the_score_before_clipping():
    generation = make_generation([[1], [1], [1]], [[2, EOS], [2, 2], [EOS]])
    placed = ppo.place_scores([7.0, 7.0, -7.0], generation.response_mask, torch.float64)
    shaped = ppo.shape_scores(placed, generation.finished, generation.response_mask, -1.0, 5.0)
    assert shaped.sum(1).tolist() == [5.0, -1.0, -5.0]
    assert ppo.shape_scores(placed, generation.finished, generation.response_mask, None, 0.0) is placed


# --- advantages -----------------------------------------------------------------------------------------------------


def random_rollout(pad_to=0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    lens = [1, 4, 2, 3, 5, 1, 2]
    prompts = [[1] * (1 + i % 3) for i in range(len(lens))]
    responses = [torch.randint(0, 3, (n,), generator=generator).tolist() for n in lens]
    generation = make_generation(prompts, responses, dtype, pad_to)
    draws = [[torch.randn(n, generator=generator, dtype=torch.float64) for n in lens] for _ in range(2)]
    rewards, values = torch.zeros(2, *generation.input_ids.shape, dtype=dtype)
    for i in range(len(lens)):
        rewards[i][generation.response_mask[i]] = draws[0][i].to(dtype)
        values[i][generation.response_mask[i]] = draws[1][i].to(dtype)
    return generation, rewards, values


def test_gae_matches_brute_force():
    generation, rewards, values = random_rollout()
    gamma, gae_lambda = 0.9, 0.7
    actual = ppo.compute_gae(rewards, values, generation.response_mask, gamma, gae_lambda)
    for i, mask in enumerate(generation.response_mask):
        r, v = rewards[i][mask], torch.nn.functional.pad(values[i][mask], (0, 1))
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        expected = [sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, len(r))) for t in range(len(r))]
        torch.testing.assert_close(actual[i][mask], torch.stack(expected), rtol=1e-12, atol=1e-12)
        assert (actual[i][~mask] == 0).all()


def test_gae_with_lambda_one_is_return_minus_value():
    generation, rewards, values = random_rollout()
    advantages = ppo.compute_gae(rewards, values, generation.response_mask, 1.0, 1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1) * generation.response_mask
    torch.testing.assert_close(advantages, (to_go - values) * generation.response_mask)


def test_results_do_not_depend_on_padding():
    narrow, wide = random_rollout(), random_rollout(pad_to=20)
    width = narrow[0].input_ids.shape[1]
    for function in (
        lambda g, r, v: ppo.compute_gae(r, v, g.response_mask, 0.9, 0.7),
        lambda g, r, v: ppo.whiten(r, g.response_mask)[0],
        lambda g, r, v: ppo.shape_rewards(r, v, r, g.response_mask, 0.3)[0],
        lambda g, r, v: torch.stack(describe(exact_roles(), g, 3)).transpose(0, 1),
    ):
        assert torch.equal(function(*narrow), function(*wide)[..., :width])
        assert (function(*wide)[..., width:] == 0).all()


def exact_roles():
    mesh = init_mesh()
    head = ScalarHead(TINY.hidden_size, mesh, torch.float64, std=0.5)
    roles = {"policy": Decoder(TINY, mesh, torch.float64, seed=1), "value_head": head}
    return {**roles, "ref_policy": Decoder(TINY, mesh, torch.float64, seed=2)}


def test_whitening_is_over_real_tokens_and_respects_the_floor():
    generation, rewards, _ = random_rollout()
    mask = generation.response_mask
    whitened, std = ppo.whiten(rewards, mask)
    assert abs(whitened[mask].mean()) < 1e-12 and abs(whitened[mask].std(correction=0) - 1) < 1e-12
    assert std == rewards[mask].std(correction=0)
    tiny, std = ppo.whiten(rewards * 1e-6, mask)
    assert std < ppo.ADVANTAGE_STD_FLOOR and tiny.abs().max() < 1e-3


def test_rloo_and_grpo_match_brute_force():
    generation, rewards, _ = random_rollout()
    rewards, mask = rewards[:6], generation.response_mask[:6]
    returns = rewards.sum(1).tolist()
    rloo = ppo.compare_samples(rewards, mask, 3, divide_by_std=False)
    grpo = ppo.compare_samples(rewards, mask, 3, divide_by_std=True)
    for i in range(6):
        group = returns[i // 3 * 3 : i // 3 * 3 + 3]
        others = (sum(group) - returns[i]) / 2
        mean = sum(group) / 3
        std = (sum((x - mean) ** 2 for x in group) / 2) ** 0.5
        assert (rloo[i][mask[i]] - (returns[i] - others)).abs().max() < 1e-12
        assert (grpo[i][mask[i]] - (returns[i] - mean) / (std + 1e-4)).abs().max() < 1e-12
        assert (rloo[i][~mask[i]] == 0).all()


def test_kl_controller_matches_formula():
    assert ppo.update_kl_coef(0.1, 12.0, 6.0, 500) == pytest.approx(0.1 * (1 + 0.2 * 500 / ppo.KL_HORIZON))
    assert ppo.update_kl_coef(0.1, 6.6, 6.0, 500) == pytest.approx(0.1 * (1 + 0.1 * 500 / ppo.KL_HORIZON))
    assert ppo.update_kl_coef(0.1, -3.0, 6.0, 500) == pytest.approx(0.1 * (1 - 0.2 * 500 / ppo.KL_HORIZON))


def test_running_moments_match_those_of_all_scores():
    state, generator = ppo.Progress(), torch.Generator().manual_seed(0)
    batches = [torch.randn(n, generator=generator, dtype=torch.float64) * 3 + 5 for n in (4, 7, 1, 30)]
    for batch in batches:
        std = state.add_scores(batch)
    everything = torch.cat(batches)
    assert std == pytest.approx(everything.std(correction=0).item(), rel=1e-12)
    assert state.score_mean == pytest.approx(everything.mean().item(), rel=1e-12)


# --- losses and gradients -------------------------------------------------------------------------------------------


def test_ppo_loss_matches_scalar_loop():
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(50, generator=generator, dtype=torch.float64) * 0.5  # noqa: E731
    logprobs, entropy, new_values = draw() - 2, draw(), draw()
    old = {"old_logprobs": logprobs + draw() * 0.5, "advantages": draw(), "values": draw(), "returns": draw()}
    args = make_args(clip_range=0.1, value_clip_range=0.3, value_coef=0.7, entropy_coef=0.01)
    loss, metrics = ppo.ppo_loss(logprobs, entropy, new_values, old, args, num_tokens=80)
    expected = 0.0
    for i in range(50):
        ratio = (logprobs[i] - old["old_logprobs"][i]).exp().item()
        advantage = old["advantages"][i].item()
        policy = max(-advantage * ratio, -advantage * min(max(ratio, 0.9), 1.1))
        low, high = old["values"][i].item() - 0.3, old["values"][i].item() + 0.3
        clipped = min(max(new_values[i].item(), low), high)
        target = old["returns"][i].item()
        value = 0.5 * max((new_values[i].item() - target) ** 2, (clipped - target) ** 2)
        expected += (policy + 0.7 * value - 0.01 * entropy[i].item()) / 80
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert metrics["clip_fraction"] > 0 and metrics["value_clip_fraction"] > 0


def update_gradient(microbatch_size, dtype, advantage="gae"):
    """Gradient of one minibatch of a PPO update with every loss term, cut into micro-batches of a size."""
    mesh = init_mesh()
    roles = {"policy": Decoder(TINY, mesh, dtype, seed=1)}
    roles["value_head"] = ScalarHead(TINY.hidden_size, mesh, dtype, std=0.5)
    generation, rewards, values = random_rollout(dtype=dtype)
    mask = generation.response_mask
    args = make_args(entropy_coef=0.01)
    fields = {"input_ids": generation.input_ids, "response_mask": mask, "values": values}
    fields["old_logprobs"] = describe(roles, generation, 7)[0] + 0.1 * rewards
    fields["advantages"] = ppo.whiten(ppo.compute_gae(rewards, values, mask, 1.0, 0.95), mask)[0]
    fields["returns"] = fields["advantages"] + values
    model = data_parallel(roles, mesh, Layout())
    model.zero_grad()
    rows = torch.arange(len(mask)).split(microbatch_size)
    microbatches = [pack_batch(fields, generation.seq_lens, part) for part in rows]
    loss_fn = partial(ppo.minibatch_loss, roles=roles, args=args, num_tokens=mask.sum())
    metrics = forward_backward(model, microbatches, loss_fn)
    return {name: p.grad.clone() for name, p in model.named_parameters()}, metrics


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
def test_gradient_does_not_depend_on_microbatch_size(dtype, tolerance):
    expected, expected_metrics = update_gradient(7, dtype)
    for microbatch_size in (1, 2, 3, 5):
        actual, metrics = update_gradient(microbatch_size, dtype)
        for name, gradient in expected.items():
            difference = (actual[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-3)
            assert difference < tolerance, (microbatch_size, name, difference)
        for name, value in expected_metrics.items():
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_value_warmup_leaves_the_trunk_alone():
    roles = {name: role for name, role in exact_roles().items() if name != "ref_policy"}
    generation, rewards, values = random_rollout()
    fields = {"input_ids": generation.input_ids, "response_mask": generation.response_mask, "values": values}
    fields.update(old_logprobs=rewards, advantages=rewards, returns=rewards)
    microbatch = pack_batch(fields, generation.seq_lens, torch.arange(7))
    loss, _ = ppo.minibatch_loss(
        states_of(roles, microbatch), microbatch, roles, make_args(), num_tokens=10, value_only=True
    )
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in roles["policy"].parameters())
    assert roles["value_head"].weight.grad.abs().max() > 0


def test_first_minibatch_has_ratio_one_and_equal_policies_no_kl():
    """Right after a rollout log_ratio is 0 up to rounding, however the sequences are packed."""
    roles = exact_roles()
    roles["ref_policy"].load_state_dict(roles["policy"].state_dict())
    roles = {name: role.float() for name, role in roles.items()}
    generation, _, _ = random_rollout(dtype=torch.float32)
    old, ref, values = describe(roles, generation, 3)
    assert torch.equal(old, ref)
    fields = {"input_ids": generation.input_ids, "response_mask": generation.response_mask, "values": values}
    fields.update(old_logprobs=old, advantages=old, returns=old)
    microbatch = pack_batch(fields, generation.seq_lens, torch.tensor([6, 0, 3, 5]))
    _, metrics = ppo.minibatch_loss(states_of(roles, microbatch), microbatch, roles, make_args(), num_tokens=10)
    assert metrics["max_log_ratio"] < ppo.MAX_LOG_RATIO


def test_reference_stays_bit_equal_over_100_steps():
    mesh = init_mesh()
    roles = {name: role.float() for name, role in exact_roles().items()}
    roles["ref_policy"].requires_grad_(False)
    frozen = {name: p.clone() for name, p in roles["ref_policy"].named_parameters()}
    before = {name: p.clone() for name, p in roles["policy"].named_parameters()}
    generation, rewards, values = random_rollout(dtype=torch.float32)
    old, ref, _ = describe(roles, generation, 7)
    fields = {"input_ids": generation.input_ids, "response_mask": generation.response_mask, "values": values}
    fields.update(old_logprobs=old, advantages=rewards, returns=rewards)
    model = data_parallel(roles, mesh, Layout())
    optimizer = AdamW(model, {"policy": 1e-2, "value_head": 1e-2}, weight_decay=0.1)
    loss_fn = partial(ppo.minibatch_loss, roles=roles, args=make_args(), num_tokens=18)
    for _ in range(100):
        model.zero_grad()
        forward_backward(model, [pack_batch(fields, generation.seq_lens, torch.arange(7))], loss_fn)
        clip_grad_norm(model, 1.0, mesh)
        assert optimizer.step()
    assert all(torch.equal(p, frozen[name]) for name, p in roles["ref_policy"].named_parameters())
    assert all((p - before[name]).abs().max() > 1e-3 for name, p in roles["policy"].named_parameters())
    assert torch.equal(describe(roles, generation, 7)[1], ref)
