"""What reward_model.py computes, writes and refuses: against transformers, brute force and one process."""

import copy
import itertools
import json
import math
import os
import random
import signal
from functools import partial

import pytest
import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast  # noqa: E402

import ppo  # noqa: E402
import reward_model as script  # noqa: E402
from parallel.checkpoint import hf_tensors, load_decoder  # noqa: E402
from parallel.data_parallel import data_parallel  # noqa: E402
from parallel.families import config_from_hf  # noqa: E402
from parallel.mesh import Layout, RankError, init_mesh  # noqa: E402
from parallel.model import Decoder, ScalarHead  # noqa: E402
from parallel.pipeline import forward_backward  # noqa: E402
from parallel.reward import choose_pad_id, load_reward_model, save_reward_model  # noqa: E402
from parallel.rows import Row, load_rows  # noqa: E402
from parallel.run import launch  # noqa: E402
from tasks import baselines  # noqa: E402
from tasks.random_walks import EOS, NODES, PAD, make_graph, make_tokenizer, measure  # noqa: E402
from tasks.rewards import Sample, SampleContext, make_reward  # noqa: E402
from tests.ranks import run_ranks  # noqa: E402
from tests.scripts import TINY_GPT2, assert_explained, make_tiny_model, read_rows, run  # noqa: E402
from tests.test_model import CASES  # noqa: E402
from tests.test_scripts import assert_same_run  # noqa: E402

MESH = init_mesh()
FAMILIES = (
    "gpt2 relu, ffn 77, untied",
    "gptj head 80 rotary 20",
    "gpt_neox head 96 rotary 24",
    "llama biases, head_dim 20, multi-query",
    "mistral window 7",
    "qwen2 windows from layer 1, tied",
    "qwen3 head_dim 36",
)
OFFSET = 0.375


def make_roles(hf_config, dtype=torch.float64):
    """A random decoder without LM head, no bias of which is 0, and a head."""
    decoder = Decoder(config_from_hf(hf_config, "test")[0], MESH, dtype, seed=3, lm_head=False)
    decoder.hf_config = hf_config
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    head = ScalarHead(decoder.config.hidden_size, MESH, dtype, std=0.2, seed=4)
    head.bias.requires_grad_(False)
    return {"reward_model": decoder, "reward_head": head}


def make_pairs(vocab_size=23, eos=EOS, pad=PAD):
    """Pairs of irregular lengths with margins; their tokens are neither the EOS, which ends them, nor the padding."""
    rng = random.Random(1)
    symbols = [i for i in range(vocab_size) if i not in (eos, pad)]
    lengths = ((2, 9), (5, 5), (17, 3), (30, 4), (8, 21), (12, 1), (3, 14))
    return [
        script.Pair(*([*rng.choices(symbols, k=n), eos] for n in pair), margin=i % 3 / 4)
        for i, pair in enumerate(lengths)
    ]


def sequences_of(pairs):
    return [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]


def step(pairs, roles, microbatch_size=64, mesh=MESH):
    """Metrics of a batch; its gradients are left in the roles."""
    model = data_parallel(roles, mesh, Layout())
    model.zero_grad()
    mine = pairs[mesh.dp.rank :: mesh.dp.size]
    microbatches = list(script.make_microbatches(mine, script.Args(microbatch_size=microbatch_size), mesh.device))
    return forward_backward(model, microbatches, partial(script.pair_loss, roles=roles, num_pairs=len(pairs)))


def gradients(roles):
    return {f"{role}.{n}": p.grad for role, m in roles.items() for n, p in m.named_parameters() if p.requires_grad}


def padded_scores(model, sequences):
    """transformers' scores of right-padded rows, one forward for all. [sequences]"""
    width = max(map(len, sequences))
    pad = model.config.pad_token_id
    input_ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids in sequences])
    return model(input_ids, attention_mask=(input_ids != pad).long()).logits[:, 0]


# --- loss and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_gradients_and_folder_match_transformers(family, tmp_path):
    """Packed pairs in float64 against AutoModelForSequenceClassification on padded rows, read from our folder.

    Of GPT-2 to 1e-9; the other families' rotary tables and norms are float32 in transformers, whatever the model is.
    """
    rtol = 1e-9 if family.startswith("gpt2") else 1e-5
    roles, pairs = make_roles({**CASES[family], "eos_token_id": EOS, "pad_token_id": EOS}), make_pairs()
    save_reward_model(*roles.values(), tmp_path / "rm", MESH, make_tokenizer(), OFFSET)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert type(model).__name__ == model.config.architectures[0] and model.dtype == torch.float64
    assert model.config.num_labels == 1 and model.config.reward_offset == OFFSET
    assert model.config.pad_token_id == PAD and model.config.eos_token_id == EOS
    scores = padded_scores(model, sequences_of(pairs))
    margins = torch.tensor([pair.margin for pair in pairs])
    differences = scores[0::2] - scores[1::2]
    loss = torch.log1p(torch.exp(margins - differences)).mean()
    loss.backward()

    metrics = step(pairs, roles)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=rtol)
    assert metrics["difference"] == pytest.approx(differences.mean().item(), rel=rtol)
    assert metrics["accuracy"] == (differences > 0).double().mean()
    expected = {name: p.grad for name, p in model.named_parameters()}
    for parameter in roles["reward_model"].parameters():
        parameter.data = parameter.grad  # hf_tensors then gives the gradients their Hugging Face names
    actual = {**dict(hf_tensors(roles["reward_model"])), "score.weight": roles["reward_head"].weight.grad}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (actual[name] - gradient).abs().max()
        assert error <= rtol * max(gradient.abs().max(), 1e-3), (name, error)


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_folder_scores_as_transformers_less_the_offset(family, tmp_path):
    """In float32, each sequence alone and all packed: packing changes nothing."""
    roles = make_roles({**CASES[family], "eos_token_id": [EOS, 5]}, torch.float32)
    save_reward_model(*roles.values(), tmp_path / "rm", MESH, make_tokenizer(), OFFSET)
    sequences = sequences_of(make_pairs(CASES[family]["vocab_size"]))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert model.config.eos_token_id == [EOS, 5] and model.config.pad_token_id == PAD
    with torch.no_grad():
        expected = padded_scores(model, sequences) - OFFSET
    loaded = dict(zip(roles, load_reward_model(str(tmp_path / "rm"), MESH, torch.float32), strict=True))
    assert loaded["reward_model"].lm_head is None and loaded["reward_head"].bias == -OFFSET
    for microbatch_size in (1, 64):
        args = script.Args(microbatch_size=microbatch_size)
        actual = script.score_all(loaded, sequences, args, MESH).float()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("microbatch_size", [1, 3])
def test_microbatches_do_not_change_gradients(microbatch_size):
    pairs, roles = make_pairs(), make_roles(TINY_GPT2, torch.float32)
    expected_metrics = step(pairs, copied := copy.deepcopy(roles))
    expected = gradients(copied)
    metrics = step(pairs, roles, microbatch_size)
    assert metrics == pytest.approx(expected_metrics, rel=1e-6)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in gradients(roles).items():
        assert (gradient - expected[name]).abs().max() <= 5e-6 * largest, name


def step_on_ranks():
    """Metrics, gradients, evaluation and scores on this rank, in float64."""
    mesh, pairs, roles = init_mesh(), make_pairs()[:6], make_roles(TINY_GPT2)
    metrics = step(pairs, roles, microbatch_size=2, mesh=mesh)
    args = script.Args(microbatch_size=2)
    return (
        metrics,
        {name: gradient.clone() for name, gradient in gradients(roles).items()},
        script.evaluate(roles, pairs, args, mesh),
        script.score_all(roles, sequences_of(pairs)[:-1], args, mesh),
    )


def test_two_ranks_match_one():
    [(metrics, expected, evaluation, scores)] = run_ranks(1, step_on_ranks)
    for rank, actual in enumerate(run_ranks(2, step_on_ranks)):
        assert actual[0] == pytest.approx(metrics, rel=1e-12), rank
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[1][name], gradient, rtol=1e-10, atol=1e-12, msg=f"rank {rank} {name}")
        for name, x in evaluation.items():
            bins = zip(actual[2][name], x, strict=True) if isinstance(x, list) else [(actual[2][name], x)]
            assert all(a == pytest.approx(b, rel=1e-10) for a, b in bins), (rank, name)
        torch.testing.assert_close(actual[3], scores, rtol=1e-12, atol=1e-12)


# --- evaluation and baselines ---------------------------------------------------------------------------------------


def test_calibration_matches_brute_force():
    differences = torch.tensor([0.0, -0.2, 0.3, 3.0, -3.0, 1.0, 2.2, -0.9, 50.0], dtype=torch.float64)
    expected = []
    for i in range(5):
        low, high = 0.5 + i / 10, 0.6 + i / 10
        inside = []
        for d in differences.tolist():
            p = 1 / (1 + math.exp(-abs(d)))
            if low <= p < high or (i == 4 and p == 1):
                inside.append((p, 0.5 if d == 0 else float(d > 0)))
        if inside:
            p, right = (sum(column) / len(inside) for column in zip(*inside, strict=True))
            expected.append({"probability": pytest.approx(p), "accuracy": pytest.approx(right), "count": len(inside)})
    assert script.calibrate(differences) == expected
    assert sum(row["count"] for row in script.calibrate(differences)) == 9


@pytest.mark.parametrize("seed", range(4))
def test_bag_accuracy_matches_newtons_method(seed):
    """A dense design matrix and Newton steps on the same objective, on pairs that a bag predicts in part."""
    rng = random.Random(seed)

    def draw(n):
        pairs = []
        for _ in range(n):
            a, b = ([*rng.choices(range(7), k=rng.randint(1, 6)), 7] for _ in range(2))
            better = a.count(2) - a.count(3) + rng.gauss(0, 1) > b.count(2) - b.count(3)
            pairs.append(script.Pair(a, b, 0.0) if better else script.Pair(b, a, 0.0))
        return pairs

    train, held_out = draw(60), draw(80)
    features = [(t,) for t in range(8)] + list(itertools.product(range(8), repeat=2))

    def design(pairs):
        def count(ids, feature):
            return sum(tuple(ids[i : i + len(feature)]) == feature for i in range(len(ids)))

        return torch.tensor(
            [[count(p.chosen_ids, f) - count(p.rejected_ids, f) for f in features] for p in pairs], dtype=torch.float64
        )

    x, w = design(train), torch.zeros(len(features), dtype=torch.float64)
    for _ in range(30):
        p = torch.sigmoid(x @ w)
        gradient = baselines.BAG_PENALTY * w - x.t() @ (1 - p)
        hessian = baselines.BAG_PENALTY * torch.eye(len(w), dtype=torch.float64) + x.t() @ ((p * (1 - p))[:, None] * x)
        w = w - torch.linalg.solve(hessian, gradient)
    y = design(held_out) @ w
    expected = ((y > 1e-12).double() + 0.5 * (y.abs() <= 1e-12)).mean().item()
    assert baselines.bag_accuracy(train, held_out) == pytest.approx(
        expected, abs=1 / 80
    )  # a near tie may fall either way
    assert expected > 0.6


def test_length_accuracy_counts_ties_half():
    pairs = [script.Pair([1, 2, 9], [1, 9], 0), script.Pair([1, 9], [2, 9], 0), script.Pair([1, 9], [1, 1, 9], 0)]
    assert baselines.length_accuracy(pairs[:2]) == 0.75 and baselines.length_accuracy(pairs) == 0.5


# --- data -----------------------------------------------------------------------------------------------------------


def read(rows, max_len=64, add_bos=True, tokenizer=None):
    rows = [Row(row, f"pairs.jsonl, line {i}") for i, row in enumerate(rows, 1)]
    return script.read_pairs(rows, tokenizer or make_tokenizer(), add_bos, max_len)


def other_tokenizer():
    """The letters under other ids, and a BOS."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {letter: i for i, letter in enumerate(["<s>", "</s>", "?", *reversed(NODES)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def test_pairs_end_in_the_eos_and_begin_with_the_bos():
    ids = {letter: i for i, letter in enumerate(NODES)}
    [pair] = read([{"prompt": "b", "chosen": "da", "rejected": "c", "margin": 2}])
    assert pair == script.Pair([ids["b"], ids["d"], ids["a"], EOS], [ids["b"], ids["c"], EOS], 2.0, "b")
    for add_bos, start_ids in ((True, [0]), (False, [])):
        [pair] = read([{"prompt": "", "chosen": "a", "rejected": "b</s>"}], 64, add_bos, other_tokenizer())
        assert pair.chosen_ids == [*start_ids, 23, 1] and pair.rejected_ids == [*start_ids, 22, 1]


def test_messages_end_at_the_answers_eos():
    """The prompt apart or within both lists gives the same pair; what the template writes behind the EOS is cut."""
    tokenizer = make_tokenizer()
    opening = [{"role": "user", "content": "b"}]
    answers = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "da"), ("rejected", "c"))}
    [apart] = read([{"prompt": opening, **answers}])
    [within] = read([{name: opening + answer for name, answer in answers.items()}])
    assert apart == within and apart.chosen_ids[-1] == EOS != apart.chosen_ids[-2]
    text = "User: b\n\nAssistant: da|"
    assert apart.chosen_ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_openings_stand_once_and_alike():
    """A prompt within both lists, before both, or as a string beside them (as many public sets have it)."""
    opening, other = ([{"role": "user", "content": text}] for text in "be")
    answers = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "da"), ("rejected", "c"))}
    both = {name: opening + answer for name, answer in answers.items()}
    rows = [{**both}, {**both, "prompt": opening}, {**both, "prompt": "b"}, {**both, "prompt": None, "margin": None}]
    pairs = read(rows)
    assert len({str(pair) for pair in pairs}) == 1 and pairs[0].margin == 0
    with pytest.raises(ValueError, match="line 1: `chosen` and `rejected` differ before their last message"):
        read([{"chosen": both["chosen"], "rejected": other + answers["rejected"]}])
    with pytest.raises(ValueError, match="line 1: beside a single message `prompt` should be messages"):
        read([{**answers, "prompt": "b"}])


def test_whole_prompts_are_held_out():
    """Of many prompts a tenth with all of their pairs; of few ones single pairs; every pair on one side."""
    rows = [{"prompt": f"{a}{b}", "chosen": "da", "rejected": c} for a in NODES for b in NODES[:10] for c in "ce"]
    train, held_out = script.hold_out(read(rows), seed=3)
    assert {pair.prompt for pair in train}.isdisjoint({pair.prompt for pair in held_out})
    assert len(held_out) == 2 * 21 and len(train) + len(held_out) == len(rows)
    few = read(rows[:60])
    train, held_out = script.hold_out(few, seed=3)
    assert len(held_out) == 6 and sorted(map(str, train + held_out)) == sorted(map(str, few))
    assert script.hold_out(few, seed=4)[1] != held_out


BAD_PAIRS = {  # case -> (second row, what the message must name beside its line)
    "equal": ({"prompt": "b", "chosen": "da", "rejected": "da"}, ["same tokens"]),
    "empty": ({"prompt": "b", "chosen": "da", "rejected": " "}, ["empty"]),
    "no rejected": ({"prompt": "b", "chosen": "da"}, ["`rejected`", "it has prompt, chosen", "preferences pairs"]),
    "no prompt": ({"chosen": "da", "rejected": "c"}, ["`prompt`", "tasks.preferences hh"]),
    "null": ({"prompt": "b", "chosen": "da", "rejected": None}, ["`rejected` is None", "not a string"]),
    "mixed": ({"prompt": "b", "chosen": "da", "rejected": [{"role": "assistant", "content": "c"}]}, ["both"]),
    "margin nan": ({"prompt": "b", "chosen": "da", "rejected": "c", "margin": math.nan}, ["margin", "nan"]),
    "margin huge": ({"prompt": "b", "chosen": "da", "rejected": "c", "margin": 10**400}, ["margin", "1000"]),
    "margin text": ({"prompt": "b", "chosen": "da", "rejected": "c", "margin": "2"}, ["margin", "'2'"]),
    "user last": (
        {name: [{"role": "user", "content": text}] for name, text in (("chosen", "b"), ("rejected", "c"))},
        ["assistant"],
    ),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_read_pairs_rejects(case):
    row, words = BAD_PAIRS[case]
    with pytest.raises(ValueError) as raised:
        read([{"prompt": "b", "chosen": "da", "rejected": "c"}, row])
    for word in ("pairs.jsonl, line 2", *words):
        assert word in str(raised.value), raised.value


def test_answers_that_repeat_the_prompt_are_refused():
    rows = [{"prompt": "b", "chosen": "bda", "rejected": f"b{x}"} for x in "cdef"]
    with pytest.raises(
        ValueError, match="pairs.jsonl, line 1: `chosen` and `rejected` begin with the prompt, as in all"
    ):
        read(rows)
    assert len(read([*rows, {"prompt": "b", "chosen": "da", "rejected": "c"}])) == 5


def test_long_pairs_are_named_counted_and_left_out():
    rows = [{"prompt": "b", "chosen": "da", "rejected": x} for x in ("c", "c" * 9, "c" * 3, "c" * 8)]
    with pytest.warns(UserWarning, match="2 of 4 pairs longer than 8 tokens left out: pairs.jsonl, line 2 has 11"):
        assert len(read(rows, max_len=8)) == 2
    with pytest.raises(ValueError, match="4 of 4 pairs .* nothing is left"):
        read(rows, max_len=3)


# --- folders --------------------------------------------------------------------------------------------------------


def test_padding_never_ends_a_text(tmp_path):
    assert choose_pad_id(7, 8, {9}, 10) == 7 and choose_pad_id(9, 8, {9}, 10) == 8
    assert choose_pad_id(None, 9, {9, 0}, 10) == 1
    assert choose_pad_id(None, -1, {0}, 10) == 1 and choose_pad_id(None, 10, {0}, 10) == 1  # ids that no model has
    roles = make_roles({**TINY_GPT2, "vocab_size": 24, "pad_token_id": 1, "eos_token_id": 1})
    save_reward_model(*roles.values(), tmp_path / "rm", MESH, other_tokenizer(), 0.0)
    assert json.loads((tmp_path / "rm/config.json").read_text())["pad_token_id"] == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert tokenizer.pad_token is None and tokenizer.eos_token == "</s>"


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    """A reward model of the walks' tokenizer, in float32."""
    folder = tmp_path_factory.mktemp("reward") / "rm"
    save_reward_model(*make_roles(TINY_GPT2, torch.float32).values(), folder, MESH, make_tokenizer(), OFFSET)
    return folder


def edited(folder, target, config=None, weights=None):
    """A copy of a reward model's folder with other entries in config.json or other tensors (None removes one)."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    content = json.loads((folder / "config.json").read_text()) | (config or {})
    (target / "config.json").write_text(json.dumps(content))
    tensors = load_file(folder / "model.safetensors") | (weights or {})
    save_file({name: x for name, x in tensors.items() if x is not None}, target / "model.safetensors")
    return str(target)


BAD_FOLDERS = {  # case -> (config, weights, what the message must name)
    "causal": ({"architectures": ["GPT2LMHeadModel"]}, {}, ["no reward model", "GPT2LMHeadModel"]),
    "two labels": ({}, {"score.weight": torch.ones(2, 32)}, ["2 labels"]),
    "no score": ({}, {"score.weight": None}, ["no tensor score.weight"]),
    "shape": ({}, {"score.weight": torch.ones(1, 33)}, ["[1, 33]", "[1, 32]"]),
    "NaN": ({}, {"score.weight": torch.full((1, 32), math.nan)}, ["score.weight", "finite"]),
    "offset": ({"reward_offset": None}, {}, ["reward_offset is None"]),
    "family": ({"architectures": ["BertForSequenceClassification"], "model_type": "bert"}, {}, ["'bert'", "gpt2"]),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_load_reward_model_rejects(case, reward_folder, tmp_path):
    config, weights, words = BAD_FOLDERS[case]
    folder = edited(reward_folder, tmp_path / "rm", config, weights)
    for load in (
        load_reward_model,
        lambda folder, mesh, dtype: make_reward(folder, SampleContext(mesh, None, [], dtype)),
    ):
        with pytest.raises(ValueError) as raised:
            load(folder, MESH, torch.float32)
        for word in (folder, *words):
            assert word in str(raised.value), raised.value


def test_causal_folder_loads_without_its_lm_head(tmp_path):
    for name, hf_config in (("tied", TINY_GPT2), ("untied", CASES["gptj head 80 rotary 20"])):
        folder = str(make_tiny_model(tmp_path / name, hf_config=hf_config))
        whole, headless = load_decoder(folder, MESH, torch.float32), load_decoder(folder, MESH, torch.float32, False)
        assert headless.lm_head is None
        expected = dict(whole.named_parameters())
        for parameter_name, parameter in headless.named_parameters():
            assert torch.equal(parameter, expected[parameter_name]), parameter_name


# --- PPO ------------------------------------------------------------------------------------------------------------


def make_samples():
    """Samples that ended by the EOS, by the length limit, and by the stop sequence "n"."""
    tokenizer = make_tokenizer()
    samples = []
    for prompt, response, ending in (("b", "dka", "|"), ("c", "ebj", ""), ("d", "", "|"), ("kk", "jrs", "n")):
        ids = tokenizer(response + ending)["input_ids"]
        samples.append(Sample(prompt, response, tokenizer(prompt)["input_ids"], ids, finished=ending != ""))
    return samples * 12  # more than a batch


@pytest.mark.parametrize("same", [True, False])
def test_reward_from_a_folder_matches_transformers(same, reward_folder, tmp_path, capsys):
    """Read text by text in transformers: prompt, response, and the EOS if the response ended; less the offset."""
    folder, samples = reward_folder, make_samples()
    if not same:
        folder = tmp_path / "rm"
        roles = make_roles({**TINY_GPT2, "vocab_size": 24, "bos_token_id": 0, "eos_token_id": 1}, torch.float32)
        save_reward_model(*roles.values(), folder, MESH, other_tokenizer(), OFFSET)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = []
    for sample in samples:
        text = (tokenizer.bos_token or "") + sample.prompt + sample.response
        ids = tokenizer(text + tokenizer.eos_token * sample.finished)["input_ids"]
        expected.append(model(torch.tensor([ids])).logits.item() - OFFSET)
    reward = make_reward(str(folder), SampleContext(MESH, make_tokenizer(), [EOS]))
    assert reward(samples) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert capsys.readouterr().out.count("re-tokenised") == (not same)
    long = [*samples[:2], Sample("b", "c" * 64, [1], [2] * 64, finished=False)]
    with pytest.raises(RankError, match=r"sample 2 \(prompt 'b'.* more than the 64 of the reward model"):
        reward(long)


def test_what_ends_a_turn_is_scored_as_it_was_trained(tmp_path):
    """A template whose turns end by another id than the tokenizer's EOS: the reward reads the ids of training."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}u{% endif %}{% endfor %}"
    )
    chat = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "da"}]
    [trained_on] = script.read_demonstrations([Row({"messages": chat}, "a row")], tokenizer, True, 64)
    turn_end = NODES.index("u")
    assert trained_on[-2:] == [turn_end, EOS]
    save_reward_model(*make_roles(TINY_GPT2, torch.float32).values(), tmp_path / "rm", MESH, tokenizer, 0.0)
    reward = make_reward(str(tmp_path / "rm"), SampleContext(MESH, tokenizer, [EOS, turn_end]))
    sample = Sample("b", "da", trained_on[:1], trained_on[1:-1], finished=True)
    reward_model, reward_head = load_reward_model(str(tmp_path / "rm"), MESH, torch.float32)
    roles = {"reward_model": reward_model, "reward_head": reward_head}
    expected = script.score_all(roles, [trained_on], script.Args(), MESH)
    assert reward([sample]) == pytest.approx(expected.tolist(), rel=1e-6)


def test_a_reward_model_keeps_its_bos(tmp_path, capsys):
    """Trained without BOS, it reads the texts without, whatever the policy does."""
    tokenizer = other_tokenizer()
    roles = make_roles({**TINY_GPT2, "vocab_size": 24, "bos_token_id": 0, "eos_token_id": 1}, torch.float32)
    scores = []
    for add_bos in (True, False):
        save_reward_model(*roles.values(), tmp_path / "rm", MESH, tokenizer, 0.0, add_bos)
        reward = make_reward(str(tmp_path / "rm"), SampleContext(MESH, tokenizer, [1], add_bos=True))
        ids = tokenizer("bdac")["input_ids"]
        scores += reward([Sample("b", "dac", [0, *ids[:1]], [*ids[1:], 1], finished=True)])
    expected = [script.score_all(roles, [[*bos, *ids, 1]], script.Args(), MESH).item() for bos in ([0], [])]
    assert scores == pytest.approx(expected, rel=1e-5) and "or BOS" in capsys.readouterr().out


def test_samples_that_cannot_fit_are_refused_at_the_start(reward_folder):
    context = SampleContext(MESH, make_tokenizer(), [EOS], max_sample_len=65)
    with pytest.raises(ValueError, match="up to 65 tokens do not fit the 64 of the reward model"):
        make_reward(str(reward_folder), context)


def test_value_function_starts_as_the_reward_model(reward_folder, tmp_path):
    policy = load_decoder(str(make_tiny_model(tmp_path / "model")), MESH, torch.float32)
    roles = ppo.make_value_function(str(reward_folder), policy, make_tokenizer(), MESH, torch.float32)
    assert list(roles) == ["value_model", "value_head"] and roles["value_model"].lm_head is None
    reward = make_reward(str(reward_folder), SampleContext(MESH, make_tokenizer(), [EOS]))
    samples = [sample for sample in make_samples()[:2]]
    for sample in samples:
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        hidden = roles["value_model"](ids, torch.arange(ids.shape[1])[None], torch.zeros_like(ids))
        value = roles["value_head"](hidden)[0, -1].item()
        assert value == pytest.approx(reward([sample])[0], abs=1e-6)
    assert all(p.requires_grad for role in roles.values() for p in role.parameters())


def launch_here(main, args_class, flags, folder, monkeypatch):
    """Runs a script in this process and gives signal handlers back."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["script.py", *map(str, flags)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        launch(main, args_class)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


SHORT_PPO = "--batch-size 16 --minibatch-size 8 --microbatch-size 4 --eval-samples 20 --max-iterations 2".split()


def test_ppo_runs_on_reward_and_value_model(reward_folder, tmp_path, monkeypatch):
    model = make_tiny_model(tmp_path / "model")
    flags = ("--model", model, *SHORT_PPO, "--reward", reward_folder, "--value-model", reward_folder)
    launch_here(ppo.main, ppo.Args, flags, tmp_path, monkeypatch)
    rows = read_rows("runs/ppo")
    assert len(rows) == 2 and rows[0]["optimizer_steps"] == 4 and math.isfinite(rows[-1]["score"])


@pytest.mark.parametrize("flag", ["--reward", "--value-model"])
def test_ppo_rejects_a_vocabulary_that_does_not_fit(flag, reward_folder, tmp_path, monkeypatch, capfd):
    roles = make_roles({**TINY_GPT2, "vocab_size": 20, "eos_token_id": 5}, torch.float32)
    save_reward_model(*roles.values(), tmp_path / "small", MESH, make_tokenizer(), 0.0)
    flags = ("--model", make_tiny_model(tmp_path / "model"), *SHORT_PPO, flag, tmp_path / "small")
    with pytest.raises(SystemExit):
        launch_here(ppo.main, ppo.Args, flags, tmp_path, monkeypatch)
    err = capfd.readouterr().err
    assert "23 ids" in err and "20 rows" in err and str(tmp_path / "small") in err and "Traceback" not in err


# --- the script -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """The first 60 of 200 steps of the default run: its folder."""
    folder = tmp_path_factory.mktemp("learnt")
    status, out, err = run("reward_model.py", "--max-steps", 60, cwd=folder, fresh=True)
    assert status == 0, err
    assert "confidence 0." in out
    return folder / "runs/reward_model"


def test_default_run_learns_the_walks(learnt):
    """Far better than by length; the bag of token pairs, which holds every edge, knows all about these walks."""
    before, *_, last = read_rows(learnt, "eval")
    assert_explained([last, *read_rows(learnt)])
    assert abs(before["eval_accuracy"] - 0.5) < 0.12 and last["eval_accuracy"] >= 0.93
    assert last["eval_length_accuracy"] < 0.35 and last["eval_bag_accuracy"] > 0.98
    assert sum(row["count"] for row in last["eval_calibration"]) == 200
    for name in ("model", "best", "checkpoints", "curves.png"):
        assert (learnt / name).exists(), name


def test_head_and_learning_rate_are_those_of_the_flags(tmp_path, monkeypatch):
    """The head starts with standard deviation 1/sqrt(hidden_size + 1); each step takes the schedule's rate."""
    stds, scales = [], []
    step, make = script.AdamW.step, ScalarHead
    monkeypatch.setattr(script, "ScalarHead", lambda *x, std, seed: stds.append(std) or make(*x, std=std, seed=seed))
    monkeypatch.setattr(script.AdamW, "step", lambda self, scale: scales.append(scale) or step(self, scale))
    model, rows = make_tiny_model(tmp_path / "tiny"), [{"prompt": "b", "chosen": c, "rejected": "uu"} for c in NODES]
    rows.append({"prompt": "b", "chosen": "c" * 70, "rejected": "uu"})  # longer than the context, whatever --max-len
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (
        "--model",
        model,
        "--data",
        "pairs.jsonl",
        "--max-len",
        1000,
        "--optim.schedule",
        "linear",
        "--optim.warmup-steps",
        0,
    )
    launch_here(script.main, script.Args, (*flags, "--max-steps", 4), tmp_path, monkeypatch)
    assert stds[0] == 1 / math.sqrt(33) and scales == [1, 0.75, 0.5, 0.25]
    drawn = torch.cat([ScalarHead(32, MESH, std=stds[0], seed=seed).weight for seed in range(100)])
    assert drawn.std().item() == pytest.approx(stds[0], rel=0.05)


def test_learnt_scores_rank_new_walks(learnt, tmp_path, monkeypatch):
    """Walks drawn anew, half of them along the edges: accuracy over pairs of one start; demonstrations score 0."""
    graph, rng = make_graph(), random.Random(5)
    rows = []
    while len(rows) < 300:
        start_node, walks = rng.choice(NODES[1:]), []
        for alphabet in (graph.successors.get, lambda node: NODES):
            walk = start_node
            while len(walk) < 9 and walk[-1] != NODES[0]:
                walk += rng.choice(alphabet(walk[-1]))
            walks.append(walk)
        worse, better = sorted(walks, key=lambda walk: measure(walk, graph))
        if measure(better, graph) > measure(worse, graph):
            rows.append({"prompt": start_node, "chosen": better[1:], "rejected": worse[1:]})
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--model", learnt / "model", "--max-steps", 0, "--eval-data", "new.jsonl")
    launch_here(script.main, script.Args, flags, tmp_path, monkeypatch)
    [row] = read_rows("runs/reward_model", "eval")
    assert row["eval_accuracy"] >= 0.9 and not (tmp_path / "runs/reward_model/model").exists()
    pairs = script.read_pairs(load_rows(script.Args().data), make_tokenizer(), True, 64)
    roles = dict(
        zip(
            ("reward_model", "reward_head"),
            load_reward_model(str(learnt / "model"), MESH, torch.float32),
            strict=True,
        )
    )
    scores = script.score_all(roles, [pair.chosen_ids for pair in pairs], script.Args(), MESH)
    assert abs(scores.mean()) < 0.5 < scores.std()  # of 1,000 of them exactly 0


def test_demonstrations_score_zero_on_average(tmp_path, monkeypatch):
    model = make_tiny_model(tmp_path / "model")
    (tmp_path / "shown.jsonl").write_text('{"prompt": "b", "completion": "da"}\n{"prompt": "c", "completion": "kna"}\n')
    flags = ("--model", model, "--max-steps", 2, "--demonstrations", "shown.jsonl")
    launch_here(script.main, script.Args, flags, tmp_path, monkeypatch)
    reward = make_reward("runs/reward_model/model", SampleContext(MESH, make_tokenizer(), [EOS]))
    tokenizer = make_tokenizer()
    samples = [
        Sample(prompt, response, tokenizer(prompt)["input_ids"], tokenizer(response + "|")["input_ids"])
        for prompt, response in (("b", "da"), ("c", "kna"))
    ]
    assert sum(reward(samples)) == pytest.approx(0, abs=1e-5) and reward(samples)[0] != 0


def test_killed_run_resumes_bit_for_bit(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    flags = ("--model", model, "--max-steps", 12, "--save-every", 4, "--eval-every", 6, "--microbatch-size", 30)
    status, _, err = run("reward_model.py", *flags, "--output-dir", tmp_path / "whole", cwd=tmp_path)
    assert status == 0, err
    moment = ("parallel.run.Run.progress", 7, signal.SIGKILL)
    status, _, err = run("reward_model.py", *flags, "--output-dir", tmp_path / "run", cwd=tmp_path, signal_at=moment)
    assert status == -signal.SIGKILL and len(read_rows(tmp_path / "run")) == 7, err
    status, _, err = run("reward_model.py", *flags, "--output-dir", tmp_path / "run", "--resume", cwd=tmp_path)
    assert status == 0, err
    assert_same_run(tmp_path / "run", tmp_path / "whole")


BAD_FLAGS = {  # case -> (files, flags, what the message must name)
    "empty --eval-data": ({"empty.jsonl": "\n"}, ("--eval-data", "empty.jsonl"), ["no rows in empty.jsonl"]),
    "one pair": (
        {"one.jsonl": '{"prompt": "b", "chosen": "da", "rejected": "c"}\n'},
        ("--data", "one.jsonl"),
        ["--eval-data", "one pair"],
    ),
    "line": (
        {"pairs.jsonl": '{"prompt": "b", "chosen": "da", "rejected": "c"}\n{"prompt": "b", "chosen": "da"}\n'},
        ("--data", "pairs.jsonl"),
        ["pairs.jsonl, line 2", "`rejected`"],
    ),
    "demonstrations": ({"x.jsonl": '{"text": "b"}\n'}, ("--demonstrations", "x.jsonl"), ["x.jsonl, line 1", "text"]),
    "too long demonstrations": (
        {"x.jsonl": json.dumps({"prompt": "b", "completion": "c" * 70}) + "\n"},
        ("--demonstrations", "x.jsonl"),
        ["1 of 1 demonstrations longer than 64 tokens", "x.jsonl, line 1 has 72"],
    ),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_script_rejects(case, tmp_path, monkeypatch, capfd):
    files, flags, words = BAD_FLAGS[case]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    flags = ("--model", make_tiny_model(tmp_path / "model"), "--max-steps", 2, *flags)
    with pytest.raises(SystemExit) as stopped:
        launch_here(script.main, script.Args, flags, tmp_path, monkeypatch)
    err = capfd.readouterr().err
    assert stopped.value.code == 1 and "Traceback" not in err
    for word in words:
        assert word in err, err
