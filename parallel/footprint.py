"""Memory and traffic before the run: bytes per rank by component and bytes sent per step, for any model and layout.

Closed forms of what the other modules allocate and send, computed from a config.json alone. They are exact for weights,
gradients, optimizer state, saved activations and traffic, and within 1 % for the peak of a step: `rehearsal.py` plays
the real code on tensors without contents and counts.

    weights      e P           P entries of this rank's units with their padding, of e bytes
    gradients    4 P           float32; from zero 2 on 4 P / dp
    optimizer    12 P          master, m, v in float32 (8 P where weights are float32); from zero 1 on / dp

Activations of a layer, in bytes per token (Korthikanti et al. 2022, arXiv 2205.05198, eq. 1-4, without dropout and with
fused attention; h wide, s = 1 / tp of the tokens under sequence parallelism, else 1; a and k wide the query and the key
heads, f the network, g = 2 of them where there are gate and up projections, else 1):

    full         e s h                                               the layer's input
    selective    e (s h + s h + (2 a + 2 k + g f) / tp)              and what matrix products and attention give
    none         e (s h + s h + (2 a + 2 k + g f + f) / tp + 2 s h)  and what norms and activation functions give

a parallel residual saves one s h; q/k norms keep their input, too, and every attention its [rows, len, len] mask.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from kernels.linear_logprobs import CHUNK_ELEMENTS
from parallel.data_parallel import ALIGNMENT
from parallel.generation import CACHE_BLOCK, NUM_SLOTS, PREFILL_TOKENS
from parallel.mesh import Layout, check_layout
from parallel.model import DecoderConfig
from parallel.order import NUMBERS
from parallel.schedules import peak_in_flight
from parallel.tensor import VOCAB_MULTIPLE, padded_vocab_size

CUDA_CONTEXT = 2**30  # what CUDA, its libraries and NCCL take of a GPU before the first tensor: about so much
SCORED_TOGETHER = 32  # samples of a reward model's forward pass


@dataclass(frozen=True)
class Role:
    """What a script holds under a name: a decoder, or a head without layers."""

    config: DecoderConfig | None = None
    itemsize: int = 4  # bytes of an entry
    trainable: bool = True
    lm_head: bool = True
    shapes: tuple[tuple, ...] = ()  # of a head's parameters; "vocab" is the vocabulary, padded and divided over tp
    in_units: bool = True  # held by `DataParallel`


@dataclass(frozen=True)
class Job:
    """A run as far as memory and traffic go."""

    roles: dict[str, Role]
    batch: int  # sequences of an optimizer step, over all ranks
    microbatch: int  # sequences of a forward and backward, on one rank
    seq_len: int  # of the longest sequences, with which everything is counted
    scored: int  # tokens of a sequence that the loss reads
    rollout: int = 0  # sequences that are generated at a time, over all ranks
    new_tokens: int = 0  # of each
    described: int = 0  # sequences whose log-probabilities are computed between rollout and step, over all ranks

    @property
    def policy(self) -> Role:
        """The decoder that trains, or the first of two."""
        return next(role for role in self.roles.values() if role.config and role.trainable)

    def microbatches(self, num_replicas: int) -> tuple[int, int]:
        """How many a replica has in an optimizer step, and the sequences of one. Raises: ValueError."""
        if self.batch % num_replicas:
            raise ValueError(f"{self.batch} sequences of a step are no multiple of {num_replicas} replicas")
        share = self.batch // num_replicas
        return -(-share // self.microbatch), min(share, self.microbatch)


def scalar_head(hidden_size: int, itemsize: int, bias: bool = True) -> Role:
    """`model.ScalarHead`, in float32 at least."""
    return Role(None, max(itemsize, 4), shapes=((1, hidden_size), (1,))[: 1 + bias])


class Parameter(NamedTuple):
    """A parameter on one rank of tp; partial: (start, stop, count) entries whose gradients tp sums, see `Unit`."""

    shape: tuple[int, ...]
    partial: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class PlannedUnit:
    """`data_parallel.Unit` as numbers."""

    section: str  # input, layer, output or head
    parameters: tuple[Parameter, ...]
    itemsize: int
    trainable: bool
    replicas: int
    zero: int
    is_tied: bool = False  # the head reads it, too

    @property
    def offsets(self) -> list[tuple[Parameter, int]]:
        found, end = [], 0
        for parameter in sorted(self.parameters, key=lambda parameter: len(parameter.shape) < 2):
            found.append((parameter, end))
            end += -(-math.prod(parameter.shape) // ALIGNMENT) * ALIGNMENT
        return found

    @property
    def share(self) -> int:
        """Entries of one replica's part."""
        parameter, offset = self.offsets[-1]
        return -(-(offset + math.prod(parameter.shape)) // (ALIGNMENT * self.replicas)) * ALIGNMENT

    @property
    def size(self) -> int:
        return self.share * self.replicas

    @property
    def wide(self) -> int:
        """Bytes of an entry of gradients and optimizer state."""
        return max(self.itemsize, 4)

    def state(self) -> tuple[int, int, int]:
        """Bytes of weights, gradients and optimizer state."""
        weights = self.itemsize * (self.share if self.zero == 3 and self.section != "head" else self.size)
        if not self.trainable:
            return weights, 0, 0
        kept = self.share if self.zero else self.size
        return (
            weights,
            self.wide * (self.share if self.zero >= 2 else self.size),
            self.wide * kept * (3 if self.itemsize < self.wide else 2),
        )

    def partial_entries(self, replica: int) -> int:
        """Entries in the sum over tp, as far as a replica's part holds them."""
        first, last = (replica * self.share, (replica + 1) * self.share) if self.zero else (0, self.size)
        total = 0
        for parameter, offset in self.offsets:
            for start, stop, count in parameter.partial:
                total += count * max(0, min(offset + stop, last) - max(offset + start, first))
        return total


def make_unit(section: str, parameters, role: Role, replicas: int, zero: int) -> PlannedUnit:
    zero = zero if role.in_units and replicas > 1 else 0  # one replica has nothing to share out
    is_tied = section == "input" and role.lm_head and role.config.tied_embeddings
    return PlannedUnit(section, tuple(parameters), role.itemsize, role.trainable, replicas, zero, is_tied)


def sections(config: DecoderConfig, tp: int, shards_tokens: bool, lm_head: bool) -> dict[str, tuple[Parameter, ...]]:
    """Parameters on one rank of tp of the three kinds of a decoder's units, in the order of its modules."""
    local, hidden, head_dim = config.shard(tp), config.hidden_size, config.head_dim
    q, kv, ffn_in = local.num_heads * head_dim, local.num_kv_heads * head_dim, local.ffn_size * (1 + config.gated)
    shared = [(q, q + kv), (q + kv, q + 2 * kv)] if tp > config.num_kv_heads else []

    def vector(size: int, is_partial: bool) -> Parameter:
        return Parameter((size,), ((0, size, 1),) if is_partial else ())

    def column(rows: int, bias: bool, heads=()) -> list[Parameter]:
        ranges = [tuple((start * n, stop * n, config.num_kv_heads) for start, stop in heads) for n in (hidden, 1)]
        return [Parameter((rows, hidden), ranges[0])] + [Parameter((rows,), ranges[1])] * bias

    norm = [vector(hidden, shards_tokens)] * (2 if config.norm == "layernorm" else 1)
    layer = [*norm, *column(q + 2 * kv, config.qkv_bias, shared), *[vector(head_dim, tp > 1)] * (2 * config.qk_norm)]
    layer += [Parameter((hidden, q)), *[vector(hidden, shards_tokens)] * config.attn_out_bias]
    layer += [*norm] * (not config.shared_norm) + column(ffn_in, config.ffn_bias)
    layer += [Parameter((hidden, local.ffn_size)), *[vector(hidden, shards_tokens)] * config.ffn_bias]
    rows = padded_vocab_size(config.vocab_size, tp) // tp
    positions = Parameter((config.max_seq_len, hidden), ((0, config.max_seq_len * hidden, 1),) * shards_tokens)
    head = column(rows, config.head_bias) if lm_head and not config.tied_embeddings else []
    return {
        "input": (Parameter((rows, hidden)), *[positions] * config.learned_positions),
        "layer": tuple(layer),
        "output": (*norm, *head),
    }


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that holds most."""

    stage: int
    held: dict[str, int]  # always, by component
    phases: dict[str, dict[str, int]]  # beside it at the peak of each phase, by component

    @property
    def phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def total(self) -> int:
        return sum(self.held.values()) + sum(self.phases[self.phase].values())


def memory(job: Job, layout: Layout, world_size: int) -> Memory:
    """What the rank holds that holds most. Raises: ValueError if model or batch cannot be divided so."""
    num_stages = Stage(job, layout, world_size).pp
    found = [Stage(job, layout, world_size, stage).memory() for stage in range(num_stages)]
    return max(found, key=lambda memory: memory.total)


class Stage:
    """One rank of a stage of the pipeline (of the whole model without one): what it holds and sends.

    Args: replica: which of dp, for sums that parts of units decide.
    """

    def __init__(self, job: Job, layout: Layout, world_size: int, stage: int = 0, replica: int = 0):
        check_layout(layout, world_size)
        self.job, self.layout, self.stage, self.replica = job, layout, stage, replica
        self.pp, self.tp = layout.pp, layout.tp
        self.num_parts = self.pp * layout.num_chunks
        self.dp = world_size // (self.tp * self.pp)
        self.is_first, self.is_last = stage == 0, stage == self.pp - 1
        self.shards_tokens = layout.sequence_parallel and self.tp > 1
        self.num_microbatches, self.rows = job.microbatches(self.dp)
        self.places = self.rows * job.seq_len  # tokens of a micro-batch
        self.scored = self.rows * job.scored  # those that the loss reads
        self.tokens = self.places + (-self.places % self.tp if self.shards_tokens else 0)
        self.tokens_local = self.tokens // self.tp if self.shards_tokens else self.tokens  # between the matrices
        self.trained = {name: role for name, role in job.roles.items() if role.trainable}
        self.decoders = {name: role for name, role in self.trained.items() if role.config}
        self.units = {name: self.units_of(role) for name, role in job.roles.items()}

    def num_layers(self, role: Role) -> int:
        config = role.config
        if self.pp == 1 or not role.trainable:
            return config.num_layers
        split = config.layers_by_part(self.layout, role.lm_head)
        return sum(split[self.stage :: self.pp])

    def units_of(self, role: Role) -> list[PlannedUnit]:
        """Units of a role on this rank, heads' and a tied embedding's being those of more replicas with stages."""
        ranks, zero = self.dp * self.pp, self.layout.zero
        if role.config is None:
            rows = padded_vocab_size(self.job.policy.config.vocab_size, self.tp) // self.tp
            shapes = [tuple(rows if n == "vocab" else n for n in shape) for shape in role.shapes]
            return [make_unit("head", map(Parameter, shapes), role, ranks, zero if self.pp == 1 else min(zero, 1))]
        kinds = sections(role.config, self.tp, self.shards_tokens, role.lm_head)
        replicas, has_input, has_output = self.dp, self.is_first, self.is_last
        if self.pp > 1 and not role.trainable:  # a frozen decoder has no stages
            replicas, zero, has_input, has_output = ranks, 3, True, True
        inputs = [make_unit("input", kinds["input"], role, replicas, zero)] * has_input
        if self.pp > 1 and role.trainable and role.lm_head and role.config.tied_embeddings:  # both ends hold it
            positions = [make_unit("input", kinds["input"][1:], role, replicas, zero)] if kinds["input"][1:] else []
            ends = make_unit("input", kinds["input"][:1], role, 2 * self.dp, min(zero, 1))
            inputs = [ends] * (has_input or has_output) + positions * has_input
        layer = make_unit("layer", kinds["layer"], role, replicas, zero)
        outputs = [make_unit("output", kinds["output"], role, replicas, zero)] * has_output
        return [*inputs, *[layer] * self.num_layers(role), *outputs]

    def section(self, name: str, section: str) -> PlannedUnit:
        return next(unit for unit in self.units[name] if unit.section == section)

    # --- memory ---

    def memory(self) -> Memory:
        held: Counter[str] = Counter()
        for name, role in self.job.roles.items():
            states = [sum(x) for x in zip(*(unit.state() for unit in self.units[name]), strict=True)]
            if role is self.job.policy:
                held.update(dict(zip(("weights", "gradients", "optimizer"), states, strict=True)))
            else:
                held[name.replace("_", " ")] = sum(states)
        held["CUDA context"] = CUDA_CONTEXT
        phases = {"update": self.update()}
        if self.job.rollout:
            phases["rollout"] = self.rollout()
        for role in self.job.roles.values():
            if not role.in_units and role.config:  # a reward model
                tokens = SCORED_TOGETHER * self.job.seq_len
                phases["score"] = {"forward": self.forward(role, tokens, self.tokens_local / self.tokens)}
        return Memory(self.stage, dict(held), phases)

    def saved_by_layer(self, role: Role, recompute: str) -> int:
        """Bytes that a layer keeps of a micro-batch for the backward: see the module's docstring."""
        config, e, tokens = role.config, role.itemsize, self.tokens
        local, state = config.shard(self.tp), e * self.tokens_local * config.hidden_size
        if recompute == "full":
            return state
        num_normed = local.num_heads + local.num_kv_heads
        heads = e * tokens * (num_normed + local.num_kv_heads) * config.head_dim
        saved = state * (1 if config.parallel_residual else 2)
        saved += heads + e * self.places * local.num_heads * config.head_dim
        saved += 4 * self.places * local.num_heads + e * self.places * self.job.seq_len  # logarithms of sums; mask
        if tokens > self.places:  # attention's result once more, padded
            saved += e * tokens * local.num_heads * config.head_dim
        if config.qk_norm:
            saved += heads + max(e, 4) * tokens * num_normed
        expanded = e * tokens * local.ffn_size * (1 + config.gated)
        if recompute == "selective":
            return saved + expanded
        if config.activation == "relu" and not config.gated:
            expanded = 0  # its backward reads the output
        return saved + expanded + e * tokens * local.ffn_size + 2 * (state + self.statistics(role))

    def statistics(self, role: Role) -> int:
        """Bytes that a norm keeps beside its input."""
        return self.tokens_local * (max(role.itemsize, 4) if role.config.norm == "rmsnorm" else 2 * role.itemsize)

    def saved_by_stage(self) -> int:
        """Bytes that the layers of all decoders, and what lies around them, keep of one micro-batch."""
        saved = 0
        for role in self.decoders.values():
            config = role.config
            saved += self.num_layers(role) * self.saved_by_layer(role, self.layout.recompute)
            saved += role.itemsize * self.tokens * 2 * -(-config.rotary_dim // 2)  # cosines and sines
            if self.is_first:
                saved += self.tokens * (8 + (self.tp > 1) + 8 * config.learned_positions)
        return saved

    def last_state(self, role: Role) -> int:
        """Bytes that the final norm keeps: its input."""
        return role.itemsize * self.tokens_local * role.config.hidden_size + self.statistics(role)

    def saved_by_heads(self) -> int:
        """Bytes that the heads on the last stage keep of a micro-batch: states of scored tokens, and what they make."""
        n, trunk, saved = self.scored, self.job.policy, 0
        for role in self.trained.values():
            if role.config:  # with states, their indices and log-probabilities
                saved += self.last_state(role) + n * (role.itemsize * role.config.hidden_size + 40)
            elif role.itemsize > trunk.itemsize:  # reads a wider copy of the states
                saved += n * role.itemsize * trunk.config.hidden_size
            inner = [shape[0] for shape in role.shapes if len(shape) == 2 and shape[0] not in ("vocab", 1)]
            saved += n * role.itemsize * sum(inner)
        kept = [max(e, 4) * n * rows for rows, _, e, _ in self.vocabulary_products() if n <= CHUNK_ELEMENTS // rows]
        return saved + sum(kept)

    def vocabulary_products(self) -> list[tuple[int, int, int, PlannedUnit]]:
        """(rows here, width, bytes of an entry, unit) of each trained matrix whose rows are the vocabulary."""
        found = []
        for name, role in self.trained.items():
            if role.config and role.lm_head:
                found.append((role.config.hidden_size, role.itemsize, self.units[name][-1]))
            widths = [shape[1] for shape in role.shapes if shape[0] == "vocab" and len(shape) == 2]
            found += [(width, role.itemsize, self.units[name][0]) for width in widths]
        vocab_size = self.job.policy.config.vocab_size
        rows = min(padded_vocab_size(vocab_size, self.tp) // self.tp, vocab_size)
        return [(rows, *product) for product in found]

    def update(self) -> dict[str, int]:
        """Bytes beside what is held at the peak of an optimizer step: the largest of some moments of its backward."""
        in_flight = peak_in_flight(
            self.layout.schedule, self.stage, self.pp, self.num_microbatches, self.layout.num_chunks
        )
        saved = self.saved_by_stage() * in_flight // (self.num_parts // self.pp)
        units = [unit for name in self.trained for unit in self.units[name]]
        # from zero 2 on gradients have no storage until their first sum: with one micro-batch, while activations lie
        absent = -sum(unit.state()[1] for unit in units if unit.zero >= 2) * (self.num_microbatches == 1)
        moments = []
        for name, role in self.decoders.items():
            working, gathered = self.layer_backward(name, role)
            moments.append({"activations": saved + absent, "working memory": working, "gathered weights": gathered})
            last = self.saved_by_layer(role, self.layout.recompute)
            moments.append({"activations": last, "working memory": working, "gathered weights": gathered})
            if self.is_first:
                moments.append({"working memory": self.embedding_backward(name, role)})
        if self.is_last:
            outputs = [self.section(name, "output") for name in self.decoders]
            gathered = sum(unit.itemsize * unit.size for unit in outputs if unit.zero == 3)
            for product in self.vocabulary_products():
                working, summing = self.head_backward(*product)
                lying = saved + absent + self.saved_by_heads()
                moments.append({"activations": lying, "working memory": working, "gathered weights": gathered})
                lying = saved + absent + sum(map(self.last_state, self.decoders.values()))
                moments.append({"activations": lying, "working memory": summing, "gathered weights": gathered})
        if self.layout.reduce_dtype == "bfloat16":
            buckets = sum(2 * unit.size for unit in units if unit.zero < 2 and unit.replicas > 1)
            last = [self.embedding_backward(name, role) for name, role in self.decoders.items() if self.is_first]
            moments.append({"working memory": buckets + max(last, default=0)})
        peak = max(moments, key=lambda moment: sum(moment.values()))
        if self.pp > 1:  # a message ahead and one on its way, in both directions
            widths = [role.itemsize * role.config.hidden_size for role in self.decoders.values()]
            peak["messages"] = 4 * self.tokens_local * sum(widths)
        return peak

    def layer_backward(self, name: str, role: Role) -> tuple[int, int]:
        """Bytes of the work on the gradients of the last layer, whose activations all lie there, and of weights
        gathered meanwhile: the largest of some moments while the backward goes through its network."""
        config, e, unit = role.config, role.itemsize, self.section(name, "layer")
        local, recompute, tied = config.shard(self.tp), self.layout.recompute, config.tied_embeddings and role.lm_head
        state, full = e * self.tokens_local * config.hidden_size, e * self.tokens * config.hidden_size
        inner = e * self.tokens * local.ffn_size
        expanded = inner * (1 + config.gated)
        second = local.ffn_size * config.hidden_size  # entries of the network's second matrix
        first = second * (1 + config.gated)
        on_its_way = unit.wide + e * (e < unit.wide)  # bytes a gradient's entry takes until it is summed
        gathered = full * self.shards_tokens
        moments = (
            state + gathered + inner + e * second,  # products of the second matrix
            state + on_its_way * second,  # its gradient
            state + expanded + 3 * inner * config.gated,  # of the activation
            state + full + gathered - inner + e * first,  # products of the first matrix
            state - inner - expanded + on_its_way * first,  # its gradient
            2 * state - inner - expanded + 3 * unit.wide * state // e * (config.norm == "rmsnorm"),  # of the norm
        )
        working = max(moments)
        if recompute == "selective":
            working += inner
        elif recompute == "full":  # the mask of all layers stays, too
            working += self.saved_by_layer(role, "none") - state + self.places * self.job.seq_len
        if tied and self.is_last:  # the head's gradient waits for that of the embedding
            working += unit.wide * math.prod(self.section(name, "input").parameters[0].shape)
        if unit.zero >= 2:
            working += unit.wide * unit.size
        return working, 2 * e * unit.size if unit.zero == 3 else 0

    def embedding_backward(self, name: str, role: Role) -> int:
        """Bytes of the work on the embedding's gradient, when activations are gone."""
        unit, layer, e = self.section(name, "input"), self.section(name, "layer"), role.itemsize
        is_tied = role.config.tied_embeddings and role.lm_head
        matrix = math.prod(unit.parameters[0].shape)
        on_its_way = 3 * unit.wide if is_tied else unit.wide + e * (e < unit.wide)  # tied: two uses and their sum
        if unit.zero < 2:
            return on_its_way * matrix
        bucket = unit if len(unit.parameters) > 1 else layer  # that of learned positions' gradients is there before
        return max(on_its_way * matrix + bucket.wide * bucket.size, unit.wide * (matrix + unit.size))

    def head_backward(self, rows: int, width: int, e: int, unit: PlannedUnit) -> tuple[int, int]:
        """Bytes of a vocabulary product's backward: while logits lie there, and while its gradient is summed."""
        n, wide = self.scored, unit.wide
        chunk = min(n, max(CHUNK_ELEMENTS // rows, 1))
        copies = wide * (1 + (n > chunk)) + e * (e < wide)  # of logits: weighted, again, rounded
        heads = any(role.config is None for role in self.trained.values())  # the states' gradient from those waits
        working = copies * chunk * rows + (wide + e) * rows * width + e * n * width * (1 + heads)
        summing = wide * (rows * width + unit.size) + e * n * width if unit.zero >= 2 else 0
        return working, summing

    def forward(self, role: Role, tokens: int, share: float = 1.0) -> int:
        """Bytes of a forward pass without gradient; share: of the tokens that lie here between the matrices."""
        config, local = role.config, role.config.shard(self.tp)
        states = 1 + 2 * share * (1 + (self.tp > 1))  # a product; layer and residual stream, their sums and biased sums
        heads = (local.num_heads + 2 * local.num_kv_heads) * config.head_dim
        return int(role.itemsize * tokens * ((2 + config.gated) * local.ffn_size + config.hidden_size * states + heads))

    def rollout(self) -> dict[str, int]:
        """Bytes beside what is held while sequences are generated; stages work as replicas (folded)."""
        role, job = self.job.policy, self.job
        config, e, local = role.config, role.itemsize, role.config.shard(self.tp)
        slots = min(NUM_SLOTS, -(-job.rollout // (self.dp * self.pp)))
        capacity = -(-(job.seq_len - 1) // CACHE_BLOCK) * CACHE_BLOCK
        cache = 2 * e * config.num_layers * slots * local.num_kv_heads * capacity * config.head_dim
        prompt_len = max(job.seq_len - job.new_tokens, 1)
        prefill = self.forward(role, min(max(PREFILL_TOKENS // prompt_len, 1), slots) * prompt_len)
        rows = padded_vocab_size(config.vocab_size, self.tp) // self.tp
        decode = slots * rows * (e + 4 * 4) + cache // config.num_layers
        found = {"KV cache": cache, "working memory": max(prefill, decode)}
        if self.layout.zero == 3 or self.pp > 1:  # whole weights; a stage has its own layers
            whole = Stage(job, Layout(tp=self.tp, sequence_parallel=self.layout.sequence_parallel), self.tp)
            units = [unit for name, x in job.roles.items() if x is role for unit in whole.units[name]]
            own = sum(sum(unit.state()[:1]) for unit in self.units[next(iter(self.decoders))] if unit.zero < 3)
            found["gathered weights"] = sum(e * unit.size for unit in units) - own
        return found

    # --- traffic ---

    def traffic(self) -> dict[str, Counter]:
        """Bytes that this rank sends in an optimizer step and in a rollout, by (axis, operation), as a ring counts.

        Without the metrics, a few numbers. A rollout counts every sequence at its full length.
        """
        step: Counter = Counter()

        def send(op: str, axis: str, nbytes: int, count: int = 1, into: Counter = step) -> None:
            size = {"tp": self.tp, "dp": self.dp, "folded": self.dp * self.pp, "ends": 2 * self.dp}[axis]
            if size > 1 and nbytes:
                nbytes = nbytes * (1 + (op == "all_reduce")) * (size - 1) // size
                into["dp" if axis == "folded" else axis, op] += count * nbytes

        m, sharded = self.num_microbatches, self.shards_tokens
        for role in self.decoders.values():
            n, states = self.num_layers(role), role.itemsize * self.tokens * role.config.hidden_size
            full, selective = (self.layout.recompute == name for name in ("full", "selective"))
            if sharded:  # columns gather twice, rows scatter, and gather backward
                send("all_gather", "tp", states, m * (n * (6 + 2 * (full or selective)) + self.is_first + self.is_last))
                send("reduce_scatter", "tp", states, m * (n * (4 + full) + self.is_first))
            else:
                send("all_reduce", "tp", states, m * (n * (4 + full) + self.is_first))
        if self.is_last:
            for _, width, e, unit in self.vocabulary_products():
                for nbytes in (unit.wide * self.scored, 3 * unit.wide * self.scored, e * self.scored * width):
                    send("all_reduce", "tp", nbytes, m)
        for name in self.trained:
            for unit in self.units[name]:
                self.send_unit(unit, m, send)
        world = self.dp * self.pp * self.tp
        step["world", "all_gather"] += 8 * NUMBERS * (world - 1)  # the norm of all gradients, and order
        if self.pp > 1:
            message = sum(
                role.itemsize * self.tokens_local * role.config.hidden_size for role in self.decoders.values()
            )
            borders = self.num_parts // self.pp * 2 - self.is_first - self.is_last
            step["pp", "send"] += m * message * borders
        return {"step": step, "rollout": self.rollout_traffic(send)}

    def send_unit(self, unit: PlannedUnit, m: int, send) -> None:
        """What a trained unit's gradients and weights cost in a step of m micro-batches."""
        axis = {self.dp: "dp", self.dp * self.pp: "folded", 2 * self.dp: "ends"}[unit.replicas]
        summed = unit.size * (2 if self.layout.reduce_dtype == "bfloat16" else unit.wide)
        if unit.zero == 0:
            send("all_reduce", axis, summed)
        else:
            send("reduce_scatter", axis, summed, m if unit.zero >= 2 else 1)
        if unit.zero == 3 and unit.section != "head":  # layers once more in the backward, a tied embedding for the head
            send("all_gather", axis, unit.itemsize * unit.size, m * (1 + (unit.section == "layer" or unit.is_tied)))
        elif unit.zero:
            send("all_gather", axis, unit.itemsize * unit.size)
        send("all_reduce", "tp", unit.wide * unit.partial_entries(self.replica))

    def rollout_traffic(self, send) -> Counter:
        """Sampling, whole weights for it, and the forwards that describe what was sampled."""
        found: Counter = Counter()
        job, role = self.job, self.job.policy
        if not job.rollout:
            return found
        share = -(-job.rollout // (self.dp * self.pp))
        states = role.itemsize * role.config.hidden_size * share * (job.seq_len - 1)
        send("all_reduce", "tp", states, 2 * role.config.num_layers + 1, found)
        blocks = padded_vocab_size(role.config.vocab_size, self.tp) // VOCAB_MULTIPLE
        drawn = share * job.new_tokens
        send("all_reduce", "tp", (4 + 16) * drawn, 1, found)  # the largest logit; id and logit of what was drawn
        send("all_gather", "tp", 8 * blocks * drawn, 2, found)
        passes = -(-job.described // (self.dp * job.microbatch))
        for name, each in job.roles.items():
            if each.config and each.in_units:
                self.send_forwards(name, each, passes, found, send)
        whole = [unit for unit in self.units[next(iter(self.decoders))] if unit.zero == 3]
        for unit in whole:
            send("all_gather", "dp", unit.itemsize * unit.size, 1, found)
        if self.pp > 1:  # folded: every stage gets the layers of all
            found["pp", "broadcast"] += self.rollout()["gathered weights"] * (self.pp - 1) // self.pp
        return found

    def send_forwards(self, name: str, role: Role, passes: int, found: Counter, send) -> None:
        """What forward passes over micro-batches cost without gradient."""
        states, n = role.itemsize * self.tokens * role.config.hidden_size, self.num_layers(role)
        if self.shards_tokens:
            send("all_gather", "tp", states, passes * (2 * n + self.is_last), found)
            send("reduce_scatter", "tp", states, passes * (2 * n + self.is_first), found)
        else:
            send("all_reduce", "tp", states, passes * (2 * n + self.is_first), found)
        if role.lm_head and self.is_last:
            send("all_reduce", "tp", 4 * max(role.itemsize, 4) * self.scored, passes, found)
        for unit in self.units[name]:
            if unit.zero == 3:
                axis = "dp" if unit.replicas == self.dp else "folded"
                send("all_gather", axis, unit.itemsize * unit.size, passes * (1 + unit.is_tied), found)
