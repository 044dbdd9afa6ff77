"""Times the data-parallel machinery; run by hand: `OMP_NUM_THREADS=1 python -m tests.bench_data_parallel`.

1. Two ranks: a step (forward, backward, reduction) with our units and with torch's DDP, taken in turns in the same
   processes on the same model.
2. One rank: units, forward_backward, norm, clipping and AdamW against a plain loop with the same mathematics out of
   torch's own parts, in turns as well.
Both report the ratio of the fastest steps, since other work on the machine only ever adds time.
"""

import argparse
import copy
import statistics
import time

import torch
from torch import nn

from parallel.data_parallel import data_parallel
from parallel.mesh import Layout, init_mesh
from parallel.model import Decoder, DecoderConfig
from parallel.optim import AdamW, clip_grad_norm
from parallel.pipeline import forward_backward
from parallel.tensor import hidden_before, vocab_parallel_logprobs
from tests.ranks import close_pools, run_ranks

SIZES = {  # name: layers, hidden size, heads, vocabulary, sequences per rank, sequence length
    "6 x 144 (random walks)": (6, 144, 12, 23, 32, 12),
    "4 x 256": (4, 256, 8, 1024, 16, 64),
}


def make_decoder(size, mesh):
    num_layers, hidden_size, num_heads, vocab_size, _, seq_len = SIZES[size]
    config = DecoderConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        ffn_size=4 * hidden_size,
        vocab_size=vocab_size,
        max_seq_len=seq_len,
        norm="layernorm",
        norm_eps=1e-5,
        activation="gelu_tanh",
        gated=False,
        learned_positions=True,
        qkv_bias=True,
        attn_out_bias=True,
        ffn_bias=True,
        tied_embeddings=True,
    )
    return Decoder(config, mesh)


def make_batch(size, rank):
    *_, vocab_size, num_rows, seq_len = SIZES[size]
    input_ids = torch.randint(vocab_size, (num_rows, seq_len), generator=torch.Generator().manual_seed(rank))
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    mask[:, 0] = False
    positions = torch.arange(seq_len).expand_as(input_ids)
    return {"input_ids": input_ids, "position_ids": positions, "first_key": torch.zeros_like(input_ids), "mask": mask}


def make_loss_fn(decoder, num_tokens):
    def loss_fn(hidden, batch):
        states = hidden_before(hidden["policy"], batch["mask"])
        logprobs, _ = vocab_parallel_logprobs(states, decoder, batch["input_ids"][batch["mask"]])
        return -logprobs.sum() / num_tokens, {}

    return loss_fn


def run_decoder(decoder, batch):
    """Its states by role, as `forward_backward` gives them to a loss."""
    return {"policy": decoder(batch["input_ids"], batch["position_ids"], batch["first_key"])}


def take_turns(steps: dict, num_steps, barrier):
    """Seconds of each step function, called in turns; the first two rounds are not counted."""
    seconds = {name: [] for name in steps}
    for i in range(num_steps + 2):
        names = list(steps) if i % 2 else list(reversed(steps))
        for name in names:
            barrier()
            started = time.perf_counter()
            steps[name]()
            if i >= 2:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def against_torch_ddp(size, num_steps):
    mesh = init_mesh()
    batch, num_tokens = make_batch(size, mesh.rank), make_batch(size, 0)["mask"].sum() * mesh.world_size
    ours = make_decoder(size, mesh)
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(ours), gradient_as_bucket_view=True)
    model = data_parallel({"policy": ours}, mesh, Layout())
    our_loss = make_loss_fn(ours, num_tokens)
    their_loss = make_loss_fn(wrapped.module, num_tokens / mesh.world_size)  # torch's DDP averages

    def our_step():
        model.zero_grad()
        forward_backward(model, [batch], our_loss)

    def their_step():
        wrapped.zero_grad(set_to_none=False)
        loss, _ = their_loss(run_decoder(wrapped, batch), batch)
        loss.backward()
        mesh.sum(loss, "dp").item()  # forward_backward, too, gives the loss of all ranks

    seconds = take_turns({"ours": our_step, "torch DDP": their_step}, num_steps, mesh.barrier)
    for (name, p), q in zip(ours.named_parameters(), wrapped.module.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    return seconds


def against_plain_loop(size, num_steps):
    mesh = init_mesh()
    batch, num_tokens = make_batch(size, 0), make_batch(size, 0)["mask"].sum()
    ours = make_decoder(size, mesh)
    plain = copy.deepcopy(ours)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), 1e-4, (0.9, 0.95), weight_decay=0.0, fused=True)
    model = data_parallel({"policy": ours}, mesh, Layout())
    optimizer = AdamW(model, 1e-4)
    our_loss, plain_loss = make_loss_fn(ours, num_tokens), make_loss_fn(plain, num_tokens)
    pieces = [dict(zip(batch, x, strict=True)) for x in zip(*(x.chunk(2) for x in batch.values()), strict=True)]

    def our_step():
        model.zero_grad()
        forward_backward(model, pieces, our_loss)
        clip_grad_norm(model, 1.0, mesh)
        optimizer.step()

    def plain_step():
        total = 0.0
        for piece in pieces:
            loss, _ = plain_loss(run_decoder(plain, piece), piece)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        plain_optimizer.step()
        plain_optimizer.zero_grad(set_to_none=True)

    return take_turns({"ours": our_step, "plain loop": plain_step}, num_steps, lambda: None)


def report(title, seconds):
    cells = [f"{name} {1e3 * min(x):.2f} / {1e3 * statistics.median(x):.2f}" for name, x in seconds.items()]
    ours, theirs = (min(x) for x in seconds.values())
    print(f"| {title} | {' | '.join(cells)} | {ours / theirs:.3f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    num_steps = parser.parse_args().steps
    print("| what | fastest / median ms | fastest / median ms | ratio of the fastest |\n|---|---|---|---|")
    for size in SIZES:
        report(f"2 ranks, {size}", run_ranks(2, against_torch_ddp, size, num_steps, timeout=300)[0])
        report(f"1 rank, {size}", run_ranks(1, against_plain_loop, size, num_steps, timeout=300)[0])
    close_pools()
