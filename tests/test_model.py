"""The decoder against transformers, family by family: logits, gradients, greedy tokens, export, packing, configs."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from parallel import checkpoint  # noqa: E402
from parallel.checkpoint import hf_tensors, load_decoder, save_decoder  # noqa: E402
from parallel.families import config_from_hf  # noqa: E402
from parallel.generation import Sampling, generate  # noqa: E402
from parallel.mesh import init_mesh  # noqa: E402
from parallel.model import Decoder  # noqa: E402

VOCAB = 211  # divides by nothing
SEQ_LEN = 40  # beyond every window below, and beyond the original length of the llama3 rotary scaling
LLAMA = dict(
    vocab_size=VOCAB,
    hidden_size=72,
    intermediate_size=100,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=False,
)
NEOX = dict(vocab_size=VOCAB, num_hidden_layers=2, intermediate_size=100, max_position_embeddings=256)
GPT2 = dict(vocab_size=VOCAB, n_embd=60, n_layer=3, n_head=5, n_positions=256)
LLAMA3_SCALING = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
MIXED_LAYERS = dict(layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=6)
CASES = {
    "gpt2": dict(model_type="gpt2", **GPT2),
    "gpt2 relu, ffn 77, untied": dict(
        model_type="gpt2", **GPT2, activation_function="relu", n_inner=77, tie_word_embeddings=False
    ),
    "gptj head 80 rotary 20": dict(
        model_type="gptj", vocab_size=VOCAB, n_embd=160, n_layer=2, n_head=2, n_positions=256, rotary_dim=20
    ),
    "gpt_neox head 96 rotary 24": dict(model_type="gpt_neox", **NEOX, hidden_size=192, num_attention_heads=2),
    "gpt_neox head 80 rotary 20, sequential": dict(
        model_type="gpt_neox", **NEOX, hidden_size=240, num_attention_heads=3, use_parallel_residual=False
    ),
    "gpt_neox rotary all, tied, no attention bias, gelu_fast": dict(
        model_type="gpt_neox",
        **NEOX,
        hidden_size=60,
        num_attention_heads=3,
        rotary_pct=1.0,
        rotary_emb_base=500,
        attention_bias=False,
        tie_word_embeddings=True,
        hidden_act="gelu_fast",
    ),
    "llama": dict(model_type="llama", **LLAMA),
    "llama biases, head_dim 20, multi-query": dict(
        model_type="llama", **{**LLAMA, "num_key_value_heads": 1}, head_dim=20, attention_bias=True, mlp_bias=True
    ),
    "llama multi-head, linear rotary scaling, tied": dict(
        model_type="llama",
        **{**LLAMA, "num_key_value_heads": 6, "tie_word_embeddings": True},
        rope_scaling=dict(rope_type="linear", factor=2.5),
    ),
    "llama 3 rotary scaling": dict(model_type="llama", **LLAMA, rope_theta=500.0, rope_scaling=LLAMA3_SCALING),
    "mistral window 7": dict(model_type="mistral", **LLAMA, sliding_window=7),
    "qwen2": dict(model_type="qwen2", **LLAMA),
    "qwen2 windows from layer 1, tied": dict(
        model_type="qwen2",
        **{**LLAMA, "tie_word_embeddings": True},
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    ),
    "qwen3 head_dim 36": dict(model_type="qwen3", **LLAMA, head_dim=36),
    "qwen3 layer types, attention bias": dict(
        model_type="qwen3", **LLAMA, head_dim=16, use_sliding_window=True, attention_bias=True, **MIXED_LAYERS
    ),
}


def make_oracle(hf_config, spread=0.1):
    """A small random transformers model; no bias is zero and no norm weight one."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**copy.deepcopy(hf_config))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else spread))
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-").replace(",", ""))
def pair(request, tmp_path_factory):
    """The oracle and the decoder made from its folder."""
    return make_pair(CASES[request.param], tmp_path_factory.mktemp("model"))


def make_pair(hf_config, folder, **options):
    oracle = make_oracle(hf_config, **options)
    oracle.save_pretrained(folder)
    return oracle, load_decoder(str(folder), init_mesh(), torch.float32)


def all_logits(decoder, input_ids, position_ids=None, first_key=None):
    """[batch, seq_len, vocab_size]; rows are single documents unless told otherwise."""
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        first_key = torch.zeros_like(input_ids)
    hidden = decoder(input_ids, position_ids, first_key)
    logits = torch.nn.functional.linear(hidden, decoder.lm_head_weight, decoder.lm_head_bias)
    return logits[..., : decoder.config.vocab_size]


def random_ids(batch, seq_len):
    return torch.randint(0, VOCAB, (batch, seq_len), generator=torch.Generator().manual_seed(1))


def assert_logits_match(actual, expected):
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


@torch.no_grad()
@pytest.mark.parametrize("seq_len", [SEQ_LEN, 150])  # the row lengths of the two attention paths
def test_logits_match_transformers(pair, seq_len):
    oracle, decoder = pair
    input_ids = random_ids(2, seq_len)
    assert_logits_match(all_logits(decoder, input_ids), oracle(input_ids).logits)


def test_gradients_match_transformers(pair):
    oracle, decoder = pair
    input_ids = random_ids(2, SEQ_LEN)
    expected = {}
    for module, logits in ((oracle, oracle(input_ids).logits), (decoder, all_logits(decoder, input_ids))):
        module.zero_grad()
        logits = logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, input_ids[:, 1:].flatten()).backward()
    head = "embed_out." if oracle.config.model_type == "gpt_neox" else "lm_head."
    for name, parameter in oracle.named_parameters():
        expected[name.replace("lm_head.", head)] = parameter.grad
    gradients = copy.deepcopy(decoder)  # a decoder whose weights are the gradients, so that export gives their names
    for parameter, source in zip(gradients.parameters(), decoder.parameters(), strict=True):
        parameter.data = source.grad
    actual = dict(hf_tensors(gradients))
    assert actual.keys() == expected.keys()
    errors = {name: ((actual[name] - grad).abs().max() / grad.abs().max()).item() for name, grad in expected.items()}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 5e-6, (worst, errors[worst])
    assert gradients.embedding.weight[VOCAB:].count_nonzero() == 0, "a padded row has a gradient"


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_match_transformers(case, tmp_path):
    oracle, decoder = make_pair(CASES[case], tmp_path, spread=0.15)  # a flatter model repeats one token
    prompts = [random_ids(1, length)[0].tolist() for length in (9, 3, 14)]
    sampling = Sampling(temperature=0, max_new_tokens=32)
    ours = generate(decoder, prompts, sampling, eos_ids=[], sample_ids=[0, 1, 2], seed=0, num_slots=2)
    for prompt, response in zip(prompts, ours.response_ids(), strict=True):
        ids = torch.tensor([prompt])
        expected = oracle.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32)
        assert response == expected[0, len(prompt) :].tolist()
    assert len(set(sum(ours.response_ids(), []))) >= 12, "the oracle repeats itself"


def tensor_names(folder):
    return sorted(name for path in Path(folder).glob("*.safetensors") for name in safe_open(path, "pt").keys())


@torch.no_grad()
@pytest.mark.parametrize("sharded", [False, True], ids=["single file", "several files"])
def test_export_opens_in_transformers_with_equal_logits(pair, sharded, tmp_path, monkeypatch):
    oracle, decoder = pair
    if sharded:
        monkeypatch.setattr(checkpoint, "FILE_BYTES", 200_000)
        oracle.save_pretrained(tmp_path / "source", max_shard_size="200KB")
        decoder = load_decoder(str(tmp_path / "source"), init_mesh(), torch.float32)
    save_decoder(decoder, tmp_path / "model", init_mesh())
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1 or not sharded
    assert tensor_names(tmp_path / "model") == tensor_names(decoder.source)
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    weights = reopened.state_dict()
    for name, weight in oracle.state_dict().items():
        assert torch.equal(weights[name], weight), name
    input_ids = random_ids(2, SEQ_LEN)
    assert torch.equal(reopened(input_ids).logits, oracle(input_ids).logits)
    configs = [json.loads(Path(folder, "config.json").read_text()) for folder in (decoder.source, tmp_path / "model")]
    assert configs[0] == configs[1]  # dropout included, which training sets to 0


@torch.no_grad()
def test_packed_documents_match_each_alone(pair):
    lens = (23, 17)
    decoder = copy.deepcopy(pair[1]).double()
    input_ids = random_ids(1, sum(lens))
    position_ids = torch.cat([torch.arange(n) for n in lens])[None]
    first_key = torch.repeat_interleave(torch.tensor([0, lens[0]]), torch.tensor(lens))[None]
    packed = all_logits(decoder, input_ids, position_ids, first_key)
    alone = torch.cat([all_logits(decoder, document) for document in input_ids.split(lens, 1)], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)


def test_no_gradient_crosses_documents(pair):
    lens = (23, 17)
    decoder = copy.deepcopy(pair[1])
    input_ids = torch.cat([random_ids(1, lens[0]) % 100, 100 + random_ids(1, lens[1]) % 100], 1)  # no id in both
    position_ids = torch.cat([torch.arange(n) for n in lens])[None]
    first_key = torch.repeat_interleave(torch.tensor([0, lens[0]]), torch.tensor(lens))[None]
    for loss_on, own, other in (
        (slice(0, lens[0]), slice(0, 100), slice(100, None)),
        (slice(lens[0], None), slice(100, 200), slice(0, 100)),
    ):
        decoder.zero_grad()
        hidden = decoder(input_ids, position_ids, first_key)[:, loss_on]
        (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
        assert decoder.embedding.weight.grad[other].count_nonzero() == 0, "a gradient from another's loss"
        assert decoder.embedding.weight.grad[own].count_nonzero() > 0


def test_dropout_of_a_config_is_reported_in_one_line(tmp_path, capsys):
    make_pair({**CASES["gpt2"], "attn_pdrop": 0.25, "embd_pdrop": 0.0}, tmp_path)
    assert capsys.readouterr().out == f"{tmp_path}: attn_pdrop 0.25 set to 0, resid_pdrop 0.1 set to 0\n"


# --- configs --------------------------------------------------------------------------------------------------------


def test_configs_of_transformers_4_and_5_mean_the_same():
    linear = dict(rope_type="linear", factor=2.0)
    of_4_and_5 = [
        (dict(rope_theta=7e5), dict(rope_parameters=dict(rope_type="default", rope_theta=7e5))),
        (
            dict(rope_theta=7e5, rope_scaling=dict(type="linear", factor=2.0)),
            dict(rope_parameters=dict(rope_theta=7e5, **linear)),
        ),
        (
            dict(rope_theta=7e5, rope_scaling=LLAMA3_SCALING),
            dict(rope_parameters=dict(rope_theta=7e5, **LLAMA3_SCALING)),
        ),
    ]
    for of_4, of_5 in of_4_and_5:
        llama = dict(model_type="llama", **LLAMA)
        before = copy.deepcopy((of_4, of_5))
        configs = [config_from_hf({**llama, **rope}, "config.json")[0] for rope in (of_4, of_5)]
        assert (of_4, of_5) == before, "a config is written again as it was read"
        assert configs[0] == configs[1] and configs[0].rotary_base == 7e5
    neox = dict(model_type="gpt_neox", **NEOX, hidden_size=60, num_attention_heads=3)
    of_4 = dict(rotary_pct=0.5, rotary_emb_base=300)
    of_5 = dict(rope_parameters=dict(rope_type="default", rope_theta=300, partial_rotary_factor=0.5))
    configs = [config_from_hf({**neox, **rope}, "config.json")[0] for rope in (of_4, of_5)]
    assert configs[0] == configs[1] and configs[0].rotary_dim == 10 and configs[0].rotary_base == 300


def test_missing_entries_have_the_defaults_of_transformers():
    config, notes = config_from_hf({"model_type": "gpt2"}, "config.json")
    assert config.tied_embeddings and (config.num_layers, config.hidden_size, config.ffn_size) == (12, 768, 3072)
    assert notes == [f"{name}_pdrop 0.1 set to 0" for name in ("attn", "embd", "resid")]
    config, notes = config_from_hf({"model_type": "gpt_neox"}, "config.json")
    assert not config.tied_embeddings and config.rotary_dim == 24 and config.parallel_residual and notes == []
    config, _ = config_from_hf({"model_type": "mistral"}, "config.json")
    assert config.windows == (4096,) * 32 and config.num_kv_heads == 8
    config, _ = config_from_hf({"model_type": "mistral", "sliding_window": None}, "config.json")
    assert config.windows == ()
    config, _ = config_from_hf({"model_type": "qwen2", "sliding_window": 64, "max_window_layers": 3}, "config.json")
    assert config.windows == (), "a window counts only with use_sliding_window"


REFUSED = {  # case -> (config, what the message must name)
    "unknown family": (dict(model_type="bert"), ["model_type 'bert'", "gpt_neox"]),
    "no family": ({}, ["model_type None", "gpt_neox"]),
    "mixture of experts": (dict(model_type="mixtral"), ["'mixtral'"]),
    "experts in a dense family": (dict(model_type="llama", num_local_experts=8), ["num_local_experts 8"]),
    "yarn": (dict(model_type="llama", rope_scaling=dict(rope_type="yarn", factor=2.0)), ["'yarn'", "llama3"]),
    "dynamic": (dict(model_type="qwen2", rope_scaling=dict(type="dynamic", factor=2.0)), ["'dynamic'", "linear"]),
    "rotary scaling without factor": (dict(model_type="llama", rope_scaling=dict(rope_type="linear")), ["factor"]),
    "activation": (dict(model_type="llama", hidden_act="quick_gelu"), ["'quick_gelu'", "silu"]),
    "inverse layer scaling": (dict(model_type="gpt2", scale_attn_by_inverse_layer_idx=True), ["by_inverse_layer_idx"]),
    "reordered attention": (dict(model_type="gpt2", reorder_and_upcast_attn=True), ["reorder_and_upcast_attn"]),
    "unscaled attention": (dict(model_type="gpt2", scale_attn_weights=False), ["scale_attn_weights"]),
    "cross attention": (dict(model_type="gpt2", add_cross_attention=True), ["add_cross_attention"]),
    "tied head with a bias": (dict(model_type="gptj", tie_word_embeddings=True), ["tie_word_embeddings", "gptj"]),
    "quantised": (dict(model_type="llama", quantization_config={"quant_method": "fp8"}), ["quantization_config"]),
    "layer type": (
        dict(model_type="qwen3", num_hidden_layers=1, layer_types=["chunked_attention"], use_sliding_window=True),
        ["'chunked_attention'", "sliding_attention"],
    ),
    "heads": (dict(model_type="gpt2", n_head=7), ["768", "7 heads"]),
    "key/value heads": (
        dict(model_type="llama", num_attention_heads=8, num_key_value_heads=3),
        ["8 heads", "3 key/value heads"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_config_rejects_what_is_not_implemented(case):
    hf_config, words = REFUSED[case]
    with pytest.raises(ValueError, match="some/config.json") as raised:
        config_from_hf(hf_config, "some/config.json")
    for word in words:
        assert word in str(raised.value)


def test_decoder_starts_from_a_config_alone():
    hf_config = CASES["gpt2"]
    decoder = Decoder(config_from_hf(hf_config, "config.json")[0], init_mesh())
    again = Decoder(decoder.config, init_mesh())
    other = Decoder(decoder.config, init_mesh(), seed=1)
    for (name, a), b, c in zip(decoder.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a, c) == (a.dim() == 1), name
    assert decoder.embedding.weight[VOCAB:].count_nonzero() == 0
    oracle = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_config))
    assert decoder.num_parameters == oracle.num_parameters()
    assert abs(decoder.layers["0"].ffn_in.weight.std() / 0.02 - 1) < 0.05
    assert abs(decoder.layers["0"].ffn_out.weight.std() / (0.02 / 6**0.5) - 1) < 0.05
