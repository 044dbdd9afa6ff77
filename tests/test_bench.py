"""Benchmarks at small sizes, those that need a GPU without one: that they run, and that what they measure is right."""

import json

import pytest
import torch

from tests import bench_ablations, bench_kernels, bench_training
from tests.scripts import ROOT, make_tiny_model, read_rows, without_times

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU these are the benchmarks, of nine minutes each")


@no_gpu
def test_bench_of_kernels_runs_every_case(tmp_path, capsys):
    rows = bench_kernels.main(["--out", str(tmp_path / "rows.json")])
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    kernels = ("decode attention", "attention forward", "attention backward", "log-probabilities forward")
    kernels += ("log-probabilities train", "sampler", "target logits", "rotary, eager", "norm with residual, eager")
    assert {row["kernel"] for row in rows} == {*kernels, "GAE, eager", "PPO token loss, eager"}
    for row in rows:
        assert row["error"] < 0.02, row  # bfloat16
        assert row["ms"] > 0 and row["floor_ms"] > 0, row
        assert not any(isinstance(ms, str) for ms in row["baselines_ms"].values()), row
    printed = capsys.readouterr().out
    assert "no GPU" in printed and printed.count("| attention forward |") == 2


@no_gpu
def test_bench_of_kernels_stops_at_its_budget(capsys):
    assert bench_kernels.main(["--budget", "0"]) == []
    assert (
        "decode attention, 4/2 x 64, batch 2, context 64 and what follows was not measured" in capsys.readouterr().out
    )


@no_gpu
def test_bench_of_training_runs_every_stage(tmp_path):
    rows = bench_training.main(["--out", str(tmp_path / "rows.json")])
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert [row["stage"] for row in rows] == ["generation"] * 2 + ["train, none", "train, full", "ppo"]
    for row in rows:
        assert all(x > 0 for name, x in row.items() if name not in ("shape", "stage", "peak_gib")), row
    ppo = rows[-1]
    phases = sum(ppo[f"{name}_seconds"] for name in ("rollout", "score", "logprobs", "update"))
    assert phases == pytest.approx(ppo["iteration_seconds"], rel=0.05)


def test_bench_of_ablations_switches_every_detail(tmp_path, capsys, monkeypatch):
    """Two iterations of each setting: no two of them learn the same, and the default is itself again afterwards."""
    monkeypatch.setattr("parallel.run.draw_curves", lambda *_: None)
    sizes = ("--batch-size", 8, "--minibatch-size", 4, "--microbatch-size", 4, "--eval-samples", 4)
    learning = ("--optim.lr", 0.003, "--value-lr", 0.3, "--reward", ROOT / "tests/letter_reward.py:share")
    model = make_tiny_model(tmp_path / "tiny")
    flags = [str(x) for x in ("--model", model, *sizes, *learning, "--max-iterations", 2)]
    rows = {}
    for i, setting in enumerate([*bench_ablations.SETTINGS, "default"]):
        bench_ablations.train(setting, 1, tmp_path / f"{i}-seed-1", flags)
        rows[i] = read_rows(tmp_path / f"{i}-seed-1")
    assert without_times(rows.pop(i)) == without_times(rows[0])
    ends = {(row[-1]["grad_norm"], row[-1]["value_loss"]) for row in rows.values()}
    assert len(ends) == len(bench_ablations.SETTINGS)
    by_name = dict(zip(bench_ablations.SETTINGS, rows.values(), strict=True))
    default, unclipped = by_name["default"], by_name["values not clipped"]
    assert default[-1]["value_clip_fraction"] > 0 and unclipped[-1]["value_clip_fraction"] == 0
    assert [row[-1]["optimizer_steps"] for row in (by_name["1 epoch"], default, by_name["4 epochs"])] == [4, 8, 16]
    assert (
        default[0]["explained_variance"] == 0 != by_name["value head from N(0, 1 / (d + 1))"][0]["explained_variance"]
    )
    bench_ablations.main(["--out", str(tmp_path), "--seeds", "1"])  # the runs are there: it prints its table
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(bench_ablations.SETTINGS) and lines[2].startswith("| default | ")
    score = read_rows(tmp_path / "0-seed-1", "eval")[-1]["eval_score_sampled"]
    assert f"| {score:.3f} +- 0.000 | never | " in lines[2]


def test_k3_is_the_divergence_in_expectation():
    """Summed over the vocabulary, k3 in the reward of the ablations penalises KL(old || ref), as k1 does."""
    old, ref = torch.randn(2, 9, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64).log_softmax(-1)
    mask = torch.ones(9, 50, dtype=torch.bool)
    rewards, _ = bench_ablations.penalise_by_k3(torch.zeros_like(old), old, ref, mask, kl_coef=0.5)
    expected = torch.nn.functional.kl_div(ref, old, log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(-2 * (old.exp() * rewards).sum(1), expected, rtol=1e-12, atol=0)
