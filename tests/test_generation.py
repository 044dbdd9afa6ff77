"""Generation: noise, the sampler, the cache, refilled slots, ends of responses."""

import dataclasses
import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parallel import generation
from parallel.generation import Sampling, generate, mix, sample_tokens, stop_at, uniform
from parallel.mesh import init_mesh
from parallel.model import Decoder, DecoderConfig
from parallel.tensor import hidden_before, vocab_parallel_logprobs

CONFIG = DecoderConfig(
    num_layers=2,
    hidden_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    ffn_size=40,
    vocab_size=37,
    max_seq_len=40,
    norm="rmsnorm",
    norm_eps=1e-5,
    activation="silu",
    gated=True,
    rotary_dim=6,
    windows=(None, 5),
    init_std=0.5,
)


@pytest.fixture(scope="module")
def decoder():
    return Decoder(CONFIG, init_mesh(), seed=3)


def make_prompts(count):
    generator = torch.Generator().manual_seed(0)
    lens = torch.randint(1, 9, (count,), generator=generator).tolist()
    return [torch.randint(2, 37, (n,), generator=generator).tolist() for n in lens]


def run(decoder, prompts, sample_ids=None, sampling=None, **options):
    sample_ids = list(range(len(prompts))) if sample_ids is None else sample_ids
    sampling = sampling or Sampling(max_new_tokens=12)
    return generate(decoder, prompts, sampling, eos_ids=[0, 1], sample_ids=sample_ids, seed=5, **options)


def test_mix_and_uniform_do_not_collide():
    """A million (sample, position) pairs, and streams and seeds beside them, give a million different numbers."""
    samples, positions = torch.arange(1000)[:, None], torch.arange(250)
    draws = [uniform(seed, stream, samples, positions) for seed in (0, 1) for stream in (0, 1)]
    noise = torch.stack(draws).flatten()
    assert len(noise.unique()) == noise.numel() == 1_000_000
    assert len(mix(torch.arange(-50_000, 50_000)).unique()) == 100_000
    assert 0 <= noise.min() and noise.max() < 1
    counts = torch.histc(noise.float(), bins=256, min=0, max=1)
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum() / 255
    assert 0.75 < chi2 < 1.25, chi2
    for a, b in ((draws[0][:, 1:], draws[0][:, :-1]), (draws[0][1:], draws[0][:-1]), (draws[0], draws[1])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 4 / 250_000**0.5, correlation


def test_sampler_is_the_inverse_cdf():
    """Even noise draws every token in proportion to its probability, in order of its id."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 384, generator=generator) * 2
    logits[0, 300:] = -torch.inf
    count = 40_000
    noise = (torch.arange(count) + 0.5) / count
    for temperature in (1.0, 0.6):
        tokens, logprobs, mass = sample_tokens(logits.expand(count, -1), noise.double(), Sampling(temperature))
        expected = (logits / temperature).log_softmax(1)[0]
        frequency = torch.bincount(tokens, minlength=384) / count
        torch.testing.assert_close(frequency, expected.exp(), rtol=0, atol=2 / count)
        torch.testing.assert_close(logprobs, expected[tokens], rtol=1e-5, atol=1e-5)
        assert (tokens.diff() >= 0).all() and (mass == 1).all()


def test_sampler_at_the_ends_of_the_noise_draws_possible_tokens():
    logits = torch.full((2, 256), -torch.inf)
    logits[:, [3, 5, 200]] = 0.0
    tokens, _, _ = sample_tokens(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), Sampling())
    assert tokens.tolist() == [3, 200]


def test_top_k_and_top_p_restrict_what_is_drawn_but_not_the_log_probability():
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.06, 0.04]]))
    logits = torch.nn.functional.pad(logits, (0, 123), value=-torch.inf).expand(1000, -1)
    noise = (torch.arange(1000).double() + 0.5) / 1000
    for sampling, kept in (
        (Sampling(top_k=2), [0, 1]),
        (Sampling(top_p=0.65), [0, 1]),
        (Sampling(top_p=0.75), [0, 1, 2]),
        (Sampling(top_k=4, top_p=0.5), [0, 1]),
        (Sampling(top_p=0.1), [0]),
    ):
        tokens, logprobs, mass = sample_tokens(logits, noise, sampling)
        assert sorted(tokens.unique().tolist()) == kept, sampling
        torch.testing.assert_close(mass, logits[0, kept].exp().sum().double().expand(1000), rtol=1e-6, atol=0)
        torch.testing.assert_close(logprobs, logits[0][tokens])


def test_sampled_logprobs_match_the_training_path(decoder):
    for temperature in (1.0, 0.7):
        out = run(decoder, make_prompts(20), sampling=Sampling(temperature, max_new_tokens=12))
        positions = torch.arange(out.input_ids.shape[1]).expand_as(out.input_ids)
        hidden = decoder(out.input_ids, positions, torch.zeros_like(positions))
        states = hidden_before(hidden, out.response_mask)
        logprobs, _ = vocab_parallel_logprobs(states, decoder, out.input_ids[out.response_mask], temperature)
        torch.testing.assert_close(out.logprobs[out.response_mask], logprobs.detach(), rtol=1e-5, atol=1e-5)
        assert (out.logprobs[~out.response_mask] == 0).all()


def test_samples_do_not_depend_on_order_slots_or_company(decoder):
    prompts = make_prompts(30)
    expected = run(decoder, prompts).response_ids()
    assert len({tuple(ids) for ids in expected}) > 20
    for num_slots in (1, 3, 8, 30):
        assert run(decoder, prompts, num_slots=num_slots).response_ids() == expected, num_slots
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2)).tolist()
    shuffled = run(decoder, [prompts[i] for i in order], order, num_slots=7).response_ids()
    assert shuffled == [expected[i] for i in order]
    assert run(decoder, prompts[4:6], [4, 5]).response_ids() == expected[4:6]


def test_same_prompt_drawn_again_gets_other_noise(decoder):
    prompts = [[5, 6, 7]] * 8
    assert len({tuple(ids) for ids in run(decoder, prompts).response_ids()}) > 4
    assert run(decoder, prompts, [3] * 8).response_ids() == [run(decoder, prompts[:1], [3]).response_ids()[0]] * 8
    other_stream = run(decoder, prompts, stream=1).response_ids()
    assert other_stream != run(decoder, prompts).response_ids()


AHEAD = [
    (Sampling(max_new_tokens=12), {}),
    (Sampling(0.8, top_k=9, top_p=0.7, max_new_tokens=12), {"num_ids": 30}),
    (Sampling(temperature=0, max_new_tokens=9), {}),
]


@pytest.mark.parametrize("sampling, options", AHEAD, ids=["plain", "truncated", "greedy"])
def test_running_ahead_gives_the_same_responses(decoder, monkeypatch, sampling, options):
    """As on a GPU, where the host looks at what was drawn only now and then."""
    prompts = make_prompts(40)
    expected = run(decoder, prompts, sampling=sampling, **options)
    assert len(set(expected.seq_lens.sub(expected.prompt_lens).tolist())) > 3, "ends at different steps"
    monkeypatch.setattr(generation, "runs_ahead", lambda decoder: True)
    for num_slots, tokens_ahead in ((40, 16), (7, 5), (3, 1), (1, 16)):
        monkeypatch.setattr(generation, "TOKENS_AHEAD", tokens_ahead)
        out = run(decoder, prompts, sampling=sampling, num_slots=num_slots, **options)
        assert out.response_ids() == expected.response_ids(), (num_slots, tokens_ahead)
        for field in ("input_ids", "prompt_lens", "seq_lens", "response_mask", "finished"):
            assert torch.equal(getattr(out, field), getattr(expected, field)), field
        torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
        assert out.kept_mass == pytest.approx(expected.kept_mass, rel=1e-6)
    assert run(decoder, []).response_ids() == []


class Recorder(TorchDispatchMode):
    """Names of all operations while it is active."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


# what makes the host wait, gives shapes that depend on values, or copies from the host: no part of a CUDA graph
HOST = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "lift_fresh", "is_nonzero", "isin"}


@pytest.mark.parametrize("sampling, options", AHEAD, ids=["plain", "truncated", "greedy"])
def test_a_step_ahead_leaves_the_host_out(decoder, monkeypatch, sampling, options):
    """And all of its calls are the same operations, in one order: what a graph replays."""
    calls = []

    class Recorded(generation.Replay):
        def __call__(self):
            with Recorder() as recorder:
                super().__call__()
            calls.append(recorder.names)

    monkeypatch.setattr(generation, "runs_ahead", lambda decoder: True)
    monkeypatch.setattr(generation, "Replay", Recorded)
    run(decoder, make_prompts(20), sampling=sampling, num_slots=8, **options)
    assert len(calls) > 20 and len(calls[0]) > 50
    assert all(call == calls[0] for call in calls)
    assert not {name.removeprefix("aten::") for name in calls[0]} & HOST
    with Recorder() as recorder:
        torch.zeros(2).nonzero(), torch.zeros(()).item(), torch.tensor(3)
    assert {"aten::nonzero", "aten::_local_scalar_dense", "aten::lift_fresh"} <= set(recorder.names), "would be seen"


@pytest.mark.parametrize("ahead", [False, True])
def test_cache_and_graph_are_gone_when_generation_returns(decoder, monkeypatch, ahead):
    """At once, not when Python next collects cycles: the update needs their memory."""
    born = []

    def watched(cls):
        class Watched(cls):
            def __init__(self, *args):
                super().__init__(*args)
                born.append(weakref.ref(self))

        return Watched

    monkeypatch.setattr(generation, "runs_ahead", lambda decoder: ahead)
    monkeypatch.setattr(generation, "KVCache", watched(generation.KVCache))
    monkeypatch.setattr(generation, "Replay", watched(generation.Replay))
    gc.collect()
    gc.disable()
    try:
        out = run(decoder, make_prompts(10), num_slots=4)
        assert len(born) == 1 + ahead and not any(ref() for ref in born)
    finally:
        gc.enable()
    assert out.finished.any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_draws_the_same_tokens_and_leaves_no_memory_behind(monkeypatch):
    mesh = init_mesh()
    decoder = Decoder(dataclasses.replace(CONFIG, head_dim=32, rotary_dim=32), mesh, seed=3).to(mesh.device)
    prompts = make_prompts(40)
    expected, held = None, []
    for ahead in (False, True, True, True):
        monkeypatch.setattr(generation, "runs_ahead", lambda decoder, ahead=ahead: ahead)
        out = run(decoder, prompts, num_slots=7).response_ids()
        expected = out if expected is None else expected
        assert out == expected
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[2] == held[3], held


def test_stop_strings_are_looked_at_after_each_token(decoder, monkeypatch):
    def stop_fn(responses):
        return [ids[-1] in (7, 11, 30) for ids in responses]

    expected = run(decoder, make_prompts(20), stop_fn=stop_fn).response_ids()
    monkeypatch.setattr(generation, "runs_ahead", lambda decoder: True)
    assert run(decoder, make_prompts(20), stop_fn=stop_fn).response_ids() == expected


def test_greedy_passes_over_what_may_not_be_drawn():
    logits = torch.randn(50, 256)
    logits[:, 200] = 150.0
    token_ids, logprobs, _ = sample_tokens(logits, torch.zeros(50).double(), Sampling(temperature=0), num_ids=190)
    assert torch.equal(token_ids, logits[:, :190].argmax(1))
    exact = logits.double().log_softmax(1).gather(1, token_ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-6, atol=0)


def test_greedy_takes_the_likeliest_token_of_a_full_forward(decoder):
    prompts = make_prompts(12)
    out = run(decoder, prompts, sampling=Sampling(temperature=0, max_new_tokens=10))
    for prompt, response in zip(prompts, out.response_ids(), strict=True):
        ids = list(prompt)
        for token in response:
            x = torch.tensor([ids])
            hidden = decoder(x, torch.arange(len(ids))[None], torch.zeros_like(x))
            logits = hidden[0, -1] @ decoder.lm_head_weight.t()
            assert token == int(logits[:37].argmax())
            ids.append(token)


def test_responses_end_at_an_eos_a_stop_or_the_limit(decoder):
    prompts = make_prompts(60)
    out = run(decoder, prompts)
    ends = {0: 0, 1: 0, "limit": 0}
    for response, finished in zip(out.response_ids(), out.finished.tolist(), strict=True):
        assert 1 <= len(response) <= 12 and not set(response[:-1]) & {0, 1}
        assert finished == (response[-1] in (0, 1))
        assert finished or len(response) == 12
        ends[response[-1] if finished else "limit"] += 1
    assert min(ends.values()) > 0, ends
    for i, (prompt, response) in enumerate(zip(prompts, out.response_ids(), strict=True)):
        expected = [False] * len(prompt) + [True] * len(response)
        assert out.response_mask[i].tolist() == expected + [False] * (out.input_ids.shape[1] - len(expected))
        assert out.input_ids[i, : len(prompt)].tolist() == prompt


def test_stop_ends_generation_and_its_tokens_stay(decoder):
    stop_ids = {7, 11, 30}
    out = run(decoder, make_prompts(60), stop_fn=lambda responses: [ids[-1] in stop_ids for ids in responses])
    stopped = [ids for ids in out.response_ids() if ids[-1] in stop_ids]
    assert stopped and not any(set(ids[:-1]) & stop_ids for ids in out.response_ids())
    assert out.finished.tolist() == [ids[-1] in stop_ids | {0, 1} for ids in out.response_ids()]


def test_stop_at_sees_strings_that_cross_tokens():
    class Characters:
        def batch_decode(self, rows, skip_special_tokens):
            return ["".join(chr(97 + i) for i in ids) for ids in rows]

    stop_fn = stop_at(Characters(), ("bca", "zz"))
    # each list begins one token before the response, or within it
    lists = [[9, 1, 2], [9, 0, 1, 2, 0], [9, 25, 25], [25, 25], [25, 0, 25], [1, 2, 0]]
    assert stop_fn(lists) == [False, True, True, False, False, False]
    assert stop_at(Characters(), ()) is None


def test_generate_rejects_prompts_without_room(decoder):
    for prompt in ([], [2] * 29):
        with pytest.raises(ValueError, match="prompt 1 has .* tokens"):
            run(decoder, [[2], prompt])


def test_sampling_rejects_impossible_values():
    for field, value in (("temperature", -1), ("top_p", 0), ("top_p", 1.5), ("top_k", -1), ("max_new_tokens", 0)):
        with pytest.raises(ValueError, match=f"--sampling.{field.replace('_', '-')}"):
            Sampling(**{field: value})
