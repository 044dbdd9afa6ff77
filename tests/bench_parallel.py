"""Times the layouts against torch's own on two ranks; run by hand: `OMP_NUM_THREADS=1 python -m tests.bench_parallel`.

ZeRO-3 against FSDP2, tensor parallelism against DTensor, 1F1B against torch's pipelining. The same decoder, weights and
rows in the same processes, a step being forward, backward and reduction of both in turns. Reported are the ratio of the
fastest steps, since other work on the machine only ever adds time, and for ZeRO-3, without and with recomputation of
whole layers, the bytes of all live tensors at the peak of a step beyond what lies there before it.
"""

import argparse
import copy
import warnings

import torch
import torch.nn.functional as F

from parallel.data_parallel import data_parallel
from parallel.mesh import Layout, init_mesh
from parallel.model import Decoder, DecoderConfig
from parallel.pipeline import forward_backward
from tests.bench_data_parallel import report, take_turns
from tests.ranks import close_pools, run_ranks
from tests.torch_peers import against_dtensor, against_pipelining, make_config
from tests.zero_models import LiveBytes

CONFIG = DecoderConfig(
    num_layers=6,
    hidden_size=256,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    ffn_size=1024,
    vocab_size=512,
    max_seq_len=128,
    norm="layernorm",
    norm_eps=1e-5,
    activation="gelu",
    gated=False,
    learned_positions=True,
    qkv_bias=True,
    attn_out_bias=True,
    ffn_bias=True,
)
NUM_ROWS, SEQ_LEN = 4, 128  # per rank


def against_fsdp2(recompute, num_steps):
    """Seconds of each step of both, and bytes at the peak of one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("ignore")  # FSDP2 warns that the decoder returns a view
    mesh = init_mesh()
    ours = Decoder(CONFIG, mesh, seed=3)
    theirs = copy.deepcopy(ours)
    theirs.recompute = recompute
    device_mesh = init_device_mesh("cpu", (mesh.world_size,))
    for module in (*theirs.layers.values(), theirs):  # embeddings, final norm and head are the last one
        fully_shard(module, mesh=device_mesh)
    model = data_parallel({"policy": ours}, mesh, Layout(zero=3, recompute=recompute))
    ids = torch.randint(CONFIG.vocab_size, (NUM_ROWS, SEQ_LEN), generator=torch.Generator().manual_seed(mesh.rank))
    positions, first_key = torch.arange(SEQ_LEN).expand_as(ids), torch.zeros_like(ids)

    def loss_of(hidden, decoder, divisor):
        logits = F.linear(hidden, decoder.lm_head_weight)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) / divisor

    def our_step():
        model.zero_grad()
        microbatch = {"input_ids": ids, "position_ids": positions, "first_key": first_key}
        forward_backward(model, [microbatch], lambda hidden, _: (loss_of(hidden["policy"], ours, mesh.dp.size), {}))

    def their_step():
        for parameter in theirs.parameters():
            parameter.grad = None
        loss = loss_of(theirs(ids, positions, first_key), theirs, 1)
        loss.backward()
        mesh.sum(loss, "dp").item()  # forward_backward, too, gives the loss of all ranks

    seconds = take_turns({"ours": our_step, "FSDP2": their_step}, num_steps, mesh.barrier)
    peaks = []
    for step in (our_step, their_step):
        with LiveBytes() as live:
            step()
        peaks.append(live.peak)
    for unit in model.units:  # the same gradients, each rank holding other slices of them
        full = mesh.all_gather(unit.flat_grad, "dp")
        for i, name in enumerate(unit.names):
            expected = theirs.get_parameter(name.removeprefix("policy.")).grad.full_tensor()
            torch.testing.assert_close(unit.view(full, i), expected, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: n + m)
    return seconds, peaks


def in_turns(make, num_steps, *args):
    """Seconds of each step of both, whose gradients agree."""
    our_step, their_step, compare = make(*args)
    seconds = take_turns({"ours": our_step, "torch": their_step}, num_steps, init_mesh().barrier)
    assert compare() < 1e-4
    return seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    num_steps = parser.parse_args().steps
    print("| 2 ranks, zero 3 | fastest / median ms | fastest / median ms | ratio of the fastest |\n|---|---|---|---|")
    for recompute in ("none", "full"):
        seconds, peaks = run_ranks(2, against_fsdp2, recompute, num_steps, timeout=300)[0]
        report(f"recompute {recompute}", seconds)
        ours, theirs = (peak / 2**20 for peak in peaks)
        print(f"| live at the peak | {ours:.1f} MiB | {theirs:.1f} MiB | {ours / theirs:.3f} |", flush=True)
    config = make_config(num_layers=6, hidden_size=256)
    for title, make, *args in (
        ("tensor parallelism, DTensor", against_dtensor, config, 4),
        ("1F1B of 8 micro-batches, torch's pipelining", against_pipelining, config, 8, 8),
        ("1F1B of 8 smaller ones", against_pipelining, make_config(6, 128, seq_len=32), 8, 8),
    ):
        report(title, run_ranks(2, in_turns, make, num_steps, *args, timeout=300)[0])
    close_pools()
