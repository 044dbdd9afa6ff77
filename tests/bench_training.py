"""Generation, fine-tuning and PPO of GPT-NeoX shapes with random weights on a GPU.

    python -m tests.bench_training --budget 540 --shapes 160m 1b 1.4b 2.8b

For each shape: tokens a second of generation beside transformers' `generate` (512 prompt tokens, 128 new ones, no end)
and beside the bytes that a token must read, at 4.3 TB/s; model FLOPs utilisation of a training step (16 rows of 2,048
tokens, 6 FLOPs a parameter and token and causal attention, of 989 TFLOP/s), its peak of memory and what `--plan` says
of it; seconds by phase of `ppo.py` at the lengths of TL;DR (512 + 53 tokens, 512 rollouts, 4 epochs), mean of the
iterations behind the first. Everything in bfloat16, the optimizer in float32. No stage begins after the budget
(seconds). Without a GPU one tiny shape on the CPU, to see that everything runs: no number of that run means anything.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tokenizers
import torch
import transformers

from parallel.checkpoint import load_decoder
from parallel.data_parallel import data_parallel
from parallel.footprint import CUDA_CONTEXT, Job, Role, memory
from parallel.generation import Sampling, generate
from parallel.mesh import Layout, init_mesh
from parallel.optim import AdamW, clip_grad_norm
from parallel.pipeline import forward_backward
from parallel.tensor import hidden_before, vocab_parallel_logprobs

ROOT = Path(__file__).parents[1]
ON_GPU = torch.cuda.is_available()
BANDWIDTH, PEAK = 4.3e12, 989e12  # of an H200: a copy as measured, dense bfloat16 as specified
VOCAB = 50304 if ON_GPU else 128
SHAPES = {  # layers, hidden size, heads
    "160m": (12, 768, 12),
    "1b": (16, 2048, 8),
    "1.4b": (24, 2048, 16),
    "2.8b": (32, 2560, 32),
    "tiny": (2, 64, 2),
}
PROMPT, NEW, BATCHES = (512, 128, (1, 8, 32, 128)) if ON_GPU else (8, 6, (1, 2))
ROWS, ROW_LEN = (16, 2048) if ON_GPU else (2, 16)
PPO_FLAGS = "--batch-size 512 --minibatch-size 128 --microbatch-size 32 --epochs 4 --sampling.max-new-tokens 53"
TINY_PPO_FLAGS = "--batch-size 4 --minibatch-size 2 --microbatch-size 2 --epochs 4 --sampling.max-new-tokens 5"


def make_folder(shape: str, folder: Path) -> None:
    """A random model whose tokenizer has a word for each id, and prompts of PROMPT words."""
    layers, hidden, heads = SHAPES[shape]
    config = transformers.GPTNeoXConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, intermediate_size=4 * hidden,
        vocab_size=VOCAB, max_position_embeddings=2048, rotary_pct=0.25, bos_token_id=0, eos_token_id=0,
        torch_dtype="bfloat16",
    )  # fmt: skip
    with torch.device("cuda" if ON_GPU else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    model.save_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w1"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0").save_pretrained(folder)
    ids = torch.randint(1, VOCAB, (512, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    rows = (json.dumps({"prompt": " ".join(f"w{i}" for i in row)}) for row in ids)
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")


def seconds(fn, rounds: int) -> float:
    """The least of some rounds behind a first one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        fn()
        if ON_GPU:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def bench_generation(folder: Path, mesh) -> list[dict]:
    ours = load_decoder(folder, mesh, torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16).to(mesh.device)
    weights = sum(p.nbytes for name, p in ours.named_parameters() if name != "embedding.weight")
    cached = 4 * ours.config.num_layers * ours.config.num_kv_heads * ours.config.head_dim  # bytes of a token
    rows = []
    for batch in BATCHES:
        prompts = torch.randint(1, VOCAB, (batch, PROMPT), device=mesh.device)
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": NEW, "min_new_tokens": NEW}

        def their_generate(prompts=prompts, options=options):
            theirs.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), pad_token_id=0, **options)

        def our_generate(prompts=prompts):
            prompts = prompts.tolist()
            sampling, samples = Sampling(max_new_tokens=NEW), list(range(len(prompts)))
            out = generate(ours, prompts, sampling, eos_ids=[], sample_ids=samples, seed=0)
            assert out.input_ids.shape == (len(prompts), PROMPT + NEW)

        a, b = seconds(our_generate, 2), seconds(their_generate, 1)
        floor = NEW * (weights + batch * cached * (PROMPT + NEW / 2)) / BANDWIDTH
        rows.append(
            {
                "batch": batch,
                "tokens_per_second": batch * NEW / a,
                "ratio_to_transformers": b / a,
                "of_floor": floor / a,
            }
        )
    return rows


def bench_training(folder: Path, mesh, recompute: str) -> dict:
    policy = load_decoder(folder, mesh, torch.bfloat16)
    layout = Layout(recompute=recompute)
    model = data_parallel({"policy": policy}, mesh, layout)
    optimizer = AdamW(model, 1e-5)
    ids = torch.randint(1, VOCAB, (ROWS, ROW_LEN), device=mesh.device)
    positions = torch.arange(ROW_LEN, device=mesh.device).expand_as(ids)
    mask, step_rows = positions > 0, max(ROWS // 4, 1)
    microbatches = [
        {"input_ids": ids[i : i + step_rows], "position_ids": positions[i : i + step_rows],
         "first_key": torch.zeros_like(ids[i : i + step_rows]), "mask": mask[i : i + step_rows]}
        for i in range(0, ROWS, step_rows)
    ]  # fmt: skip

    def loss_fn(hidden, microbatch):
        states = hidden_before(hidden["policy"], microbatch["mask"])
        logprobs, _ = vocab_parallel_logprobs(states, policy, microbatch["input_ids"][microbatch["mask"]])
        return -logprobs.sum() / mask.sum(), {}

    def step():
        model.zero_grad()
        forward_backward(model, microbatches, loss_fn)
        clip_grad_norm(model, 1.0, mesh)
        optimizer.step()

    took = seconds(step, 3)
    config = policy.config
    attention = 6 * config.num_layers * config.num_heads * config.head_dim * ROW_LEN  # causal, forward and backward
    flops = ids.numel() * (6 * policy.num_parameters + attention)
    peak = torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else 0.0
    job = Job({"policy": Role(config, itemsize=2)}, ROWS, step_rows, ROW_LEN, scored=ROW_LEN - 1)
    planned = (memory(job, layout, 1).total - CUDA_CONTEXT) / 2**30
    found = {"tokens_per_second": ids.numel() / took, "mfu": flops / took / PEAK}
    return found | {"peak_gib": peak, "planned_gib": planned}


def bench_ppo(folder: Path, timeout: float) -> dict:
    """Mean seconds of each phase of ppo.py behind the first iteration."""
    with tempfile.TemporaryDirectory() as out:
        reward = Path(out) / "reward.py"
        reward.write_text("def share(samples):\n    return [s.response.count('1') / 1000 for s in samples]\n")
        flags = (PPO_FLAGS if ON_GPU else TINY_PPO_FLAGS).split()
        flags += ["--model", folder, "--data", folder / "prompts.jsonl", "--reward", f"{reward}:share"]
        flags += ["--dtype", "bfloat16", "--max-iterations", 3, "--eval-every", 100, "--save-every", 100]
        flags += ["--eval-samples", 0, "--output-dir", Path(out) / "run", "--no-bos", "--optim.lr", 1e-6]
        done = subprocess.run(
            [sys.executable, ROOT / "ppo.py", *map(str, flags)], cwd=ROOT, capture_output=True, text=True,
            timeout=timeout,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        rows = [json.loads(line) for line in (Path(out) / "run/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["event"] == "train"][1:]
    names = [name for name in rows[0] if name.endswith("_seconds")] + ["mfu"] * ("mfu" in rows[0])
    return {name: sum(row[name] for row in rows) / len(rows) for name in names}


def main(args: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540, help="seconds, after which no stage begins")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES)[:4] if ON_GPU else ["tiny"])
    parser.add_argument("--out", type=Path, help="a JSON file for all rows")
    options = parser.parse_args(args)
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    start, mesh, rows = time.monotonic(), init_mesh(), []
    print(f"torch {torch.__version__}, transformers {transformers.__version__}", end=", ")
    print(torch.cuda.get_device_name() if ON_GPU else "no GPU: a tiny shape once, to see that everything runs")

    def stage(shape, name, fn):
        left = options.budget - (time.monotonic() - start)
        if left <= 0:
            print(f"{options.budget:.0f} s are over: {shape} {name} was not measured", flush=True)
            return
        if ON_GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found = fn()
        for row in found if isinstance(found, list) else [found]:
            rows.append({"shape": shape, "stage": name, **row})
            print(f"{shape:5} {name:15} " + "  ".join(f"{key} {x:,.4g}" for key, x in row.items()), flush=True)

    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            make_folder(shape, folder)
            stage(shape, "generation", lambda folder=folder: bench_generation(folder, mesh))
            for recompute in ("none", "full"):
                stage(
                    shape,
                    f"train, {recompute}",
                    lambda folder=folder, recompute=recompute: bench_training(folder, mesh, recompute),
                )
            timeout = options.budget - (time.monotonic() - start)
            stage(shape, "ppo", lambda folder=folder, timeout=timeout: bench_ppo(folder, timeout))
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
