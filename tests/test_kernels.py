"""The PyTorch references in kernels/ against float64 formulas written out plainly."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from torch.utils._python_dispatch import TorchDispatchMode

import ppo
from kernels import attention as attention_file
from kernels import decode as decode_file
from kernels import launch
from kernels import linear_logprobs as linear_logprobs_file
from kernels.attention import EXPLICIT_MAX_LEN, Visible, attention
from kernels.decode import Step, append, decode_attention
from kernels.launch import overlaps_itself, padded_head, runs_triton
from kernels.linear_logprobs import linear_logprobs
from kernels.pointwise import rotate_


def plain_attention(q, k, v, first_key, window):
    """One query, one head at a time. Shapes: [batch, seq_len, heads, head_dim]"""
    out = torch.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for t in range(q.shape[1]):
                start = int(first_key[b, t]) if window is None else max(int(first_key[b, t]), t - window + 1)
                keys, values = k[b, start : t + 1, h // group], v[b, start : t + 1, h // group]
                probs = (keys @ q[b, t, h] / q.shape[3] ** 0.5).softmax(0)
                out[b, t, h] = probs @ values
    return out


@pytest.mark.parametrize("seq_len", [7, EXPLICIT_MAX_LEN + 3], ids=["explicit", "fused"])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_matches_float64_loops(seq_len, num_kv_heads, window):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, seq_len, heads, 6) for heads in (4, num_kv_heads, num_kv_heads)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    first_key = torch.zeros(2, seq_len, dtype=torch.long)
    first_key[1, 2:] = 2  # two documents in the second row
    first_key[1, 5:] = 5
    grad = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    expected = plain_gradients([x.clone().requires_grad_() for x in (q, k, v)], first_key, window, grad)
    expected[0] = plain_attention(q, k, v, first_key, window)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        out = attention(*inputs, Visible(first_key, window))
        out.backward(grad.to(dtype))
        actual = [out.detach(), *(x.grad for x in inputs)]
        for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def plain_gradients(inputs, first_key, window, grad):
    """Output and input gradients by autograd through a masked softmax over all keys."""
    q, k, v = inputs
    group = q.shape[2] // k.shape[2]
    position = torch.arange(q.shape[1])
    earliest = first_key if window is None else torch.maximum(first_key, position - window + 1)
    seen = (position >= earliest[:, :, None]) & (position <= position[:, None])  # [batch, query, key]
    k_all, v_all = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k_all) / q.shape[3] ** 0.5
    probs = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", probs, v_all)
    out.backward(grad)
    return [out.detach(), q.grad, k.grad, v.grad]


@pytest.mark.parametrize("window", [None, 3])
def test_decode_attention_matches_last_row_of_attention(window):
    generator = torch.Generator().manual_seed(1)
    lens = torch.tensor([1, 4, 9])
    q = torch.randn(3, 9, 4, 6, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(3, 9, 2, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = plain_attention(q, k, v, torch.zeros(3, 9, dtype=torch.long), window)
    last = q[torch.arange(3), lens - 1]  # [3, heads, head_dim]
    cache = torch.stack([torch.nn.functional.pad(x.transpose(1, 2), (0, 0, 0, 2), value=torch.nan) for x in (k, v)])
    for i, n in enumerate(lens):
        cache[:, i, :, n:] = 7.0  # what a longer sequence left in the slot
    out = decode_attention(last, cache, Step(lens, 11), window)
    torch.testing.assert_close(out, expected[torch.arange(3), lens - 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_elements", [1 << 23, 40], ids=["one-chunk", "chunks"])
def test_linear_logprobs_matches_log_softmax(temperature, with_bias, chunk_elements, monkeypatch):
    monkeypatch.setattr(linear_logprobs_file, "CHUNK_ELEMENTS", chunk_elements)
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, weight, token_ids = draw(9, 5) * 4, draw(16, 5), torch.tensor([0, 12, 3, 3, 7, 1, 2, 12, 11])
    bias = draw(16) if with_bias else None
    vocab_size = 13  # 3 padded rows
    grads = draw(2, 9)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        inputs = [x.to(dtype).requires_grad_() if x is not None else None for x in (hidden, weight, bias)]
        logits = inputs[0].double() @ inputs[1].double().t() + (inputs[2].double() if with_bias else 0)
        log_probs = (logits[:, :vocab_size] / temperature).log_softmax(1)
        expected = log_probs.gather(1, token_ids[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(1)
        real = [x for x in inputs if x is not None]
        expected_grads = torch.autograd.grad((expected[0] * grads[0] + expected[1] * grads[1]).sum(), real)
        m, s, z, t = linear_logprobs(inputs[0], inputs[1], token_ids, inputs[2], temperature, vocab_size=vocab_size)
        actual = z - m - s.log(), s.log() - t / s
        actual_grads = torch.autograd.grad((actual[0] * grads[0] + actual[1] * grads[1]).sum(), real)
        for a, e in zip((*actual, *actual_grads), (*expected, *expected_grads), strict=True):
            torch.testing.assert_close(a.double(), e.double(), rtol=tolerance, atol=tolerance)


def test_linear_logprobs_of_shards_merges_to_the_whole():
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    token_ids = torch.tensor([0, 5, 6, 9, 3, 8])
    vocab_size = 10
    shards = [linear_logprobs(hidden, weight[i : i + 6], token_ids, None, 1.0, i, vocab_size) for i in (0, 6)]
    largest = torch.maximum(shards[0][0], shards[1][0])
    scales = [(m - largest).exp() for m, *_ in shards]
    total = sum(c * s for c, (_, s, _, _) in zip(scales, shards, strict=True))
    weighted = sum(c * (t + (m - largest) * s) for c, (m, s, _, t) in zip(scales, shards, strict=True))
    logprob = sum(z for _, _, z, _ in shards) - largest - total.log()
    log_probs = (hidden @ weight[:vocab_size].t()).log_softmax(1)
    torch.testing.assert_close(logprob, log_probs.gather(1, token_ids[:, None])[:, 0])
    torch.testing.assert_close(total.log() - weighted / total, -(log_probs.exp() * log_probs).sum(1))


def test_linear_logprobs_survives_extreme_logits():
    hidden = torch.tensor([[1e4, -1e4], [0.0, 0.0]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    m, s, z, t = linear_logprobs(hidden, weight, torch.tensor([0, 2]))
    torch.testing.assert_close(z - m - s.log(), torch.tensor([0.0, -torch.log(torch.tensor(3.0))]))
    torch.testing.assert_close(s.log() - t / s, torch.tensor([0.0, torch.log(torch.tensor(3.0))]))


def test_linear_logprobs_keeps_at_most_one_chunk(monkeypatch):
    """Of a [1000, 3000] product one chunk's exponentials are kept; beyond it the inputs and one number per token."""
    for chunk_elements, kept in ((1000 * 3000, 1000 * 3000), (1000 * 3000 - 1, 0)):
        monkeypatch.setattr(linear_logprobs_file, "CHUNK_ELEMENTS", chunk_elements)
        hidden, weight = torch.randn(1000, 8, requires_grad=True), torch.randn(3000, 8, requires_grad=True)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: s.append(x.numel()) or x, lambda x: x):
            node = linear_logprobs(hidden, weight, torch.zeros(1000, dtype=torch.long))[1].grad_fn
        assert max(saved) == 3000 * 8, saved
        assert (0 if node.kept is None else node.kept.numel()) == kept


def test_heads_beyond_the_largest_are_refused_not_left_to_pytorch(monkeypatch):
    assert [padded_head(size) for size in (1, 12, 32, 33, 72, 80, 112, 256)] == [32, 32, 32, 64, 80, 80, 128, 256]
    for file in (attention_file, decode_file):
        monkeypatch.setattr(file, "runs_triton", lambda x: True)  # as on a GPU
    x, lens = torch.zeros(1, 3, 1, 257), torch.ones(1, dtype=torch.long)
    cache, step = torch.zeros(2, 1, 1, 3, 257), Step(lens, 3)
    for run in (
        lambda: attention(x, x, x, Visible(torch.zeros(1, 3, dtype=torch.long))),
        lambda: decode_attention(x[:, 0], cache, step),
        lambda: append(x.view(1, -1), cache, step, 1),
    ):
        with pytest.raises(ValueError, match="heads of 257: kernels take at most 256.*KERNELS=reference takes any"):
            run()


WITHOUT_TRITON = """
import importlib.abc, pathlib, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Hidden())
sys.modules["triton"] = None
import importlib, os, torch
for file in pathlib.Path("kernels").glob("[!_]*.py"):
    importlib.import_module(f"kernels.{file.stem}")
from kernels.attention import Visible, attention
x = torch.randn(1, 3, 2, 32)
attention(x, x, x, Visible(torch.zeros(1, 3, dtype=torch.long)))
os.environ["KERNELS"] = "triton"
try:
    attention(x, x, x, Visible(torch.zeros(1, 3, dtype=torch.long)))
except ValueError as problem:
    print(problem)
assert not torch.cuda.is_initialized()
"""


def test_kernels_import_without_triton_and_without_a_gpu():
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", WITHOUT_TRITON]
    done = subprocess.run(
        command, cwd=root, env={"PATH": "", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "KERNELS=triton, but the package triton is not installed\n"


def test_who_runs_triton(monkeypatch, capsys):
    """GPUs from sm_80 on; older ones, float64 and no Triton mean PyTorch, which is said once; KERNELS forces either."""
    gpu, capability = SimpleNamespace(is_cuda=True, device="cuda:0", dtype=torch.float32), [(7, 5)]
    wide = SimpleNamespace(is_cuda=True, device="cuda:0", dtype=torch.float64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.delenv("KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(launch, "triton", "there")
    launch._say_once.cache_clear()
    assert [runs_triton(gpu), runs_triton(gpu), runs_triton(torch.zeros(1))] == [False] * 3
    assert capsys.readouterr().out == "kernels: PyTorch, since this GPU is sm_75 and Triton's need sm_80\n"
    for capability[0] in ((8, 0), (8, 6), (9, 0), (10, 0)):
        assert runs_triton(gpu)
    assert [runs_triton(wide), runs_triton(wide), runs_triton(torch.zeros(1).double())] == [False] * 3
    said = "kernels: PyTorch, since Triton's take bfloat16, float16 and float32, not float64\n"
    assert capsys.readouterr().out == said
    monkeypatch.setenv("KERNELS", "reference")
    assert not runs_triton(gpu)
    monkeypatch.setenv("KERNELS", "triton")
    assert runs_triton(gpu)
    with pytest.raises(ValueError, match="KERNELS=triton, but .* not float64"):
        runs_triton(wide)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        runs_triton(torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert runs_triton(torch.zeros(1))
    monkeypatch.setenv("KERNELS", "cuda")
    with pytest.raises(ValueError, match="KERNELS=cuda: takes reference or triton"):
        runs_triton(gpu)
    monkeypatch.delenv("KERNELS")
    monkeypatch.setattr(launch, "triton", None)
    assert not runs_triton(gpu) and not runs_triton(gpu)
    assert capsys.readouterr().out == "kernels: PyTorch, since the package triton is not installed\n"


PINS = {"2.11.0": "3.6.0", "2.12.0": "3.7.0", "2.12.1": "3.7.1", "2.13.0": "3.7.1"}  # torch's CUDA builds -> Triton


def test_requirements_allow_the_triton_that_a_cuda_build_of_torch_requires():
    lines = (Path(__file__).parents[1] / "requirements.txt").read_text().splitlines()
    allowed = {x.name: x.specifier for x in map(Requirement, lines)}
    assert [x.version for x in allowed["torch"] if x.operator == "<="] == [list(PINS)[-1]]  # each build's is known
    assert all(version in allowed["torch"] for version in PINS)
    installed = [x.specifier for x in map(Requirement, metadata.requires("torch")) if x.name == "triton"]
    for version in (*PINS.values(), *(x.version for pin in installed for x in pin)):
        assert version in allowed["triton"], version


def test_overlaps_itself_finds_entries_that_share_memory():
    x = torch.zeros(6, 5, 4)
    for alone in (x, x.transpose(0, 2), x[::2, 1:, ::3], x[:, :1].transpose(1, 2), x[:0], x[2:3].expand(1, 5, 4)):
        assert not overlaps_itself(alone)
    for shared in (x[:1].expand(6, 5, 4), x.as_strided((3, 4), (2, 1)), x.as_strided((3, 4), (3, 1))):
        assert overlaps_itself(shared)


def rotate_misfit(**changed):
    x, cos = torch.zeros(4, 96), torch.ones(4, 1, 16)
    given = {"x": x, "cos": cos, "sin": cos, "num_heads": 2, "head_dim": 32, "interleaved": False} | changed
    return rotate_(*given.values())


@pytest.mark.parametrize(
    "changed, text",
    [
        ({"num_heads": 4}, "4 heads of 32.*do not fit"),
        ({"head_dim": 40}, "heads of 40.*do not fit"),
        ({"sin": torch.ones(4, 1, 8)}, r"sin \[4, 1, 8\] do not fit"),
        ({"cos": torch.ones(4, 1, 17), "sin": torch.ones(4, 1, 17)}, r"cos \[4, 1, 17\]"),
        ({"cos": torch.ones(3, 1, 16), "sin": torch.ones(3, 1, 16)}, r"cos \[3, 1, 16\]"),
        ({"cos": torch.ones(4, 1, 16, device="meta")}, "cpu, meta and cpu: one device"),
        ({"x": torch.zeros(1, 96).expand(4, 96)}, r"strides \(0, 1\)"),
    ],
)
def test_rotate_rejects_misfits(changed, text):
    rotate_misfit()
    with pytest.raises(ValueError, match=text):
        rotate_misfit(**changed)


class Launches(TorchDispatchMode):
    """How many operations that a GPU would launch a kernel for."""

    NONE = {"view", "slice", "select", "expand", "detach", "alias", "unsqueeze", "empty", "split", "scalar_tensor"}

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ not in self.NONE
        return func(*args, **(kwargs or {}))


def test_what_has_no_kernel_launches_as_few_as_the_decision_says():
    """The counts in kernels/pointwise.py, by which rotary, GAE and PPO's token loss are left to PyTorch."""
    rewards, values = torch.randn(2, 4, 100)
    with Launches() as launches:
        ppo.compute_gae(rewards, values, torch.ones(4, 100, dtype=torch.bool), 1.0, 0.95)
    assert launches.count <= 2 * 99 + 10
    inputs = [torch.randn(9, requires_grad=True) for _ in range(3)]
    old = {name: torch.randn(9) for name in ("old_logprobs", "advantages", "values", "returns")}
    with Launches() as launches:
        torch.autograd.grad(ppo.ppo_loss(*inputs, old, ppo.Args(), torch.tensor(9))[0], inputs)
    assert launches.count <= 94
    with Launches() as launches:
        rotate_misfit()
    assert launches.count - 2 <= 5  # but for its two inputs
