"""Sampling with a KV cache: one length per sequence, finished slots refilled, noise that is a function of the token.

With pipeline stages there are as many groups of sequences as stages, and they go round: while one group is at the first
stage, another is at the second, so that all stages are at work although a sequence's next token needs its last one.

On a GPU that holds the whole model the host does not look at each token: it has several drawn at a time, each by one
CUDA graph of the whole step, and only then sees which sequences have ended.

The uniform that decides a token depends on (seed, stream, sample, position) alone, so what is sampled depends neither
on batch order, batch composition and refill order nor on the number of ranks; the logits do only by rounding.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import Visible, attention
from kernels.decode import Step, append, decode_attention
from kernels.sampler import weigh_shard
from parallel.collectives import Axis, all_gather, all_reduce_, broadcast_, recv_async_, send_async
from parallel.model import Decoder, DecoderConfig, split_heads
from parallel.tensor import packed_weights

NUM_SLOTS = 256  # sequences generated at a time
CACHE_BLOCK = 32  # tokens; the cache's capacity is a multiple
TOKENS_AHEAD = 16  # of each sequence, before the host looks which ones have ended
PREFILL_TOKENS = 1 << 14  # padded prompt tokens of one forward
ROLLOUT, EVALUATION = 0, 1  # streams of sampling noise
ONE_RANK = Axis("tp", 1, 0)


@dataclass
class Sampling:
    """How tokens are drawn. Probabilities everywhere are those of logits / temperature over the full vocabulary;
    top-k and top-p restrict only what is drawn."""

    temperature: float = 1.0
    """divides the logits; 0 takes the likeliest token, in evaluations only"""
    top_k: int = 0
    """draw from the k likeliest tokens; 0 = all"""
    top_p: float = 1.0
    """draw from the likeliest tokens that together have this probability (Holtzman et al. 2020, 1904.09751); 1 = all"""
    max_new_tokens: int = 9
    """response length limit, in tokens, the EOS included"""
    stop: tuple[str, ...] = ()
    """strings that end a response when they appear in it; the text is cut before them for the reward"""

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"--sampling.temperature {self.temperature} is negative; 0 is greedy, 1 the model itself")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--sampling.top-p {self.top_p} is not in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"--sampling.top-k {self.top_k} is negative; 0 keeps all tokens")
        if self.max_new_tokens < 1:
            raise ValueError(f"--sampling.max-new-tokens {self.max_new_tokens} must be at least 1")

    @property
    def truncates(self) -> bool:
        """Whether some tokens can never be drawn, which makes the samples off-policy."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


@dataclass
class Generation:
    """Prompts and their responses, right-padded with id 0, in the order of the prompts."""

    input_ids: Tensor  # [batch, seq_len] prompt then response
    prompt_lens: Tensor  # [batch]
    seq_lens: Tensor  # [batch]
    response_mask: Tensor  # [batch, seq_len] bool, from the first sampled token through the last
    logprobs: Tensor  # [batch, seq_len] of the sampled tokens, in nats, 0 elsewhere
    finished: Tensor  # [batch] bool: ended by an EOS or a stop sequence, not by the length limit
    kept_mass: float  # mean probability of the tokens that top-k and top-p left

    def response_ids(self) -> list[list[int]]:
        rows = zip(self.input_ids.tolist(), self.prompt_lens.tolist(), self.seq_lens.tolist(), strict=True)
        return [ids[start:end] for ids, start, end in rows]


def mix(x: Tensor) -> Tensor:
    """A bijection of the 64-bit integers that scatters neighbours (splitmix64's finaliser; Steele et al. 2014)."""

    def shift_right(x, bits):  # logical shift of a signed integer
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = (x ^ shift_right(x, 30)) * -4658895280553007687
    x = (x ^ shift_right(x, 27)) * -7723592293110705685
    return x ^ shift_right(x, 31)


def uniform(seed: int, stream: int, sample_ids: Tensor, positions: Tensor) -> Tensor:
    """One float64 in [0, 1) per (seed, stream, sample, position), by nested hashing.

    Shapes: sample_ids, positions int64, broadcast against each other -> their common shape
    """
    state = mix(torch.tensor(seed, device=sample_ids.device))
    for coordinate in (torch.tensor(stream, device=sample_ids.device), sample_ids, positions):
        state = mix(state + 7046029254386353131 + coordinate)
    return ((state >> 11) & ((1 << 53) - 1)).double() / (1 << 53)


def sample_tokens(
    logits: Tensor, noise: Tensor, sampling: Sampling, num_ids: int | None = None, axis: Axis = ONE_RANK
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token per row by the inverse of the cumulative distribution.

    The probabilities are summed in blocks of 128 ids; a float64 prefix sum over the block sums finds the block, another
    one the id inside it. A shard of the vocabulary holds whole blocks, so its size changes neither sum.

    Args: num_ids: ids from here on are never drawn. axis: over which the vocabulary is divided.
    Shapes: logits [n, padded_vocab / tp] float32, -inf where an id does not exist; noise [n] in [0, 1)
    Communication: over tp an all-reduce (max) of [n], an all-gather of [n, blocks] and an all-reduce of [2, n]; with
        num_ids the first two once more; top-k and top-p need the whole distribution and gather [n, padded_vocab].
    Returns: token_ids [n]; logprobs [n] over the full vocabulary at the sampling temperature (at 1 if that is 0);
        kept_mass [n], the probability that top-k, top-p and num_ids left
    """
    num_local, start = logits.shape[1], axis.rank * logits.shape[1]  # the first id here
    shard = weigh_shard(logits, sampling.temperature)
    all_reduce_(shard.largest, axis, "max")
    sums = gather_vocab(shard.sum_blocks(), axis)  # [n, blocks of the whole vocabulary]
    total = sums.sum(1)
    kept_mass = torch.ones_like(total)
    if num_ids is not None:
        largest = shard.largest
        shard.drop_ids(num_ids - start)
        all_reduce_(shard.largest, axis, "max")
        total = total * shard.nats_above(largest).exp()  # in the unit that weights have from now on
    if sampling.temperature == 0:
        best, local_ids = shard.kept.max(1)
        over_all = best.clone()
        all_reduce_(over_all, axis, "max")
        token_ids = (local_ids + start).where(best == over_all, torch.iinfo(torch.int64).max)
        all_reduce_(token_ids, axis, "min")
        logprobs = shard.logprobs(token_ids - start, total)
    else:
        if sampling.truncates:
            whole = shard
            if axis.size > 1:
                whole = weigh_shard(gather_vocab(logits, axis), sampling.temperature, shard.largest)
                if num_ids is not None:
                    whole.drop_ids(num_ids)
            shard.drop_below(whole.border(sampling.top_k, sampling.top_p * total if sampling.top_p < 1 else None))
        if sampling.truncates or num_ids is not None:
            sums = gather_vocab(shard.sum_blocks(), axis)
            kept_mass = sums.sum(1) / total
        token_ids, logprobs = shard.draw(sums.cumsum(1), noise, total, start)
    if axis.size > 1:  # those who do not hold the token's block have found another
        is_here = (token_ids >= start) & (token_ids < start + num_local)
        found = torch.stack((token_ids.double(), logprobs.double())).where(is_here, 0.0)
        all_reduce_(found, axis)
        token_ids, logprobs = found[0].long(), found[1].to(logits.dtype)
    return token_ids, logprobs, kept_mass


def gather_vocab(x: Tensor, axis: Axis) -> Tensor:
    """Shards of the vocabulary side by side: [n, m] -> [n, tp * m]"""
    return x if axis.size == 1 else all_gather(x[None], axis).transpose(0, 1).flatten(1)


class KVCache:
    """Keys and values of the sequences being generated: one slot per sequence, one length per slot.

    Its capacity, in tokens, grows by CACHE_BLOCK as the longest sequence needs it: batched products over a whole
    contiguous tensor are several times as fast on a CPU as over the visible part of a larger one. `generate` reserves
    all of it at once where it runs ahead.

    Args: config: of what this rank computes (`DecoderConfig.shard`). layers: of this rank.
    Shapes: stored[layer] [2 (keys, values), num_slots, num_kv_heads, capacity, head_dim]
    """

    def __init__(
        self, config: DecoderConfig, layers: Iterable[int], num_slots: int, dtype: torch.dtype, device: torch.device
    ):
        self.config, self.shape = config, (2, num_slots, config.num_kv_heads, 0, config.head_dim)
        self.stored = {i: torch.zeros(self.shape, dtype=dtype, device=device) for i in layers}
        self.slots: Tensor | None = None  # those whose prompts the next forward holds; None: it holds one token of each
        self.new: Step | None = None  # where those tokens go

    def prompt(self, slots: Tensor, num_tokens: int) -> None:
        """The next forward holds the whole prompts of these slots, right-padded to num_tokens."""
        self.slots = slots
        self.reserve(num_tokens)

    def step(self, lens: Tensor) -> None:
        """The next forward holds one new token of each of the first len(lens) slots, which have lens tokens cached and
        room for one more; lens is -1 for slots that are not in use."""
        self.slots = None
        self.new = Step(lens + 1, self.shape[3])

    def reserve(self, num_tokens: int) -> None:
        """Makes room for sequences of num_tokens, layer by layer."""
        *slots, capacity, head_dim = self.shape
        if num_tokens > capacity:
            self.shape = (*slots, -(-num_tokens // CACHE_BLOCK) * CACHE_BLOCK, head_dim)
            for i, layer in self.stored.items():
                self.stored[i] = F.pad(layer, (0, 0, 0, self.shape[3] - capacity))

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copies slots over others."""
        for stored in self.stored.values():
            stored[:, targets] = stored[:, sources]

    def attention(
        self, layer: int, heads: Tensor, visible: Visible, tables: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Stores this forward's keys and values, then attends to everything stored.

        Args: tables: of new tokens that are yet to be rotated; those of prompts are.
        Shapes: heads [batch, seq_len, q + k + v heads, head_dim] -> [batch, seq_len, num_heads, head_dim]
        """
        config, stored = self.config, self.stored[layer]
        if self.slots is not None:  # what lies beyond a prompt's end is overwritten before it is ever visible
            q, k, v = split_heads(heads, config)
            stored[0, self.slots, :, : k.shape[1]] = k.transpose(1, 2)
            stored[1, self.slots, :, : v.shape[1]] = v.transpose(1, 2)
            return attention(q, k, v, visible)
        q = append(heads.flatten(1), stored, self.new, config.num_heads, tables, config.rotary_interleaved)
        return decode_attention(q, stored, self.new, visible.window)[:, None]


def lm_logits(decoder: Decoder, hidden: Tensor) -> Tensor:
    """Next-token logits of this rank's vocabulary in float32 at least, -inf in padded rows.

    Shapes: hidden [n, hidden_size] -> [n, padded_vocab / tp]
    """
    head = decoder.lm_head
    logits = F.linear(hidden, decoder.lm_head_weight) if head is None else head.product(hidden, head.bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits[:, max(decoder.config.vocab_size - decoder.mesh.tp.rank * logits.shape[1], 0) :].fill_(-torch.inf)
    return logits


@dataclass
class Pass:
    """One forward of a group of sequences: whole prompts that enter, or the newest token of each one under way."""

    rows: Tensor  # [n] the sequences
    slots: Tensor | None  # [n] where prompts enter
    lens: Tensor  # [n] tokens of each prompt, or those cached before the newest
    token_ids: Tensor  # [n, seq_len]
    position_ids: Tensor  # [n, seq_len]

    def forward(self, decoder: Decoder, cache: KVCache, x: Tensor, layers: range) -> Tensor:
        """Through some layers; behind the last one [n, hidden_size], of each sequence's last token."""
        if self.slots is not None:
            cache.prompt(self.slots, self.token_ids.shape[1])
        else:
            cache.reserve(int(self.lens.max()) + 1)
            cache.step(self.lens)
        x = decoder(x, self.position_ids, torch.zeros_like(self.token_ids), cache, layers)
        if layers.stop < decoder.config.num_layers:
            return x
        last = torch.zeros_like(self.lens) if self.slots is None else self.lens - 1
        return x[torch.arange(len(last), device=last.device), last]


class Replay:
    """A function without arguments and results; on a GPU, from the second call on, one CUDA graph of what it does.

    The first call is made as it is: what is set up only once (compiled kernels, workspaces) is no part of the graph.
    The function must not wait for the GPU, and every call must read and write the same tensors in the same shapes.
    """

    def __init__(self, fn: Callable[[], None], device: torch.device):
        self.fn, self.graph = fn, None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.was_called = False

    def __call__(self) -> None:
        if self.stream is None:
            self.fn()
        elif not self.was_called:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.fn()
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=self.stream):
                    self.fn()
            self.graph.replay()
        self.was_called = True


def runs_ahead(decoder: Decoder) -> bool:
    """Whether the host may let this rank draw several tokens of a sequence before it looks at them."""
    mesh = decoder.mesh
    return mesh.device.type == "cuda" and mesh.pp.size == mesh.tp.size == 1 and decoder.shards is None


def stop_at(tokenizer, stop: tuple[str, ...]) -> Callable[[list[list[int]]], list[bool]] | None:
    """Says of each response whether its text contains a stop sequence; None without stop sequences.

    Only the end of a response is decoded: called after every token, an earlier stop has been seen before. Each list of
    ids begins one token early, so that a space at the response's beginning shows.
    """
    if not stop:
        return None
    tail = max(len(text.encode()) for text in stop) + 4  # a token holds at least a byte; some room for word-start rules

    def stop_fn(responses: list[list[int]]) -> list[bool]:
        ends = [ids[-tail:] for ids in responses]
        firsts = tokenizer.batch_decode([ids[:1] for ids in ends], skip_special_tokens=True)
        texts = tokenizer.batch_decode(ends, skip_special_tokens=True)
        return [any(end in text[len(first) :] for end in stop) for first, text in zip(firsts, texts, strict=True)]

    return stop_fn


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    eos_ids: list[int],
    sample_ids: list[int],
    seed: int,
    stream: int = ROLLOUT,
    stop_fn: Callable[[list[list[int]]], list[bool]] | None = None,
    logits_fn: Callable[[Tensor], Tensor] | None = None,
    num_ids: int | None = None,
    num_slots: int = NUM_SLOTS,
) -> Generation:
    """Samples one response per prompt with continuous batching.

    A response ends with the first of: an id of `eos_ids`, `stop_fn` (see `stop_at`), `sampling.max_new_tokens`. The
    sampled EOS or stop sequence is part of it.

    Args: sample_ids: one number per prompt; with seed, stream and position it fixes the noise. logits_fn: hidden
        [n, hidden_size] -> logits [n, padded_vocab / tp] in place of the LM head. num_ids: ids from here on, which the
        tokenizer lacks, are never drawn.
    Communication: over tp that of the decoder and of `sample_tokens`; over pp one message a pass and border between
        parts, and a broadcast of what was drawn; replicas do not wait for each other.
    Raises: ValueError if a prompt is empty or does not fit the context together with its response.
    """
    mesh, config, dtype = decoder.mesh, decoder.config, decoder.dtype
    device, pp = mesh.device, mesh.pp
    if num_ids is not None and num_ids >= config.vocab_size:
        num_ids = None  # the logits of those ids are -inf anyway
    # one row more than there are prompts: that of slots that are not in use while the host does not look
    prompt_lens = torch.tensor([*(len(prompt) for prompt in prompts), 1], dtype=torch.long, device=device)
    limit = prompt_lens + sampling.max_new_tokens  # [batch + 1], as all that follow
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= config.max_seq_len - sampling.max_new_tokens:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with {sampling.max_new_tokens} new ones it must fit the context "
                f"of {config.max_seq_len} and hold at least one token: cut it or lower --sampling.max-new-tokens"
            )
    max_len, batch = int(limit.max()), len(prompts)
    input_ids = torch.zeros(batch + 1, max_len, dtype=torch.long, device=device)
    for i, prompt in enumerate(prompts):
        input_ids[i, : len(prompt)] = torch.tensor(prompt, device=device)
    logprobs = torch.zeros(batch + 1, max_len, device=device, dtype=torch.promote_types(dtype, torch.float32))
    seq_lens = prompt_lens.clone()
    finished = torch.zeros(batch + 1, dtype=torch.bool, device=device)
    samples = torch.tensor([*sample_ids, 0], dtype=torch.long, device=device)
    new = torch.arange(sampling.max_new_tokens, device=device)
    noise = uniform(seed, stream, samples[:, None], prompt_lens[:, None] + new)  # [batch + 1, max_new_tokens]
    eos = torch.tensor(eos_ids, dtype=torch.long, device=device)
    kept_mass = torch.zeros((), dtype=torch.float64, device=device)
    num_started = 0

    num_slots = max(min(num_slots, -(-batch // pp.size)), 1)  # of a group
    layers = [i for chunk in decoder.chunks for i in chunk]
    caches = [KVCache(config.shard(mesh.tp.size), layers, num_slots, dtype, device) for _ in range(pp.size)]
    none = torch.zeros(0, dtype=torch.long, device=device)
    groups = [none] * pp.size  # of each group, the sequence in each slot in use; these slots are the first

    def next_pass(rows: Tensor) -> Pass | None:
        """What a group, whose slots hold these sequences, does next."""
        nonlocal num_started
        num_free = min(num_slots - len(rows), batch - num_started)
        if num_free and (not len(rows) or num_free >= num_slots // 4 or num_started + num_free == batch):
            longest = int(prompt_lens[num_started : num_started + num_free].max())
            num_entered = min(num_free, max(1, PREFILL_TOKENS // longest))
            entered = torch.arange(num_started, num_started + num_entered, device=device)
            num_started += num_entered
            slots = torch.arange(len(rows), len(rows) + num_entered, device=device)
            token_ids = input_ids[entered, : int(prompt_lens[entered].max())]  # causality hides the padding
            positions = torch.arange(token_ids.shape[1], device=device).expand_as(token_ids)
            return Pass(entered, slots, prompt_lens[entered], token_ids, positions)
        if not len(rows):
            return None
        lens = seq_lens[rows] - 1  # the newest token is not in the cache yet
        return Pass(rows, None, lens, input_ids[rows, lens][:, None], lens[:, None])

    def draw(hidden: Tensor, rows: Tensor) -> Tensor:
        """Next tokens, their log-probabilities and the mass kept, as [3, n] float64."""
        logits = logits_fn(hidden) if logits_fn is not None else lm_logits(decoder, hidden)
        at = noise[rows, seq_lens[rows] - prompt_lens[rows]]
        return torch.stack([x.double() for x in sample_tokens(logits, at, sampling, num_ids, mesh.tp)])

    def record(drawn: Tensor, rows: Tensor) -> Tensor:
        """Appends what was drawn; returns which rows go on."""
        tokens, positions = drawn[0].long(), seq_lens[rows]
        input_ids[rows, positions] = tokens
        logprobs[rows, positions] = drawn[1].to(logprobs.dtype)
        seq_lens[rows] = positions + 1
        kept_mass.add_(drawn[2].where(rows < batch, 0.0).sum())
        ended = (tokens[:, None] == eos).any(1)
        if stop_fn is not None:
            spans = zip(input_ids[rows].tolist(), prompt_lens[rows].tolist(), (positions + 1).tolist(), strict=True)
            ended |= torch.tensor(stop_fn([ids[start - 1 : end] for ids, start, end in spans]), device=device)
        finished[rows] = ended
        return ~ended & (positions + 1 < limit[rows])

    rows_in_slots = torch.full((num_slots,), batch, dtype=torch.long, device=device)

    def step() -> None:
        """One token more of each sequence in rows_in_slots, from which those that end disappear, unseen by the host."""
        lens = seq_lens[rows_in_slots] - 1
        caches[0].step(lens.where(rows_in_slots < batch, -1))
        token_ids = input_ids[rows_in_slots, lens][:, None]
        hidden = decoder(token_ids, lens[:, None], torch.zeros_like(token_ids), caches[0])[:, 0]
        going = record(draw(hidden, rows_in_slots), rows_in_slots)
        rows_in_slots.copy_(rows_in_slots.where(going, batch))
        seq_lens[batch:].fill_(1)

    def run_ahead(rows: Tensor) -> Tensor:
        """TOKENS_AHEAD tokens more of each sequence, or until it ends; returns which rows go on."""
        rows_in_slots.fill_(batch)
        rows_in_slots[: len(rows)] = rows
        for _ in range(min(TOKENS_AHEAD, sampling.max_new_tokens)):
            replay()
        return rows_in_slots[: len(rows)] < batch

    def close(cache: KVCache, rows: Tensor, going: Tensor) -> Tensor:
        """Moves the last sequences of a group into the slots of those that ended; returns who is left."""
        num_going = int(going.sum())
        if num_going < len(rows):
            holes = (~going[:num_going]).nonzero()[:, 0]
            movers = going[num_going:].nonzero()[:, 0] + num_going
            cache.move(movers, holes)
            rows = rows.clone()
            rows[holes] = rows[movers]
        return rows[:num_going]

    ahead = runs_ahead(decoder) and stop_fn is None  # texts are looked at by the host
    if ahead:
        caches[0].reserve(max_len - 1)  # the last token is not stored
        replay = Replay(step, device)
    passes: list[Pass | None] = [None] * pp.size  # of each group, under way
    num_parts = pp.size * len(decoder.chunks)
    came: Tensor | None = None  # what the stage before has sent
    with packed_weights(decoder, num_slots):
        for tick in itertools.count():
            # of each group: the part of the model that its pass is at; each is at another stage
            at = [(tick - group) % num_parts for group in range(pp.size)]
            for group in range(pp.size):
                if at[group] == 0:
                    passes[group] = next_pass(groups[group])
            if num_started == batch and not any(passes):
                break
            mine = (tick - pp.rank) % pp.size
            one = passes[mine]
            if ahead and one is not None and one.slots is None:
                groups[0] = close(caches[0], one.rows, run_ahead(one.rows))
                continue
            states = None
            if one is not None:
                chunk = decoder.chunks[at[mine] // pp.size]
                states = one.forward(decoder, caches[mine], one.token_ids if at[mine] == 0 else came, chunk)
            if pp.size > 1:
                moving = [(tick - stage) % pp.size for stage in range(pp.size)]  # the group at each stage
                widths = [
                    passes[group].token_ids.numel() if passes[group] and at[group] < num_parts - 1 else 0
                    for group in moving
                ]
                came = rotate(states, widths, decoder)
            for group in range(pp.size):
                if at[group] < num_parts - 1 or passes[group] is None:
                    continue
                rows = passes[group].rows
                drawn = torch.empty(3, len(rows), dtype=torch.float64, device=device)
                if pp.rank == pp.size - 1:
                    drawn = draw(states, rows)
                broadcast_(drawn, pp, pp.size - 1)
                going = record(drawn, rows)
                if passes[group].slots is not None:  # prompts have come to those that were there
                    going = torch.cat((torch.ones(len(groups[group]), dtype=torch.bool, device=device), going))
                    groups[group] = torch.cat((groups[group], rows))
                groups[group] = close(caches[group], groups[group], going)
    input_ids, prompt_lens, seq_lens, logprobs, finished = (
        x[:batch] for x in (input_ids, prompt_lens, seq_lens, logprobs, finished)
    )
    seq_len = int(seq_lens.max()) if batch else 1
    positions = torch.arange(seq_len, device=device)
    response_mask = (positions >= prompt_lens[:, None]) & (positions < seq_lens[:, None])
    return Generation(
        input_ids[:, :seq_len],
        prompt_lens,
        seq_lens,
        response_mask,
        logprobs[:, :seq_len],
        finished,
        float(kept_mass / response_mask.sum().clamp(min=1)),
    )


def rotate(states: Tensor | None, num_tokens: list[int], decoder: Decoder) -> Tensor | None:
    """Each stage's states to the next one, the last one's to the first; all stages issue their messages in one order.

    Args: num_tokens: that each stage sends, 0 if nothing.
    Shapes: states [tokens, hidden_size] -> the same of the stage before, None if it sends nothing
    Communication: over pp one message per stage that sends.
    """
    pp, channels = decoder.mesh.pp, decoder.mesh.channels
    came, pending = None, []
    for stage, tokens in enumerate(num_tokens):
        following = (stage + 1) % pp.size
        channel = channels["forward" if following else "wrap_forward"] if tokens else None
        if tokens and stage == pp.rank:
            pending.append(send_async(states, channel, following))
        elif tokens and following == pp.rank:
            came = torch.empty(tokens, decoder.config.hidden_size, dtype=decoder.dtype, device=decoder.mesh.device)
            pending.append(recv_async_(came, channel, stage))
    for message in pending:
        message.wait()
    return came
