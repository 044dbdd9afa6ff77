"""Supervised fine-tuning: the log-likelihood of demonstrations, token by token.

For a demonstration y with loss on its tokens M (all but the first; of prompt + completion the completion; of messages
the assistant's turns), a step over a batch of all ranks minimises, N being the number of loss tokens in the batch,

    - (1 / N) sum over demonstrations y, sum over t in M(y), of log pi(y_t | y_<t)                               (1)

A mean over the tokens of the whole batch, so that neither micro-batch size, packing nor layout changes a gradient
(averaging per micro-batch, as many do, weighs a token by the company it keeps).

    torchrun sft.py
    torchrun --nproc-per-node 2 sft.py --model FOLDER --data train.jsonl --eval-data valid.jsonl

The first command clones the embedded task's random walks; eval_loss falls from 3.1 to about 0.66 nats per token.
"""

import math
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

from parallel.adapters import Lora, Tuning, set_trained
from parallel.checkpoint import load_decoder, read_config, save_decoder
from parallel.data import check_vocabulary, load_tokenizer, pack_batch, pad_batch, rows_at, sft_examples
from parallel.data_parallel import data_parallel
from parallel.footprint import Job, Role
from parallel.mesh import Layout, init_mesh
from parallel.optim import AdamW, Optim, clip_grad_norm
from parallel.pipeline import forward_backward, forward_only
from parallel.plan import describe_memory, print_plan
from parallel.reshard import rollout_weights
from parallel.rows import load_rows, resolve_model
from parallel.run import Run, check_flags, launch
from parallel.tensor import hidden_before, vocab_parallel_logprobs
from parallel.training_state import save_training_state


@dataclass
class Args:
    """Supervised fine-tuning. The defaults clone the embedded task's random walks."""

    model: str = "tasks.random_walks:untrained_policy"
    """Hugging Face folder, hub id, or module:function that returns a folder"""
    tokenizer: str = ""
    """folder or hub id; empty = that of --model"""
    data: tuple[str, ...] = ("tasks.random_walks:walks",)
    """JSONL or text files, folders, hub names, module:function; rows of `text`, `prompt` + `completion`, `messages`"""
    eval_data: tuple[str, ...] = ()
    """demonstrations of the evaluation, likewise; none = those of --data"""
    bos: bool = True
    """begin each demonstration with the tokenizer's BOS, where it has one"""
    eos: bool = True
    """end each demonstration with the tokenizer's EOS"""
    max_len: int = 0
    """cut demonstrations to this many tokens; 0 = the model's context"""
    packing: bool = True
    """lay several demonstrations in a row, invisible to each other; otherwise one per row, padded"""
    output_dir: str = ""
    """run folder; empty = the next free of runs/sft, runs/sft-2, ..."""
    resume: bool = False
    """go on from the newest checkpoint of --output-dir, or of the newest runs/sft*"""
    overwrite: bool = False
    """replace the run that --output-dir holds"""
    allow_change: tuple[str, ...] = ()
    """flags that may differ from those of the resumed run, e.g. --allow-change optim.lr"""
    seed: int = 1
    """of the order of demonstrations"""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """of parameters and activations; the optimizer keeps a float32 copy of bfloat16 parameters"""
    max_steps: int = 300
    """optimizer steps; 0 evaluates and stops"""
    eval_every: int = 100
    """steps between evaluations"""
    save_every: int = 100
    """steps between checkpoints; the last two are kept"""
    log_every: int = 10
    """steps between progress lines where the output is not a terminal"""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """also log there; the package must be installed"""
    batch_size: int = 100
    """demonstrations of an optimizer step, over all ranks"""
    microbatch_size: int = 100
    """demonstrations of a forward and backward, per rank; changes memory and speed only"""
    freeze: tuple[str, ...] = ()
    """parts that keep their weights: embedding, layers.0-5, lm_head, ... or patterns of names such as *.bias"""
    unfrozen_layers: int = 0
    """upper layers that train, with what lies above them; 0 = all"""
    lora: Lora = field(default_factory=Lora)
    optim: Optim = field(default_factory=partial(Optim, lr=1e-3))
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
        """What of the policy trains."""
        return Tuning(self.freeze, self.unfrozen_layers, self.lora)

    def job(self) -> Job:
        """What --plan counts."""
        config = read_config(self.model)
        seq_len = min(self.max_len or config.max_seq_len, config.max_seq_len)
        roles = {"policy": Role(config, getattr(torch, self.dtype).itemsize, tuning=self.tuning.resolved())}
        return Job(roles, self.batch_size, self.microbatch_size, seq_len, scored=seq_len - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Data and loss
# ---------------------------------------------------------------------------------------------------------------------


def make_microbatches(examples, args, device):
    """Yields micro-batches of `microbatch_size` examples, packed or one per row."""
    for i in range(0, len(examples), args.microbatch_size):
        some = examples[i : i + args.microbatch_size]
        fields, seq_lens = pad_batch(
            {"input_ids": [e.input_ids for e in some], "loss_mask": [e.loss_mask for e in some]}
        )
        microbatch = pack_batch(fields, seq_lens, torch.arange(len(seq_lens)), one_per_row=not args.packing)
        yield {name: x.to(device) for name, x in microbatch.items()}


def sft_loss(hidden, microbatch, policy, num_tokens):
    """Negative log-likelihood of the loss tokens (eq. 1), in nats, divided by the batch's num_tokens.

    Args: hidden: the policy's states, by role. Shapes: [rows, row_len, hidden_size], the micro-batch [rows, row_len]
    """
    mask = microbatch["loss_mask"]
    states = hidden_before(hidden["policy"], mask)
    logprobs, _ = vocab_parallel_logprobs(states, policy, microbatch["input_ids"][mask])
    loss = -logprobs.sum() / num_tokens
    return loss, {"loss": loss.detach()}


@torch.no_grad()
def evaluate(policy, examples, args, mesh):
    """Nats per predicted token over all examples, and its exponential. Communication: one sum over all replicas."""
    nats = torch.zeros((), dtype=torch.float64, device=mesh.device)
    mine = list(make_microbatches(examples[mesh.dp.rank :: mesh.dp.size], args, mesh.device))
    for _, (loss, _) in forward_only({"policy": policy}, mine, partial(sft_loss, policy=policy, num_tokens=1)):
        nats += loss.double()
    num_tokens = sum(sum(example.loss_mask) for example in examples)
    loss = mesh.folded.sum(nats, "dp").item() / num_tokens
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700)), "eval_tokens": num_tokens}


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """What a resumed run needs beside weights and optimizer state."""

    step: int = 0
    samples: int = 0  # demonstrations read, over all ranks
    tokens: int = 0  # of those demonstrations
    skipped_steps: int = 0  # for a non-finite gradient
    best_loss: float = math.inf
    seconds: float = 0.0  # of training


def main(args: Args) -> None:
    if args.plan:
        return print_plan(args)
    folder = resolve_model(args.model)
    mesh = init_mesh(args.layout, read_config(folder), (args.batch_size, args.microbatch_size))
    run = Run("sft", args, mesh)
    if args.batch_size % mesh.dp.size:
        raise ValueError(f"--batch-size {args.batch_size} is no multiple of {mesh.dp.size} replicas")

    # model and data
    tokenizer = load_tokenizer(args.tokenizer or folder)
    policy = set_trained(load_decoder(folder, mesh, getattr(torch, args.dtype)), args.tuning, args.seed)
    check_vocabulary(tokenizer, policy.config)
    model = data_parallel({"policy": policy}, mesh, args.layout)
    optimizer = AdamW(model, args.optim.lr, args.optim.betas, args.optim.eps, args.optim.weight_decay)
    max_len = min(args.max_len or policy.config.max_seq_len, policy.config.max_seq_len)
    train = sft_examples(load_rows(args.data), tokenizer, args.bos, args.eos, max_len)
    held_out = (
        sft_examples(load_rows(args.eval_data), tokenizer, args.bos, args.eos, max_len) if args.eval_data else train
    )

    state = Progress()
    stored = [*model.pieces(), *optimizer.pieces()]
    saved = run.load_checkpoint(stored)
    if saved is not None:
        state = Progress(**saved["progress"])
    run.describe(
        [
            ("model", f"{args.model}, {policy.config.num_layers} layers, {policy.config.hidden_size} wide"),
            ("parameters", f"{policy.num_parameters:,}, {args.dtype}"),
            ("layout", mesh.describe()),
            ("memory", describe_memory(model, optimizer)),
            (
                "batch",
                f"{args.batch_size} demonstrations a step = {mesh.dp.size} ranks x "
                f"{math.ceil(args.batch_size / mesh.dp.size / args.microbatch_size)} micro-batches x "
                f"{min(args.batch_size // mesh.dp.size, args.microbatch_size)} demonstrations",
            ),
            ("data", f"{len(train)} demonstrations, {len(held_out)} for evaluation, up to {max_len} tokens each"),
        ]
    )

    def save_checkpoint():
        meta = {"progress": vars(state)}
        save_training_state(run.folder / "checkpoints", state.step, stored, meta, keep=2, mesh=mesh)

    def evaluate_now():
        mesh.at("evaluation", state.step)
        with rollout_weights(policy):
            metrics = evaluate(policy, held_out, args, mesh)
        run.log({"event": "eval", "iteration": state.step, "samples": state.samples, **metrics})
        run.note(
            f"step {state.step}: eval_loss {metrics['eval_loss']:.5f} nats per token, "
            f"perplexity {metrics['eval_perplexity']:.4f} over {metrics['eval_tokens']:,} tokens"
        )
        if metrics["eval_loss"] < state.best_loss and state.step > 0:
            save_decoder(policy, run.folder / "best", mesh, tokenizer)
        state.best_loss = min(state.best_loss, metrics["eval_loss"])

    if saved is None:
        evaluate_now()  # the baseline

    while state.step < args.max_steps and not run.stop_requested():
        started = time.perf_counter()
        order = rows_at(state.samples, args.batch_size, len(train), args.seed)
        batch = [train[i] for i in order]  # of all ranks
        num_tokens = sum(sum(example.loss_mask) for example in batch)
        share = args.batch_size // mesh.dp.size
        mine = batch[mesh.dp.rank * share : (mesh.dp.rank + 1) * share]

        # update
        mesh.at("update", state.step + 1)
        model.zero_grad()
        loss_fn = partial(sft_loss, policy=policy, num_tokens=num_tokens)
        metrics = forward_backward(model, list(make_microbatches(mine, args, mesh.device)), loss_fn)
        metrics["grad_norm"] = clip_grad_norm(model, args.optim.max_grad_norm, mesh)
        scale = args.optim.lr_multiplier(state.step, args.max_steps)
        if not optimizer.step(scale):
            state.skipped_steps += 1

        # log
        seconds = time.perf_counter() - started
        state.step += 1
        state.samples += args.batch_size
        batch_tokens = sum(len(example.input_ids) for example in batch)
        state.tokens += batch_tokens
        state.seconds += seconds
        row = {
            "event": "train",
            "iteration": state.step,
            "samples": state.samples,
            "tokens": state.tokens,
            "seconds": state.seconds,
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
        save_decoder(policy, run.folder / "model", mesh, tokenizer)
    run.finish()
    mesh.close()


if __name__ == "__main__":
    launch(main, Args)
