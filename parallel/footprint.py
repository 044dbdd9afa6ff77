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

import functools
import itertools
import math
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

from kernels.linear_logprobs import CHUNK_ELEMENTS
from parallel.data_parallel import ALIGNMENT
from parallel.generation import CACHE_BLOCK, NUM_SLOTS, PREFILL_TOKENS
from parallel.mesh import Layout, check_layout
from parallel.model import DecoderConfig
from parallel.order import NUMBERS
from parallel.pipeline import make_program
from parallel.reshard import Shards, free_units
from parallel.schedules import Action, Transfer
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
    in_units: bool = True  # in the model that trains, beside it otherwise


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
    axis: str = "dp"  # over which its replicas lie
    is_offloaded: bool = False  # its optimizer state, or frozen its weights, are in the host's memory

    @functools.cached_property
    def offsets(self) -> list[tuple[Parameter, int]]:
        found, end = [], 0
        for parameter in sorted(self.parameters, key=lambda parameter: len(parameter.shape) < 2):
            found.append((parameter, end))
            end += -(-math.prod(parameter.shape) // ALIGNMENT) * ALIGNMENT
        return found

    @functools.cached_property
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

    def state(self) -> tuple[int, int, int, int]:
        """Bytes of weights, gradients and optimizer state, and of what lies in the host's memory."""
        weights = self.itemsize * (self.share if self.zero == 3 and self.section != "head" else self.size)
        if not self.trainable:
            return (0, 0, 0, weights) if self.is_offloaded else (weights, 0, 0, 0)
        gradients = self.wide * (self.share if self.zero >= 2 else self.size)
        kept = self.wide * (self.share if self.zero else self.size)
        if self.is_offloaded:  # with a master copy always, and the gradients that the step reads
            return weights, gradients, 0, 4 * kept
        return weights, gradients, kept * (3 if self.itemsize < self.wide else 2), 0

    def partial_entries(self, replica: int) -> int:
        """Entries in the sum over tp, as far as a replica's part holds them."""
        first, last = (replica * self.share, (replica + 1) * self.share) if self.zero else (0, self.size)
        total = 0
        for parameter, offset in self.offsets:
            for start, stop, count in parameter.partial:
                total += count * max(0, min(offset + stop, last) - max(offset + start, first))
        return total


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


layers_by_part = functools.lru_cache(maxsize=256)(DecoderConfig.layers_by_part)
shard = functools.lru_cache(maxsize=256)(DecoderConfig.shard)


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that holds most."""

    stage: int
    held: dict[str, int]  # always, by component
    host: int  # in the host's memory
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
        self.dp = world_size // (self.tp * self.pp)
        self.sizes = {"tp": self.tp, "dp": self.dp, "pp": self.pp, "folded": self.dp * self.pp, "ends": 2 * self.dp}
        self.num_chunks = layout.num_chunks if self.pp > 1 else 1
        self.is_first, self.is_last = stage == 0, stage == self.pp - 1
        self.shards_tokens = layout.sequence_parallel and self.tp > 1
        self.num_microbatches, self.rows = job.microbatches(self.dp)
        self.places = self.rows * job.seq_len  # tokens of a micro-batch
        self.scored = self.rows * job.scored  # those that the loss reads
        self.tokens = self.places + (-self.places % self.tp if self.shards_tokens else 0)
        self.tokens_local = self.tokens // self.tp if self.shards_tokens else self.tokens  # between the matrices
        self.folds = self.pp > 1 and layout.rollout != "rotation"  # stages are replicas during a rollout
        self.trained = {name: role for name, role in job.roles.items() if role.trainable}
        self.decoders = {name: role for name, role in self.trained.items() if role.config}
        self.units = {name: self.units_of(role) for name, role in job.roles.items()}

    @property
    def slots(self) -> int:
        """Sequences of a group that are generated at a time; without stages, or folded, there is one group."""
        replicas, groups = ("folded", 1) if self.folds else ("dp", self.pp)
        of_replica = math.ceil(self.job.rollout / self.sizes[replicas])
        return min(NUM_SLOTS, math.ceil(of_replica / groups))

    def layers(self, role: Role) -> list[int]:
        """How many layers of a decoder each chunk of this stage has; a frozen one has no stages."""
        if self.pp == 1 or not role.trainable:
            return [role.config.num_layers]
        return layers_by_part(role.config, self.layout, role.lm_head)[self.stage :: self.pp]

    def is_start(self, chunk: int) -> bool:
        """Whether this is the first part of the model."""
        return self.is_first and chunk == 0

    def is_end(self, chunk: int) -> bool:
        return self.is_last and chunk == self.num_chunks - 1

    def units_of(self, role: Role) -> list[PlannedUnit]:
        """Units of a role on this rank, heads' and a tied embedding's being those of more replicas with stages."""
        is_offloaded = ("optimizer" if role.trainable else "frozen") in self.layout.offload

        def make(section: str, parameters, axis: str, zero: int) -> PlannedUnit:
            replicas = self.sizes[axis]
            if replicas == 1 and (role.trainable or not is_offloaded):
                zero = 0  # there is nothing to share out
            placed = role.itemsize, role.trainable, replicas, zero, axis, is_offloaded
            return PlannedUnit(section, tuple(parameters), *placed)

        zero, at_ends = self.layout.zero, self.layout.zero if self.pp == 1 else min(self.layout.zero, 1)
        if role.config is None:
            is_offloaded = is_offloaded and role.trainable
            rows = padded_vocab_size(self.job.policy.config.vocab_size, self.tp) // self.tp
            shapes = [tuple(rows if n == "vocab" else n for n in shape) for shape in role.shapes]
            return [make("head", map(Parameter, shapes), "folded", at_ends)]
        kinds = sections(role.config, self.tp, self.shards_tokens, role.lm_head)
        axis, has_input, has_output = "dp", self.is_first, self.is_last
        if not role.trainable:
            axis, has_input, has_output = "folded", True, True
            zero = 3 if self.pp > 1 or is_offloaded else zero
        inputs = [make("input", kinds["input"], axis, zero)] * has_input
        if self.pp > 1 and role.trainable and role.lm_head and role.config.tied_embeddings:  # both ends hold it
            positions = [make("input", kinds["input"][1:], axis, zero)] if kinds["input"][1:] else []
            ends = make("input", kinds["input"][:1], "ends", at_ends)
            inputs = [ends] * (has_input or has_output) + positions * has_input
        layers = [make("layer", kinds["layer"], axis, zero)] * sum(self.layers(role))
        return [*inputs, *layers, *[make("output", kinds["output"], axis, zero)] * has_output]

    def section(self, name: str, section: str) -> PlannedUnit:
        return next(unit for unit in self.units[name] if unit.section == section)

    # --- memory ---

    def held(self) -> tuple[dict[str, int], int]:
        """Bytes that lie there always, by component, and in the host's memory."""
        held: Counter[str] = Counter()
        host = 0
        for name, role in self.job.roles.items():
            *states, of_host = [sum(x) for x in zip(*(unit.state() for unit in self.units[name]), strict=True)]
            host += of_host
            if role is self.job.policy:
                held.update(dict(zip(("weights", "gradients", "optimizer"), states, strict=True)))
            else:
                held[name.replace("_", " ")] = sum(states)
        held["CUDA context"] = CUDA_CONTEXT
        return dict(held), host

    def memory(self) -> Memory:
        held, host = self.held()
        phases = {"update": self.update()}
        if self.job.rollout:
            phases["rollout"] = self.rollout()
        for name, role in self.job.roles.items():
            if not role.in_units and role.config:  # a reward model
                forward = self.forward(role, SCORED_TOGETHER * self.job.seq_len, self.tokens_local / self.tokens)
                streamed = sorted(unit.itemsize * unit.size for unit in self.units[name] if unit.zero == 3)
                phases["score"] = {"forward": forward, "gathered weights": sum(streamed[-2:])}
        return Memory(self.stage, held, host, phases)

    def saved_by_layer(self, role: Role, recompute: str) -> int:
        """Bytes that a layer keeps of a micro-batch for the backward: see the module's docstring."""
        config, e, tokens = role.config, role.itemsize, self.tokens
        local, state = shard(config, self.tp), e * self.tokens_local * config.hidden_size
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

    def saved_by_chunk(self, chunk: int) -> int:
        """Bytes that a chunk's layers of all decoders, and what lies around them, keep of one micro-batch."""
        return sum(
            self.layers(role)[chunk] * self.saved_by_layer(role, self.layout.recompute) + self.saved_around(role, chunk)
            for role in self.decoders.values()
        )

    def saved_around(self, role: Role, chunk: int) -> int:
        """Bytes that a decoder's layers share: cosines and sines, the mask of recomputations, token ids."""
        saved = role.itemsize * self.tokens * 2 * -(-role.config.rotary_dim // 2)
        saved += self.places * self.job.seq_len * (self.layout.recompute == "full")
        return saved + self.tokens * (8 + (self.tp > 1) + 8 * role.config.learned_positions) * self.is_start(chunk)

    def last_state(self, role: Role) -> int:
        """Bytes that the final norm keeps: its input."""
        return role.itemsize * self.tokens_local * role.config.hidden_size + self.statistics(role)

    def saved_by_heads(self) -> int:
        """Bytes that the heads on the last stage keep of a micro-batch: states of scored tokens, and what they make."""
        n, saved = self.scored, 0
        for role in self.trained.values():
            if role.config:  # with states, their indices and log-probabilities
                saved += self.last_state(role) + n * (role.itemsize * role.config.hidden_size + 40)
            else:
                saved += self.wider_states(role)
            inner = [shape[0] for shape in role.shapes if len(shape) == 2 and shape[0] not in ("vocab", 1)]
            saved += n * role.itemsize * sum(inner)
        kept = [max(e, 4) * n * rows for rows, _, e, _ in self.vocabulary_products() if n <= CHUNK_ELEMENTS // rows]
        return saved + sum(kept)

    def wider_states(self, role: Role) -> int:
        """Bytes of the copy of the states that a head reads which is wider than the trunk."""
        trunk = self.job.policy
        return self.scored * role.itemsize * trunk.config.hidden_size * (role.itemsize > trunk.itemsize)

    def vocabulary_products(self) -> list[tuple[int, int, int, PlannedUnit]]:
        """(rows here, width, bytes of an entry, unit) of each trained matrix whose rows are the vocabulary."""
        found = []
        for name, role in self.trained.items():
            if role.config and role.lm_head:
                at_ends = self.pp > 1 and role.config.tied_embeddings
                found.append((role.config.hidden_size, role.itemsize, self.units[name][0 if at_ends else -1]))
            widths = [shape[1] for shape in role.shapes if shape[0] == "vocab" and len(shape) == 2]
            found += [(width, role.itemsize, self.units[name][0]) for width in widths]
        vocab_size = self.job.policy.config.vocab_size
        rows = min(padded_vocab_size(vocab_size, self.tp) // self.tp, vocab_size)
        return [(rows, *product) for product in found]

    @property
    def program(self) -> list[Action | Transfer]:
        """What this stage does in a step, one after the other."""
        return make_program(self.layout.schedule, self.pp, self.num_microbatches, self.num_chunks)[self.stage]

    def backwards(self) -> set[tuple[int, tuple[int, ...], frozenset[int], int]]:
        """Kinds of backward passes in a step: the chunk, how many forwards of each chunk wait for theirs meanwhile,
        chunks that have had one before, and messages that lie there: sent last, or to be received ahead."""
        waiting, done, found = [0] * self.num_chunks, frozenset(), set()
        received = sent = 0
        for step in self.program:
            if isinstance(step, Transfer):
                received += step.kind == "recv"
                sent = sent or step.kind == "send"
            elif step.kind == "F":
                waiting[step.chunk] += 1
                received -= not self.is_start(step.chunk)
            else:
                waiting[step.chunk] -= 1
                received -= not self.is_end(step.chunk)
                found.add((step.chunk, tuple(waiting), done, received + sent))
                done |= {step.chunk}
        return found

    def absent(self, chunk: int) -> int:
        """Bytes of a chunk's gradients, if they have no storage until their first sum: from zero 2 on."""
        absent = 0
        for name, role in self.trained.items():
            counts = {"head": self.pp == 1, "input": self.is_start(chunk), "output": self.is_end(chunk)}
            if role.config:
                counts["layer"] = self.layers(role)[chunk]
            for unit in set(self.units[name]):
                absent += unit.state()[1] * counts[unit.section] * (unit.zero >= 2)
        return absent

    def read_by_heads(self, role: Role) -> tuple[str, ...]:
        """Sections of a decoder that stay whole from the last part's forward to its backward."""
        return ("output", "input") if self.pp == 1 and role.lm_head and role.config.tied_embeddings else ("output",)

    def update(self) -> dict[str, int]:
        """Bytes beside what is held at the peak of an optimizer step: the largest of some moments of its backward."""
        moments = []

        def add(activations: int, working: int, gathered: int = 0, messages: int = 0) -> None:
            moment = {"activations": activations, "working memory": working, "gathered weights": gathered}
            moments.append(moment | {"messages": messages * self.message})

        saved = [self.saved_by_chunk(chunk) for chunk in range(self.num_chunks)]
        by_heads = self.saved_by_heads() if self.is_last else 0
        read = [
            u for name, role in self.decoders.items() for u in self.units[name] if u.section in self.read_by_heads(role)
        ]
        output = sum(unit.itemsize * unit.size for unit in read if unit.zero == 3)  # stays until its backward
        of_layer = {name: self.layer_backward(name, role) for name, role in self.decoders.items()}
        for chunk, waiting, done, messages in self.backwards():
            gradient = not self.is_end(chunk)  # what has come for this pass lies there to its end
            others = sum(n * x for n, x in zip(waiting, saved, strict=True)) + waiting[-1] * by_heads
            others -= sum(self.absent(i) for i in range(self.num_chunks) if i not in done | {chunk})
            mine = saved[chunk] - self.absent(chunk) * (chunk not in done)
            kept = output * (waiting[-1] > 0)
            for name, role in self.decoders.items():
                working, unit = of_layer[name]
                gathered = unit * min(sum(self.layers(role)[: chunk + 1]), 2)  # this layer and the one before
                add(others + mine, working, gathered + kept, messages)
                last = self.saved_by_layer(role, self.layout.recompute) + self.saved_around(role, chunk)
                add(others + last, working, gathered + kept, messages + gradient)
                if self.is_start(chunk):
                    add(others, self.embedding_backward(name, role, chunk not in done), kept, messages + gradient)
            if self.is_end(chunk):
                copies = sum(self.wider_states(role) for role in self.trained.values() if not role.config)
                for product in self.vocabulary_products():
                    working, summing = self.head_backward(*product)
                    add(others + mine + by_heads - copies, working, output, messages)  # heads before have freed those
                    add(others + mine + sum(map(self.last_state, self.decoders.values())), summing, output, messages)
        if self.layout.reduce_dtype == "bfloat16":
            units = [unit for name in self.trained for unit in self.units[name]]
            buckets = sum(2 * unit.size for unit in units if unit.zero < 2 and unit.replicas > 1)
            last = [self.embedding_backward(name, role, False) for name, role in self.decoders.items() if self.is_first]
            add(0, buckets + max(last, default=0))
        return max(moments, key=lambda moment: sum(moment.values()))

    @property
    def message(self) -> int:
        """Bytes of what goes from stage to stage: the states of a micro-batch in every decoder."""
        return self.tokens_local * sum(role.itemsize * role.config.hidden_size for role in self.decoders.values())

    def layer_backward(self, name: str, role: Role) -> tuple[int, int]:
        """Bytes of the work on the gradients of the last layer, whose activations all lie there, and of a
        layer if it is gathered: the largest of some moments while the backward goes through its network."""
        config, e, unit = role.config, role.itemsize, self.section(name, "layer")
        local, recompute = shard(config, self.tp), self.layout.recompute
        tied = config.tied_embeddings and role.lm_head and self.pp == 1
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
        elif recompute == "full":
            working += self.saved_by_layer(role, "none") - state
        if tied:  # the head's gradient waits for that of the embedding
            working += unit.wide * math.prod(self.section(name, "input").parameters[0].shape)
        if unit.zero >= 2:
            working += unit.wide * unit.size
        return working, e * unit.size if unit.zero == 3 else 0

    def embedding_backward(self, name: str, role: Role, is_first_sum: bool) -> int:
        """Bytes of the work on the embedding's gradient, when the micro-batch's activations are gone.

        Args: is_first_sum: of gradients that have no storage before.
        """
        unit, layer, e = self.section(name, "input"), self.section(name, "layer"), role.itemsize
        is_tied = role.config.tied_embeddings and role.lm_head and self.pp == 1
        matrix = math.prod(unit.parameters[0].shape)
        on_its_way = 3 * unit.wide if is_tied else unit.wide + e * (e < unit.wide)  # tied: two uses and their sum
        later = [u for u in self.units[name] if u.section == "input" and u.zero >= 2]
        absent = is_first_sum * unit.wide * sum(u.share for u in later)
        if layer.zero < 2:
            return on_its_way * matrix
        bucket = layer.wide * (layer.size - is_first_sum * layer.share)  # of the first layer, not yet summed
        if later and len(later[0].parameters) + (unit.zero < 2) > 1:  # learned positions': their gradient comes before
            bucket = unit.wide * later[0].size
        return max(on_its_way * matrix + bucket, unit.wide * (matrix + unit.size) * (unit.zero >= 2)) - absent

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
        config, local = role.config, shard(role.config, self.tp)
        states = 1 + share * (2 + (self.tp > 1))  # a product; residual stream before and after attention; a sum over tp
        heads = (local.num_heads + 2 * local.num_kv_heads) * config.head_dim
        return int(role.itemsize * tokens * ((2 + config.gated) * local.ffn_size + config.hidden_size * states + heads))

    def rollout(self) -> dict[str, int]:
        """Bytes beside what is held while sequences are generated: by this stage's layers, or by all if it folds."""
        role, job, name = self.job.policy, self.job, next(iter(self.decoders))
        config, e, local = role.config, role.itemsize, shard(role.config, self.tp)
        groups, num_layers, has_head = self.pp, sum(self.layers(role)), self.is_last
        gathered = sum(unit.itemsize * unit.size for unit in self.units[name] if unit.zero == 3)
        on_its_way = 0
        if self.folds:
            groups, num_layers, has_head = 1, config.num_layers, True
            on_its_way = max((unit.itemsize * unit.size for unit in self.units[name] if unit.zero == 3), default=0)
            gathered = sum(e * math.prod(parameter.shape) for parameter in self.whole(role))
        capacity = -(-(job.seq_len - 1) // CACHE_BLOCK) * CACHE_BLOCK
        layer_cache = 2 * e * self.slots * local.num_kv_heads * capacity * config.head_dim
        cache = groups * num_layers * layer_cache
        prompt_len = max(job.seq_len - job.new_tokens, 1)
        tokens = min(max(PREFILL_TOKENS // prompt_len, 1), self.slots) * prompt_len
        came = e * tokens * config.hidden_size if groups > 1 and not (self.is_first and self.num_chunks == 1) else 0
        working = [self.forward(role, tokens) + came, layer_cache, on_its_way - cache]
        if has_head:
            working.append(
                self.slots * padded_vocab_size(config.vocab_size, self.tp) // self.tp * (e + 4 * 4) + layer_cache
            )
        found = {"KV cache": cache, "working memory": max(working)}
        return found | ({"gathered weights": gathered} if gathered else {})

    def whole(self, role: Role) -> list[Parameter]:
        """Every parameter of a decoder of this rank of tp."""
        kinds = sections(role.config, self.tp, self.shards_tokens, role.lm_head)
        return [*kinds["input"], *kinds["layer"] * role.config.num_layers, *kinds["output"]]

    # --- traffic ---

    def count(self, found: Counter, axis: str, op: str, nbytes: int, times: int = 1) -> None:
        """Adds what a ring sends for some collectives over an axis."""
        size = self.sizes[axis]
        if size > 1 and nbytes:
            nbytes = nbytes * (1 + (op == "all_reduce")) * (size - 1) // size
            found["dp" if axis == "folded" else axis, op] += times * nbytes

    def step_traffic(self) -> Counter:
        """Bytes that this rank sends in an optimizer step, by (axis, operation), as a ring counts; without metrics."""
        found: Counter = Counter()
        m = self.num_microbatches
        for role in self.decoders.values():
            n, states = sum(self.layers(role)), role.itemsize * self.tokens * role.config.hidden_size
            full, selective = (self.layout.recompute == name for name in ("full", "selective"))
            if self.shards_tokens:  # columns gather twice, rows scatter, and gather backward
                gathers = n * (6 + 2 * (full or selective)) + self.is_first + self.is_last
                self.count(found, "tp", "all_gather", states, m * gathers)
                self.count(found, "tp", "reduce_scatter", states, m * (n * (4 + full) + self.is_first))
            else:
                self.count(found, "tp", "all_reduce", states, m * (n * (4 + full) + self.is_first))
        if self.is_last:
            for _, width, e, unit in self.vocabulary_products():
                for nbytes in (unit.wide * self.scored, 3 * unit.wide * self.scored, e * self.scored * width):
                    self.count(found, "tp", "all_reduce", nbytes, m)
        for name in self.trained:
            for unit in self.units[name]:
                self.count_sums(found, unit, m)
        actions = [step for step in self.program if isinstance(step, Action)]
        each = 1 if self.pp > 1 else m  # without stages every micro-batch costs the same
        self.count_gathers(found, self.decoders, actions[: len(actions) // each], each)
        self.count_messages(found, m, both_ways=True)
        found["world", "all_gather"] += 8 * NUMBERS * (self.sizes["folded"] * self.tp - 1)  # the norm, and order
        return found

    def count_sums(self, found: Counter, unit: PlannedUnit, m: int) -> None:
        """What a unit's gradients and new weights cost in a step of m micro-batches."""
        summed = unit.size * (2 if self.layout.reduce_dtype == "bfloat16" else unit.wide)
        if unit.zero == 0:
            self.count(found, unit.axis, "all_reduce", summed)
        else:
            self.count(found, unit.axis, "reduce_scatter", summed, m if unit.zero >= 2 else 1)
        if unit.zero in (1, 2) or (unit.zero == 3 and unit.section == "head"):
            self.count(found, unit.axis, "all_gather", unit.itemsize * unit.size)
        place = {"dp": self.replica, "folded": self.stage * self.dp + self.replica}
        place["ends"] = self.is_last * self.dp + self.replica
        self.count(found, "tp", "all_reduce", unit.wide * unit.partial_entries(place[unit.axis]))

    def count_messages(self, found: Counter, passes: int, both_ways: bool) -> None:
        """States that go to the next part, and gradients that go back."""
        if self.pp > 1:
            borders = self.num_chunks - self.is_last + both_ways * (self.num_chunks - self.is_first)
            found["pp", "send"] += passes * borders * self.message

    def count_gathers(self, found: Counter, roles: dict[str, Role], actions: list[Action], times: int = 1) -> None:
        """What zero 3 gathers in the passes of some decoders of the same stages: `reshard.Shards`, told of them."""
        decoders = [GatheredDecoder(self, name, role) for name, role in roles.items()]
        decoders = [decoder for decoder in decoders if decoder.units]
        in_use: Counter[GatheredUnit] = Counter()
        for decoder in decoders:
            decoder.shards = Shards("", decoder, decoder.units, in_use)
        needs_backward = any(action.kind != "F" for action in actions)
        states: dict[tuple, list[list[State]]] = {}
        for kind, chunk, i in actions:
            if kind == "F":
                states[chunk, i] = [decoder.forward(chunk, needs_backward) for decoder in decoders]
                for decoder in decoders:
                    if decoder.is_end(chunk):
                        decoder.shards.need_output()
                continue
            for state in itertools.chain(*states.pop((chunk, i))[::-1]):
                for hook in state.hooks:
                    hook(None)
            free_units(in_use)
        for decoder in decoders:
            for unit in decoder.units:
                self.count(found, unit.planned.axis, "all_gather", unit.nbytes, times * unit.num_gathers)

    def rollout_traffic(self) -> Counter:
        """Bytes that this rank sends for a rollout: sampling, whole weights for it, and what describes the samples.

        Sequences count at their full length, of which it is an upper bound; exact where none ends early.
        """
        found: Counter = Counter()
        job, role, name = self.job, self.job.policy, next(iter(self.decoders))
        if not job.rollout:
            return found
        config, e = role.config, role.itemsize
        share = math.ceil(job.rollout / self.sizes["folded" if self.folds else "dp"])
        num_layers = config.num_layers if self.folds else sum(self.layers(role))
        states = e * config.hidden_size * share * (job.seq_len - 1)
        self.count(found, "tp", "all_reduce", states, 2 * num_layers + (self.is_first or self.folds))
        drawn = share * job.new_tokens
        if self.is_last or self.folds:
            blocks = padded_vocab_size(config.vocab_size, self.tp) // VOCAB_MULTIPLE
            self.count(found, "tp", "all_reduce", (4 + 16) * drawn)  # the largest logit; id and logit of what was drawn
            self.count(found, "tp", "all_gather", 8 * blocks * drawn, 2)
        for unit in self.units[name]:
            if unit.zero == 3:
                self.count(found, unit.axis, "all_gather", e * unit.size)
        if self.folds:  # every stage gets the layers of all
            for parameter in self.whole(role):
                self.count(found, "pp", "broadcast", e * math.prod(parameter.shape))
        elif self.pp > 1:
            found["pp", "send"] += states * (self.num_chunks - self.is_last)
            self.count(found, "pp", "broadcast", 3 * 8 * drawn)
        passes = math.ceil(job.described / (self.dp * job.microbatch))
        self.count_forwards(found, self.decoders, passes, passes)
        self.count_messages(found, passes, both_ways=False)
        for name, role in job.roles.items():
            if role.config and not role.trainable and role.in_units:
                mine = len(range(self.stage, passes, self.pp))
                self.count_forwards(found, {name: role}, math.ceil(passes / self.pp), mine)
        return found

    def count_forwards(self, found: Counter, roles: dict[str, Role], passes: int, reads: int) -> None:
        """What forward passes of some decoders without gradient cost, of which the heads read some; those of frozen
        ones see all of their layers."""
        chunks = 1
        for role in roles.values():
            states, layers = role.itemsize * self.tokens * role.config.hidden_size, self.layers(role)
            chunks, n = len(layers), sum(layers)
            is_first, is_last = (self.is_first, self.is_last) if role.trainable else (True, True)
            if self.shards_tokens:
                self.count(found, "tp", "all_gather", states, passes * (2 * n + is_last))
                self.count(found, "tp", "reduce_scatter", states, passes * (2 * n + is_first))
            else:
                self.count(found, "tp", "all_reduce", states, passes * (2 * n + is_first))
            if role.lm_head and is_last:
                self.count(found, "tp", "all_reduce", 4 * max(role.itemsize, 4) * self.scored, reads)
        self.count_gathers(found, roles, [Action("F", chunk, i) for chunk in range(chunks) for i in range(passes)])


class State:
    """What a pass reads or gives, for `Shards`."""

    def __init__(self, requires_grad: bool):
        self.requires_grad, self.hooks = requires_grad, []

    def register_hook(self, hook) -> None:
        self.hooks.append(hook)


class GatheredUnit:
    """A unit of zero 3, for `Shards`: counts how often it is gathered."""

    zero = 3

    def __init__(self, planned: PlannedUnit, name: str):
        self.planned, self.name, self.nbytes = planned, name, planned.itemsize * planned.size
        self.is_whole, self.num_gathers = False, 0

    def start_gather(self) -> None:
        self.num_gathers += not self.is_whole
        self.is_whole = True

    def finish_gather(self) -> None:
        pass

    def free(self) -> None:
        self.is_whole = False


class GatheredDecoder:
    """A decoder as far as `Shards` sees it."""

    def __init__(self, stage: Stage, name: str, role: Role):
        self.per_chunk = stage.layers(role)
        self.layers = range(sum(self.per_chunk))
        is_whole = stage.pp == 1 or not role.trainable
        self.is_start, self.is_end = ((lambda _: True,) * 2) if is_whole else (stage.is_start, stage.is_end)
        self.mesh = SimpleNamespace(pp=SimpleNamespace(size=1 if is_whole else stage.pp))
        self.ties_lm_head = role.lm_head and role.config.tied_embeddings
        names = itertools.count()
        self.units = [
            GatheredUnit(unit, f".layers.{next(names)}" if unit.section == "layer" else f".{unit.section}")
            for unit in stage.units[name]
            if unit.zero == 3
        ]

    def forward(self, chunk: int, needs_backward: bool) -> list[State]:
        """As `Decoder.forward`; returns the states in the order in which a backward comes to them."""
        section, states = sum(self.per_chunk[:chunk]), []
        if self.is_start(chunk):
            self.shards.enter(0, None)
        for _ in range(self.per_chunk[chunk] + self.is_end(chunk)):
            section += 1
            states.append(State(needs_backward))
            self.shards.enter(section, states[-1])
        states.append(State(needs_backward))
        self.shards.end(section, states[-1])
        return states[::-1]
