"""PPO from a reward on whole responses: rollouts, rewards with a KL penalty, advantages, clipped updates.

For a prompt x the policy pi samples a response y, which a reward scores. With a frozen reference pi_ref, every token t
of the response earns (the score falls on the last one)

    r_t = score * [t = last] - kl_coef * (log pi_old(y_t) - log pi_ref(y_t))                                    (1)

    delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lambda A_{t+1}        R_t = A_t + V_t      (2)

and a minibatch minimises, with rho_t = pi(y_t) / pi_old(y_t), as a mean over the response tokens of all ranks,

    max(-A_t rho_t, -A_t clip(rho_t, 1 - eps, 1 + eps)) + value_coef * L_value - entropy_coef * H_t             (3)
    L_value = 1/2 max((V - R)^2, (clip(V, V_old - eps_v, V_old + eps_v) - R)^2)                                 (4)

Sources: Schulman et al. 2017 (arXiv 1707.06347, eq. 7, 11, 12); Ziegler et al. 2019 (1909.08593, eq. 2 and the KL
controller); Stiennon et al. 2020 (2009.01325); Ahmadian et al. 2024 (2402.14740, RLOO); Shao et al. 2024 (2402.03300,
GRPO). Differs from all of them: every mean is over the real response tokens of all ranks, so that neither micro-batch
size nor layout changes a gradient; advantages are whitened once per rollout; the score lies on the EOS itself.

    torchrun ppo.py
    torchrun --nproc-per-node 2 ppo.py --model FOLDER --data prompts.jsonl --reward my_file.py:my_function

The first command takes a random-walk policy from an optimality of 0.35 to above 0.97 in under two minutes on two cores.
"""

import itertools
import math
import time
import warnings
import zlib
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from parallel.adapters import Lora, Tuning, make_reference, set_trained, shares_weights
from parallel.checkpoint import eos_ids, load_decoder, read_config, save_decoder
from parallel.data import (
    check_vocabulary,
    epoch_order,
    load_tokenizer,
    pack_batch,
    prompt_rows,
    rows_at,
)
from parallel.data_parallel import data_parallel
from parallel.footprint import Job, Role, scalar_head
from parallel.generation import EVALUATION, ROLLOUT, Sampling, generate, stop_at
from parallel.mesh import Layout, RankError, init_mesh
from parallel.model import ScalarHead
from parallel.optim import AdamW, Optim, clip_grad_norm
from parallel.pipeline import forward_backward, forward_folded, forward_only
from parallel.plan import describe_memory, print_plan
from parallel.reshard import rollout_weights
from parallel.reward import is_reward_model, load_reward_model
from parallel.rows import load_rows, resolve_model
from parallel.run import Run, check_flags, launch
from parallel.tensor import hidden_before, vocab_parallel_logprobs
from parallel.training_state import save_training_state
from tasks.rewards import SampleContext, make_reward, make_samples, score_together

KL_HORIZON = 10_000  # sequences over which the adaptive KL coefficient answers to an error (Ziegler et al. 2019)
ADVANTAGE_STD_FLOOR = 1e-2  # whitening never divides by less, so that noise is not blown up when all is learnt
MAX_LOG_RATIO = 1e-5  # nats, fp32: the first minibatch of an iteration is on-policy
MAX_MISMATCH = 1e-4  # nats, fp32: sampled against recomputed log-probabilities


@dataclass
class Args:
    """PPO. The defaults train the embedded random-walks task."""

    model: str = "tasks.random_walks:base_policy"
    """policy and reference: Hugging Face folder, hub id, or module:function that returns a folder"""
    tokenizer: str = ""
    """folder or hub id; empty = that of --model"""
    data: tuple[str, ...] = ("tasks.random_walks:prompts",)
    """JSONL or text files (plain or .gz), folders, hub names, or module:function; rows of `prompt` or `messages`"""
    eval_data: tuple[str, ...] = ()
    """prompts of the evaluation, likewise; none = those of --data, at most 256"""
    prompt_tokens: int = 0
    """cut prompts of this many tokens from rows of `text`; 0 = rows hold prompts"""
    bos: bool = True
    """begin each prompt with the tokenizer's BOS, where it has one, as sft.py does"""
    reward: str = "tasks.random_walks:optimality"
    """module:function or file.py:function called as reward(samples) -> list of float, an http(s) endpoint, or the
    folder of a reward model"""
    rollout_timeout: float = 7200.0
    """seconds that ranks wait for one that lives but is still sampling or scoring; a dead one is noticed after 60"""
    output_dir: str = ""
    """run folder; empty = the next free of runs/ppo, runs/ppo-2, ..."""
    resume: bool = False
    """go on from the newest checkpoint of --output-dir, or of the newest runs/ppo*"""
    overwrite: bool = False
    """replace the run that --output-dir holds"""
    allow_change: tuple[str, ...] = ()
    """flags that may differ from those of the resumed run, e.g. --allow-change optim.lr"""
    seed: int = 1
    """of the sampling noise, the order of prompts and minibatches"""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """of parameters and activations; the optimizer keeps a float32 copy of bfloat16 parameters"""
    max_iterations: int = 60
    """rollouts, each with its updates; 0 evaluates and stops"""
    eval_every: int = 10
    """iterations between evaluations"""
    save_every: int = 20
    """iterations between checkpoints; the last two are kept"""
    log_every: int = 1
    """iterations between progress lines where the output is not a terminal"""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """also log there; the package must be installed"""
    eval_samples: int = 2000
    """sampled responses of an evaluation, spread over its prompts, beside one greedy response per prompt"""
    eval_temperature: float = 1.0
    """temperature of the sampled evaluation; top-k and top-p do not apply to it"""

    batch_size: int = 128
    """rollouts of an iteration, in sequences over all ranks"""
    samples_per_prompt: int = 1
    """responses to each prompt within a rollout"""
    epochs: int = 2
    """passes over a rollout (Schulman et al. 2017: 3 to 10; Stiennon et al. 2020: 4)"""
    minibatch_size: int = 32
    """sequences of an optimizer step, over all ranks"""
    microbatch_size: int = 16
    """sequences of a forward and backward, per rank: memory and speed; the gradient is the same but for rounding"""
    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    """gae learns a value function; rloo and grpo compare the samples of a prompt (--samples-per-prompt) instead"""
    gamma: float = 1.0
    """discount per token (eq. 2)"""
    gae_lambda: float = 0.95
    """lambda of eq. 2: 1 = Monte Carlo returns, 0 = one-step differences"""
    clip_range: float = 0.2
    """eps of eq. 3 (Schulman et al. 2017, eq. 7)"""
    value_clip_range: float = 0.2
    """eps_v of eq. 4; a large number does not clip"""
    value_coef: float = 1.0
    """weight of the value loss (eq. 3)"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus (eq. 3)"""
    max_kl: float = 0.0
    """end an iteration's updates when the mean KL(old || new) per token, in nats (k3), passes this; 0 = never"""
    kl_coef: float = 0.001
    """weight of the KL penalty (eq. 1), per nat; its start value when --kl-target is given; 0 needs no reference"""
    kl_target: float = 0.0
    """nats per sequence that the KL coefficient is steered towards (Ziegler et al. 2019: 6); 0 = fixed coefficient"""
    score_clip: float = 0.0
    """clip scores to +- this, before scaling; 0 = off"""
    score_scaling: bool = False
    """divide scores by the standard deviation of all scores so far; their mean is not subtracted"""
    missing_eos_score: float | None = None
    """replaces the score of a response that did not end by itself (Huang et al. 2024, arXiv 2403.17031: -1)"""
    value_model: str = "head"
    """head = on the policy's trunk; copy = a second decoder that starts as the policy; or the folder of a decoder or of
    a reward model, whose head it then starts with"""
    value_lr: float = 0.0
    """learning rate of value head and value model; 0 = that of the policy"""
    value_warmup_iterations: int = 0
    """first iterations, in which only the value function learns"""
    freeze: tuple[str, ...] = ()
    """parts that keep their weights: embedding, layers.0-5, lm_head, ... or patterns of names such as *.bias"""
    unfrozen_layers: int = 0
    """upper layers that train, with what lies above them; the reference shares the rest, which is computed once;
    0 = all"""
    lora: Lora = field(default_factory=Lora)
    optim: Optim = field(default_factory=partial(Optim, lr=2e-4, schedule="linear"))
    sampling: Sampling = field(default_factory=Sampling)
    layout: Layout = field(default_factory=Layout)
    plan: float = 0.0
    """GiB of a rank: prints what a run of these flags would hold and send, which layouts fit, and ends; 0 = train"""
    world_size: int = 0
    """ranks that --plan is for; 0 = those started"""

    def __post_init__(self):
        counts = "batch_size minibatch_size microbatch_size samples_per_prompt epochs eval_every save_every log_every"
        zero = "prompt_tokens max_iterations eval_samples value_warmup_iterations eval_temperature gamma gae_lambda"
        zero += " rollout_timeout clip_range value_clip_range value_coef max_kl kl_coef kl_target score_clip value_lr"
        zero += " plan world_size unfrozen_layers"
        check_flags(self, {1: counts, 0: zero})
        if self.kl_target and not self.kl_coef:
            raise ValueError("--kl-target steers --kl-coef by factors: with --kl-coef 0 it would stay 0")
        if self.batch_size % self.minibatch_size:
            raise ValueError(f"--batch-size {self.batch_size} is no multiple of --minibatch-size {self.minibatch_size}")
        if self.batch_size % self.samples_per_prompt:
            raise ValueError(
                f"--batch-size {self.batch_size} is no multiple of --samples-per-prompt {self.samples_per_prompt}"
            )
        if self.advantage != "gae" and self.samples_per_prompt < 2:
            raise ValueError(f"--advantage {self.advantage} compares samples of a prompt: --samples-per-prompt >= 2")
        if self.unfrozen_layers and self.kl_coef and self.layout.pp > 1:
            raise ValueError(
                "--unfrozen-layers has the reference share frozen layers, which --layout.pp divides into stages: use "
                "--lora.rank, whose reference is the adapters left out, or --freeze layers.0-N, with a whole reference"
            )
        if self.sampling.temperature == 0:
            raise ValueError("--sampling.temperature 0 is greedy; rollouts need a temperature above 0")

    @property
    def tuning(self) -> Tuning:
        """What of policy and value model trains."""
        return Tuning(self.freeze, self.unfrozen_layers, self.lora)

    def job(self) -> Job:
        """What --plan counts."""
        config, itemsize = read_config(self.model), getattr(torch, self.dtype).itemsize
        tuning = self.tuning.resolved()
        roles = {"policy": Role(config, itemsize, tuning=tuning)}
        if self.kl_coef:
            shared = shares_weights(tuning, self.layout.pp)
            roles["ref_policy"] = Role(config, itemsize, trainable=False, shared=shared, tuning=tuning)
        if self.advantage == "gae":
            if self.value_model != "head":
                value_config = config if self.value_model == "copy" else read_config(self.value_model)
                roles["value_model"] = Role(value_config, itemsize, lm_head=False, tuning=tuning)
            roles["value_head"] = scalar_head(config.hidden_size, itemsize)
        if Path(self.reward).is_dir():
            reward_config = read_config(self.reward)
            roles["reward model"] = Role(reward_config, itemsize, trainable=False, lm_head=False, in_units=False)
        new_tokens = self.sampling.max_new_tokens
        seq_len = min(self.prompt_tokens + new_tokens if self.prompt_tokens else math.inf, config.max_seq_len)
        rollout = {"rollout": self.batch_size, "new_tokens": new_tokens, "described": self.batch_size}
        return Job(roles, self.minibatch_size, self.microbatch_size, seq_len, scored=new_tokens, **rollout)


# ---------------------------------------------------------------------------------------------------------------------
# Rewards and advantages: pure functions of [batch, seq_len] tensors, indexed by the token that each number is about
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """One iteration's responses of all ranks; tensors without gradient, 0 outside the response."""

    input_ids: Tensor  # [batch, seq_len] prompt then response
    seq_lens: Tensor  # [batch]
    response_mask: Tensor  # [batch, seq_len] bool, from the first sampled token through the EOS
    token_scores: Tensor  # [batch, seq_len] the reward's numbers, a response's score on its last token
    finished: Tensor  # [batch] bool, ended by an EOS or a stop sequence
    rollout_logprobs: Tensor  # [batch, seq_len] that it was sampled with
    old_logprobs: Tensor | None = None  # [batch, seq_len] by the path that training takes
    ref_logprobs: Tensor | None = None  # [batch, seq_len]
    values: Tensor | None = None  # [batch, seq_len] of the state before each token
    advantages: Tensor | None = None  # [batch, seq_len]
    returns: Tensor | None = None  # [batch, seq_len]


def last_token_mask(response_mask: Tensor) -> Tensor:
    """True on the last token of each response: the EOS if one was sampled. [batch, seq_len] bool -> the same shape"""
    following = torch.nn.functional.pad(response_mask[:, 1:], (0, 1))
    return response_mask & ~following


def place_scores(scores: list, response_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Scores on the tokens they are about: one number on the last response token, a list token by token.

    Shapes: scores [batch] of numbers or of lists, response_mask [batch, seq_len] -> [batch, seq_len]
    """
    placed = torch.zeros(response_mask.shape, dtype=dtype, device=response_mask.device)
    if scores and isinstance(scores[0], list):
        placed[response_mask] = torch.tensor([x for row in scores for x in row], dtype=dtype, device=placed.device)
    else:
        placed[last_token_mask(response_mask)] = torch.tensor(scores, dtype=dtype, device=placed.device)
    return placed


def shape_scores(token_scores, finished, response_mask, missing_eos_score, score_clip):
    """Replaces the score of responses without an end, then clips.

    Shapes: token_scores, response_mask [batch, seq_len]; finished [batch] -> [batch, seq_len]
    """
    if missing_eos_score is not None:
        replacement = last_token_mask(response_mask) * missing_eos_score
        token_scores = torch.where(finished[:, None], token_scores, replacement)
    return token_scores.clamp(-score_clip, score_clip) if score_clip else token_scores


def shape_rewards(token_scores, old_logprobs, ref_logprobs, response_mask, kl_coef):
    """Rewards of eq. 1: the score minus the KL penalty, whose estimator k1 = log(old / ref) has the right gradient.

    Shapes: all [batch, seq_len]. Returns: rewards, kl (k1 per token, in nats)
    """
    kl = (old_logprobs - ref_logprobs) * response_mask
    return token_scores - kl_coef * kl, kl


def compute_gae(rewards, values, response_mask, gamma, gae_lambda):
    """Generalized advantage estimates (eq. 2); 0 outside the response.

    Shapes: rewards, values, response_mask and the result are [batch, seq_len].
    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 11-12, with V = 0 after the last response token.
    """
    next_values = torch.nn.functional.pad((values * response_mask)[:, 1:], (0, 1))
    advantages = (rewards + gamma * next_values - values) * response_mask  # delta_t, to which the loop adds the rest
    decay = gamma * gae_lambda * response_mask.to(rewards.dtype)
    for t in reversed(range(rewards.shape[1] - 1)):
        advantages[:, t].add_(decay[:, t] * advantages[:, t + 1])
    return advantages


def compare_samples(rewards, response_mask, samples_per_prompt, divide_by_std):
    """Critic-free advantages: a response's return against those of the other responses to its prompt.

    RLOO subtracts the mean of the others; GRPO (divide_by_std) the group's mean, over its deviation.

    Shapes: rewards, response_mask [batch, seq_len], the samples of a prompt adjacent -> [batch, seq_len]
    Source: Ahmadian et al. 2024 (arXiv 2402.14740), eq. 8; Shao et al. 2024 (arXiv 2402.03300), section 4.1.2.
    """
    returns = rewards.sum(1).view(-1, samples_per_prompt)  # [prompts, samples]
    centred = returns - returns.mean(1, keepdim=True)
    if divide_by_std:
        advantages = centred / (returns.std(1, keepdim=True) + 1e-4)
    else:
        advantages = centred * samples_per_prompt / (samples_per_prompt - 1)
    return advantages.view(-1, 1) * response_mask


def whiten(advantages, response_mask):
    """Mean 0 and deviation 1 over the response tokens; never divides by less than ADVANTAGE_STD_FLOOR.

    Shapes: [batch, seq_len]. Returns: whitened advantages, the deviation before.
    """
    real = advantages[response_mask]
    mean, std = real.mean(), real.std(correction=0)
    return (advantages - mean) / std.clamp(min=ADVANTAGE_STD_FLOOR) * response_mask, std


def update_kl_coef(kl_coef, kl_per_sequence, kl_target, num_sequences):
    """Proportional controller of Ziegler et al. 2019 (arXiv 1909.08593), section 2.2; KL in nats per sequence."""
    error = min(max(kl_per_sequence / kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_sequences / KL_HORIZON)


def ppo_loss(logprobs, entropy, new_values, old, args, num_tokens, value_only=False):
    """Clipped losses of eq. 3 and 4 over some response tokens, divided by the minibatch's num_tokens.

    Args: old: dict of old_logprobs, values, advantages, returns, each [tokens]. num_tokens: response tokens of the
        minibatch over all ranks and micro-batches. value_only: leaves the policy terms out (value warm-up).
    Shapes: logprobs, entropy, new_values [tokens]; new_values is None without a value function
    Returns: loss, and metrics that sum to the minibatch's means
    """
    log_ratio = logprobs - old["old_logprobs"]
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - args.clip_range, 1 + args.clip_range)
    policy_losses = torch.maximum(-old["advantages"] * ratio, -old["advantages"] * clipped_ratio)
    losses = policy_losses - args.entropy_coef * entropy
    if value_only:
        losses = torch.zeros_like(losses)
    with torch.no_grad():
        metrics = {
            "policy_loss": policy_losses.sum() / num_tokens,
            "entropy": entropy.sum() / num_tokens,
            "approx_kl": (ratio - 1 - log_ratio).sum() / num_tokens,
            "clip_fraction": (ratio != clipped_ratio).sum() / num_tokens,
            "max_log_ratio": log_ratio.abs().amax() if len(log_ratio) else log_ratio.sum(),
        }
    if new_values is not None:
        lower, upper = old["values"] - args.value_clip_range, old["values"] + args.value_clip_range
        clipped_values = torch.maximum(torch.minimum(new_values, upper), lower)
        errors, clipped_errors = (new_values - old["returns"]) ** 2, (clipped_values - old["returns"]) ** 2
        value_losses = 0.5 * torch.maximum(errors, clipped_errors)
        losses = losses + args.value_coef * value_losses
        metrics["value_loss"] = value_losses.detach().sum() / num_tokens
        metrics["value_clip_fraction"] = (clipped_errors > errors).sum() / num_tokens
    return losses.sum() / num_tokens, metrics


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts and their evaluation
# ---------------------------------------------------------------------------------------------------------------------


def read_heads(hidden, microbatch, roles, temperature, detach_trunk=False):
    """Log-probabilities, entropies and values (None without a value function) of a micro-batch's response tokens.

    Args: hidden: states by role, of the policy and, if there is one, the value model.
    Shapes: hidden [rows, row_len, hidden_size], microbatch as `pack_batch` makes it -> three of [tokens], in row-major
        order of its response_mask
    """
    mask = microbatch["response_mask"]
    states = hidden_before(hidden["policy"], mask)  # [tokens, hidden_size]
    logprobs, entropy = vocab_parallel_logprobs(states, roles["policy"], microbatch["input_ids"][mask], temperature)
    values = None
    if "value_model" in roles:
        values = roles["value_head"](hidden_before(hidden["value_model"], mask))
    elif "value_head" in roles:
        values = roles["value_head"](states.detach() if detach_trunk else states)
    return logprobs, entropy, values


def minibatch_loss(hidden, microbatch, roles, args, num_tokens, value_only=False):
    """Loss and metrics of one micro-batch (see `ppo_loss`); hidden: states by role."""
    logprobs, entropy, values = read_heads(hidden, microbatch, roles, args.sampling.temperature, value_only)
    names = ("old_logprobs", "advantages", "values", "returns")
    old = {name: microbatch[name][microbatch["response_mask"]] for name in names if name in microbatch}
    return ppo_loss(logprobs, entropy, values, old, args, num_tokens, value_only)


def split_epoch(args, iteration, epoch, mesh):
    """Yields, for each minibatch of an epoch, its rows of the rollout and this rank's share as micro-batches."""
    order = torch.as_tensor(epoch_order(args.batch_size, args.seed, (iteration - 1) * args.epochs + epoch))
    share = args.minibatch_size // mesh.dp.size
    for minibatch in order.split(args.minibatch_size):
        mine = minibatch[mesh.dp.rank * share : (mesh.dp.rank + 1) * share]
        yield minibatch, mine.split(args.microbatch_size)


@torch.no_grad()
def describe_tokens(roles, rollout, temperature, microbatches):
    """Log-probabilities under policy and reference, and values, of some rows by the path that training takes.

    Args: rollout: with input_ids, response_mask and seq_lens. microbatches: rows of each, as training will take them:
        the same rows laid out in the same way give the same numbers, to the last bit unless kernels run on bfloat16,
        whose sums without gradient take another order.
    Returns: old_logprobs, ref_logprobs, values, each [batch, seq_len], 0 outside the responses of those rows, and
        where another stage has them
    """
    policy, ref_policy = roles["policy"], roles.get("ref_policy")
    dtype = torch.promote_types(policy.dtype, torch.float32)
    shape, device = rollout.input_ids.shape, rollout.input_ids.device
    old_logprobs, ref_logprobs, values = torch.zeros(3, *shape, dtype=dtype, device=device)
    fields = {"input_ids": rollout.input_ids, "response_mask": rollout.response_mask}
    packed = [pack_batch(fields, rollout.seq_lens, rows) for rows in microbatches]

    def place(into, microbatch, numbers):  # [tokens] to their places in [batch, seq_len]
        into.view(-1)[microbatch["source"][microbatch["response_mask"]]] = numbers.to(dtype)

    def read(hidden, microbatch):
        logprobs, _, new_values = read_heads(hidden, microbatch, roles, temperature)
        place(old_logprobs, microbatch, logprobs)
        if new_values is not None:
            place(values, microbatch, new_values)
        if "ref_policy" in hidden:
            read_reference(hidden["ref_policy"], microbatch)

    def read_reference(hidden, microbatch):
        logprobs, _, _ = read_heads({"policy": hidden}, microbatch, {"policy": ref_policy}, temperature)
        place(ref_logprobs, microbatch, logprobs)

    shares = ref_policy is not None and ref_policy.trunk is not None  # then it runs beside the policy
    names = ("policy", "value_model", "ref_policy") if shares else ("policy", "value_model")
    forward_only({role: roles[role] for role in names if role in roles}, packed, read)
    if ref_policy is None:
        return old_logprobs, old_logprobs, values
    if not shares:
        for microbatch, hidden in forward_folded(ref_policy, packed, policy.mesh):
            read_reference(hidden, microbatch)
    return old_logprobs, ref_logprobs, values


def evaluate(policy, prompts, reward, args, tokenizer, eos):
    """Mean score of one greedy response per prompt and of `eval_samples` sampled ones at fixed noise.

    Communication: scores and texts are gathered over dp.
    Returns: metrics, and rows of (kind, prompt, response, score, finished), of all samples of all ranks
    """
    mesh, metrics, table = policy.mesh, {}, []
    for kind, temperature, count in (
        ("greedy", 0.0, len(prompts)),
        ("sampled", args.eval_temperature, args.eval_samples),
    ):
        if not count:
            continue
        sample_ids = list(range(count))[mesh.dp.rank :: mesh.dp.size]
        mine = [prompts[i % len(prompts)] for i in sample_ids]
        generation = generate(
            policy,
            [row.prompt_ids for row in mine],
            Sampling(temperature=temperature, max_new_tokens=args.sampling.max_new_tokens, stop=args.sampling.stop),
            eos_ids=eos,
            sample_ids=sample_ids,
            seed=args.seed,
            stream=EVALUATION,
            stop_fn=stop_at(tokenizer, args.sampling.stop),
            num_ids=len(tokenizer),
        )
        samples = make_samples(generation, mine, tokenizer, eos, args.sampling.stop)
        scores = score_together(reward, samples, mesh, args.rollout_timeout)
        scores = [sum(s) if isinstance(s, list) else s for s in scores]
        lens = (generation.seq_lens - generation.prompt_lens).tolist()
        results = zip(sample_ids, samples, scores, lens, strict=True)
        rows = [(i, s.prompt, s.response, score, s.finished, n) for i, s, score, n in results]
        rows = sorted(row for part in mesh.gather_objects(rows, "dp") for row in part)
        scores = torch.tensor([row[3] for row in rows], dtype=torch.float64)
        metrics[f"eval_score_{kind}"] = scores.mean().item()
        if kind == "sampled":
            metrics["eval_score_sampled_se"] = scores.std(correction=0).item() / math.sqrt(count)
            metrics["eval_finished"] = sum(row[4] for row in rows) / count
            metrics["eval_response_len"] = sum(row[5] for row in rows) / count
        for _, prompt, response, score, finished, _ in rows:
            found = {"prompt": prompt, "response": response, "score": score, "finished": finished}
            table.append({"kind": kind, **found})
    return metrics, table


def check_mismatch(rollout: Rollout, dtype, iteration, tokenizer) -> dict[str, float]:
    """Metrics of |rollout - old| log-probability: a stale weight or a wrong cache would show.

    Raises: RankError, on all ranks alike, if one token differs by more than MAX_MISMATCH; in bfloat16 a mean of
        exp |difference| above 1.05 is a warning.
    """
    difference = (rollout.rollout_logprobs - rollout.old_logprobs).abs()  # [batch, seq_len]
    if dtype == torch.bfloat16:
        if difference[rollout.response_mask].exp().mean() > 1.05:
            warnings.warn(f"iteration {iteration}: rollout and training log-probabilities differ by 5 %", stacklevel=2)
    elif not difference.max() <= MAX_MISMATCH:  # a NaN is no agreement
        row, t = divmod(int(difference.argmax()), difference.shape[1])
        raise RankError(
            f"iteration {iteration}: sample {row} drew token {t}, "
            f"{tokenizer.decode([int(rollout.input_ids[row, t])])!r}, with log-probability "
            f"{rollout.rollout_logprobs[row, t]:.6f}, recomputed as {rollout.old_logprobs[row, t]:.6f}"
        )
    mean = difference.sum() / rollout.response_mask.sum()
    return {"rollout_mismatch": mean.item(), "rollout_mismatch_max": difference.max().item()}


def gather_rollout(local: Rollout, mesh) -> Rollout:
    """The rollouts of all replicas of a mesh in sample order, on every rank: [batch / dp, seq_len] -> [batch, seq_len].

    Communication: one all-gather over dp per field. They are small beside activations, and each minibatch may then take
    any rows and still give every rank the same number.
    """
    width = int(mesh.max(local.input_ids.shape[1], "dp"))
    gathered = {}
    for name, x in vars(local).items():
        if x is not None:
            x = torch.nn.functional.pad(x, (0, width - x.shape[1])) if x.dim() == 2 else x
            x = mesh.all_gather(x, "dp")
        gathered[name] = x
    return Rollout(**gathered)


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """What a resumed run needs beside weights and optimizer state."""

    iteration: int = 0
    samples: int = 0  # rollouts drawn, in sequences over all ranks; numbers the sampling noise and the prompts
    tokens: int = 0  # of those rollouts, prompts included
    optimizer_steps: int = 0
    skipped_steps: int = 0  # for a non-finite gradient
    kl_coef: float = 0.0
    score_count: int = 0
    score_mean: float = 0.0
    score_m2: float = 0.0  # sum of squared deviations from the mean
    best_score: float = -math.inf
    seconds: float = 0.0  # of rollouts and updates

    def add_scores(self, scores: Tensor) -> float:
        """Merges a batch into the running moments (Chan et al. 1979); returns the running deviation."""
        count, mean = len(scores), scores.double().mean().item()
        m2 = (scores.double() - mean).square().sum().item()
        total = self.score_count + count
        self.score_m2 += m2 + (mean - self.score_mean) ** 2 * self.score_count * count / total
        self.score_mean += (mean - self.score_mean) * count / total
        self.score_count = total
        return math.sqrt(self.score_m2 / total) or 1.0


def describe_batch(args: Args, num_replicas: int) -> list[tuple[str, str]]:
    """The batch identity: how many episodes, minibatches and micro-batches on how many ranks."""
    share = args.minibatch_size // num_replicas
    num_minibatches = args.batch_size // args.minibatch_size
    return [
        (
            "rollout",
            f"{args.batch_size} episodes = {args.batch_size // args.samples_per_prompt} prompts x "
            f"{args.samples_per_prompt} samples an iteration",
        ),
        (
            "update",
            f"{args.epochs} epochs x {num_minibatches} minibatches = {args.epochs * num_minibatches} optimizer steps, "
            f"each of {args.minibatch_size} episodes",
        ),
        (
            "minibatch",
            f"{num_replicas} ranks x {math.ceil(share / args.microbatch_size)} micro-batches x "
            f"{min(share, args.microbatch_size)} episodes",
        ),
    ]


def rollout_metrics(rollout: Rollout, kl: Tensor | None) -> dict:
    """What a rollout was like; kl [batch, seq_len] per token, None without a reference."""
    mask, scores = rollout.response_mask, rollout.token_scores.sum(1)
    metrics = {
        "score": scores.mean().item(),
        "score_std": scores.std(correction=0).item(),
        "response_len": mask.sum(1).double().mean().item(),
        "finished": rollout.finished.double().mean().item(),
        "rollout_hash": zlib.crc32(rollout.input_ids.cpu().numpy().tobytes()),
    }
    if kl is not None:
        metrics["kl"] = (kl.sum() / mask.sum()).item()
        metrics["kl_per_sequence"] = kl.sum(1).mean().item()
        metrics["kl_k3"] = (((-kl).exp() - 1 + kl).sum() / mask.sum()).item()
    if rollout.returns is not None:
        returns, values = rollout.returns[mask], rollout.values[mask]
        variance, unexplained = returns.var(correction=0).item(), (returns - values).var(correction=0).item()
        metrics["explained_variance"] = 1 - unexplained / variance if variance > ADVANTAGE_STD_FLOOR**2 else None
    return metrics


def make_value_function(source, policy, tokenizer, mesh, dtype):
    """The roles "value_head" and, unless it reads the policy's trunk, "value_model"; see --value-model."""
    value_model, value_head = policy, None
    if source == "copy":
        value_model = load_decoder(policy.source, mesh, dtype, lm_head=False)
    elif source != "head":
        folder = resolve_model(source)
        if is_reward_model(folder):
            value_model, value_head = load_reward_model(folder, mesh, dtype)
        else:
            value_model = load_decoder(folder, mesh, dtype, lm_head=False)
        check_vocabulary(tokenizer, value_model.config, f"--value-model {source}")
    if value_head is None:
        value_head = ScalarHead(value_model.config.hidden_size, mesh, torch.promote_types(dtype, torch.float32))
    return (
        {"value_head": value_head} if value_model is policy else {"value_model": value_model, "value_head": value_head}
    )


def main(args: Args) -> None:
    if args.plan:
        return print_plan(args)
    folder = resolve_model(args.model)
    mesh = init_mesh(args.layout, read_config(folder), (args.minibatch_size, args.microbatch_size))
    run = Run("ppo", args, mesh)
    dtype = getattr(torch, args.dtype)
    if args.minibatch_size % mesh.dp.size:
        raise ValueError(f"--minibatch-size {args.minibatch_size} is no multiple of {mesh.dp.size} replicas")
    if args.batch_size % mesh.folded.dp.size:
        raise ValueError(f"--batch-size {args.batch_size} is no multiple of {mesh.folded.dp.size} replicas and stages")

    # models: the policy, its frozen reference and a value function
    tokenizer = load_tokenizer(args.tokenizer or folder)
    policy = set_trained(load_decoder(folder, mesh, dtype), args.tuning, args.seed)
    check_vocabulary(tokenizer, policy.config)
    eos = eos_ids(folder, tokenizer)
    roles = {"policy": policy}
    if args.kl_coef:  # shares what does not train; else a copy without stages, see `forward_folded`
        shared = make_reference(policy)
        roles["ref_policy"] = shared or load_decoder(folder, mesh.folded, dtype).requires_grad_(False)
    if args.advantage == "gae":
        roles |= make_value_function(args.value_model, policy, tokenizer, mesh, dtype)
        if "value_model" in roles:  # with adapters as the policy's; a copy begins with the same, others with new ones
            lora = policy.tuning.lora if args.value_model == "copy" else replace(policy.tuning.lora, adapters="")
            set_trained(roles["value_model"], replace(policy.tuning, lora=lora), args.seed)
    model = data_parallel(roles, mesh, args.layout)
    value_lr = args.value_lr or args.optim.lr
    lr = {"policy": args.optim.lr, "value_model": value_lr, "value_head": value_lr}
    lr = {role: lr[role] for role in roles if role in lr}
    optimizer = AdamW(model, lr, args.optim.betas, args.optim.eps, args.optim.weight_decay)

    # data and reward
    max_seq_len = min(model.config.max_seq_len for model in (policy, roles.get("value_model", policy)))
    room = max_seq_len - args.sampling.max_new_tokens
    prompts = prompt_rows(load_rows(args.data), tokenizer, args.prompt_tokens, room, args.bos)
    eval_prompts = prompts[:256]
    if args.eval_data:
        eval_prompts = prompt_rows(load_rows(args.eval_data), tokenizer, args.prompt_tokens, room, args.bos)
    longest = max(len(row.prompt_ids) for row in prompts + eval_prompts) + args.sampling.max_new_tokens
    reward = make_reward(args.reward, SampleContext(mesh, tokenizer, eos, args.bos, dtype, longest))
    stop_fn = stop_at(tokenizer, args.sampling.stop)

    # where a resumed run goes on
    state = Progress(kl_coef=args.kl_coef)
    stored = [*model.pieces(), *optimizer.pieces()]
    saved = run.load_checkpoint(stored)
    if saved is not None:
        state = Progress(**saved["progress"])

    steps_per_iteration = args.epochs * (args.batch_size // args.minibatch_size)
    total_steps = steps_per_iteration * args.max_iterations
    run.describe(
        [
            ("model", f"{args.model}, {policy.config.num_layers} layers, {policy.config.hidden_size} wide"),
            ("parameters", f"{policy.num_parameters:,} in the policy, {args.dtype}"),
            ("layout", mesh.describe()),
            ("memory", describe_memory(model, optimizer)),
            *describe_batch(args, mesh.dp.size),
            ("data", f"{len(prompts)} prompts, {len(eval_prompts)} for evaluation; reward {args.reward}"),
        ]
    )
    if args.sampling.truncates:
        run.note("top-k or top-p cut what is sampled, not the probabilities: rollouts are off-policy by kept_mass")

    def save_checkpoint():
        meta = {"progress": vars(state)}
        save_training_state(run.folder / "checkpoints", state.iteration, stored, meta, keep=2, mesh=mesh)

    def save_model(name):
        heads = {} if "value_model" in roles else {role: x for role, x in roles.items() if role == "value_head"}
        save_decoder(policy, run.folder / name, mesh, tokenizer, heads)

    def evaluate_now():
        mesh.at("evaluation", state.iteration)
        with rollout_weights(policy) as sampler:
            metrics, table = evaluate(sampler, eval_prompts, reward, args, tokenizer, eos)
        run.log({"event": "eval", "iteration": state.iteration, "samples": state.samples, **metrics})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        run.note(f"iteration {state.iteration}: {shown}")
        run.samples(table, state.iteration, "kind")
        score = metrics.get("eval_score_sampled", metrics["eval_score_greedy"])
        if score > state.best_score and state.iteration > 0:
            save_model("best")
        state.best_score = max(state.best_score, score)

    if saved is None:
        evaluate_now()  # the baseline

    while state.iteration < args.max_iterations and not run.stop_requested():
        state.iteration += 1
        started = time.perf_counter()
        timer = {}

        # rollout: this replica's share of the samples
        mesh.at("rollout", state.iteration)
        first_group = state.samples // args.samples_per_prompt
        order = rows_at(first_group, args.batch_size // args.samples_per_prompt, len(prompts), args.seed)
        with rollout_weights(policy) as sampler:
            mine = args.batch_size // sampler.mesh.dp.size
            sample_ids = [state.samples + sampler.mesh.dp.rank * mine + i for i in range(mine)]
            rows = [prompts[order[s // args.samples_per_prompt - first_group]] for s in sample_ids]
            generation = generate(
                sampler,
                [row.prompt_ids for row in rows],
                args.sampling,
                eos_ids=eos,
                sample_ids=sample_ids,
                seed=args.seed,
                stream=ROLLOUT,
                stop_fn=stop_fn,
                num_ids=len(tokenizer),
            )
        timer["rollout_seconds"] = time.perf_counter()

        # score
        samples = make_samples(generation, rows, tokenizer, eos, args.sampling.stop)
        scores = score_together(reward, samples, sampler.mesh, args.rollout_timeout)
        timer["score_seconds"] = time.perf_counter()

        # everybody's rollouts; log-probabilities and values, in the micro-batches of the first epoch
        mesh.at("log-probabilities")
        rollout = gather_rollout(
            Rollout(
                generation.input_ids,
                generation.seq_lens,
                generation.response_mask,
                place_scores(scores, generation.response_mask, generation.logprobs.dtype),
                generation.finished,
                generation.logprobs,
            ),
            sampler.mesh,
        )
        microbatches = [rows for _, mine in split_epoch(args, state.iteration, 0, mesh) for rows in mine]
        described = describe_tokens(roles, rollout, args.sampling.temperature, microbatches)
        rollout.old_logprobs, rollout.ref_logprobs, rollout.values = (mesh.folded.sum(x, "dp") for x in described)
        mismatch = check_mismatch(rollout, dtype, state.iteration, tokenizer)
        mask = rollout.response_mask
        timer["logprobs_seconds"] = time.perf_counter()

        # rewards
        token_scores = shape_scores(
            rollout.token_scores, rollout.finished, mask, args.missing_eos_score, args.score_clip
        )
        if args.score_scaling:
            token_scores = token_scores / state.add_scores(token_scores.sum(1))
        kl_coef = state.kl_coef
        rewards, kl = shape_rewards(token_scores, rollout.old_logprobs, rollout.ref_logprobs, mask, kl_coef)
        kl_per_sequence = kl.sum(1).mean().item()
        is_copy = state.optimizer_steps == 0 and not args.lora.adapters  # of the reference
        if is_copy and dtype != torch.bfloat16 and kl.abs().max() > MAX_LOG_RATIO:
            raise RankError(f"KL of {kl.abs().max():.2e} nats on a token between a policy and its own copy")

        # advantages
        if args.advantage == "gae":
            advantages = compute_gae(rewards, rollout.values, mask, args.gamma, args.gae_lambda)
            rollout.returns = advantages + rollout.values
            rollout.advantages, advantage_std = whiten(advantages, mask)
        else:
            rollout.advantages = compare_samples(
                rewards, mask, args.samples_per_prompt, divide_by_std=args.advantage == "grpo"
            )
            advantage_std = rollout.advantages[mask].std(correction=0)

        # update
        value_only = state.iteration <= args.value_warmup_iterations
        fields = {name: x for name, x in vars(rollout).items() if x is not None and x.dim() == 2}
        steps: list[dict] = []  # metrics of each optimizer step
        minibatches = (split_epoch(args, state.iteration, epoch, mesh) for epoch in range(args.epochs))
        for minibatch, mine in itertools.chain.from_iterable(minibatches):
            num_tokens = mask[minibatch].sum()
            microbatches = [pack_batch(fields, rollout.seq_lens, rows) for rows in mine]
            loss_fn = partial(minibatch_loss, roles=roles, args=args, num_tokens=num_tokens, value_only=value_only)
            model.zero_grad()
            metrics = forward_backward(model, microbatches, loss_fn)
            if not steps and dtype != torch.bfloat16 and metrics["max_log_ratio"] > MAX_LOG_RATIO:
                raise RankError(
                    f"iteration {state.iteration}: the first minibatch is off-policy by {metrics['max_log_ratio']:.2e} "
                    f"nats, more than {MAX_LOG_RATIO:.0e}: forward passes of equal weights disagree"
                )
            if steps and args.max_kl and metrics["approx_kl"] > args.max_kl:
                break
            metrics["grad_norm"] = clip_grad_norm(model, args.optim.max_grad_norm, mesh)
            scale = args.optim.lr_multiplier(state.optimizer_steps, total_steps)
            if optimizer.step(scale, frozen=("policy",) if value_only else ()):
                state.optimizer_steps += 1
            else:
                state.skipped_steps += 1
            steps.append(metrics)
        if args.kl_target:
            state.kl_coef = update_kl_coef(state.kl_coef, kl_per_sequence, args.kl_target, args.batch_size)
        timer["update_seconds"] = time.perf_counter()

        # log
        ends = list(timer.values())
        seconds = ends[-1] - started
        num_tokens = int(rollout.seq_lens.sum())
        state.samples += args.batch_size
        state.tokens += num_tokens
        state.seconds += seconds
        passes = (
            3 * len(steps) / (args.batch_size // args.minibatch_size) + 2 + ("ref_policy" in roles)
        )  # of 2 N a token
        row = {
            "event": "train",
            "iteration": state.iteration,
            "samples": state.samples,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "iteration_seconds": seconds,
            "iteration_tokens": num_tokens,
            **{name: end - start for (name, end), start in zip(timer.items(), [started, *ends], strict=False)},
            "tokens_per_second": num_tokens / seconds,
            **mesh.utilisation(2 * policy.num_parameters * num_tokens * passes, seconds),
            **rollout_metrics(rollout, kl if "ref_policy" in roles else None),
            "kl_coef": kl_coef,
            **mismatch,
            "kept_mass": sampler.mesh.sum(generation.kept_mass * int(generation.response_mask.sum()), "dp")
            / int(mask.sum()),
            "advantage_std": advantage_std.item(),
            **{name: sum(step[name] for step in steps) / len(steps) for name in steps[0]},
            "first_log_ratio": steps[0]["max_log_ratio"],
            "optimizer_steps": state.optimizer_steps,
            "skipped_steps": state.skipped_steps,
            "lr": args.optim.lr * args.optim.lr_multiplier(state.optimizer_steps, total_steps),
        }
        run.log(row)
        run.progress(
            state.iteration,
            args.max_iterations,
            {
                "tok/s": f"{row['tokens_per_second']:,.0f}",
                "score": f"{row['score']:.3f}",
                "kl": f"{kl_per_sequence:.2f}",
                "entropy": f"{row['entropy']:.3f}",
                "len": f"{row['response_len']:.1f}",
            },
        )

        # evaluate and save
        last = state.iteration == args.max_iterations
        if last or state.iteration % args.eval_every == 0:
            evaluate_now()
            run.curves()
        if last or state.iteration % args.save_every == 0:
            save_checkpoint()

    if run.stop_requested():
        save_checkpoint()
    elif state.iteration:
        save_model("model")
    run.finish()
    mesh.close()


if __name__ == "__main__":
    launch(main, Args)
