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

a parallel residual saves one s h; q/k norms keep their input, too. Kernels are those of GPUs.
Layers below the first one that trains keep nothing; a frozen matrix without an adapter does not keep what it reads.
Frozen weights have neither gradients nor optimizer state.
"""

import functools
import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kernels.linear_logprobs import SUM_ELEMENTS, chunk_rows
from parallel.adapters import INPUTS, Tuning, all_names
from parallel.data_parallel import ALIGNMENT
from parallel.generation import CACHE_BLOCK, NUM_SLOTS, PREFILL_TOKENS
from parallel.mesh import Layout, check_layout
from parallel.model import DecoderConfig
from parallel.order import NUMBERS
from parallel.pipeline import make_program
from parallel.reshard import Shards, free_units
from parallel.schedules import Action, Transfer
from parallel.tensor import VOCAB_MULTIPLE, padded_vocab_size

DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}  # by bytes of an entry
COLUMNS, ROWS = ("qkv", "ffn_in"), ("attn_out", "ffn_out")  # matrices of a layer, divided by outputs and by inputs
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
    tuning: Tuning = Tuning()  # of a decoder that trains, or of the policy whose weights a reference shares
    shared: bool = False  # a reference that shares what of the policy does not train

    def __post_init__(self):
        if self.config and self.is_tuned:
            of_layer = (name for name, _ in sections(self.config, 1, False, False)["layer"])
            self.tuning.check(all_names(self.config, of_layer), self.config, self.lm_head)

    @property
    def start(self) -> int:
        """As `adapters.first_trained_layer`: without stages a shared reference begins there."""
        return min(first_trained_layer(self.config, self.tuning), self.config.num_layers - 1)

    @property
    def is_tuned(self) -> bool:
        return self.tuning != Tuning()


@functools.lru_cache(maxsize=256)
def first_trained_layer(config: DecoderConfig, tuning: Tuning) -> int:
    """The number of layers that nothing which trains lies in or below."""
    num_layers = config.num_layers
    inputs = [f"{name}.weight" for name in INPUTS[: 1 + config.learned_positions]]
    if any(tuning.trains(name, num_layers) for name in inputs):
        return 0
    return next((i for i in range(num_layers) if any(layer_tuning(config, tuning, i))), num_layers)


@functools.lru_cache(maxsize=4096)
def layer_tuning(config: DecoderConfig, tuning: Tuning, i: int) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the parameters of layer i that train, and of the matrices that have an adapter."""
    names = [name for name, _ in sections(config, 1, False, False)["layer"]]
    trained = (name for name in names if tuning.trains(f"layers.{i}.{name}", config.num_layers))
    adapted = (name for name in names if tuning.adapts(f"layers.{i}.{name}", config.num_layers))
    return frozenset(trained), frozenset(name.removesuffix(".weight") for name in adapted)


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


@functools.lru_cache(maxsize=256)
def sections(
    config: DecoderConfig, tp: int, shards_tokens: bool, lm_head: bool
) -> dict[str, tuple[tuple[str, Parameter], ...]]:
    """Names and parameters on one rank of tp of the three kinds of a decoder's units, in the order of its modules."""
    local, hidden, head_dim = config.shard(tp), config.hidden_size, config.head_dim
    q, kv, ffn_in = local.num_heads * head_dim, local.num_kv_heads * head_dim, local.ffn_size * (1 + config.gated)
    shared = [(q, q + kv), (q + kv, q + 2 * kv)] if tp > config.num_kv_heads else []

    def vector(name: str, size: int, is_partial: bool) -> tuple[str, Parameter]:
        return name, Parameter((size,), ((0, size, 1),) if is_partial else ())

    def norm(name: str) -> list[tuple[str, Parameter]]:
        kinds = ("weight", "bias") if config.norm == "layernorm" else ("weight",)
        return [vector(f"{name}.{kind}", hidden, shards_tokens) for kind in kinds]

    def column(name: str, rows: int, bias: bool, heads=()) -> list[tuple[str, Parameter]]:
        ranges = [tuple((start * n, stop * n, config.num_kv_heads) for start, stop in heads) for n in (hidden, 1)]
        found = [(f"{name}.weight", Parameter((rows, hidden), ranges[0]))]
        return found + [(f"{name}.bias", Parameter((rows,), ranges[1]))] * bias

    def row(name: str, columns: int, bias: bool) -> list[tuple[str, Parameter]]:
        return [(f"{name}.weight", Parameter((hidden, columns)))] + [
            vector(f"{name}.bias", hidden, shards_tokens)
        ] * bias

    layer = norm("attn_norm") + column("qkv", q + 2 * kv, config.qkv_bias, shared)
    layer += [vector(f"{name}.weight", head_dim, tp > 1) for name in ("q_norm", "k_norm") if config.qk_norm]
    layer += row("attn_out", q, config.attn_out_bias)
    layer += ([] if config.shared_norm else norm("ffn_norm")) + column("ffn_in", ffn_in, config.ffn_bias)
    layer += row("ffn_out", local.ffn_size, config.ffn_bias)
    rows = padded_vocab_size(config.vocab_size, tp) // tp
    positions = Parameter((config.max_seq_len, hidden), ((0, config.max_seq_len * hidden, 1),) * shards_tokens)
    inputs = [("embedding.weight", Parameter((rows, hidden)))]
    inputs += [("position_embedding.weight", positions)] * config.learned_positions
    head = column("lm_head", rows, config.head_bias) if lm_head and not config.tied_embeddings else []
    return {"input": tuple(inputs), "layer": tuple(layer), "output": (*norm("final_norm"), *head)}


def adapter(name: str, weight: Parameter, rank: int, tp: int) -> list[Parameter]:
    """The two matrices beside a weight: see `tensor.Adapter`."""
    outputs, inputs = weight.shape
    a, b = Parameter((rank, inputs)), Parameter((outputs, rank))
    if tp == 1:
        return [a, b]
    if name in ROWS:
        return [a, Parameter(b.shape, ((0, outputs * rank, 1),))]
    shared = tuple((start // inputs * rank, stop // inputs * rank, count) for start, stop, count in weight.partial)
    return [Parameter(a.shape, ((0, rank * inputs, 1),)), Parameter(b.shape, shared)]


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
        """How many layers of a decoder each chunk of this stage has."""
        return [len(layers) for layers in self.layer_ids(role)]

    def layer_ids(self, role: Role) -> list[range]:
        """Numbers of the layers of each chunk of this stage; of frozen decoders only one that shares has stages."""
        if self.pp == 1 or not (role.trainable or role.shared):
            return [range(self.fork(role), role.config.num_layers)]
        counts = layers_by_part(role.config, self.layout, role.lm_head)
        ends = [0, *itertools.accumulate(counts)]
        return [range(ends[i], ends[i + 1]) for i in range(self.stage, len(counts), self.pp)]

    def fork(self, role: Role) -> int:
        """The layer from which on a shared reference has layers of its own; with stages it has all."""
        return role.start if role.shared and self.pp == 1 else 0

    def is_start(self, chunk: int) -> bool:
        """Whether this is the first part of the model."""
        return self.is_first and chunk == 0

    def is_end(self, chunk: int) -> bool:
        return self.is_last and chunk == self.num_chunks - 1

    def units_of(self, role: Role) -> list[PlannedUnit]:
        """Units of a role on this rank, heads' and a tied embedding's being those of more replicas with stages."""
        is_offloaded = ("optimizer" if role.trainable else "frozen") in self.layout.offload

        def make(section: str, parameters, axis: str, zero: int, trainable: bool = role.trainable) -> PlannedUnit:
            replicas = self.sizes[axis]
            offloaded = is_offloaded and trainable == role.trainable
            if replicas == 1 and (trainable or not offloaded):
                zero = 0  # there is nothing to share out
            placed = role.itemsize, trainable, replicas, zero, axis, offloaded
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
        if role.shared:
            has_input = self.fork(role) == 0

        def split(section: str, named, axis: str, zero: int, prefix: str = "") -> list[PlannedUnit]:
            """A unit of what trains and one of what does not; of a shared reference only what trains in the policy."""
            groups: dict[bool, list[Parameter]] = {}
            for name, parameter in named:
                trains = not role.is_tuned or role.tuning.trains(prefix + name, role.config.num_layers)
                if trains or not role.shared:
                    groups.setdefault(trains and role.trainable, []).append(parameter)
                layer, _, kind = name.partition(".")
                if role.trainable and kind == "weight" and role.tuning.adapts(prefix + name, role.config.num_layers):
                    groups.setdefault(True, []).extend(adapter(layer, parameter, role.tuning.lora.rank, self.tp))
            return [make(section, parameters, axis, zero, trains) for trains, parameters in groups.items()]

        inputs = split("input", kinds["input"], axis, zero) if has_input else []
        ties = role.lm_head and role.config.tied_embeddings
        if self.pp > 1 and role.trainable and ties:  # both ends hold it
            ends = split("input", kinds["input"][:1], "ends", at_ends) if has_input or has_output else []
            inputs = ends + (split("input", kinds["input"][1:], axis, zero) if has_input else [])
        layers, of_kind = [], {}
        for i in (i for chunk in self.layer_ids(role) for i in chunk):
            kind = layer_tuning(role.config, role.tuning, i) if role.is_tuned else None
            if kind not in of_kind:
                of_kind[kind] = split("layer", kinds["layer"], axis, zero, f"layers.{i}.")
            layers += of_kind[kind]
        outputs = split("output", kinds["output"], axis, zero) if has_output else []
        return [*inputs, *layers, *outputs]

    def section(self, name: str, section: str) -> PlannedUnit:
        """The first unit of a section that trains, or of layers the last one; without any, one that does not."""
        found = [unit for unit in self.units[name] if unit.section == section]
        found = found[::-1] if section == "layer" else found
        return next((unit for unit in found if unit.trainable), found[0])

    def trains(self, role: Role, name: str) -> bool:
        return role.trainable and (not role.is_tuned or role.tuning.trains(name, role.config.num_layers))

    def adapts_head(self, role: Role) -> bool:
        """Whether the LM head has an adapter, merged into a weight of its own for a pass."""
        has_head = role.config and role.lm_head and not role.config.tied_embeddings
        return bool(has_head and role.trainable and role.tuning.adapts("lm_head.weight", role.config.num_layers))

    # --- memory ---

    def held(self) -> tuple[dict[str, int], int]:
        """Bytes that lie there always, by component, and in the host's memory."""
        held: Counter[str] = Counter()
        host = 0
        for name, role in self.job.roles.items():
            states = [unit.state() for unit in self.units[name]]
            *states, of_host = (sum(x) for x in zip((0, 0, 0, 0), *states, strict=True))
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

    def saved_by_layer(self, role: Role, recompute: str, i: int | None = None) -> int:
        """Bytes that layer i (None: one of which all trains) keeps of a micro-batch for the backward: see the module's
        docstring."""
        config, e, tokens = role.config, role.itemsize, self.tokens
        local, state = shard(config, self.tp), e * self.tokens_local * config.hidden_size
        trained, adapted = layer_tuning(config, role.tuning if i is not None else Tuning(), i or 0)
        has_backward = {*COLUMNS, *ROWS} if i is None else self.products_with_backward(role, i)
        if not has_backward:
            return 0
        if recompute == "full":
            return state
        reads = {name: f"{name}.weight" in trained or name in adapted for name in (*COLUMNS, *ROWS)}
        norms = (
            "attn_norm",
            "attn_norm" if config.shared_norm else "ffn_norm",
        )  # before the columns, each computed anew
        if recompute == "selective":  # keeps what the norms read wherever the columns have a backward
            through = [name in has_backward for name in COLUMNS]
        else:  # where a gradient goes through the norms
            is_lowest = i is not None and role.is_tuned and self.reads_constants(role, i)
            after_attention = "attn_out" in has_backward and not config.parallel_residual
            learning = {name.partition(".")[0] for name in trained}
            reaches = [not is_lowest, not is_lowest or after_attention]
            through = [reached or norm in learning for reached, norm in zip(reaches, norms, strict=True)]
        saved = state * (any(through) if config.parallel_residual else sum(through))
        num_normed = local.num_heads + local.num_kv_heads
        heads = e * tokens * (num_normed + local.num_kv_heads) * config.head_dim
        attended = e * self.places * local.num_heads * config.head_dim
        has_attention = "qkv" in has_backward or "q_norm.weight" in trained or "k_norm.weight" in trained
        if has_attention:
            saved += heads
            saved += 4 * self.places * local.num_heads  # logarithms of sums
            if config.qk_norm:
                saved += heads + max(e, 4) * tokens * num_normed
        if has_attention or reads["attn_out"]:
            saved += attended
        if tokens > self.places and reads["attn_out"]:  # attention's result once more, padded
            saved += e * tokens * local.num_heads * config.head_dim
        expanded = e * tokens * local.ffn_size * (1 + config.gated)
        if recompute == "selective":
            return saved + expanded * ("ffn_out" in has_backward)
        inner = e * tokens * local.ffn_size
        if config.activation == "relu" and not config.gated:  # its backward reads the output
            saved += inner * ("ffn_in" in has_backward or reads["ffn_out"])
        else:
            saved += expanded * ("ffn_in" in has_backward) + inner * reads["ffn_out"]
        normed = [name in has_backward and (reads[name] or self.tp > 1) for name in COLUMNS]  # tp keeps it either way
        return saved + state * sum(normed) + sum(through) * self.statistics(role)

    def products_with_backward(self, role: Role, i: int) -> set[str]:
        """Those of a layer's matrices whose products a gradient comes back to."""
        config, constant = role.config, role.is_tuned and self.reads_constants(role, i)
        trained, adapted = layer_tuning(config, role.tuning, i)
        learning = {name.rpartition(".")[0] for name in trained} | adapted
        norm, found = "attn_norm" if config.shared_norm else "ffn_norm", set()

        def add(name: str, reads_gradient: bool, *others: str) -> None:
            if reads_gradient or learning & {name, *others}:
                found.add(name)

        add("qkv", not constant, "attn_norm")
        add("attn_out", "qkv" in found, "q_norm", "k_norm")
        add("ffn_in", not constant or ("attn_out" in found and not config.parallel_residual), norm)
        add("ffn_out", "ffn_in" in found)
        return found

    def reads_constants(self, role: Role, i: int) -> bool:
        """Whether layer i, or the final norm behind all of them, reads what needs no gradient: nothing below it trains,
        and nothing that another stage has sent, whose gradient is always asked for."""
        if self.pp > 1 and not (self.is_first and i <= self.layer_ids(role)[0].stop):
            return False
        trains_input = self.trains(role, "embedding.weight") or (
            role.config.learned_positions and self.trains(role, "position_embedding.weight")
        )
        return not trains_input and i <= first_trained_layer(role.config, role.tuning)

    def gives_constants(self, role: Role) -> bool:
        """Whether the states behind the final norm need no gradient: at most an LM head trains."""
        names = (f"final_norm.{kind}" for kind in ("weight", "bias")[: 1 + (role.config.norm == "layernorm")])
        reads_constants = role.is_tuned and self.reads_constants(role, role.config.num_layers)
        return reads_constants and not any(self.trains(role, name) for name in names)

    def statistics(self, role: Role) -> int:
        """Bytes that a norm keeps beside its input."""
        return self.tokens_local * (max(role.itemsize, 4) if role.config.norm == "rmsnorm" else 2 * role.itemsize)

    def saved_by_chunk(self, chunk: int) -> int:
        """Bytes that a chunk's layers of all decoders, and what lies around them, keep of one micro-batch."""
        found = 0
        for role in self.decoders.values():
            layers, recompute = self.layer_ids(role)[chunk], self.layout.recompute
            if role.is_tuned:
                found += sum(self.saved_by_layer(role, recompute, i) for i in layers)
            else:
                found += len(layers) * self.saved_by_layer(role, recompute)
            found += self.saved_around(role, chunk)
        return found

    def saved_around(self, role: Role, chunk: int) -> int:
        """Bytes that a decoder's layers share: cosines and sines, the mask of recomputations, token ids."""
        saved = role.itemsize * self.tokens * 2 * -(-role.config.rotary_dim // 2)
        saved += 8 * self.places * len(set(role.config.windows) or {None})  # which keys are visible
        ids = (8 + (self.tp > 1)) * self.trains(role, "embedding.weight")
        ids += 8 * (role.config.learned_positions and self.trains(role, "position_embedding.weight"))
        return saved + self.tokens * ids * self.is_start(chunk)

    def last_state(self, role: Role) -> int:
        """Bytes that the final norm keeps: its input."""
        if self.gives_constants(role):
            return 0
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
            if self.adapts_head(role):  # the weight with its adapter merged into it
                rows = padded_vocab_size(role.config.vocab_size, self.tp) // self.tp
                saved += role.itemsize * rows * role.config.hidden_size
        for rows, _, e, *_ in self.vocabulary_products():
            chunk, logits, _ = self.head_workspace(rows, e)
            saved += logits * (chunk == n)
        return saved

    def head_workspace(self, rows: int, e: int) -> tuple[int, int, int]:
        """How many tokens' logits a vocabulary product holds at a time, their bytes, and those of their gradient."""
        stride = -(-rows // 64) * 64
        chunk = min(self.scored, chunk_rows(stride, DTYPES[e]))
        return chunk, 4 * chunk * stride, e * (e < 4) * chunk * stride

    def wider_states(self, role: Role) -> int:
        """Bytes of the copy of the states that a head reads which is wider than the trunk."""
        trunk = self.job.policy
        return self.scored * role.itemsize * trunk.config.hidden_size * (role.itemsize > trunk.itemsize)

    def vocabulary_products(self) -> list[tuple[int, int, int, PlannedUnit, bool]]:
        """(rows here, width, bytes of an entry, unit, whether it trains) of each matrix whose rows are token ids."""
        found = []
        for name, role in self.trained.items():
            if role.config and role.lm_head:
                at_ends = self.pp > 1 and role.config.tied_embeddings
                trains = self.trains(role, "embedding.weight" if role.config.tied_embeddings else "lm_head.weight")
                trains = trains or self.adapts_head(role)
                unit = self.units[name][0 if at_ends else -1]
                found.append((role.config.hidden_size, role.itemsize, unit, trains))
            widths = [shape[1] for shape in role.shapes if shape[0] == "vocab" and len(shape) == 2]
            found += [(width, role.itemsize, self.units[name][0], True) for width in widths]
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
            for unit in self.units[name]:
                if unit.section != "layer":
                    absent += unit.state()[1] * counts[unit.section] * (unit.zero >= 2)
            for unit in self.units_of_layers(name, chunk) if role.config else []:
                absent += unit.state()[1] * (unit.zero >= 2)
        return absent

    def units_of_layers(self, name: str, chunk: int) -> list[PlannedUnit]:
        """Units of a chunk's layers, of each in turn."""
        role = self.job.roles[name]
        before = [i for layers in self.layer_ids(role)[:chunk] for i in layers]
        each = [unit for unit in self.units[name] if unit.section == "layer"]
        counts = [self.units_per_layer(role, i) for i in [*before, *self.layer_ids(role)[chunk]]]
        return each[sum(counts[: len(before)]) : sum(counts)]

    def units_per_layer(self, role: Role, i: int) -> int:
        """Into how many units a layer's parameters go: of those that train and of those that do not."""
        if not role.is_tuned:
            return 1
        names = [name for name, _ in sections(role.config, 1, False, False)["layer"]]
        trained, adapted = layer_tuning(role.config, role.tuning, i)
        trains = bool(trained or (adapted and role.trainable))
        return trains + (not role.shared and len(trained) < len(names))

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
                lowest = self.layer_ids(role)[chunk][0] if role.is_tuned else None
                last = self.saved_by_layer(role, self.layout.recompute, lowest) + self.saved_around(role, chunk)
                add(others + last, working, gathered + kept, messages + gradient)
                if self.is_start(chunk) and self.trains(role, "embedding.weight"):
                    add(others, self.embedding_backward(name, role, chunk not in done), kept, messages + gradient)
            if self.is_end(chunk):
                copies = sum(self.wider_states(role) for role in self.trained.values() if not role.config)
                for product in self.vocabulary_products():
                    working, summing = self.head_backward(*product)
                    add(others + mine + by_heads - copies, working, output, messages)  # heads before have freed those
                    add(others + mine + sum(map(self.last_state, self.decoders.values())), summing, output, messages)
        if self.layout.reduce_dtype == "bfloat16":
            units = [unit for name in self.trained for unit in self.units[name]]
            buckets = sum(2 * unit.size for unit in units if unit.trainable and unit.zero < 2 and unit.replicas > 1)
            last = [
                self.embedding_backward(name, role, False)
                for name, role in self.decoders.items()
                if self.is_first and self.trains(role, "embedding.weight")
            ]
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
        local, recompute, last = shard(config, self.tp), self.layout.recompute, self.layer_ids(role)[-1][-1]
        tied = config.tied_embeddings and role.lm_head and self.pp == 1 and self.trains(role, "embedding.weight")
        trains_in, trains_out = (self.trains(role, f"layers.{last}.{x}.weight") for x in ("ffn_in", "ffn_out"))
        state, full = e * self.tokens_local * config.hidden_size, e * self.tokens * config.hidden_size
        inner = e * self.tokens * local.ffn_size
        expanded = inner * (1 + config.gated)
        second = local.ffn_size * config.hidden_size  # entries of the network's second matrix, and of its first
        first = second * (1 + config.gated) * trains_in
        second = second * trains_out
        on_its_way = unit.wide + e * (e < unit.wide)  # bytes a gradient's entry takes until it is summed
        gathered = full * self.shards_tokens
        moments = (
            state + gathered + inner + e * second,  # products of the second matrix
            state + on_its_way * second,  # its gradient
            state + expanded + 3 * inner * config.gated,  # of the activation
            state + full + gathered - inner + e * first,  # products of the first matrix
            state - inner - expanded + on_its_way * first,  # its gradient
            2 * state - inner - expanded,  # of the norm
        )
        working = max(moments)
        if recompute == "selective":
            working += inner
        elif recompute == "full":
            working += self.saved_by_layer(role, "none", last if role.is_tuned else None) - state
        if tied:  # the head's gradient waits for that of the embedding
            working += unit.wide * math.prod(self.section(name, "input").parameters[0].shape)
        if unit.zero >= 2:
            working += unit.wide * unit.size
        of_last = self.units[name][::-1]
        of_last = [u for u in of_last if u.section == "layer"][: self.units_per_layer(role, last)]
        return working, sum(e * u.size for u in of_last if u.zero == 3)

    def embedding_backward(self, name: str, role: Role, is_first_sum: bool) -> int:
        """Bytes of the work on the embedding's gradient, when the micro-batch's activations are gone.

        Args: is_first_sum: of gradients that have no storage before.
        """
        unit, layer, e = self.section(name, "input"), self.section(name, "layer"), role.itemsize
        is_tied = role.config.tied_embeddings and role.lm_head and self.pp == 1
        matrix = math.prod(unit.parameters[0].shape)
        on_its_way = (3 * unit.wide if is_tied else unit.wide + e * (e < unit.wide)) * matrix  # tied: two uses and sum
        on_its_way += e * self.tokens * role.config.hidden_size * (self.tp > 1)  # what it is computed from
        later = [u for u in self.units[name] if u.section == "input" and u.zero >= 2]
        absent = is_first_sum * unit.wide * sum(u.share for u in later)
        if layer.zero < 2:
            return on_its_way
        bucket = layer.wide * (layer.size - is_first_sum * layer.share)  # of the first layer, not yet summed
        if later and len(later[0].parameters) + (unit.zero < 2) > 1:  # learned positions': their gradient comes before
            bucket = unit.wide * later[0].size
        return max(on_its_way + bucket, unit.wide * (matrix + unit.size) * (unit.zero >= 2)) - absent

    def head_backward(self, rows: int, width: int, e: int, unit: PlannedUnit, trains: bool) -> tuple[int, int]:
        """Bytes of a vocabulary product's backward: while logits lie there, and while its gradient is summed."""
        n, wide = self.scored, unit.wide
        chunk, logits, gradient = self.head_workspace(rows, e)
        heads = any(role.config is None for role in self.trained.values())  # the states' gradient from those waits
        part = min(SUM_ELEMENTS // (64 * width) * 64, rows) * width  # of the weight's gradient, computed at a time
        products = max(4 * chunk * width, 4 * part * trains, e * rows * width * trains * (e < 4))
        working = logits * (n > chunk) + gradient + 4 * rows * width * trains + products + e * n * width * (1 + heads)
        summing = wide * (rows * width + unit.size) + e * n * width if unit.zero >= 2 and trains else 0
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
            logits = self.slots * padded_vocab_size(config.vocab_size, self.tp) // self.tp
            working.append(2 * max(e, 4) * logits)  # and as many weights, where the likeliest is taken
        found = {"KV cache": cache, "working memory": max(working)}
        return found | ({"gathered weights": gathered} if gathered else {})

    def whole(self, role: Role) -> list[Parameter]:
        """Every parameter of a decoder of this rank of tp."""
        kinds = sections(role.config, self.tp, self.shards_tokens, role.lm_head)
        found = [x for _, x in [*kinds["input"], *kinds["layer"] * role.config.num_layers, *kinds["output"]]]
        if role.tuning.lora.rank:
            weights = {name.removesuffix(".weight"): x for name, x in kinds["layer"] + kinds["output"]}
            adapted = [x for i in range(role.config.num_layers) for x in layer_tuning(role.config, role.tuning, i)[1]]
            for name in adapted + ["lm_head"] * self.adapts_head(role):
                found += adapter(name, weights[name], role.tuning.lora.rank, self.tp)
        return found

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
        full, again = self.layout.recompute == "full", self.layout.recompute != "none"
        for role in self.decoders.values():
            states = role.itemsize * self.tokens * role.config.hidden_size
            trains_input = self.is_first and self.trains(role, "embedding.weight")
            gathers = sums = 0  # of states over tp
            for i in (i for chunk in self.layer_ids(role) for i in chunk):
                trained, adapted = layer_tuning(role.config, role.tuning, i)
                has_backward = self.products_with_backward(role, i)
                columns = [name for name in COLUMNS if name in has_backward]
                reads = sum(name in adapted or f"{name}.weight" in trained for name in columns)
                repeated = len(columns)  # products of columns that are computed again
                in_network = bool(has_backward & {"ffn_in", "ffn_out"})
                if full:  # all up to the last product with a backward
                    repeated = bool(has_backward) + in_network
                gathers += 2 + len(has_backward) - len(columns) + reads + again * repeated
                sums += 2 + len(columns) + full * in_network
            if self.shards_tokens:  # columns gather twice, rows scatter, and gather backward
                self.count(found, "tp", "all_gather", states, m * (gathers + trains_input + self.is_last))
                self.count(found, "tp", "reduce_scatter", states, m * (sums + self.is_first))
            else:
                self.count(found, "tp", "all_reduce", states, m * (sums + self.is_first))
        if self.is_last:
            for _, width, e, unit, _ in self.vocabulary_products():
                reads_constants = unit.section != "head" and self.gives_constants(self.job.policy)
                states = 0 if reads_constants else e * self.scored * width
                for nbytes in (unit.wide * self.scored, 3 * unit.wide * self.scored, states):
                    self.count(found, "tp", "all_reduce", nbytes, m)
        for name in self.trained:
            for unit in self.units[name]:
                if unit.trainable:
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
        decoders: list[GatheredDecoder] = []
        for name, role in roles.items():
            decoders.append(GatheredDecoder(self, name, role, decoders[0] if role.shared else None))
        in_use: Counter[GatheredUnit] = Counter()
        for decoder in decoders:
            decoder.shards = Shards(decoder.sections, decoder.units, in_use)
        decoders = [decoder for decoder in decoders if any(decoder.shards.sections)]
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

        Sequences count at their full length, and the tokenizer as one that lacks ids of the model: an upper bound,
        exact where that is so.
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
            # the largest logit, of all ids and of those that may be drawn; id and logit of what was drawn
            self.count(found, "tp", "all_reduce", (4 + 4 + 16) * drawn)
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
        shared = {name: role for name, role in job.roles.items() if role.shared}  # runs beside the policy
        self.count_forwards(found, self.decoders | shared, passes, passes)
        self.count_messages(found, passes, both_ways=False)
        if shared and self.pp > 1:
            states = self.tokens_local * sum(role.itemsize * role.config.hidden_size for role in shared.values())
            found["pp", "send"] += passes * (self.num_chunks - self.is_last) * states
        for name, role in job.roles.items():
            if role.config and not role.trainable and role.in_units and not role.shared:
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
            is_first, is_last = (self.is_first, self.is_last) if role.trainable or role.shared else (True, True)
            is_first = is_first and self.fork(role) == 0
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
    """A unit, for `Shards`: counts how often it is gathered."""

    def __init__(self, planned: PlannedUnit):
        self.planned, self.zero, self.nbytes = planned, planned.zero, planned.itemsize * planned.size
        self.is_whole, self.num_gathers = False, 0

    def start_gather(self) -> None:
        self.num_gathers += not self.is_whole
        self.is_whole = True

    def finish_gather(self) -> None:
        pass

    def free(self) -> None:
        self.is_whole = False


class GatheredDecoder:
    """A decoder as far as `Shards` sees it; trunk: the one whose frozen units it shares."""

    def __init__(self, stage: Stage, name: str, role: Role, trunk: "GatheredDecoder | None"):
        self.stage, self.role = stage, role
        self.chunks = stage.layer_ids(role)
        is_whole = stage.pp == 1 or not (role.trainable or role.shared)
        self.is_start, self.is_end = ((lambda _: True,) * 2) if is_whole else (stage.is_start, stage.is_end)
        self.start = 0  # the first layer here, if not that of a stage
        self.fork: int | None = None  # where a forward pauses for a decoder that goes on from there on its own
        self.units = [GatheredUnit(unit) for unit in stage.units[name]]
        of_layers = iter([unit for unit in self.units if unit.planned.section == "layer"])
        ids = [i for chunk in self.chunks for i in chunk]
        layers = [list(itertools.islice(of_layers, stage.units_per_layer(role, i))) for i in ids]
        self.inputs, outputs = ([u for u in self.units if u.planned.section == x] for x in ("input", "output"))
        holds_embedding = not role.shared or role.tuning.trains("embedding.weight", role.config.num_layers)
        if role.lm_head and role.config.tied_embeddings and is_whole and holds_embedding:
            outputs = outputs + self.inputs[:1]  # learned positions may lie in a second one
        self.sections = [self.inputs, *layers, outputs]
        if trunk is not None:
            first = trunk.sections.index(trunk.sections[-1]) - len(layers)  # its section of the first layer here
            self.start = stage.fork(role)
            theirs = [trunk.sections[0] if self.start == 0 else [], *trunk.sections[first:]]
            frozen = [[unit for unit in section if not unit.planned.trainable] for section in theirs]
            self.sections = [mine + shared for mine, shared in zip(self.sections, frozen, strict=True)]
            trunk.fork = self.start or None

    def forward(self, chunk: int, needs_backward: bool) -> list[State]:
        """As `Decoder.forward`; returns the states in the order in which a backward comes to them."""
        section, states = sum(map(len, self.chunks[:chunk])), []
        if self.is_start(chunk) and self.start == 0:
            self.shards.enter(0, None)
        for i in (*self.chunks[chunk], *[self.role.config.num_layers] * self.is_end(chunk)):
            section += 1
            if i == self.fork and not needs_backward:
                self.shards.end(section - 1, State(False))
            constant = self.role.is_tuned and self.stage.reads_constants(self.role, i)
            states.append(State(needs_backward and not constant))
            self.shards.enter(section, states[-1])
        constant = self.role.is_tuned and self.stage.reads_constants(self.role, self.chunks[chunk].stop)
        if self.is_end(chunk):
            constant = self.stage.gives_constants(self.role)
        states.append(State(needs_backward and not constant))
        self.shards.end(section, states[-1])
        return states[::-1]
