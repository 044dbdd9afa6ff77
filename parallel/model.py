"""One decoder for every family: GPT-2, GPT-J, GPT-NeoX, Llama, Mistral, Qwen2, Qwen3 are rows of flags.

`families.py` derives the flags from a Hugging Face config and says where each tensor lies in its files. Inside the
decoder activations are token-major [tokens, hidden_size]; only attention sees [batch, seq_len].
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import Visible, attention
from kernels.pointwise import gated_activation, rms_norm, rotate_
from parallel.collectives import broadcast_, split_back
from parallel.mesh import Layout, Mesh
from parallel.recompute import recompute
from parallel.schedules import check_layers_per_stage, layers_of_stage, split_layers
from parallel.tensor import (
    ColumnParallelLinear,
    Placement,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    fill_local,
    full_tensor,
    merge,
    placements,
)


@dataclass(frozen=True)
class RotaryScaling:
    """How rotary frequencies are stretched beyond the context they were trained on."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that tells one architecture from another."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_seq_len: int
    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: float
    activation: Literal["gelu", "gelu_tanh", "silu", "relu"]
    gated: bool  # ffn(x) = down(act(gate(x)) * up(x))
    parallel_residual: bool = False  # x + attn(norm(x)) + ffn(norm'(x))
    shared_norm: bool = False  # attention and FFN read the same norm (GPT-J)
    learned_positions: bool = False
    rotary_dim: int = 0  # leading part of each head that is rotated; 0 for none
    rotary_base: float = 10000.0
    rotary_interleaved: bool = False  # rotates (x0, x1), (x2, x3) ... instead of the two halves
    rotary_scaling: RotaryScaling | None = None
    qkv_bias: bool = False
    attn_out_bias: bool = False
    ffn_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False  # RMS norm of each query and key head
    tied_embeddings: bool = False
    windows: tuple[int | None, ...] = ()  # sliding window of each layer; () for none
    init_std: float = 0.02

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def shard(self, tp: int) -> "DecoderConfig":
        """What one of tp ranks computes: its heads and its part of the feed-forward network.

        Key and value heads fewer than ranks lie on several each.
        Raises: ValueError if heads or network cannot be divided so.
        """
        if not self.fits_tp(tp):
            fitting = ", ".join(str(n) for n in range(1, self.num_heads + 1) if self.fits_tp(n))
            raise ValueError(f"--layout.tp {tp} does not divide {self.describe_sizes()}: this model takes {fitting}")
        return replace(
            self,
            num_heads=self.num_heads // tp,
            num_kv_heads=max(self.num_kv_heads // tp, 1),
            ffn_size=self.ffn_size // tp,
        )

    def describe_sizes(self) -> str:
        """What tp has to divide."""
        heads = f"{self.num_heads} heads, {self.num_kv_heads} key/value heads"
        return f"{heads} and a feed-forward network {self.ffn_size} wide"

    def count_parameters(self, lm_head: bool = True) -> int:
        """Of a whole model, without padded vocabulary rows; tied embeddings count once."""
        d, norm = self.hidden_size, self.hidden_size * (2 if self.norm == "layernorm" else 1)
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        ffn_in = self.ffn_size * (1 + self.gated)
        layer = (q + 2 * kv) * (d + self.qkv_bias) + d * (q + self.attn_out_bias) + norm * (2 - self.shared_norm)
        layer += ffn_in * (d + self.ffn_bias) + d * (self.ffn_size + self.ffn_bias) + 2 * self.head_dim * self.qk_norm
        head = self.vocab_size * (d + self.head_bias) if lm_head and not self.tied_embeddings else 0
        positions = self.max_seq_len * d * self.learned_positions
        return self.vocab_size * d + positions + self.num_layers * layer + norm + head

    def layers_by_part(self, layout: Layout, lm_head: bool = True) -> list[int]:
        """How many layers each part of a pipeline gets, in the model's order: as the flag says, or by cost.

        Costs are numbers of parameters, which weigh on memory and, but for the embedding's, on time.
        Raises: ValueError, with what would fit, if there are too few layers or the flag's numbers do not fit.
        """
        if layout.layers_per_stage:
            check_layers_per_stage(list(layout.layers_per_stage), self.num_layers, layout.pp, layout.num_chunks)
            return list(layout.layers_per_stage)
        matrix = self.vocab_size * self.hidden_size
        ends = (2 if lm_head else 1) * matrix if not (lm_head and self.tied_embeddings) else matrix
        layer = (self.count_parameters(lm_head) - ends) / self.num_layers
        head = matrix / layer if lm_head else 0.0
        return split_layers(self.num_layers, layout.pp, layout.num_chunks, matrix / layer, head)

    def fits_tp(self, tp: int) -> bool:
        kv_fits = self.num_kv_heads % tp == 0 or tp % self.num_kv_heads == 0
        return self.num_heads % tp == 0 and self.ffn_size % tp == 0 and kv_fits


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, arXiv 1910.07467), statistics in at least float32."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rotary_tables(config: DecoderConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each token's rotation angles, in float64 (Su et al. 2021, arXiv 2104.09864, eq. 15).

    Shapes: position_ids [tokens] -> two of [tokens, rotary_dim / 2]
    """
    exponent = torch.arange(0, config.rotary_dim, 2, dtype=torch.float64, device=position_ids.device)
    frequency = config.rotary_base ** (-exponent / config.rotary_dim)  # [rotary_dim / 2], radians per token
    scaling = config.rotary_scaling
    if scaling is not None and scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling is not None:  # llama3: long waves are stretched, short ones kept, those between interpolated
        turns = scaling.original_max_seq_len * frequency / (2 * math.pi)
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = keep.clamp(0, 1)
        frequency = frequency * keep + frequency / scaling.factor * (1 - keep)
    angle = position_ids[:, None] * frequency
    return angle.cos(), angle.sin()


class Block(nn.Module):
    """One decoder layer: attention and feed-forward network, each behind a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, mesh: Mesh, dtype: torch.dtype):
        super().__init__()
        tp, shards_tokens = mesh.tp, mesh.sequence_parallel
        self.config = config.shard(tp.size)  # what this rank computes
        hidden, head_dim = config.hidden_size, config.head_dim
        q_heads, kv_heads = (config.num_heads, head_dim), (config.num_kv_heads, head_dim)
        self.attn_norm = make_norm(config, dtype, shards_tokens)
        # rows: all query heads, then all key heads, then all value heads
        self.qkv = ColumnParallelLinear(hidden, (q_heads, kv_heads, kv_heads), config.qkv_bias, dtype, tp)
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(head_dim, config.norm_eps, dtype) for _ in range(2))
            for norm in (self.q_norm, self.k_norm):  # each rank norms its own heads
                norm.placements = {"weight": Placement(is_partial=tp.size > 1)}
        self.attn_out = RowParallelLinear((q_heads,), hidden, config.attn_out_bias, dtype, tp, shards_tokens)
        if not config.shared_norm:
            self.ffn_norm = make_norm(config, dtype, shards_tokens)
        # gated: rows of the gate, then rows of the up projection
        columns = (config.ffn_size, 1)
        self.ffn_in = ColumnParallelLinear(hidden, (columns,) * (1 + config.gated), config.ffn_bias, dtype, tp)
        self.ffn_out = RowParallelLinear((columns,), hidden, config.ffn_bias, dtype, tp, shards_tokens)

    def attend(self, heads: Tensor, tables, attention_fn, sharded_tokens: bool = False) -> Tensor:
        """Self-attention: queries, keys and values [tokens, (q + k + v heads) * head_dim] -> [tokens, hidden_size]"""
        config = self.config
        if config.qk_norm:
            q, k, v = split_heads(heads.view(len(heads), -1, config.head_dim), config)
            heads = torch.cat((self.q_norm(q).flatten(1), self.k_norm(k).flatten(1), v.flatten(1)), 1)
        if tables is not None:
            num_rotated = config.num_heads + config.num_kv_heads
            heads = rotate_(heads, *tables, num_rotated, config.head_dim, config.rotary_interleaved)
        return self.attn_out(attention_fn(heads), sharded_tokens)

    def contract(self, x: Tensor, sharded_tokens: bool = False) -> Tensor:
        """Second half of the position-wise network: [tokens, ffn_size or 2 * ffn_size] -> [tokens, hidden_size]"""
        activation = ACTIVATIONS[self.config.activation]
        x = gated_activation(x, activation) if self.config.gated else activation(x)
        return self.ffn_out(x, sharded_tokens)

    def forward(self, x: Tensor, tables, attention_fn, sharded_tokens: bool = False, selective: bool = False) -> Tensor:
        """Args: attention_fn: [tokens, (q + k + v heads) * head_dim] -> [tokens, q heads * head_dim]. sharded_tokens:
        whether x, and what this returns, is [tokens / tp, hidden_size]. selective: norms and activations are recomputed
        in the backward, each up to the product behind it."""
        ffn_norm = self.attn_norm if self.config.shared_norm else self.ffn_norm
        heads = recompute(selective, lambda x: self.qkv(self.attn_norm(x), sharded_tokens), x)
        attended = x + self.attend(heads, tables, attention_fn, sharded_tokens)
        ffn_source = x if self.config.parallel_residual else attended
        expanded = recompute(selective, lambda x: self.ffn_in(ffn_norm(x), sharded_tokens), ffn_source)
        return attended + recompute(selective, self.contract, expanded, sharded_tokens)


class Decoder(nn.Module):
    """Token ids to hidden states after the final norm; the LM head's weight lies here, its product is the caller's.

    With stages (mesh.pp) a rank holds the layers of its `chunks`, under their numbers in the whole model, the rank with
    the first layer also the embeddings, the one with the last the output: final norm and LM head. Where the head is
    tied to the embedding, both ends hold that.

    Args: seed: every parameter is drawn from a generator seeded by (seed, its name); None leaves them uninitialised.
        lm_head: False leaves out an LM head of its own, of which a reward or value model has no use. has_storage:
        False: parameters have their shapes and no memory, until somebody gives it to them. start: the first layer;
        from 1 on there are no embeddings, and `forward` reads what the layer before gave.
    Raises: ValueError if tp or pp do not fit the model.
    Source: the families' papers; `DecoderConfig` says which parts.
    """

    recompute = "none"  # see parallel/recompute.py; set by data parallelism, as is the next
    shards = None  # a `parallel.reshard.Shards` if weights are gathered when a pass comes to them
    fold = None  # a `parallel.reshard.Fold` once rollouts have had all layers on every stage
    files = None  # the `parallel.checkpoint.WeightFiles` that parameters without storage are still to be read from
    tuning = None  # the `parallel.adapters.Tuning` that says what of it trains, once that has been applied
    base = ""  # the fingerprint of the weights that adapters were added to
    trunk = None  # the decoder with which it shares what does not train, see `parallel.adapters.make_reference`

    def __init__(
        self,
        config: DecoderConfig,
        mesh: Mesh,
        dtype: torch.dtype = torch.float32,
        seed: int | None = 0,
        lm_head: bool = True,
        has_storage: bool = True,
        start: int = 0,
    ):
        super().__init__()
        self.config, self.mesh, self.dtype, self.has_lm_head = config, mesh, dtype, lm_head
        self.hf_config: dict = {}  # as read from config.json; what export writes again
        self.generation_config: dict = {}  # likewise of generation_config.json
        self.source = ""  # folder or hub id that the weights came from
        self.layers_by_part = [config.num_layers]
        if mesh.pp.size > 1:
            self.layers_by_part = config.layers_by_part(mesh.layout, lm_head)
        self.chunks = layers_of_stage(self.layers_by_part, mesh.pp.rank, mesh.pp.size)
        if start:
            self.chunks = [range(start, config.num_layers)]
        self.is_first = self.chunks[0].start == 0
        self.is_last = self.chunks[-1].stop == config.num_layers
        self.ties_lm_head = lm_head and config.tied_embeddings
        with torch.device(mesh.device):
            self.embedding = self.position_embedding = self.final_norm = self.lm_head = None
            if self.is_first or (self.is_last and self.ties_lm_head):
                self.embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size, dtype, mesh.tp)
            if self.is_first and config.learned_positions:
                weight = torch.empty(config.max_seq_len, config.hidden_size, dtype=dtype)
                self.position_embedding = nn.Embedding(*weight.shape, _weight=weight)
                self.position_embedding.placements = {"weight": Placement(is_partial=mesh.sequence_parallel)}
            self.layers = nn.ModuleDict()
            for i in (i for chunk in self.chunks for i in chunk):
                self.layers[str(i)] = Block(config, mesh, dtype)
                if not has_storage:  # there is never more than one layer
                    free_storage(self.layers[str(i)])
            if self.is_last:
                self.final_norm = make_norm(config, dtype, mesh.sequence_parallel)
            if self.is_last and lm_head and not config.tied_embeddings:
                self.lm_head = VocabParallelHead(
                    config.hidden_size, config.vocab_size, config.head_bias, dtype, mesh.tp
                )
        if not has_storage:
            free_storage(self)
        self.placements = placements(self)  # of every parameter here, by name
        if seed is not None:
            initialise(self, config, seed)

    @property
    def num_parameters(self) -> int:
        """Of the whole model, without padded vocabulary rows; tied embeddings count once."""
        return self.config.count_parameters(self.has_lm_head)

    @property
    def has_adapters(self) -> bool:
        return self.tuning is not None and self.tuning.lora.rank > 0

    @property
    def lm_head_weight(self) -> Tensor:
        """[padded_vocab / tp, hidden_size], an adapter merged into it; on the last stage"""
        return self.embedding.weight if self.lm_head is None else self.lm_head.merged_weight()

    @property
    def lm_head_bias(self) -> Tensor | None:
        """[padded_vocab / tp]; on the last stage"""
        return None if self.lm_head is None else self.lm_head.bias

    def local_parameters(self, adapters: bool = False) -> Iterator[tuple[str, Tensor]]:
        """This rank's weights by name with adapters merged into them, or the adapters alone.

        Communication: under zero 3 one all-gather over dp per unit; then only the first replica gets any.
        """

        def stored(of_adapters: bool) -> Iterator[tuple[str, Tensor]]:
            whole = self.named_parameters() if self.shards is None else self.shards.whole_parameters(of_adapters)
            return ((name, p.detach()) for name, p in whole if (".adapter." in name) == of_adapters)

        if adapters:
            yield from stored(True)
            return
        low_rank = dict(stored(True)) if self.has_adapters else {}
        for name, weight in stored(False):
            a, b = (low_rank.get(f"{name.removesuffix('weight')}adapter.{x}") for x in "ab")
            yield name, weight if a is None else merge(weight, a, b, self.tuning.lora.scale)

    def full_parameters(self, adapters: bool = False) -> Iterator[tuple[str, Tensor]]:
        """What `local_parameters` gives in full shapes without padding, one at a time, on the first replica.

        Communication: that of `local_parameters`, one all-gather over tp per parameter sharded there; with stages one
        broadcast over pp per parameter, with its name and shape.
        """
        assert self.files is None, "weights that data_parallel has not read yet"
        parameters = self.local_parameters(adapters)
        local = ((name, full_tensor(p, self.placements[name], self.mesh.tp)) for name, p in parameters)
        pp = self.mesh.pp
        if pp.size == 1:
            yield from local
            return
        for stage in range(pp.size):
            while True:
                name, full = next(local, (None, None)) if stage == pp.rank else (None, None)
                head = None if name is None else (name, full.shape, full.dtype)
                head = self.mesh.broadcast_object(head, "pp", stage)
                if head is None:
                    break
                name, shape, dtype = head
                full = torch.empty(shape, dtype=dtype, device=self.mesh.device) if full is None else full.contiguous()
                broadcast_(full, pp, stage)
                if stage == 0 or name != "embedding.weight":  # else the twin of a tied one
                    yield name, full

    def sections(self) -> list[list[nn.Parameter]]:
        """Parameters that passes through this rank's part need one after the other: those of the embeddings, of each
        layer, and of the output, to which a tied embedding of the same rank belongs, too."""
        inputs = [self.embedding if self.is_first else None, self.position_embedding]
        output = [self.final_norm, self.lm_head]
        if self.ties_lm_head and self.mesh.pp.size == 1:
            output.append(self.embedding)
        modules = [inputs, *([layer] for layer in self.layers.values()), output]
        return [[p for module in part if module is not None for p in module.parameters()] for part in modules]

    def enter(self, section: int, x: Tensor | None) -> None:
        """Has the weights of a section at hand: the embeddings, layer by layer, the output; x is what it reads."""
        if self.shards is not None:
            self.shards.enter(section, x)

    def forward(
        self, x: Tensor, position_ids: Tensor, first_key: Tensor, kv_cache=None, layers: range | None = None
    ) -> Tensor:
        """Hidden states after the final norm, or between two layers.

        Args: x: token ids, or what the layer before layers.start gave. first_key: in row coordinates, the earliest
            position that each token's query may see. kv_cache: a `parallel.generation.KVCache`; then keys and values
            are stored in it and read from it. layers: of this rank; None: all of the model.
        Shapes: token ids, position_ids, first_key [batch, seq_len] -> [batch, seq_len, hidden_size]; between layers
            [tokens, hidden_size], under sequence parallelism (without a cache) [tokens / tp, hidden_size]
        """
        assert self.files is None, "weights that data_parallel has not read yet"
        config, tp = self.config, self.mesh.tp
        layers = range(config.num_layers) if layers is None else layers
        shape, num_tokens = position_ids.shape, position_ids.numel()
        sharded_tokens = self.mesh.sequence_parallel and kv_cache is None
        padding = -num_tokens % tp.size if sharded_tokens else 0  # every rank holds as many tokens
        positions = F.pad(position_ids.flatten(), (0, padding))
        tables = None
        if config.rotary_dim:
            tables = tuple(table.to(self.dtype)[:, None] for table in rotary_tables(config, positions))
        cache_tables = None
        if kv_cache is not None and kv_cache.slots is None:  # new tokens are rotated where the cache stores them
            tables, cache_tables = None, tables
        if layers.start == 0:
            token_ids = F.pad(x.flatten(), (0, padding))
            self.enter(0, None)
            x = self.embedding(token_ids, sharded_tokens)  # [tokens, hidden_size], or [tokens / tp, hidden_size]
            if self.position_embedding is not None:
                if sharded_tokens:
                    positions = positions.chunk(tp.size)[tp.rank]
                x = x + self.position_embedding(positions)
        visible = {window: Visible(first_key, window) for window in set(config.windows) or {None}}
        section = list(self.layers).index(str(layers.start))  # the first one here; the input's is 0
        for i in layers:
            section += 1
            layer = self.layers[str(i)]

            def attention_fn(heads, layer=layer, i=i):
                heads = heads[:num_tokens].view(*shape, -1, config.head_dim)  # [batch, seq_len, q + k + v heads, ...]
                if kv_cache is not None:
                    attended = kv_cache.attention(i, heads, visible[config.window(i)], cache_tables)
                else:
                    attended = attention(*split_heads(heads, layer.config), visible[config.window(i)])
                attended = attended.reshape(num_tokens, -1)
                return F.pad(attended, (0, 0, 0, padding)) if padding else attended  # a pad by 0 is a copy

            self.enter(section, x)
            selective = self.recompute == "selective"
            x = recompute(self.recompute == "full", layer, x, tables, attention_fn, sharded_tokens, selective)
        if layers.stop == config.num_layers:
            section += 1
            self.enter(section, x)
            x = self.final_norm(x)
            if sharded_tokens:
                x = split_back(x, tp)[:num_tokens]
            x = x.view(*shape, -1)
        if self.shards is not None:
            self.shards.end(section, x)
        return x


class ScalarHead(nn.Module):
    """One number per hidden state, in float32 at least: values or rewards.

    Args: std: of the normal initialisation; 0 makes it start at 0 everywhere.
    """

    def __init__(self, hidden_size: int, mesh: Mesh, dtype: torch.dtype = torch.float32, std: float = 0.0, seed=0):
        super().__init__()
        weight = torch.randn(1, hidden_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * std
        self.weight = nn.Parameter(weight.to(mesh.device, dtype))
        self.bias = nn.Parameter(torch.zeros(1, device=mesh.device, dtype=dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden_size] -> [...]"""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return F.linear(hidden.to(dtype), self.weight.to(dtype), self.bias.to(dtype)).squeeze(-1)


def free_storage(module: nn.Module) -> None:
    """Gives the parameters' memory back; they stay what they are, of a storage now empty."""
    for parameter in module.parameters():
        parameter.data.untyped_storage().resize_(0)


def split_heads(heads: Tensor, config: DecoderConfig) -> tuple[Tensor, ...]:
    """[..., q + k + v heads, head_dim] -> queries, keys and values"""
    return heads.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=-2)


def make_norm(config: DecoderConfig, dtype: torch.dtype, shards_tokens: bool) -> nn.Module:
    if config.norm == "rmsnorm":
        norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
    else:
        norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
    norm.placements = dict.fromkeys(("weight", "bias"), Placement(is_partial=shards_tokens))
    return norm


@torch.no_grad()
def initialise(decoder: Decoder, config: DecoderConfig, seed: int) -> None:
    """GPT-2's initialisation: normal matrices, the two that write to the residual stream divided by sqrt(2 layers)."""
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1)
        else:
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            residual = name.endswith(("attn_out.weight", "ffn_out.weight"))
            std = config.init_std / math.sqrt(2 * config.num_layers) if residual else config.init_std
            placement = decoder.placements[name]
            full = torch.randn(placement.full_shape(parameter.shape), generator=generator) * std
            fill_local(parameter, full, placement, decoder.mesh.tp)
