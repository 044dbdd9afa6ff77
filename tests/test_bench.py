"""Benchmarks that need a GPU, at small sizes without one: that they run, and that what they measure is right."""

import json

import pytest
import torch

from tests import bench_kernels, bench_training


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_bench_of_kernels_runs_every_case(tmp_path, capsys):
    rows = bench_kernels.main(["--out", str(tmp_path / "rows.json")])
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    kernels = ("decode attention", "attention forward", "attention backward", "log-probabilities forward")
    assert {row["kernel"] for row in rows} == {*kernels, "log-probabilities train", "sampler", "target logits"}
    for row in rows:
        assert row["error"] < 0.02, row  # bfloat16
        assert row["ms"] > 0 and row["floor_ms"] > 0, row
        assert not any(isinstance(ms, str) for ms in row["baselines_ms"].values()), row
    printed = capsys.readouterr().out
    assert "no GPU" in printed and printed.count("| attention forward |") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_bench_of_kernels_stops_at_its_budget(capsys):
    assert bench_kernels.main(["--budget", "0"]) == []
    assert (
        "decode attention, 4/2 x 64, batch 2, context 64 and what follows was not measured" in capsys.readouterr().out
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_bench_of_training_runs_every_stage(tmp_path):
    rows = bench_training.main(["--out", str(tmp_path / "rows.json")])
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert [row["stage"] for row in rows] == ["generation"] * 2 + ["train, none", "train, full", "ppo"]
    for row in rows:
        assert all(x > 0 for name, x in row.items() if name not in ("shape", "stage", "peak_gib")), row
    ppo = rows[-1]
    phases = sum(ppo[f"{name}_seconds"] for name in ("rollout", "score", "logprobs", "update"))
    assert phases == pytest.approx(ppo["iteration_seconds"], rel=0.05)
