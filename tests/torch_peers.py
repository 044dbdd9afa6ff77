"""torch's own parallelism on the same weights and rows: DTensor's tensor parallelism, and its pipelining.

Each of the two functions below gives, on every rank, a step of ours and a step of theirs (forward and backward), and a
function that compares all gradients; tests compare, `bench_parallel.py` takes times.
"""

import torch
import torch.nn.functional as F
from torch import nn

from parallel.data_parallel import data_parallel
from parallel.mesh import Layout, init_mesh
from parallel.model import Decoder, DecoderConfig
from parallel.pipeline import forward_backward
from parallel.tensor import hidden_before, vocab_parallel_logprobs
from tests.states import full_tensors


def make_config(num_layers, hidden_size, vocab_size=512, seq_len=128):
    """A GPT-2 with a head of its own."""
    return DecoderConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=hidden_size // 32,
        num_kv_heads=hidden_size // 32,
        head_dim=32,
        ffn_size=4 * hidden_size,
        vocab_size=vocab_size,
        max_seq_len=seq_len,
        norm="layernorm",
        norm_eps=1e-5,
        activation="gelu",
        gated=False,
        learned_positions=True,
        qkv_bias=True,
        attn_out_bias=True,
        ffn_bias=True,
    )


def make_batch(config, num_rows):
    """Rows of which every token but the first carries loss."""
    seq_len = config.max_seq_len
    ids = torch.randint(config.vocab_size, (num_rows, seq_len), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(seq_len).expand_as(ids)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    return {"input_ids": ids, "position_ids": positions, "first_key": torch.zeros_like(ids), "mask": mask}


def make_our_step(decoder, layout, num_microbatches, batch):
    """The step, and the model that holds its gradients."""
    model = data_parallel({"policy": decoder}, decoder.mesh, layout)
    pieces = zip(*(x.chunk(num_microbatches) for x in batch.values()), strict=True)
    microbatches = [dict(zip(batch, piece, strict=True)) for piece in pieces]
    num_tokens = batch["mask"].sum()

    def loss_fn(hidden, microbatch):
        return nats_per_token(hidden["policy"], microbatch["input_ids"], decoder, num_tokens), {}

    def step():
        model.zero_grad()
        return forward_backward(model, microbatches, loss_fn)["loss"]

    return step, model


def nats_per_token(hidden, ids, decoder, num_tokens):
    mask = torch.arange(ids.shape[1]).expand_as(ids) > 0
    logprobs, _ = vocab_parallel_logprobs(hidden_before(hidden, mask), decoder, ids[mask])
    return -logprobs.sum() / num_tokens


# --- tensor parallelism ----------------------------------------------------------------------------------------------


class PlainBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, self.head_dim = config.hidden_size, config.head_dim
        self.attn_norm, self.ffn_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.attn_out = (nn.Linear(d, d) for _ in range(4))
        self.ffn_in, self.ffn_out = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):
        rows, seq_len, _ = x.shape
        y = self.attn_norm(x)
        q, k, v = (
            linear(y).view(rows, seq_len, -1, self.head_dim).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(rows, seq_len, -1)
        x = x + self.attn_out(y)
        return x + self.ffn_out(F.gelu(self.ffn_in(self.ffn_norm(x))))


class PlainDecoder(nn.Module):
    """The decoder out of torch's plain layers, which DTensor can divide; weights are copied from ours."""

    def __init__(self, config, source):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_seq_len, config.hidden_size)
        self.layers = nn.ModuleList(PlainBlock(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                weight.copy_(plain_part(name, dict(source.named_parameters()), len(weight)))

    def forward(self, ids):
        x = self.embedding(ids) + self.position_embedding(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.final_norm(x))


def plain_part(name, ours, num_rows):
    """What a parameter of PlainDecoder is in ours: queries, keys and values lie in one matrix there."""
    *path, module, leaf = name.split(".")
    if module in ("q", "k", "v"):
        return ours[".".join([*path, "qkv", leaf])].chunk(3)["qkv".index(module)]
    return ours[name][:num_rows]


def against_dtensor(config, num_rows):
    """ours, theirs, compare: tp is the number of ranks, without sequence parallelism."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_mesh()
    layout = Layout(tp=mesh.world_size, sequence_parallel=False)
    mesh, whole = init_mesh(layout), Decoder(config, init_mesh(Layout(dp=mesh.world_size)), seed=3)
    batch = make_batch(config, num_rows)
    our_step, model = make_our_step(Decoder(config, mesh, seed=3), layout, 1, batch)
    theirs = PlainDecoder(config, whole)
    plan = {f"layers.*.{name}": ColwiseParallel() for name in ("q", "k", "v", "ffn_in")}
    plan |= {f"layers.*.{name}": RowwiseParallel() for name in ("attn_out", "ffn_out")}
    plan |= {"embedding": RowwiseParallel(input_layouts=Replicate())}
    plan |= {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    parallelize_module(theirs, init_device_mesh("cpu", (mesh.world_size,)), plan)

    def their_step():
        theirs.zero_grad()
        ids = batch["input_ids"]
        logits = theirs(ids)[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        return loss.item()

    def compare():
        """Largest difference of a gradient, relative to the largest entry of that parameter's."""
        ours = {}
        for unit in model.units:
            ours |= full_tensors(unit, unit.flat_grad)
        ours = {name.partition(".")[2]: x for name, x in ours.items()}
        worst = 0.0
        for name, parameter in theirs.named_parameters():
            grad = parameter.grad
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            part = plain_part(name, ours, len(grad))
            if not name.endswith("k.bias"):  # whose gradient is 0 but for rounding
                worst = max(worst, ((part - grad).abs().max() / grad.abs().max()).item())
        return worst

    return our_step, their_step, compare


# --- pipeline --------------------------------------------------------------------------------------------------------


class StageModule(nn.Module):
    """A stage's layers as torch's pipelining wants them: one tensor in, one out."""

    def __init__(self, decoder, microbatch):
        super().__init__()
        self.decoder, self.where = decoder, (microbatch["position_ids"], microbatch["first_key"])

    def forward(self, x):
        return self.decoder(x, *self.where, layers=self.decoder.chunks[0])


def against_pipelining(config, num_rows, num_microbatches):
    """ours, theirs, compare: as many stages as ranks, 1F1B."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    layout = Layout(pp=init_mesh().world_size)
    mesh = init_mesh(layout)
    batch = make_batch(config, num_rows)
    our_step, model = make_our_step(Decoder(config, mesh, seed=3), layout, num_microbatches, batch)
    theirs = Decoder(config, mesh, seed=3)
    ids, num_tokens = batch["input_ids"], batch["mask"].sum()

    def loss_fn(hidden, ids):
        return nats_per_token(hidden, ids, theirs, num_tokens)  # the same: what is compared is the pipeline

    first = {name: x[: num_rows // num_microbatches] for name, x in batch.items()}
    stage = PipelineStage(StageModule(theirs, first), mesh.pp.rank, mesh.pp.size, mesh.device)
    schedule = Schedule1F1B(stage, num_microbatches, loss_fn, scale_grads=False)

    def their_step():
        theirs.zero_grad()
        losses = []
        if mesh.pp.rank == 0:
            schedule.step(ids)
        elif mesh.pp.rank == mesh.pp.size - 1:
            schedule.step(target=ids, losses=losses)
        else:
            schedule.step()
        loss = torch.stack(losses).sum() if losses else torch.zeros(())
        return mesh.sum(loss.detach(), "pp").item()  # forward_backward, too, gives the loss on all ranks

    def compare():
        """Largest difference of a gradient of this stage, relative to the largest entry of that parameter's."""
        worst = 0.0
        ours = dict(model.named_parameters())
        for name, parameter in theirs.named_parameters():
            grad = ours[f"policy.{name}"].grad
            worst = max(worst, ((grad - parameter.grad).abs().max() / grad.abs().max()).item())
        return worst

    return our_step, their_step, compare
