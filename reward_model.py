"""Reward modelling: a score for whole responses, learnt from which of two was preferred.

For a prompt x with answers y_c (chosen) and y_r (rejected) the model gives the scores r_c and r_r, read from the hidden
state on the EOS that ends each. A step over a batch of N pairs of all ranks minimises, m being a pair's margin (0 where
its row has none),

    p(y_c over y_r) = sigmoid(r_c - r_r)                                                                       (1)
    - (1 / N) sum over pairs of log sigmoid(r_c - r_r - m)                                                     (2)
    offset = mean over demonstrations y of r(x, y)                                                             (3)

The offset is stored with the model and subtracted wherever its scores are used, so that demonstrations score 0 on
average. Beside the accuracy stand those of two models that cannot read: "the longer answer wins", and (1) with a score
that is linear in the counts of tokens and of pairs of neighbouring tokens.

Sources: Bradley and Terry 1952; Stiennon et al. 2020 (arXiv 2009.01325, section 3.4: loss and centring; appendix B: the
head's initialisation); Touvron et al. 2023 (2307.09288, eq. 2: margins). Differs from them: the score always lies on an
EOS, so pairs that do not fit the context are left out, not cut; a mean is over the pairs of all ranks.

    torchrun reward_model.py
    torchrun --nproc-per-node 2 reward_model.py --model FOLDER --data train.jsonl --eval-data valid.jsonl

The first command learns which of two walks is the better one: accuracy 0.565 -> 0.970 on 200 pairs it did not see (by
length 0.265; the bag of token pairs, which here are the edges of a graph, gets all of them).
"""

import math
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.adapters import Lora, Tuning, set_trained
from parallel.checkpoint import load_decoder, read_config
from parallel.data import check_vocabulary, epoch_order, join_parts, load_tokenizer, rows_at, split_turns
from parallel.data_parallel import data_parallel
from parallel.footprint import Job, Role, scalar_head
from parallel.mesh import Layout, init_mesh
from parallel.model import ScalarHead
from parallel.optim import AdamW, Optim, clip_grad_norm
from parallel.pipeline import forward_backward, forward_only
from parallel.plan import describe_memory, print_plan
from parallel.reshard import rollout_weights
from parallel.reward import is_reward_model, load_reward_model, pack_sequences, read_scores, save_reward_model
from parallel.rows import Row, load_rows, resolve_model, warn
from parallel.run import Run, check_flags, launch
from parallel.training_state import save_training_state
from tasks.baselines import bag_accuracy, count_wins, length_accuracy

MIN_PROMPTS = 100  # below, a tenth of them says little, and single pairs are held out
MANY = 4  # rows of which all answers repeat their prompts by no accident
MAX_DEMONSTRATIONS = 1000  # chosen answers that stand in for --demonstrations
CALIBRATION_BINS = 5  # of equal width, from probability 0.5 to 1


@dataclass
class Args:
    """Reward modelling. The defaults learn the embedded task's preferences between walks."""

    model: str = "tasks.random_walks:base_policy"
    """Hugging Face folder, hub id, or module:function that returns a folder; a reward model goes on with its head"""
    tokenizer: str = ""
    """folder or hub id; empty = that of --model"""
    data: tuple[str, ...] = ("tasks.random_walks:preferences",)
    """JSONL files, folders, hub names or module:function; rows of `prompt`, `chosen`, `rejected` (strings, or messages,
    where `prompt` may be left out) and, if wanted, `margin`"""
    eval_data: tuple[str, ...] = ()
    """pairs of the evaluation, likewise; none = a tenth of --data, held out by --seed"""
    demonstrations: tuple[str, ...] = ()
    """rows of `prompt` + `completion` or `messages` whose mean score becomes 0; none = chosen answers of the training
    pairs, at most 1,000"""
    bos: bool = True
    """begin each answer's prompt with the tokenizer's BOS, where it has one"""
    max_len: int = 0
    """leave pairs with a longer answer out, in tokens with the prompt; 0 = the model's context"""
    output_dir: str = ""
    """run folder; empty = the next free of runs/reward_model, runs/reward_model-2, ..."""
    resume: bool = False
    """go on from the newest checkpoint of --output-dir, or of the newest runs/reward_model*"""
    overwrite: bool = False
    """replace the run that --output-dir holds"""
    allow_change: tuple[str, ...] = ()
    """flags that may differ from those of the resumed run, e.g. --allow-change optim.lr"""
    seed: int = 1
    """of the head's initial weights, the pairs held out and the order of the others"""
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
    batch_size: int = 64
    """pairs of an optimizer step, over all ranks"""
    microbatch_size: int = 64
    """pairs of a forward and backward, per rank; changes memory and speed only"""
    freeze: tuple[str, ...] = ()
    """parts that keep their weights: embedding, layers.0-5, ... or patterns of names such as *.bias"""
    unfrozen_layers: int = 0
    """upper layers that train, with what lies above them; 0 = all"""
    lora: Lora = field(default_factory=Lora)
    optim: Optim = field(default_factory=partial(Optim, lr=5e-4, schedule="cosine", warmup_steps=10))
    layout: Layout = field(default_factory=Layout)
    plan: float = 0.0
    """GiB of a rank: prints what a run of these flags would hold and send, which layouts fit, and ends; 0 = train"""
    world_size: int = 0
    """ranks that --plan is for; 0 = those started"""

    def __post_init__(self):
        check_flags(
            self,
            {
                1: "batch_size microbatch_size eval_every save_every log_every",
                0: "max_steps max_len plan world_size unfrozen_layers",
            },
        )

    @property
    def tuning(self) -> Tuning:
        """What of the model trains."""
        return Tuning(self.freeze, self.unfrozen_layers, self.lora)

    def job(self) -> Job:
        """What --plan counts."""
        config, itemsize = read_config(self.model), getattr(torch, self.dtype).itemsize
        roles = {
            "reward_model": Role(config, itemsize, lm_head=False, tuning=self.tuning.resolved()),
            "reward_head": scalar_head(config.hidden_size, itemsize, bias=False),
            "reward_head.bias": Role(None, max(itemsize, 4), trainable=False, shapes=((1,),)),
        }
        seq_len = min(self.max_len or config.max_seq_len, config.max_seq_len)
        return Job(roles, 2 * self.batch_size, 2 * self.microbatch_size, seq_len, scored=1)


# ---------------------------------------------------------------------------------------------------------------------
# Data: each answer with its prompt as one sequence that ends in the EOS
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """Two answers to a prompt, each with the prompt before it."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float
    prompt: str = ""  # tells pairs of one prompt from others


def read_pairs(rows: list[Row], tokenizer, add_bos: bool, max_len: int) -> list[Pair]:
    """Pairs from `prompt`, `chosen`, `rejected` and `margin`, without those that `drop_long` leaves out.

    Raises: ValueError naming the row that does not fit, or when no pair is left.
    """
    answers = [answer_row(row, name) for row in rows for name in ("chosen", "rejected")]
    if len(rows) >= MANY and all(x.get("prompt") and x["completion"].startswith(str(x["prompt"])) for x in answers):
        raise ValueError(
            f"{rows[0].where}: `chosen` and `rejected` begin with the prompt, as in all rows: leave it out of them "
            "(python -m tasks.preferences hh does so with dialogues)"
        )
    sequences = encode_answers(answers, tokenizer, add_bos)
    pairs = []
    for row, chosen_ids, rejected_ids in zip(rows, sequences[0::2], sequences[1::2], strict=True):
        margin = row.number(0.0 if row.get("margin") is None else row["margin"], "its `margin` is")
        if chosen_ids == rejected_ids:
            raise ValueError(f"{row.where}: `chosen` and `rejected` are the same tokens: there is nothing to prefer")
        prompt = shared_opening(row) if isinstance(row["chosen"], list) else row["prompt"]
        pairs.append(Pair(chosen_ids, rejected_ids, margin, str(prompt)))
    lengths = [max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    return drop_long(pairs, lengths, rows, max_len, "pairs")


def hold_out(pairs: list[Pair], seed: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and a tenth for evaluation: that of whole prompts, where there are at least MIN_PROMPTS."""
    if len(pairs) == 1:
        raise ValueError("one pair leaves nothing to hold out: give --eval-data, or more pairs")
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    keys = [pair.prompt for pair in pairs] if len(prompts) >= MIN_PROMPTS else list(range(len(pairs)))
    units = list(dict.fromkeys(keys))
    order = epoch_order(len(units), seed, 0)
    rank = {units[i]: place for place, i in enumerate(order)}
    num_held_out = math.ceil(len(units) / 10)
    train = [pair for pair, key in sorted(zip(pairs, keys, strict=True), key=lambda x: rank[x[1]])]
    split = sum(rank[key] < num_held_out for key in keys)
    return train[split:], train[:split]


def read_demonstrations(rows: list[Row], tokenizer, add_bos: bool, max_len: int) -> list[list[int]]:
    """Demonstrations as tokens, as `encode_answers` makes them, without those that `drop_long` leaves out."""
    sequences = encode_answers(rows, tokenizer, add_bos)
    return drop_long(sequences, [len(ids) for ids in sequences], rows, max_len, "demonstrations")


def drop_long(items: list, lengths: list[int], rows: list[Row], max_len: int, what: str) -> list:
    """What has at most max_len tokens, with one warning of the rest: cut, it would lack the EOS and what was judged.

    Raises: ValueError if nothing is left.
    """
    long = [f"{row.where} has {length}" for row, length in zip(rows, lengths, strict=True) if length > max_len]
    if long:
        message = f"{len(long)} of {len(rows)} {what} longer than {max_len} tokens left out: {long[0]}"
        if len(long) == len(rows):
            raise ValueError(f"{message}; nothing is left: give shorter ones or a model with a longer context")
        warn(message)
    return [item for item, length in zip(items, lengths, strict=True) if length <= max_len]


def answer_row(row: Row, name: str) -> Row:
    """A pair's prompt with one of its answers: a row of `prompt` + `completion`, or of `messages`."""
    both_given = "chosen" in row and "rejected" in row
    if not both_given or isinstance(row["chosen"], list) != isinstance(row["rejected"], list):
        needed = "`chosen` and `rejected`, both as strings or both as messages"
        raise row.misfit(f"{needed} (python -m tasks.preferences pairs makes them of other columns)")
    if isinstance(row[name], list):
        return Row({"messages": shared_opening(row) + row[name][-1:]}, row.where)
    if row.get("prompt") is None:
        hint = "python -m tasks.preferences hh splits whole dialogues"
        raise row.misfit(f"`prompt` before answers that are strings (it may be empty; {hint})")
    return Row({"prompt": row["prompt"], "completion": row.text(name)}, row.where)


def shared_opening(row: Row) -> list:
    """The messages before the last of `chosen` and `rejected`: those of `prompt`, if it is given, or their own.

    A prompt that is a string, or that both lists repeat, is what stands in the lists already.
    """
    prompt = row.get("prompt")
    openings = []
    for name in ("chosen", "rejected"):
        opening = row[name][:-1]
        if isinstance(prompt, list) and opening[: len(prompt)] != prompt:
            opening = prompt + opening
        elif isinstance(prompt, str) and not opening:
            raise ValueError(f"{row.where}: beside a single message `prompt` should be messages too")
        openings.append(opening)
    if openings[0] != openings[1]:
        raise ValueError(f"{row.where}: `chosen` and `rejected` differ before their last message: no common prompt")
    return openings[0]


def encode_answers(rows: list[Row], tokenizer, add_bos: bool) -> list[list[int]]:
    """Rows of `prompt` + `completion` or `messages` as tokens, through the EOS that ends the answer.

    Where a chat template writes no EOS, or text behind it, the EOS is appended or the text cut off.
    Raises: ValueError naming the row that lacks its fields or whose answer is empty.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, on which the score would lie; --tokenizer names another one")
    parts_of, is_answer = [], []
    for row in rows:
        if "messages" in row:
            parts, spoken = split_turns(row, tokenizer)
            if row["messages"][-1]["role"] != "assistant":
                raise ValueError(f"{row.where}: the messages do not end with the assistant's answer")
            answer = row["messages"][-1]["content"]
        elif "prompt" in row and "completion" in row:
            parts, spoken = [row.text("prompt"), row.text("completion")], [False, True]
            answer = parts[1]
        else:
            raise row.misfit("`prompt` and `completion`, or `messages`")
        if not answer.strip():
            raise ValueError(f"{row.where}: an answer is empty")
        parts_of.append(parts)
        is_answer.append(spoken)
    sequences = []
    examples = join_parts(rows, parts_of, is_answer, tokenizer, add_bos, add_eos=True)
    for row, example in zip(rows, examples, strict=True):
        if not any(example.loss_mask):
            raise ValueError(f"{row.where}: an answer has no tokens")
        end = max(t for t, of_answer in enumerate(example.loss_mask) if of_answer) + 1
        ids = example.input_ids[:end]
        sequences.append(ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id])
    return sequences


def make_microbatches(pairs: list[Pair], args, device):
    """Yields packed micro-batches of `microbatch_size` pairs: sequences chosen, rejected, chosen, ..., and margins."""
    for i in range(0, len(pairs), args.microbatch_size):
        some = pairs[i : i + args.microbatch_size]
        packed = pack_sequences([ids for pair in some for ids in (pair.chosen_ids, pair.rejected_ids)], device)
        yield {**packed, "margins": torch.tensor([pair.margin for pair in some], dtype=torch.float64, device=device)}


# ---------------------------------------------------------------------------------------------------------------------
# Loss and calibration
# ---------------------------------------------------------------------------------------------------------------------


def pair_loss(hidden, microbatch, roles, num_pairs):
    """Loss (eq. 2) and metrics of one micro-batch, divided by the batch's num_pairs; hidden: states by role."""
    scores = read_scores(hidden["reward_model"], roles["reward_head"], microbatch)  # [2 * pairs]
    difference = scores[0::2] - scores[1::2]  # [pairs]
    loss = -F.logsigmoid(difference - microbatch["margins"].to(difference.dtype)).sum() / num_pairs
    with torch.no_grad():
        metrics = {
            "accuracy": count_wins(difference).sum() / num_pairs,
            "difference": difference.sum() / num_pairs,
        }
    return loss, metrics


def calibrate(difference: Tensor) -> list[dict]:
    """Pairs in bins of the probability (eq. 1) of the answer that the model prefers, and how often it is right."""
    confidence, wins = difference.abs().sigmoid(), count_wins(difference)
    bins = ((2 * confidence - 1) * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    table = []
    for i in bins.unique().tolist():
        inside = bins == i
        probability, accuracy = confidence[inside].mean().item(), wins[inside].mean().item()
        table.append({"probability": probability, "accuracy": accuracy, "count": int(inside.sum())})
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_all(roles, sequences: list[list[int]], args, mesh) -> Tensor:
    """Scores of all sequences on every rank, each working on its share. Communication: one sum over all replicas.

    Shapes: -> [sequences] float64
    """
    scores = torch.zeros(len(sequences), dtype=torch.float64, device=mesh.device)
    microbatches = []
    for mine in torch.arange(mesh.dp.rank, len(sequences), mesh.dp.size).split(2 * args.microbatch_size):
        packed = pack_sequences([sequences[i] for i in mine], mesh.device)
        microbatches.append({**packed, "sequences": mine.to(mesh.device)})

    def read(hidden, microbatch):
        return read_scores(hidden["reward_model"], roles["reward_head"], microbatch)

    for microbatch, found in forward_only({"reward_model": roles["reward_model"]}, microbatches, read):
        scores[microbatch["sequences"]] = found.double()
    return mesh.folded.sum(scores, "dp")


def evaluate(roles, pairs: list[Pair], args, mesh) -> dict:
    """Accuracy with standard error, mean difference, loss (eq. 2) and calibration over all pairs."""
    scores = score_all(roles, [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)], args, mesh)
    difference = (scores[0::2] - scores[1::2]).cpu()
    margins = torch.tensor([pair.margin for pair in pairs], dtype=torch.float64)
    wins = count_wins(difference)
    return {
        "eval_accuracy": wins.mean().item(),
        "eval_accuracy_se": wins.std(correction=0).item() / math.sqrt(len(pairs)),
        "eval_loss": -F.logsigmoid(difference - margins).mean().item(),
        "eval_difference": difference.mean().item(),
        "eval_calibration": calibrate(difference),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """What a resumed run needs beside weights and optimizer state."""

    step: int = 0
    samples: int = 0  # pairs read, over all ranks
    tokens: int = 0  # of those pairs
    skipped_steps: int = 0  # for a non-finite gradient
    best_loss: float = math.inf
    seconds: float = 0.0  # of training


def main(args: Args) -> None:
    if args.plan:
        return print_plan(args)
    folder = resolve_model(args.model)
    mesh = init_mesh(args.layout, read_config(folder), (args.batch_size, args.microbatch_size))
    run = Run("reward_model", args, mesh)
    dtype = getattr(torch, args.dtype)
    if args.batch_size % mesh.dp.size:
        raise ValueError(f"--batch-size {args.batch_size} is no multiple of {mesh.dp.size} replicas")

    # model: the head's bias cancels in the loss and would only drift
    tokenizer = load_tokenizer(args.tokenizer or folder)
    if is_reward_model(folder):
        reward_model, reward_head = load_reward_model(folder, mesh, dtype)
    else:
        reward_model = load_decoder(folder, mesh, dtype, lm_head=False)
        hidden_size, wide = reward_model.config.hidden_size, torch.promote_types(dtype, torch.float32)
        reward_head = ScalarHead(hidden_size, mesh, wide, std=1 / math.sqrt(hidden_size + 1), seed=args.seed)
    reward_head.bias.requires_grad_(False).zero_()
    set_trained(reward_model, args.tuning, args.seed)
    check_vocabulary(tokenizer, reward_model.config)
    roles = {"reward_model": reward_model, "reward_head": reward_head}
    model = data_parallel(roles, mesh, args.layout)
    optimizer = AdamW(model, args.optim.lr, args.optim.betas, args.optim.eps, args.optim.weight_decay)

    # data
    max_seq_len = reward_model.config.max_seq_len
    max_len = min(args.max_len or max_seq_len, max_seq_len)
    train = read_pairs(load_rows(args.data), tokenizer, args.bos, max_len)
    if args.eval_data:
        held_out = read_pairs(load_rows(args.eval_data), tokenizer, args.bos, max_len)
    else:
        train, held_out = hold_out(train, args.seed)
    demonstrations = [pair.chosen_ids for pair in train[:MAX_DEMONSTRATIONS]]
    if args.demonstrations:
        demonstrations = read_demonstrations(load_rows(args.demonstrations), tokenizer, args.bos, max_len)
    baselines = {
        "eval_length_accuracy": length_accuracy(held_out),
        "eval_bag_accuracy": bag_accuracy(train, held_out),
    }

    state = Progress()
    stored = [*model.pieces(), *optimizer.pieces()]
    saved = run.load_checkpoint(stored)
    if saved is not None:
        state = Progress(**saved["progress"])
    run.describe(
        [
            ("model", f"{args.model}, {reward_model.config.num_layers} layers, {reward_model.config.hidden_size} wide"),
            ("parameters", f"{reward_model.num_parameters:,} without LM head, {args.dtype}"),
            ("layout", mesh.describe()),
            ("memory", describe_memory(model, optimizer)),
            (
                "batch",
                f"{args.batch_size} pairs a step = {mesh.dp.size} ranks x "
                f"{math.ceil(args.batch_size / mesh.dp.size / args.microbatch_size)} micro-batches x "
                f"{min(args.batch_size // mesh.dp.size, args.microbatch_size)} pairs",
            ),
            ("data", f"{len(train)} pairs, {len(held_out)} for evaluation, up to {max_len} tokens an answer"),
            (
                "baselines",
                f"accuracy {baselines['eval_length_accuracy']:.3f} of the longer answer, "
                f"{baselines['eval_bag_accuracy']:.3f} of a bag of tokens",
            ),
        ]
    )

    def save_checkpoint():
        meta = {"progress": vars(state)}
        save_training_state(run.folder / "checkpoints", state.step, stored, meta, keep=2, mesh=mesh)

    def save_model(name):
        with rollout_weights(reward_model):
            offset = score_all(roles, demonstrations, args, mesh).mean().item()  # eq. 3
        save_reward_model(reward_model, reward_head, run.folder / name, mesh, tokenizer, offset, args.bos)

    def evaluate_now():
        mesh.at("evaluation", state.step)
        with rollout_weights(reward_model):
            metrics = evaluate(roles, held_out, args, mesh) | baselines
        run.log({"event": "eval", "iteration": state.step, "samples": state.samples, **metrics})
        run.note(
            f"step {state.step}: accuracy {metrics['eval_accuracy']:.4f} +- {metrics['eval_accuracy_se']:.4f}, "
            f"eval_loss {metrics['eval_loss']:.4f} nats per pair, mean difference {metrics['eval_difference']:.3f}"
        )
        for row in metrics["eval_calibration"]:
            run.note(f"  confidence {row['probability']:.3f}: right {row['accuracy']:.3f} of {row['count']} pairs")
        if metrics["eval_loss"] < state.best_loss and state.step > 0:
            save_model("best")
        state.best_loss = min(state.best_loss, metrics["eval_loss"])

    if saved is None:
        evaluate_now()  # the baseline

    while state.step < args.max_steps and not run.stop_requested():
        started = time.perf_counter()
        order = rows_at(state.samples, args.batch_size, len(train), args.seed)
        batch = [train[i] for i in order]  # of all ranks
        share = args.batch_size // mesh.dp.size
        mine = batch[mesh.dp.rank * share : (mesh.dp.rank + 1) * share]

        # update
        mesh.at("update", state.step + 1)
        model.zero_grad()
        loss_fn = partial(pair_loss, roles=roles, num_pairs=len(batch))
        metrics = forward_backward(model, list(make_microbatches(mine, args, mesh.device)), loss_fn)
        metrics["grad_norm"] = clip_grad_norm(model, args.optim.max_grad_norm, mesh)
        scale = args.optim.lr_multiplier(state.step, args.max_steps)
        if not optimizer.step(scale):
            state.skipped_steps += 1

        # log
        seconds = time.perf_counter() - started
        state.step += 1
        state.samples += args.batch_size
        batch_tokens = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in batch)
        state.tokens += batch_tokens
        state.seconds += seconds
        row = {
            "event": "train",
            "iteration": state.step,
            "samples": state.samples,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "tokens_per_second": batch_tokens / seconds,
            **mesh.utilisation(6 * reward_model.num_parameters * batch_tokens, seconds),
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
                "accuracy": f"{row['accuracy']:.3f}",
                "grad_norm": f"{row['grad_norm']:.3f}",
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
        save_model("model")
    run.finish()
    mesh.close()


if __name__ == "__main__":
    launch(main, Args)
