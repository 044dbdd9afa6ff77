"""Hugging Face families as rows of flags, and where each tensor of the decoder lies in their files.

A family is supported when every part of its config is: what is not implemented is refused by name, never ignored.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

from parallel.model import DecoderConfig, RotaryScaling

SUPPORTED = ("gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
ROTARY_SCALINGS = ("default", "linear", "llama3")
LAYER_TYPES = ("full_attention", "sliding_attention")
DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout")
REFUSED = (  # entries of a config that change what it computes, if they are set
    "quantization_config",
    "num_experts",
    "num_local_experts",
    "add_cross_attention",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
)


class Unsupported(ValueError):
    """A part of a config that is not implemented."""

    def __init__(self, source: str, what: str, implemented: Iterable[str] = ()):
        way_out = f"implemented are {', '.join(implemented)}" if implemented else "use a model without it"
        super().__init__(f"{source}: {what} is not implemented; {way_out}")


def config_from_hf(hf: dict, source: str) -> tuple[DecoderConfig, list[str]]:
    """The flags of a Hugging Face config.json, of transformers 4 or 5; missing entries have transformers' defaults.

    Args: source: what errors call the config.
    Returns: the config, and notes on what was changed (dropout).
    Raises: ValueError naming the entry that is wrong or not implemented.
    """
    model_type = hf.get("model_type")
    if model_type not in SUPPORTED:
        raise Unsupported(source, f"model_type {model_type!r}", SUPPORTED)
    for name in REFUSED:
        if hf.get(name):
            raise Unsupported(source, f"{name} {hf[name]}")
    from transformers import AutoConfig

    try:
        full = AutoConfig.for_model(**copy.deepcopy(hf)).to_dict()  # a copy: transformers writes into rope_scaling
        build = {"gpt2": from_gpt2, "gptj": from_gptj, "gpt_neox": from_gpt_neox}.get(model_type, from_llama_like)
        config = build(full, source)
    except Unsupported:
        raise
    except Exception as error:  # transformers checks types and ranges, with errors of several kinds
        raise ValueError(f"{source} is no valid {model_type} config: {type(error).__name__}: {error}") from error
    if config.num_heads % config.num_kv_heads:
        raise ValueError(f"{source}: {config.num_heads} heads are no multiple of {config.num_kv_heads} key/value heads")
    notes = [f"{name} {full[name]} set to 0" for name in DROPOUTS if full.get(name)]
    return config, notes


def activation(name: str, source: str) -> str:
    if name not in ACTIVATIONS:
        raise Unsupported(source, f"activation {name!r}", ACTIVATIONS)
    return ACTIVATIONS[name]


def divide_heads(hidden_size: int, num_heads: int) -> int:
    """head_dim of the families that have no entry for it."""
    if hidden_size % num_heads:
        raise ValueError(f"a hidden size of {hidden_size} is no multiple of {num_heads} heads")
    return hidden_size // num_heads


def from_gpt2(hf: dict, source: str) -> DecoderConfig:
    if not hf.get("scale_attn_weights", True):
        raise Unsupported(source, "scale_attn_weights false")
    return DecoderConfig(
        num_layers=hf["n_layer"],
        hidden_size=hf["n_embd"],
        num_heads=hf["n_head"],
        num_kv_heads=hf["n_head"],
        head_dim=divide_heads(hf["n_embd"], hf["n_head"]),
        ffn_size=hf.get("n_inner") or 4 * hf["n_embd"],
        vocab_size=hf["vocab_size"],
        max_seq_len=hf["n_positions"],
        norm="layernorm",
        norm_eps=hf["layer_norm_epsilon"],
        activation=activation(hf["activation_function"], source),
        gated=False,
        learned_positions=True,
        qkv_bias=True,
        attn_out_bias=True,
        ffn_bias=True,
        tied_embeddings=hf.get("tie_word_embeddings", True),
        init_std=hf["initializer_range"],
    )


def from_gptj(hf: dict, source: str) -> DecoderConfig:
    if hf.get("tie_word_embeddings"):
        raise Unsupported(source, "tie_word_embeddings true in gptj, whose head has a bias")
    if not hf.get("rotary_dim"):
        raise Unsupported(source, f"rotary_dim {hf.get('rotary_dim')}")
    return DecoderConfig(
        num_layers=hf["n_layer"],
        hidden_size=hf["n_embd"],
        num_heads=hf["n_head"],
        num_kv_heads=hf["n_head"],
        head_dim=divide_heads(hf["n_embd"], hf["n_head"]),
        ffn_size=hf.get("n_inner") or 4 * hf["n_embd"],
        vocab_size=hf["vocab_size"],
        max_seq_len=hf["n_positions"],
        norm="layernorm",
        norm_eps=hf["layer_norm_epsilon"],
        activation=activation(hf["activation_function"], source),
        gated=False,
        parallel_residual=True,
        shared_norm=True,
        rotary_dim=hf["rotary_dim"],
        rotary_interleaved=True,
        ffn_bias=True,
        head_bias=True,
        init_std=hf["initializer_range"],
    )


def from_gpt_neox(hf: dict, source: str) -> DecoderConfig:
    head_dim = divide_heads(hf["hidden_size"], hf["num_attention_heads"])
    return DecoderConfig(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_attention_heads"],
        head_dim=head_dim,
        ffn_size=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        max_seq_len=hf["max_position_embeddings"],
        norm="layernorm",
        norm_eps=hf["layer_norm_eps"],
        activation=activation(hf["hidden_act"], source),
        gated=False,
        parallel_residual=hf.get("use_parallel_residual", True),
        **rotary_flags(hf, head_dim, source),
        qkv_bias=hf.get("attention_bias", True),
        attn_out_bias=hf.get("attention_bias", True),
        ffn_bias=True,
        tied_embeddings=hf.get("tie_word_embeddings", False),
        init_std=hf["initializer_range"],
    )


def from_llama_like(hf: dict, source: str) -> DecoderConfig:
    """Llama, Mistral, Qwen2 and Qwen3: RMS norms, a gated network, rotary positions, grouped key/value heads."""
    model_type, num_layers = hf["model_type"], hf["num_hidden_layers"]
    head_dim = hf.get("head_dim") or divide_heads(hf["hidden_size"], hf["num_attention_heads"])
    windows: tuple = ()
    if model_type == "mistral" and hf.get("sliding_window"):
        windows = (hf["sliding_window"],) * num_layers
    elif hf.get("use_sliding_window") and hf.get("sliding_window"):
        unknown = sorted(set(hf["layer_types"]) - set(LAYER_TYPES))
        if unknown:
            raise Unsupported(source, f"layer type {unknown[0]!r}", LAYER_TYPES)
        windows = tuple(hf["sliding_window"] if kind == "sliding_attention" else None for kind in hf["layer_types"])
    bias = model_type in ("llama", "qwen3") and hf.get("attention_bias", False)
    return DecoderConfig(
        num_layers=num_layers,
        hidden_size=hf["hidden_size"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        head_dim=head_dim,
        ffn_size=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        max_seq_len=hf["max_position_embeddings"],
        norm="rmsnorm",
        norm_eps=hf["rms_norm_eps"],
        activation=activation(hf["hidden_act"], source),
        gated=True,
        **rotary_flags(hf, head_dim, source),
        qkv_bias=model_type == "qwen2" or bias,
        attn_out_bias=bias,
        ffn_bias=model_type == "llama" and hf.get("mlp_bias", False),
        qk_norm=model_type == "qwen3",
        tied_embeddings=hf.get("tie_word_embeddings", False),
        windows=windows,
        init_std=hf["initializer_range"],
    )


def rotary_flags(hf: dict, head_dim: int, source: str) -> dict:
    """Rotary dimension, base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and others (4)."""
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    if set(rope) & set(LAYER_TYPES):
        raise Unsupported(source, "rotary parameters that differ by layer type")
    kind = rope.get("rope_type", rope.get("type", "default"))
    base = rope.get("rope_theta", hf.get("rope_theta", hf.get("rotary_emb_base", 10000.0)))
    default_fraction = 0.25 if hf["model_type"] == "gpt_neox" else 1.0
    fraction = rope.get("partial_rotary_factor", hf.get("rotary_pct", default_fraction))
    scaling = None
    if kind == "linear":
        scaling = RotaryScaling("linear", rope["factor"])
    elif kind == "llama3":
        scaling = RotaryScaling(
            "llama3",
            rope["factor"],
            rope["low_freq_factor"],
            rope["high_freq_factor"],
            rope["original_max_position_embeddings"],
        )
    elif kind != "default":
        raise Unsupported(source, f"rotary scaling {kind!r}", ROTARY_SCALINGS)
    return {"rotary_dim": int(head_dim * fraction), "rotary_base": float(base), "rotary_scaling": scaling}


@dataclass(frozen=True)
class Piece:
    """Rows of a local tensor that are rows (columns, if transposed) of a Hugging Face tensor.

    local[start : start + size] == hf[hf_start : hf_start + size]   (transposed: hf[:, hf_start : hf_start + size].T)
    """

    hf_name: str
    start: int
    size: int
    hf_start: int = 0
    transposed: bool = False


NAMES = {  # local name -> Hugging Face name; {i} is the layer
    "gpt2": {
        "embedding": "transformer.wte",
        "position_embedding": "transformer.wpe",
        "attn_norm": "transformer.h.{i}.ln_1",
        "qkv": "transformer.h.{i}.attn.c_attn",
        "attn_out": "transformer.h.{i}.attn.c_proj",
        "ffn_norm": "transformer.h.{i}.ln_2",
        "ffn_in": "transformer.h.{i}.mlp.c_fc",
        "ffn_out": "transformer.h.{i}.mlp.c_proj",
        "final_norm": "transformer.ln_f",
        "lm_head": "lm_head",
    },
    "gptj": {
        "embedding": "transformer.wte",
        "attn_norm": "transformer.h.{i}.ln_1",
        "qkv": tuple(f"transformer.h.{{i}}.attn.{x}_proj" for x in "qkv"),
        "attn_out": "transformer.h.{i}.attn.out_proj",
        "ffn_in": "transformer.h.{i}.mlp.fc_in",
        "ffn_out": "transformer.h.{i}.mlp.fc_out",
        "final_norm": "transformer.ln_f",
        "lm_head": "lm_head",
    },
    "gpt_neox": {
        "embedding": "gpt_neox.embed_in",
        "attn_norm": "gpt_neox.layers.{i}.input_layernorm",
        "qkv": "gpt_neox.layers.{i}.attention.query_key_value",
        "attn_out": "gpt_neox.layers.{i}.attention.dense",
        "ffn_norm": "gpt_neox.layers.{i}.post_attention_layernorm",
        "ffn_in": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
        "ffn_out": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
        "final_norm": "gpt_neox.final_layer_norm",
        "lm_head": "embed_out",
    },
    "llama": {
        "embedding": "model.embed_tokens",
        "attn_norm": "model.layers.{i}.input_layernorm",
        "qkv": tuple(f"model.layers.{{i}}.self_attn.{x}_proj" for x in "qkv"),
        "q_norm": "model.layers.{i}.self_attn.q_norm",
        "k_norm": "model.layers.{i}.self_attn.k_norm",
        "attn_out": "model.layers.{i}.self_attn.o_proj",
        "ffn_norm": "model.layers.{i}.post_attention_layernorm",
        "ffn_in": ("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"),
        "ffn_out": "model.layers.{i}.mlp.down_proj",
        "final_norm": "model.norm",
        "lm_head": "lm_head",
    },
}


def pieces(name: str, num_rows: int, config: DecoderConfig, model_type: str) -> list[Piece]:
    """Which rows of which Hugging Face tensors a local tensor of the decoder consists of.

    Args: name: of the local tensor, e.g. layers.3.qkv.weight. num_rows: of it, without padded vocabulary rows.
    """
    *path, module, leaf = name.split(".")
    names = NAMES.get(model_type, NAMES["llama"])[module]
    layer = path[1] if path else ""
    hf_names = [n.format(i=layer) + f".{leaf}" for n in ([names] if isinstance(names, str) else names)]
    if len(hf_names) == 2:  # gate and up
        sizes = [config.ffn_size] * 2
    elif len(hf_names) == 3:  # q, k and v
        sizes = [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    elif model_type == "gpt_neox" and module == "qkv":  # rows per head: q, k, v
        head_dim, part = config.head_dim, config.num_heads * config.head_dim
        return [
            Piece(hf_names[0], j * part + head * head_dim, head_dim, (3 * head + j) * head_dim)
            for j in range(3)
            for head in range(config.num_heads)
        ]
    else:
        # GPT-2 stores the matrices of its linear layers as [in, out]
        transposed = model_type == "gpt2" and bool(path) and leaf == "weight" and "norm" not in module
        return [Piece(hf_names[0], 0, num_rows, transposed=transposed)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [Piece(*part) for part in zip(hf_names, starts, sizes, strict=True)]
