"""AdamW against torch's and against plain float32 loops, norms against float64, skipped steps, exact continuation."""

import importlib
import inspect
import math
import re
import warnings

import pytest
import torch
import tyro
from torch import nn

from parallel.collectives import RankError
from parallel.data_parallel import data_parallel
from parallel.mesh import Layout, init_mesh
from parallel.optim import AdamW, Optim, clip_grad_norm, lr_multiplier, sum_of_squares
from parallel.pipeline import forward_backward
from parallel.training_state import load_training_state, save_training_state
from tests.ranks import run_ranks
from tests.scripts import make_tiny_model
from tests.states import assert_equal_states, full_state, read_state

BETAS, EPS = (0.9, 0.95), 1e-8


def make_model(dtype=torch.float32):
    """Roles with matrices and vectors of odd sizes."""
    torch.manual_seed(5)
    policy = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.LayerNorm(13), nn.Linear(13, 5)).to(dtype)
    value_head = nn.Linear(7, 1, dtype=torch.promote_types(dtype, torch.float32))
    return data_parallel({"policy": policy, "value_head": value_head}, init_mesh(), Layout())


def set_gradients(model, step, scale=1.0):
    """Noise that depends on the step and the parameter only; returns it in float32 or float64."""
    gradients = {}
    for i, (name, parameter) in enumerate(model.named_parameters()):
        generator = torch.Generator().manual_seed(100 * step + i)
        noise = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad.copy_(noise)
        gradients[name] = parameter.grad.clone()
    return gradients


def torch_adamw(parameters, lr, weight_decay, betas=BETAS, eps=EPS):
    """torch's own, in groups: learning rate by role, decay of matrices only."""
    groups = [
        {"params": [p], "lr": lr[name.split(".")[0]], "weight_decay": weight_decay if p.dim() >= 2 else 0.0}
        for name, p in parameters.items()
    ]
    return torch.optim.AdamW(groups, betas=betas, eps=eps)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=["float32", "float64"])
@pytest.mark.parametrize(("betas", "eps"), [(BETAS, EPS), ((0.5, 0.99), 1e-2)], ids=["defaults", "others"])
def test_adamw_matches_torch(dtype, bar, weight_decay, betas, eps):
    model = make_model(dtype)
    lr = {"policy": 1e-2, "value_head": 3e-2}
    expected = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    oracle = torch_adamw(expected, lr, weight_decay, betas, eps)
    optimizer = AdamW(model, lr, betas, eps, weight_decay)
    for step in range(20):
        gradients = set_gradients(model, step)
        for (name, p), group in zip(expected.items(), oracle.param_groups, strict=True):
            group["lr"] = lr[name.split(".")[0]] * lr_multiplier(step, "cosine", 3, 20)
            p.grad = gradients[name]
        oracle.step()
        clip_grad_norm(model, 0, model.mesh)
        assert optimizer.step(lr_multiplier(step, "cosine", 3, 20))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name].detach(), rtol=bar, atol=bar, msg=lambda m, n=name: n + m)


class Made(Exception):
    """Ends a script where it makes its optimizer."""


@pytest.mark.parametrize("name", ["ppo", "ilql", "sft", "reward_model"])
def test_flags_of_adam_reach_every_script(name, tmp_path, monkeypatch):
    module = importlib.import_module(name)

    def stop(*args, **kwargs):
        raise Made(inspect.signature(AdamW).bind(*args, **kwargs).arguments)

    monkeypatch.setattr(module, "AdamW", stop)
    monkeypatch.chdir(tmp_path)
    flags = "--optim.betas 0.5 0.7 --optim.eps 1e-2 --optim.weight-decay 0.1".split()
    with pytest.raises(Made) as caught:
        module.main(tyro.cli(module.Args, args=["--model", str(make_tiny_model(tmp_path / "tiny")), *flags]))
    [made] = caught.value.args
    assert (made["betas"], made["eps"], made["weight_decay"]) == ((0.5, 0.7), 1e-2, 0.1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"betas": (0.9, 1.0)}, "--optim.betas 0.9 1.0 should be two numbers from 0 to below 1"),
        ({"betas": (-0.1, 0.9)}, "--optim.betas -0.1 0.9 should be two numbers"),
        ({"betas": (0.9, math.nan)}, "--optim.betas 0.9 nan should be two numbers"),
        ({"eps": 0.0}, "--optim.eps 0.0 should be a number above 0"),
        ({"eps": math.inf}, "--optim.eps inf should be a number above 0"),
        ({"lr": -1.0}, "--optim.lr -1.0 should be a number from 0 on"),
    ],
)
def test_optim_rejects(flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Optim(**flags)


@pytest.mark.parametrize("max_norm", [0.5, 1e6, 0])
def test_clipping_matches_torch(max_norm):
    model = make_model()
    expected = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    oracle = torch_adamw(expected, {"policy": 1e-2, "value_head": 1e-2}, 0.0)
    optimizer = AdamW(model, 1e-2, BETAS, EPS)
    for step in range(5):
        gradients = set_gradients(model, step, scale=3.0**step / 10)  # so that the clipping matters to Adam
        for name, p in expected.items():
            p.grad = gradients[name]
        expected_norm = nn.utils.clip_grad_norm_(expected.values(), max_norm or math.inf)
        oracle.step()
        assert clip_grad_norm(model, max_norm, model.mesh) == pytest.approx(expected_norm.item(), rel=1e-6)
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name].detach(), rtol=1e-6, atol=1e-6)


def test_bfloat16_parameters_follow_a_float32_master():
    model = make_model(torch.bfloat16)
    optimizer = AdamW(model, 1e-3, BETAS, EPS, weight_decay=0.1)
    masters = {name: p.detach().float() for name, p in model.named_parameters()}
    m = {name: torch.zeros_like(w) for name, w in masters.items()}
    v = {name: torch.zeros_like(w) for name, w in masters.items()}
    for step in range(1, 31):
        gradients = set_gradients(model, step)
        clip_grad_norm(model, 0, model.mesh)
        optimizer.step()
        for name, w in masters.items():
            g = gradients[name]
            m[name] = BETAS[0] * m[name] + (1 - BETAS[0]) * g
            v[name] = BETAS[1] * v[name] + (1 - BETAS[1]) * g * g
            if w.dim() >= 2:
                w -= 1e-3 * 0.1 * w
            corrected = (v[name] / (1 - BETAS[1] ** step)).sqrt() + EPS
            w -= 1e-3 * m[name] / (1 - BETAS[0] ** step) / corrected
    saved = full_state(model, optimizer)
    for name, p in model.named_parameters():
        if p.dtype == torch.bfloat16:
            torch.testing.assert_close(saved[f"{name}|master"], masters[name], rtol=1e-6, atol=1e-6)
            assert torch.equal(p, saved[f"{name}|master"].bfloat16()), f"{name} is not its master rounded"
        else:
            assert f"{name}|master" not in saved
            torch.testing.assert_close(p.detach(), masters[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_continued_run_is_bit_identical(dtype, tmp_path):
    def run(model, optimizer, steps):
        for step in steps:
            set_gradients(model, step)
            clip_grad_norm(model, 1.0, model.mesh)
            optimizer.step(1 / (step + 1))

    model = make_model(dtype)
    optimizer = AdamW(model, 1e-2, weight_decay=0.1)
    run(model, optimizer, range(4))
    stored = [*model.pieces(), *optimizer.pieces()]
    save_training_state(tmp_path, 4, stored, {}, 1, model.mesh)
    names = {"policy.0.weight", "policy.0.weight|m", "policy.0.weight|v", "value_head.bias|m"}
    assert names <= read_state(tmp_path / "step-4").keys()
    run(model, optimizer, range(4, 9))
    resumed = make_model(dtype)
    resumed_optimizer = AdamW(resumed, 1e-2, weight_decay=0.1)
    run(resumed, resumed_optimizer, range(2))
    load_training_state(tmp_path, [*resumed.pieces(), *resumed_optimizer.pieces()], model.mesh)
    run(resumed, resumed_optimizer, range(4, 9))
    assert_equal_states(full_state(resumed, resumed_optimizer), full_state(model, optimizer))


def test_adamw_rejects_role_without_learning_rate():
    with pytest.raises(ValueError, match="no learning rate for value_head"):
        AdamW(make_model(), {"policy": 1e-2})


@pytest.mark.parametrize("size", [0, 1, 1000, 65536, 200_001])
def test_sum_of_squares_matches_float64(size):
    x = torch.randn(size, generator=torch.Generator().manual_seed(6)) * 1e-3
    assert sum_of_squares(x).item() == pytest.approx(math.fsum(x.double().square().tolist()), rel=1e-13, abs=0)
    assert math.isfinite(sum_of_squares(torch.full((8,), 1e30)).item()), "squares overflow in float32 only"


def test_schedules_have_known_values():
    def course(schedule, warmup_steps, total_steps):
        return [lr_multiplier(step, schedule, warmup_steps, total_steps) for step in range(total_steps + 1)]

    assert course("constant", 0, 3) == [1, 1, 1, 1]
    assert course("constant", 2, 3) == [0.5, 1, 1, 1]
    assert course("linear", 2, 6) == [0.5, 1, 1, 0.75, 0.5, 0.25, 0]
    assert course("cosine", 0, 4) == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0])
    assert lr_multiplier(9, "linear", 0, 5) == 0 and lr_multiplier(0, "cosine", 5, 5) == 0.2
    assert Optim(schedule="linear", warmup_steps=2).lr_multiplier(3, 6) == 0.75


# ---------------------------------------------------------------------------------------------------------------------
# Several ranks
# ---------------------------------------------------------------------------------------------------------------------


def train(num_steps, poisoned_steps, dtype_name="float64", total_steps=None):
    """Weights, which steps were taken, norms and warnings of a short run; at poisoned steps rank 1 (or 0) has a NaN."""
    mesh = init_mesh()
    model = make_model(getattr(torch, dtype_name))
    optimizer = AdamW(model, {"policy": 1e-2, "value_head": 2e-2}, BETAS, EPS, weight_decay=0.1)
    policy, value_head = model.roles["policy"], model.roles["value_head"]
    taken, norms = [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(num_steps):
            x = torch.randn(8, 7, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            x = x[mesh.dp.rank :: mesh.dp.size].to(policy[0].weight.dtype)
            poison = float("nan") if step in poisoned_steps and mesh.rank == mesh.world_size - 1 else 0.0

            def loss_fn(_, x, poison=poison):
                loss = policy(x).square().sum() + (value_head(x.to(value_head.weight.dtype)) - 1).square().sum()
                return (loss + poison * policy[0].bias.sum()) / 8, {}

            model.zero_grad()
            forward_backward(model, list(x.split(2)), loss_fn)
            norms.append(clip_grad_norm(model, 0.5, mesh))
            taken.append(optimizer.step(lr_multiplier(step, "linear", 2, total_steps or num_steps)))
    texts = [str(warning.message) for warning in caught]
    return {name: p.detach().clone() for name, p in model.named_parameters()}, taken, norms, texts


@pytest.mark.parametrize("size", [2, 4])
def test_training_matches_one_process(size):
    [(expected, _, expected_norms, _)] = run_ranks(1, train, 6, ())
    for rank, (weights, taken, norms, texts) in enumerate(run_ranks(size, train, 6, ())):
        assert taken == [True] * 6 and not texts
        assert norms == pytest.approx(expected_norms, rel=1e-12), f"rank {rank}"
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("size", [1, 2])
def test_nonfinite_step_is_skipped_on_all_ranks(size):
    results = run_ranks(size, train, 6, (2, 3, 5), "float32")
    for rank, (weights, taken, norms, texts) in enumerate(results):
        assert taken == [True, True, False, False, True, False], f"rank {rank}"
        assert math.isnan(norms[2]) and all(weight.isfinite().all() for weight in weights.values())
        assert all(torch.equal(weight, results[0][0][name]) for name, weight in weights.items())
        text = "optimizer step skipped on all ranks: non-finite gradient of policy.0.bias, on rank "
        assert texts == ([text + str(size - 1)] * 2 if rank == 0 else [])


def test_skipped_step_leaves_no_trace():
    [(weights, taken, _, _)] = run_ranks(1, train, 3, (2,))
    [(expected, _, _, _)] = run_ranks(1, train, 2, (), "float64", 3)
    assert taken == [True, True, False] and all(torch.equal(weights[name], expected[name]) for name in weights)


def train_on_nonsense():
    with pytest.raises(RankError) as caught:
        train(9, range(3, 9))
    return str(caught.value)


def test_fifth_skipped_step_in_a_row_ends_the_run_on_all_ranks():
    for text in run_ranks(2, train_on_nonsense):
        assert text.startswith("5 optimizer steps in a row skipped: non-finite gradient of policy.0.bias, on rank 1; ")


def test_step_without_a_norm_is_noticed():
    with pytest.raises(AssertionError, match="clip_grad_norm comes before step"):
        AdamW(make_model(), 1e-2).step()
