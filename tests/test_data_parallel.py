"""Data parallelism: gradients of N ranks against one process, losses against torch's DDP, what a bad replica says."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parallel.collectives import RankError, traffic
from parallel.data_parallel import check_replicas_equal, data_parallel, describe_nonfinite, make_units
from parallel.mesh import Layout, init_mesh
from parallel.model import Decoder, DecoderConfig, ScalarHead
from parallel.pipeline import forward_backward
from parallel.tensor import hidden_before, vocab_parallel_logprobs
from parallel.training_state import load_training_state, save_training_state
from tests.ranks import run_ranks
from tests.zero_models import unpacked

FLOAT32 = Layout(reduce_dtype="float32")
GRAD_BARS = {"float32": 5e-6, "float64": 1e-12}  # of a unit's largest entry
VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS, BATCH_SIZE, SEQ_LEN = 23, 12, 3, 8, 7


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.ffn_in = nn.LayerNorm(HIDDEN_SIZE), nn.Linear(HIDDEN_SIZE, 2 * HIDDEN_SIZE)
        self.ffn_out = nn.Linear(2 * HIDDEN_SIZE, HIDDEN_SIZE)

    def forward(self, x):
        return x + self.ffn_out(F.gelu(self.ffn_in(self.norm(x))))


class Tiny(nn.Module):
    """Predicts the token after each token from that token alone."""

    def __init__(self, variant=""):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE)
        if variant == "unused":
            self.position_embedding = nn.Embedding(SEQ_LEN, HIDDEN_SIZE)
        self.layers = nn.ModuleList(Block() for _ in range(NUM_LAYERS))
        self.final_norm = nn.LayerNorm(HIDDEN_SIZE)
        self.lm_head = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE)
        if variant == "tied":
            self.lm_head.weight = self.embedding.weight
        if variant == "frozen":
            self.layers[0].requires_grad_(False)
            self.layers[1].norm.requires_grad_(False)

    def forward(self, input_ids, skip=()):
        x = self.embedding(input_ids)
        for i, layer in enumerate(self.layers):
            x = x if i in skip else layer(x)
        return self.lm_head(self.final_norm(x))


def make_roles(variant, dtype):
    roles = {"policy": Tiny(variant).to(dtype), "ref_policy": Tiny().to(dtype).requires_grad_(False)}
    return roles | {"value_head": nn.Linear(HIDDEN_SIZE, 1, dtype=torch.promote_types(dtype, torch.float32))}


def make_batch(num_rows=BATCH_SIZE):
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(VOCAB_SIZE, (num_rows, SEQ_LEN), generator=generator)
    loss_mask = torch.rand(num_rows, SEQ_LEN - 1, generator=generator) < 0.6
    return {"input_ids": input_ids, "loss_mask": loss_mask}


def tiny_loss(roles, num_tokens, skip=()):
    def loss_fn(_, microbatch):  # the model is no decoder: the loss runs it
        ids, mask = microbatch["input_ids"], microbatch["loss_mask"]
        logits = roles["policy"](ids[:, :-1], skip)
        losses = F.cross_entropy(logits[mask], ids[:, 1:][mask], reduction="none")
        values = roles["value_head"](roles["policy"].embedding(ids[:, :-1])[mask].to(roles["value_head"].weight.dtype))
        loss = (losses + values.squeeze(1).square()).sum() / num_tokens
        return loss, {"tokens": mask.sum(), "max_loss": losses.max()}

    return loss_fn


def step_gradients(variant, dtype_name, microbatch_size, layout=FLOAT32, skip_of_rank=None):
    """Gradients by full name, metrics and the bytes sent for one step over the whole batch."""
    mesh, roles = init_mesh(layout), make_roles(variant, getattr(torch, dtype_name))
    model = data_parallel(roles, mesh, layout)
    batch = make_batch()
    local = {name: x[mesh.dp.rank :: mesh.dp.size] for name, x in batch.items()}
    pieces = zip(*(x.split(microbatch_size) for x in local.values()), strict=True)
    microbatches = [dict(zip(local, piece, strict=True)) for piece in pieces]
    model.zero_grad()
    before = traffic().get(("dp", "all_reduce"), 0)
    skip = (skip_of_rank or {}).get(mesh.dp.rank, ())
    metrics = forward_backward(model, microbatches, tiny_loss(roles, batch["loss_mask"].sum(), skip))
    sent = traffic().get(("dp", "all_reduce"), 0) - before
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return gradients, metrics, sent, sum(unit.flat_grad.nbytes for unit in model.units if unit.trainable)


def unit_of(name):
    """The layer that a parameter belongs to, or the parameter itself."""
    return re.sub(r"(layers\.\d+).*", r"\1", name)


def assert_gradients_close(actual, expected, bar, where):
    assert actual.keys() == expected.keys(), where
    largest = {}
    for name, gradient in expected.items():
        unit = unit_of(name)
        largest[unit] = max(largest.get(unit, 0.0), gradient.abs().max().item())
    for name, gradient in expected.items():
        error = (actual[name] - gradient).abs().max().item()
        scale = largest[unit_of(name)]
        assert error <= bar * scale, f"{where}, gradient of {name}: off by {error:.2e}, largest {scale:.2e}"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("variant", ["", "tied", "unused", "frozen"])
@pytest.mark.parametrize("size", [2, 4])
def test_gradients_match_one_process(size, variant, dtype):
    [(expected, expected_metrics, _, _)] = run_ranks(1, step_gradients, variant, dtype, BATCH_SIZE)
    assert any(gradient.abs().max() > 0.01 for gradient in expected.values())
    for rank, (gradients, metrics, sent, nbytes) in enumerate(run_ranks(size, step_gradients, variant, dtype, 1)):
        assert_gradients_close(gradients, expected, GRAD_BARS[dtype], f"{size} ranks, rank {rank}")
        assert metrics == pytest.approx(expected_metrics, rel=1e-6 if dtype == "float32" else 1e-12)
        num_sums, num_maxima = 2, 2  # metrics, and the number of micro-batches, in float64
        assert sent == 2 * (size - 1) * nbytes // size + 2 * (size - 1) * 8 * (num_sums + num_maxima) // size


@pytest.mark.parametrize("microbatch_size", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_do_not_depend_on_microbatch_size(microbatch_size, dtype):
    [(expected, expected_metrics, _, _)] = run_ranks(1, step_gradients, "tied", dtype, BATCH_SIZE)
    [(gradients, metrics, _, _)] = run_ranks(1, step_gradients, "tied", dtype, microbatch_size)
    assert_gradients_close(gradients, expected, GRAD_BARS[dtype], f"micro-batches of {microbatch_size}")
    assert metrics == pytest.approx(expected_metrics, rel=1e-6)


def test_replicas_hold_the_same_bits():
    results = run_ranks(4, step_gradients, "tied", "float32", 1)
    for rank, (gradients, metrics, _, _) in enumerate(results):
        assert metrics == results[0][1], f"rank {rank}"
        assert all(torch.equal(gradients[name], results[0][0][name]) for name in gradients), f"rank {rank}"


def test_layer_used_by_one_rank_only_matches_one_process():
    """Rank 1 does not run layer 1: its unit becomes ready on rank 0 alone, and the order of reductions still agrees."""
    results = run_ranks(2, step_gradients, "", "float64", 4, FLOAT32, {1: (1,)})
    roles, batch = make_roles("", torch.float64), make_batch()
    for rank, skip in ((0, ()), (1, (1,))):
        rows = {name: x[rank::2] for name, x in batch.items()}
        tiny_loss(roles, batch["loss_mask"].sum(), skip)({}, rows)[0].backward()
    expected = {f"{role}.{name}": p.grad for role, m in roles.items() for name, p in m.named_parameters()}
    expected = {name: gradient for name, gradient in expected.items() if gradient is not None}
    for rank, (gradients, *_) in enumerate(results):
        assert_gradients_close(gradients, expected, 1e-12, f"rank {rank}")


def test_bfloat16_parameters_accumulate_in_float32():
    [(gradients, _, _, _)] = run_ranks(1, step_gradients, "", "bfloat16", 1)
    [(expected, _, _, _)] = run_ranks(1, step_gradients, "", "float32", 1)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    assert_gradients_close(gradients, expected, 0.05, "bfloat16 parameters")
    name = "policy.lm_head.bias"
    assert not torch.equal(gradients[name], gradients[name].bfloat16().float()), "sums were rounded to bfloat16"


def test_reduction_in_bfloat16_halves_the_bytes_and_rounds():
    [(expected, _, _, _)] = run_ranks(1, step_gradients, "", "float32", BATCH_SIZE)
    layout = Layout(reduce_dtype="bfloat16")
    for rank, (gradients, _, sent, nbytes) in enumerate(run_ranks(2, step_gradients, "", "float32", 1, layout)):
        assert_gradients_close(gradients, expected, 2**-7, f"rank {rank}")
        assert sent == nbytes // 2 + 4 * 8  # beside the gradients three metrics and the number of micro-batches


def test_units_follow_the_layers():
    roles = make_roles("frozen", torch.float32)
    values = {role: [p.clone() for p in module.parameters()] for role, module in roles.items()}
    units = make_units(roles, init_mesh())
    layers = [f"policy.layers.{i}" for i in (0, 1, 1, 2)]
    assert [unit.name for unit in units if unit.name.startswith("policy")] == ["policy.input", *layers, "policy.output"]
    assert [unit.trainable for unit in units[:6]] == [True, False, False, True, True, True]
    assert units[-1].name == "value_head" and all(unit.flat_grad is None for unit in units if not unit.trainable)
    assert units[5].names == ["policy.lm_head.weight", "policy.final_norm.weight", "policy.final_norm.bias"] + [
        "policy.lm_head.bias"
    ]
    for role, module in roles.items():
        assert all(torch.equal(p, value) for p, value in zip(module.parameters(), values[role], strict=True))
    for unit in units:
        unit.flat.fill_(3)
        assert all((parameter == 3).all() for parameter in unit.parameters), f"{unit.name} is not made of views"
    tied = make_units({"policy": Tiny("tied")}, init_mesh())
    assert sum(name.endswith(("embedding.weight", "lm_head.weight")) for unit in tied for name in unit.names) == 1


def test_weights_come_back_from_a_checkpoint(tmp_path):
    model, other = (data_parallel(make_roles("tied", torch.float32), init_mesh(), Layout()) for _ in range(2))
    stored = list(model.pieces())
    assert not any(x.name.startswith("ref_policy") or x.name == "policy.lm_head.weight" for x in stored)
    with torch.no_grad():
        for piece in stored:
            piece.tensor.normal_()
    save_training_state(tmp_path, 1, stored, {}, 1, model.mesh)
    load_training_state(tmp_path, list(other.pieces()), other.mesh)
    for (name, expected), (_, actual) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(actual, expected), name


def test_replaced_gradient_is_noticed():
    roles = make_roles("", torch.float32)
    model = data_parallel(roles, init_mesh(), Layout())
    roles["policy"].zero_grad()
    with pytest.raises(AssertionError, match=r"policy\..*\.grad was replaced"):
        forward_backward(model, [make_batch()], tiny_loss(roles, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Against torch's DDP
# ---------------------------------------------------------------------------------------------------------------------


def sgd_losses(with_torch_ddp):
    """Local losses of 12 SGD steps; both replicas have the same number of tokens."""
    mesh, tiny = init_mesh(), Tiny("tied")
    model = data_parallel({"policy": tiny}, mesh, Layout()) if not with_torch_ddp else None
    ddp = nn.parallel.DistributedDataParallel(tiny, bucket_cap_mb=0.005) if with_torch_ddp else None
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(12):
        input_ids = torch.randint(VOCAB_SIZE, (BATCH_SIZE, SEQ_LEN), generator=generator)
        local = input_ids[mesh.dp.rank :: mesh.dp.size]
        num_tokens = BATCH_SIZE * (SEQ_LEN - 1) // (mesh.dp.size if with_torch_ddp else 1)  # torch's DDP averages

        def loss_fn(ids, num_tokens=num_tokens):
            logits = (ddp or tiny)(ids[:, :-1])
            return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / num_tokens

        if with_torch_ddp:
            loss = loss_fn(local)
            loss.backward()
            losses.append(loss.item() / mesh.dp.size)
        else:
            model.zero_grad()
            forward_backward(model, [{"ids": local}], lambda _, mb: (loss_fn(mb["ids"]), {}))
            losses.append(loss_fn(local).item())
        with torch.no_grad():
            for parameter in tiny.parameters():
                parameter.sub_(0.5 * parameter.grad)
                if with_torch_ddp:
                    parameter.grad = None
    return losses


def test_losses_of_sgd_equal_torch_ddp_bit_for_bit():
    ours, theirs = run_ranks(2, sgd_losses, False), run_ranks(2, sgd_losses, True)
    assert ours == theirs
    assert ours[0][-1] < 0.8 * ours[0][0], "nothing was learnt"


# ---------------------------------------------------------------------------------------------------------------------
# Bad replicas
# ---------------------------------------------------------------------------------------------------------------------


def unequal_replicas():
    mesh, roles = init_mesh(), make_roles("", torch.float32)
    data_parallel(roles, mesh, Layout())
    with torch.no_grad():
        if mesh.rank == 1:
            weight = roles["policy"].layers[1].ffn_in.weight
            weight[0, 0], weight[0, 1] = weight[0, 1].clone(), weight[0, 0].clone()  # equal sums, other places
    with pytest.raises(RankError, match=r"policy.layers.1 \(.* on rank 0, 1 differ from each other over dp; look"):
        check_replicas_equal(make_units(roles, mesh), mesh, "look")
    return True


def test_unequal_replicas_are_rejected_on_all_ranks():
    assert run_ranks(2, unequal_replicas) == [True, True]


def nonfinite_gradient(poisoned_rank, value):
    mesh, roles = init_mesh(), make_roles("", torch.float32)
    model = data_parallel(roles, mesh, Layout())
    model.zero_grad()
    batch = make_batch()
    loss_fn = tiny_loss(roles, batch["loss_mask"].sum())
    if mesh.rank == poisoned_rank:
        weight = roles["policy"].layers[2].norm.weight
        weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(3), value))
    forward_backward(model, [batch], loss_fn)
    return describe_nonfinite(model, mesh)


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 1), (4, 2)])
def test_nonfinite_gradient_names_parameter_and_rank(size, rank):
    texts = run_ranks(size, nonfinite_gradient, rank, float("nan"))
    assert texts == [f"non-finite gradient of policy.layers.2.norm.weight, on rank {rank}"] * size
    assert run_ranks(size, nonfinite_gradient, None, 0.0) == [None] * size


def test_overflow_of_the_sum_is_told_from_a_bad_rank():
    texts = run_ranks(2, overflowing_sum)
    assert texts == ["non-finite gradient of policy.layers.2.norm.weight, in the sum over ranks, finite on each"] * 2


def overflowing_sum():
    mesh, roles = init_mesh(), make_roles("", torch.float32)
    model = data_parallel(roles, mesh, Layout())
    model.zero_grad()
    batch = make_batch()
    weight = roles["policy"].layers[2].norm.weight
    weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(3), 3e38))
    forward_backward(model, [batch], tiny_loss(roles, batch["loss_mask"].sum()))
    return describe_nonfinite(model, mesh)


# ---------------------------------------------------------------------------------------------------------------------
# The real decoder
# ---------------------------------------------------------------------------------------------------------------------


def decoder_step(dtype_name, microbatch_size):
    mesh, dtype = init_mesh(), getattr(torch, dtype_name)
    config = DecoderConfig(
        num_layers=2,
        hidden_size=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        ffn_size=24,
        vocab_size=37,
        max_seq_len=16,
        norm="rmsnorm",
        norm_eps=1e-6,
        activation="silu",
        gated=True,
        rotary_dim=4,
        tied_embeddings=True,
        init_std=0.3,
    )
    roles = {"policy": Decoder(config, mesh, dtype), "value_head": ScalarHead(16, mesh, dtype, std=0.5)}
    model = data_parallel(roles, mesh, Layout())
    input_ids = torch.randint(37, (BATCH_SIZE, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    mask[:, 0] = mask[2, 3:] = mask[5, 4:] = False

    def loss_fn(hidden, microbatch):
        ids, mask_local = microbatch["input_ids"], microbatch["mask"]
        hidden = hidden_before(hidden["policy"], mask_local)
        logprobs, _ = vocab_parallel_logprobs(hidden, roles["policy"], ids[mask_local])
        return ((roles["value_head"](hidden) - 1).square() - logprobs).sum() / mask.sum(), {}

    rows = torch.arange(BATCH_SIZE)[mesh.dp.rank :: mesh.dp.size].split(microbatch_size)
    model.zero_grad()
    microbatches = [{**unpacked(input_ids[i]), "mask": mask[i]} for i in rows]
    metrics = forward_backward(model, microbatches, loss_fn)
    return {name: p.grad.clone() for name, p in model.named_parameters()}, metrics


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [2, 4])
def test_decoder_gradients_match_one_process(size, dtype):
    [(expected, expected_metrics)] = run_ranks(1, decoder_step, dtype, BATCH_SIZE)
    for rank, (gradients, metrics) in enumerate(run_ranks(size, decoder_step, dtype, 1)):
        assert_gradients_close(gradients, expected, GRAD_BARS[dtype], f"{size} ranks, rank {rank}")
        assert metrics["loss"] == pytest.approx(expected_metrics["loss"], rel=1e-6)
