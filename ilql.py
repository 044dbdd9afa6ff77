"""ILQL: implicit language Q-learning, from a fixed set of dialogues with rewards; nothing is sampled while it learns.

Every token of the speaker is an action a, the state s is all text before it. Beside the policy's LM head stand one or
two Q heads, their slowly following targets Q', and a value head V. With s' the state before the speaker's next token
(what others write in between is skipped; V(s') = 0 after the last one) and means over the actions of a batch,

    y = r + gamma V(s')                                                                                        (1)
    L_q = sum_i mean (Q_i(s, a) - y)^2                                                                         (2)
    L_v = mean |tau - [Q'(s, a) < V(s)]| (Q'(s, a) - V(s))^2        with Q' = min_i Q'_i                       (3)
    L_cql = sum_i mean -log softmax(Q_i(s, .))[a]                                                              (4)
    L_awac = mean min(exp(beta (Q'(s, a) - V(s))), w_max) * -log pi(a | s)                                     (5)
    L = L_q + L_v + cql_coef L_cql + awac_coef L_awac                                                          (6)
    Q'_i <- (1 - alpha) Q'_i + alpha Q_i        every target_sync_steps optimizer steps                        (7)

No gradient flows through y, through Q' or through the weight in (5). Sampling adds what Q' knows to the policy,

    a ~ softmax((log pi(. | s) + advantage_scale (min_i Q'_i(s, .) - V(s))) / temperature)                     (8)

where V(s) cancels. A Q value is a logit of its head, so (2) and (4) come from one pass that holds a
[tokens, vocab] tensor of 32 MiB at most; Q' of the data's tokens gathers rows of the head instead.

Sources: Snell et al. 2022 (arXiv 2206.11871); Kostrikov et al. 2021 (2110.06169, eq. 5: expectiles); Kumar et al. 2020
(2006.04779, eq. 4: CQL); Nair et al. 2020 (2006.09359: AWAC); trlX (Havrilla et al. 2023). Differs from trlX: targets
follow in optimizer steps (trlX: once per epoch), target heads are float32 whatever the model is, and the AWAC weight is
clipped.

    torchrun ilql.py
    torchrun --nproc-per-node 2 ilql.py --model FOLDER --data rated.jsonl --eval-data prompts.jsonl --reward my.py:fn

The first command learns shortest paths from 1,000 random walks, none of it sampled: plain cloning (scale 0) reaches an
optimality of 0.35, decoding at scale 100 more than 0.95.
"""

import copy
import math
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.adapters import Lora, Tuning, set_trained
from parallel.checkpoint import eos_ids, holds_heads, load_decoder, load_heads, read_config, save_decoder
from parallel.collectives import Axis
from parallel.data import (
    check_vocabulary,
    is_message,
    join_parts,
    load_tokenizer,
    pack_batch,
    pad_batch,
    prompt_rows,
    rows_at,
    split_turns,
)
from parallel.data_parallel import data_parallel
from parallel.footprint import Job, Role
from parallel.generation import EVALUATION, Sampling, generate, lm_logits, stop_at
from parallel.mesh import Layout, Mesh, init_mesh
from parallel.optim import AdamW, Optim, clip_grad_norm
from parallel.pipeline import forward_backward
from parallel.plan import describe_memory, print_plan
from parallel.reshard import rollout_weights
from parallel.rows import Row, load_rows, resolve_model, warn
from parallel.run import Run, check_flags, launch
from parallel.tensor import (
    hidden_before,
    padded_vocab_size,
    place_vocab,
    vocab_parallel_logits,
    vocab_parallel_logprobs,
    vocab_parallel_target,
)
from parallel.training_state import module_pieces, save_training_state
from tasks.rewards import SampleContext, make_reward, make_samples, score_together

MAX_AWAC_WEIGHT = 20.0  # w_max of eq. 5


@dataclass
class Args:
    """ILQL. The defaults learn the embedded random-walks task from its walks alone."""

    model: str = "tasks.random_walks:untrained_policy"
    """Hugging Face folder, hub id, or module:function that returns a folder; Q and value heads beside it are loaded"""
    tokenizer: str = ""
    """folder or hub id; empty = that of --model"""
    data: tuple[str, ...] = ("tasks.random_walks:rated_walks",)
    """JSONL files, folders, hub names or module:function; rows of `prompt`, `response`, `reward` (a return, or one
    number per response token, its EOS included), or `messages`, `rewards` (a return, or one per assistant's turn)"""
    eval_data: tuple[str, ...] = ()
    """prompts to sample from, rows of `prompt` or `messages`; none = the prompts of --data, at most 256"""
    reward: str = "tasks.random_walks:optimality"
    """scores what the evaluation samples: a function, an endpoint or a reward model, as in ppo.py; empty = none"""
    bos: bool = True
    """begin each dialogue with the tokenizer's BOS, where it has one"""
    max_len: int = 0
    """leave longer dialogues out, in tokens; 0 = the model's context"""
    rollout_timeout: float = 7200.0
    """seconds that ranks wait for one that lives but is still sampling or scoring; a dead one is noticed after 60"""
    output_dir: str = ""
    """run folder; empty = the next free of runs/ilql, runs/ilql-2, ..."""
    resume: bool = False
    """go on from the newest checkpoint of --output-dir, or of the newest runs/ilql*"""
    overwrite: bool = False
    """replace the run that --output-dir holds"""
    allow_change: tuple[str, ...] = ()
    """flags that may differ from those of the resumed run, e.g. --allow-change optim.lr"""
    seed: int = 1
    """of the heads' initial weights, the order of dialogues and the sampling noise"""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """of parameters and activations; the optimizer keeps a float32 copy of bfloat16 parameters"""
    max_steps: int = 200
    """optimizer steps; 0 evaluates and stops"""
    eval_every: int = 50
    """steps between evaluations"""
    save_every: int = 100
    """steps between checkpoints; the last two are kept"""
    log_every: int = 10
    """steps between progress lines where the output is not a terminal"""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """also log there; the package must be installed"""
    eval_samples: int = 2000
    """responses of an evaluation at each scale, spread over its prompts"""
    advantage_scales: tuple[float, ...] = (0.0, 1.0, 100.0)
    """advantage_scale of eq. 8, each evaluated; 0 = the cloned policy"""

    batch_size: int = 100
    """dialogues of an optimizer step, over all ranks"""
    microbatch_size: int = 100
    """dialogues of a forward and backward, per rank; changes memory and speed only"""
    num_q_heads: Literal[1, 2] = 2
    """the smaller of two target Q values is less optimistic"""
    gamma: float = 0.99
    """discount per action (eq. 1)"""
    expectile: float = 0.8
    """tau of eq. 3: 0.5 = the mean of what was done, towards 1 = the best of it"""
    cql_coef: float = 0.1
    """weight of eq. 4, which keeps tokens that were never tried from looking good"""
    awac_coef: float = 1.0
    """weight of eq. 5, which clones the data into the policy"""
    awac_beta: float = 0.0
    """beta of eq. 5: 0 = plain cloning"""
    target_update_rate: float = 0.1
    """alpha of eq. 7"""
    target_sync_steps: int = 5
    """optimizer steps from one update of the target heads to the next (eq. 7)"""
    freeze: tuple[str, ...] = ()
    """parts that keep their weights: embedding, layers.0-5, lm_head, ... or patterns of names such as *.bias"""
    unfrozen_layers: int = 0
    """upper layers that train, with what lies above them; 0 = all"""
    lora: Lora = field(default_factory=Lora)
    optim: Optim = field(default_factory=partial(Optim, lr=1e-3, schedule="cosine"))
    sampling: Sampling = field(default_factory=Sampling)
    layout: Layout = field(default_factory=Layout)
    plan: float = 0.0
    """GiB of a rank: prints what a run of these flags would hold and send, which layouts fit, and ends; 0 = train"""
    world_size: int = 0
    """ranks that --plan is for; 0 = those started"""

    def __post_init__(self):
        counts = "batch_size microbatch_size eval_every save_every log_every target_sync_steps"
        zero = "max_steps max_len eval_samples gamma cql_coef awac_coef awac_beta rollout_timeout plan world_size"
        zero += " unfrozen_layers"
        check_flags(self, {1: counts, 0: zero})
        if not 0 < self.expectile < 1:
            raise ValueError(f"--expectile {self.expectile} is not between 0 and 1; 0.5 is the mean")
        if not 0 < self.target_update_rate <= 1:
            raise ValueError(f"--target-update-rate {self.target_update_rate} is not in (0, 1]; 1 copies the Q heads")
        if not all(map(math.isfinite, self.advantage_scales)) or not self.advantage_scales:
            raise ValueError(f"--advantage-scales {self.advantage_scales} should be finite numbers, at least one")
        if len({f"{scale:g}" for scale in self.advantage_scales}) < len(self.advantage_scales):
            raise ValueError(f"--advantage-scales {self.advantage_scales} holds a scale twice")

    @property
    def tuning(self) -> Tuning:
        """What of the policy trains."""
        return Tuning(self.freeze, self.unfrozen_layers, self.lora)

    def job(self) -> Job:
        """What --plan counts."""
        config, itemsize = read_config(self.model), getattr(torch, self.dtype).itemsize
        wide, n = max(itemsize, 4), config.hidden_size
        q_heads = (((2 * n, n), (2 * n,), ("vocab", 2 * n), ("vocab",))) * self.num_q_heads
        roles = {
            "policy": Role(config, itemsize, tuning=self.tuning.resolved()),
            "q_heads": Role(None, itemsize, shapes=q_heads),
            "value_head": Role(None, wide, shapes=((2 * n, n), (2 * n,), (1, 2 * n), (1,))),
            "target_q_heads": Role(None, wide, trainable=False, shapes=q_heads, in_units=False),
        }
        seq_len, new_tokens = min(self.max_len or config.max_seq_len, config.max_seq_len), self.sampling.max_new_tokens
        rollout = {"rollout": self.eval_samples, "new_tokens": new_tokens}
        return Job(roles, self.batch_size, self.microbatch_size, seq_len, scored=seq_len - 1, **rollout)


# ---------------------------------------------------------------------------------------------------------------------
# Data: dialogues as tokens, which of them are actions, and what each action earned
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Dialogue:
    """A dialogue's tokens; each list has one entry per token."""

    input_ids: list[int]
    action_mask: list[bool]  # the speaker's tokens, EOS included
    rewards: list[float]  # of each action, 0 elsewhere
    terminal: list[bool]  # True on the last action


def read_dialogues(rows: list[Row], tokenizer, add_bos: bool, max_len: int) -> list[Dialogue]:
    """Dialogues from `prompt` + `response` + `reward`, or `messages` + `rewards`, where the assistant speaks.

    A return is a number for a whole dialogue: it lies on the last action, standardised over the data set. A list holds
    the rewards themselves: one per response token, or one per turn of the assistant, on its last token.
    Dialogues longer than max_len are left out, with one warning: cut, they would end in another state.
    Raises: ValueError naming the row that does not fit, or when nothing is left to learn from.
    """
    parts_of, is_action, given = [], [], []
    for row in rows:
        if "messages" in row and "rewards" in row:
            messages = row["messages"]
            if isinstance(messages, list) and messages and is_message(messages[0]):
                if messages[0]["role"] == "assistant":
                    raise ValueError(f"{row.where}: its `messages` start with the assistant: no state to act in")
            parts, spoken = split_turns(row, tokenizer)
            given.append(row["rewards"])
        elif all(name in row for name in ("prompt", "response", "reward")):
            parts, spoken = [row.text("prompt"), row.text("response")], [False, True]
            given.append(row["reward"])
        else:
            raise row.misfit("`prompt`, `response` and `reward`, or `messages` and `rewards`")
        parts_of.append(parts)
        is_action.append(spoken)
        check_rewards(row, given[-1])
    is_dense = isinstance(given[0], list)
    for row, rewards in zip(rows, given, strict=True):
        if isinstance(rewards, list) != is_dense:
            kinds = f"{rewards!r:.40} is given, and {given[0]!r:.40} for {rows[0].where}"
            raise ValueError(f"{row.where}: {kinds}: all rewards are numbers, or all are lists")
    kept, long = [], []
    examples = join_parts(rows, parts_of, is_action, tokenizer, add_bos, add_eos=True)
    for row, example, rewards in zip(rows, examples, given, strict=True):
        actions = [t for t, is_action in enumerate(example.loss_mask) if is_action]
        if not actions:
            raise ValueError(f"{row.where}: the dialogue holds no action: the assistant says nothing")
        if actions[0] == 0:
            raise ValueError(f"{row.where}: nothing stands before the first action: give a prompt or a tokenizer's BOS")
        where = actions[-1:]  # of a return
        if is_dense:
            where = example.ends if "messages" in row else actions
            if len(rewards) != len(where):
                what = "turns of the assistant" if "messages" in row else "tokens in the response, its EOS included"
                raise ValueError(f"{row.where}: {len(rewards)} rewards for {len(where)} {what}")
            if None in where:
                raise ValueError(f"{row.where}: a turn of the assistant has no token that its reward could lie on")
        if len(example.input_ids) > max_len:
            long.append(f"{row.where} has {len(example.input_ids)} tokens")
        else:
            kept.append((example, where, rewards))
    if long:
        message = f"{len(long)} of {len(rows)} dialogues longer than {max_len} tokens left out: {long[0]}"
        if not kept:
            raise ValueError(f"{message}; none is left: give a model with a longer context or shorter dialogues")
        warn(message)
    all_rewards = [rewards for _, _, rewards in kept]
    if is_dense:
        if not any(value for rewards in all_rewards for value in rewards):
            raise ValueError(
                f"all rewards of {len(kept)} dialogues are 0: there is nothing better or worse to learn from"
            )
    else:
        all_rewards = [[value] for value in standardise(all_rewards)]
    dialogues = []
    for (example, where, _), rewards in zip(kept, all_rewards, strict=True):
        placed = [0.0] * len(example.input_ids)
        for t, value in zip(where, rewards, strict=True):
            placed[t] = float(value)
        last = max(t for t, is_action in enumerate(example.loss_mask) if is_action)
        terminal = [t == last for t in range(len(placed))]
        dialogues.append(Dialogue(example.input_ids, example.loss_mask, placed, terminal))
    return dialogues


def check_rewards(row: Row, rewards) -> None:
    """Raises ValueError unless a row's reward is a finite number or a list of such."""
    for value in rewards if isinstance(rewards, list) else [rewards]:
        row.number(value, "its reward holds")
    if rewards == []:
        raise ValueError(f"{row.where}: its list of rewards is empty")


def standardise(returns: list[float]) -> list[float]:
    """Returns with mean 0 and deviation 1. Raises: ValueError if they are all equal."""
    x = torch.tensor(returns, dtype=torch.float64)
    std = x.std(correction=0)
    if std <= 1e-8 * x.abs().max():
        raise ValueError(f"all {len(returns)} returns are {returns[0]}: there is nothing better or worse to learn from")
    return ((x - x.mean()) / std).tolist()


def make_microbatches(dialogues: list[Dialogue], args, device):
    """Yields packed micro-batches of `microbatch_size` dialogues: fields of `Dialogue` and where its tokens lie."""
    for i in range(0, len(dialogues), args.microbatch_size):
        some = [vars(dialogue) for dialogue in dialogues[i : i + args.microbatch_size]]
        fields, seq_lens = pad_batch({name: [dialogue[name] for dialogue in some] for name in some[0]})
        microbatch = pack_batch(fields, seq_lens, torch.arange(len(seq_lens)))
        yield {name: x.to(device) for name, x in microbatch.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Heads and losses
# ---------------------------------------------------------------------------------------------------------------------


class MLPHead(nn.Module):
    """Two layers on the hidden state: numbers per token of the vocabulary (Q), or one (V).

    Args: vocab_size: None for V. The vocabulary is divided over tp, as that of the LM head.
    Shapes: hidden [n, hidden_size] -> features [n, 2 * hidden_size] -> [n, padded_vocab / tp] or [n, 1]
    """

    def __init__(self, hidden_size: int, vocab_size: int | None, dtype: torch.dtype, mesh: Mesh, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        num_rows = 1 if vocab_size is None else padded_vocab_size(vocab_size, 1)  # those drawn

        def uniform(fan_in, *shape):  # as torch initialises a linear layer
            x = (2 * torch.rand(*shape, generator=generator) - 1) / math.sqrt(fan_in)
            return nn.Parameter(x.to(mesh.device, dtype))

        self.inner_weight = uniform(hidden_size, 2 * hidden_size, hidden_size)
        self.inner_bias = uniform(hidden_size, 2 * hidden_size)
        self.weight = uniform(2 * hidden_size, num_rows, 2 * hidden_size)
        self.bias = uniform(2 * hidden_size, num_rows)
        if vocab_size is not None:
            place_vocab(self, ("weight", "bias"), vocab_size, mesh.tp)

    def features(self, hidden: Tensor) -> Tensor:
        return F.relu(F.linear(hidden.to(self.weight.dtype), self.inner_weight, self.inner_bias))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(self.features(hidden), self.weight, self.bias)


def make_heads(config, args, dtype, mesh) -> dict[str, nn.Module]:
    """Q heads, a value head, and the targets, which start as the Q heads; those two in at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    seeds = [args.seed * 4 + i for i in range(args.num_q_heads + 1)]
    q_heads = nn.ModuleList(MLPHead(config.hidden_size, config.vocab_size, dtype, mesh, s) for s in seeds[1:])
    return {
        "q_heads": q_heads,
        "value_head": MLPHead(config.hidden_size, None, wide, mesh, seeds[0]),
        "target_q_heads": copy.deepcopy(q_heads).to(wide).requires_grad_(False),
    }


@torch.no_grad()
def sync_targets(q_heads: nn.Module, target_q_heads: nn.Module, rate: float) -> None:
    """Moves the target heads towards the Q heads (eq. 7)."""
    for target, source in zip(target_q_heads.parameters(), q_heads.parameters(), strict=True):
        target.lerp_(source.to(target.dtype), rate)


@torch.no_grad()
def min_target_q(target_q_heads: nn.Module, states: Tensor, token_ids: Tensor, tp: Axis) -> Tensor:
    """min_i Q'_i of each action: a row of each head's weight per token. [n, hidden_size], [n] -> [n]"""
    values = []
    for head in target_q_heads:
        values.append(vocab_parallel_target(head.features(states), head.weight, head.bias, token_ids, tp))
    return torch.stack(values).amin(0)


def ilql_loss(hidden, microbatch, roles, target_q_heads, args, num_actions):
    """Loss (eq. 6) and metrics of one micro-batch, divided by the batch's num_actions; hidden: states by role.

    Shapes: hidden [rows, row_len, hidden_size], microbatch as `make_microbatches` gives it, [rows, row_len] each
    """
    mask = microbatch["action_mask"]
    token_ids, rewards, terminal = (
        microbatch[name][mask] for name in ("input_ids", "rewards", "terminal")
    )  # [actions]
    states = hidden_before(hidden["policy"], mask)  # [actions, hidden_size]
    state_values = roles["value_head"](states).squeeze(-1)  # [actions]
    tp = roles["policy"].mesh.tp
    target_q = min_target_q(target_q_heads, states.detach(), token_ids, tp)

    # an action's next state is that of the action behind it in the dialogue
    next_values = torch.where(terminal, 0.0, state_values.detach().roll(-1))
    y = rewards.to(next_values.dtype) + args.gamma * next_values

    vocab_size = roles["policy"].config.vocab_size
    q_loss = cql_loss = 0.0
    for head in roles["q_heads"]:
        features = head.features(states)
        action_q, q_logprobs, _ = vocab_parallel_logits(features, head.weight, head.bias, token_ids, vocab_size, tp)
        q_loss = q_loss + (action_q - y).square().sum() / num_actions
        cql_loss = cql_loss - q_logprobs.sum() / num_actions
    advantages = target_q - state_values
    weights = torch.where(advantages.detach() < 0, 1 - args.expectile, args.expectile)
    value_loss = (weights * advantages.square()).sum() / num_actions
    logprobs, _ = vocab_parallel_logprobs(states, roles["policy"], token_ids)
    awac_weights = (args.awac_beta * advantages.detach()).exp().clamp(max=MAX_AWAC_WEIGHT)
    awac_loss = -(awac_weights * logprobs).sum() / num_actions
    loss = q_loss + value_loss + args.cql_coef * cql_loss + args.awac_coef * awac_loss
    metrics = {
        "loss": loss,
        "q_loss": q_loss,
        "value_loss": value_loss,
        "cql_loss": cql_loss,
        "awac_loss": awac_loss,
        "target_q": target_q.sum() / num_actions,
        "state_value": state_values.sum() / num_actions,
        "awac_weight": awac_weights.sum() / num_actions,
    }
    return loss, {name: x.detach() for name, x in metrics.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Sampling and its evaluation
# ---------------------------------------------------------------------------------------------------------------------


def guided_logits(hidden: Tensor, policy, target_q_heads, advantage_scale: float) -> Tensor:
    """Logits of eq. 8: [n, hidden_size] -> [n, padded_vocab / tp], -inf where an id does not exist."""
    q_values = torch.stack([head(hidden) for head in target_q_heads]).amin(0)
    return lm_logits(policy, hidden) + advantage_scale * q_values


def evaluate(policy, target_q_heads, prompts, reward, args, tokenizer, eos):
    """Mean score of `eval_samples` responses at fixed noise, at each of the scales.

    Communication: scores and texts are gathered over dp.
    Returns: metrics, and rows of (scale, prompt, response, score, finished), of all samples of all ranks
    """
    mesh, metrics, table = policy.mesh, {}, []
    sample_ids = list(range(args.eval_samples))[mesh.dp.rank :: mesh.dp.size]
    mine = [prompts[i % len(prompts)] for i in sample_ids]
    for scale in args.advantage_scales if args.eval_samples else ():
        logits_fn = partial(guided_logits, policy=policy, target_q_heads=target_q_heads, advantage_scale=scale)
        generation = generate(
            policy,
            [row.prompt_ids for row in mine],
            args.sampling,
            eos_ids=eos,
            sample_ids=sample_ids,
            seed=args.seed,
            stream=EVALUATION,
            stop_fn=stop_at(tokenizer, args.sampling.stop),
            num_ids=len(tokenizer),
            logits_fn=logits_fn if scale else None,
        )
        samples = make_samples(generation, mine, tokenizer, eos, args.sampling.stop)
        scores = score_together(reward, samples, mesh, args.rollout_timeout) if reward else [math.nan] * len(samples)
        scores = [sum(s) if isinstance(s, list) else s for s in scores]
        lens = (generation.seq_lens - generation.prompt_lens).tolist()
        results = zip(sample_ids, samples, scores, lens, strict=True)
        rows = [(i, s.prompt, s.response, score, s.finished, n) for i, s, score, n in results]
        rows = sorted(row for part in mesh.gather_objects(rows, "dp") for row in part)
        if reward:
            scores = torch.tensor([row[3] for row in rows], dtype=torch.float64)
            metrics[f"eval_score_scale_{scale:g}"] = scores.mean().item()
            metrics[f"eval_score_scale_{scale:g}_se"] = scores.std(correction=0).item() / math.sqrt(len(scores))
        metrics[f"eval_response_len_scale_{scale:g}"] = sum(row[5] for row in rows) / len(rows)
        metrics[f"eval_finished_scale_{scale:g}"] = sum(row[4] for row in rows) / len(rows)
        for _, prompt, response, score, finished, _ in rows:
            found = {"prompt": prompt, "response": response, "score": score, "finished": finished}
            table.append({"scale": scale, **found})
    return metrics, table


def evaluation_prompts(rows: list[Row]) -> list[Row]:
    """The different prompts of some dialogues, at most 256: what stands before the assistant's first turn."""
    prompts = {}
    for row in rows:
        if "messages" in row:
            turns = row["messages"]
            first = next((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))
            fields = {**row, "messages": turns[:first]}
        else:
            fields = dict(row)
        for name in ("response", "reward", "rewards"):
            fields.pop(name, None)
        prompts.setdefault(str(fields), Row(fields, row.where))
    return list(prompts.values())[:256]


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """What a resumed run needs beside weights and optimizer state."""

    step: int = 0
    samples: int = 0  # dialogues read, over all ranks
    tokens: int = 0  # of those dialogues
    optimizer_steps: int = 0  # what the target heads follow
    skipped_steps: int = 0  # for a non-finite gradient
    best_score: float = -math.inf
    seconds: float = 0.0  # of training


def main(args: Args) -> None:
    if args.plan:
        return print_plan(args)
    folder = resolve_model(args.model)
    mesh = init_mesh(args.layout, read_config(folder), (args.batch_size, args.microbatch_size))
    run = Run("ilql", args, mesh)
    dtype = getattr(torch, args.dtype)
    if args.batch_size % mesh.dp.size:
        raise ValueError(f"--batch-size {args.batch_size} is no multiple of {mesh.dp.size} replicas")

    # model: the policy, Q heads with their targets, and a value head
    tokenizer = load_tokenizer(args.tokenizer or folder)
    policy = set_trained(load_decoder(folder, mesh, dtype), args.tuning, args.seed)
    check_vocabulary(tokenizer, policy.config)
    eos = eos_ids(folder, tokenizer)
    heads = make_heads(policy.config, args, dtype, mesh)
    if holds_heads(folder, "q_heads"):
        load_heads(folder, heads, mesh)
    target_q_heads = heads["target_q_heads"]
    roles = {"policy": policy, "q_heads": heads["q_heads"], "value_head": heads["value_head"]}
    model = data_parallel(roles, mesh, args.layout)
    optimizer = AdamW(model, args.optim.lr, args.optim.betas, args.optim.eps, args.optim.weight_decay)

    # data and reward
    max_len = min(args.max_len or policy.config.max_seq_len, policy.config.max_seq_len)
    rows = load_rows(args.data)
    dialogues = read_dialogues(rows, tokenizer, args.bos, max_len)
    prompt_source = load_rows(args.eval_data) if args.eval_data else evaluation_prompts(rows)
    room = policy.config.max_seq_len - args.sampling.max_new_tokens
    eval_prompts = prompt_rows(prompt_source, tokenizer, 0, room, args.bos)
    longest = max(len(row.prompt_ids) for row in eval_prompts) + args.sampling.max_new_tokens
    context = SampleContext(mesh, tokenizer, eos, args.bos, dtype, longest)
    reward = make_reward(args.reward, context) if args.reward else None

    # where a resumed run goes on
    state = Progress()
    stored = [*model.pieces(), *optimizer.pieces(), *module_pieces("target_q_heads", target_q_heads, mesh)]
    saved = run.load_checkpoint(stored)
    if saved is not None:
        state = Progress(**saved["progress"])
    num_actions = sum(sum(dialogue.action_mask) for dialogue in dialogues)
    run.describe(
        [
            ("model", f"{args.model}, {policy.config.num_layers} layers, {policy.config.hidden_size} wide"),
            (
                "parameters",
                f"{policy.num_parameters:,} in the policy, "
                f"{sum(p.numel() for head in heads.values() for p in head.parameters()):,} in the heads, {args.dtype}",
            ),
            ("layout", mesh.describe()),
            ("memory", describe_memory(model, optimizer)),
            (
                "batch",
                f"{args.batch_size} dialogues a step = {mesh.dp.size} ranks x "
                f"{math.ceil(args.batch_size / mesh.dp.size / args.microbatch_size)} micro-batches x "
                f"{min(args.batch_size // mesh.dp.size, args.microbatch_size)} dialogues",
            ),
            ("data", f"{len(dialogues)} dialogues with {num_actions:,} actions, {len(eval_prompts)} prompts to sample"),
        ]
    )

    def save_checkpoint():
        meta = {"progress": vars(state)}
        save_training_state(run.folder / "checkpoints", state.step, stored, meta, keep=2, mesh=mesh)

    def evaluate_now():
        mesh.at("evaluation", state.step)
        with rollout_weights(policy) as sampler:
            metrics, table = evaluate(sampler, target_q_heads, eval_prompts, reward, args, tokenizer, eos)
        run.log({"event": "eval", "iteration": state.step, "samples": state.samples, **metrics})
        scores = {name: x for name, x in metrics.items() if name.startswith("eval_score") and not name.endswith("_se")}
        run.note(f"step {state.step}: " + "  ".join(f"{name} {x:.4f}" for name, x in scores.items()))
        run.samples(table, state.step, "scale")
        best = max(scores.values(), default=-math.inf)
        if best > state.best_score and state.step > 0:
            save_decoder(policy, run.folder / "best", mesh, tokenizer, heads)
        state.best_score = max(state.best_score, best)

    if saved is None:
        evaluate_now()  # the baseline

    while state.step < args.max_steps and not run.stop_requested():
        started = time.perf_counter()
        batch = [dialogues[i] for i in rows_at(state.samples, args.batch_size, len(dialogues), args.seed)]  # all ranks'
        num_actions = sum(sum(dialogue.action_mask) for dialogue in batch)
        share = args.batch_size // mesh.dp.size
        mine = batch[mesh.dp.rank * share : (mesh.dp.rank + 1) * share]

        # update
        mesh.at("update", state.step + 1)
        model.zero_grad()
        loss_fn = partial(ilql_loss, roles=roles, target_q_heads=target_q_heads, args=args, num_actions=num_actions)
        metrics = forward_backward(model, list(make_microbatches(mine, args, mesh.device)), loss_fn)
        metrics["grad_norm"] = clip_grad_norm(model, args.optim.max_grad_norm, mesh)
        scale = args.optim.lr_multiplier(state.step, args.max_steps)
        if optimizer.step(scale):
            state.optimizer_steps += 1
            if state.optimizer_steps % args.target_sync_steps == 0:
                sync_targets(heads["q_heads"], target_q_heads, args.target_update_rate)
        else:
            state.skipped_steps += 1

        # log
        seconds = time.perf_counter() - started
        state.step += 1
        state.samples += args.batch_size
        batch_tokens = sum(len(dialogue.input_ids) for dialogue in batch)
        state.tokens += batch_tokens
        state.seconds += seconds
        row = {
            "event": "train",
            "iteration": state.step,
            "samples": state.samples,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "step_seconds": seconds,
            "tokens_per_second": batch_tokens / seconds,
            **mesh.utilisation(6 * policy.num_parameters * batch_tokens, seconds),
            **metrics,
            "lr": args.optim.lr * scale,
            "skipped_steps": state.skipped_steps,
        }
        run.log(row)
        run.progress(
            state.step,
            args.max_steps,
            {
                "tok/s": f"{row['tokens_per_second']:,.0f}",
                "loss": f"{row['loss']:.4f}",
                "q_loss": f"{row['q_loss']:.4f}",
                "target_q": f"{row['target_q']:.3f}",
            },
        )

        # evaluate and save
        last = state.step == args.max_steps
        if last or state.step % args.eval_every == 0:
            evaluate_now()
            run.curves()
        if last or state.step % args.save_every == 0:
            save_checkpoint()

    if run.stop_requested():
        save_checkpoint()
    elif state.step:
        save_decoder(policy, run.folder / "model", mesh, tokenizer, heads)
    run.finish()
    mesh.close()


if __name__ == "__main__":
    launch(main, Args)
