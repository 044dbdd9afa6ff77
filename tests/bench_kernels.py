"""Each Triton kernel on a GPU: milliseconds, the floor, error, memory, and what else that machine offers for the same.

    python -m tests.bench_kernels --budget 480 --out kernels.json

First the machine's ceilings: a copy of 8 GiB and a bfloat16 product of 8192 x 8192 matrices. A floor is what an
operation must read and write, or multiply, at those ceilings. Times are medians of `triton.testing.do_bench`, which
clears the L2 cache; each is taken twice, and the spread is their difference. Errors are norms relative to a float64
formula on small inputs of the same head dim or width. What has no kernel (rotary, norm with residual, GAE, PPO's token
loss) is timed as it runs, beside torch.compile. A baseline that is not there, or fails, is "n/a" with its reason. Rows
are printed as they come; none begins after the budget (seconds). Without a GPU small shapes run once on the CPU, to see
that everything runs: no number of that run means anything.
"""

import argparse
import inspect
import json
import math
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention import Visible, attention
from kernels.decode import Step, decode_attention
from kernels.launch import triton
from kernels.linear_logprobs import linear_logprobs
from kernels.pointwise import rotate_
from kernels.target_logits import target_logits
from parallel.generation import Sampling, sample_tokens
from ppo import compute_gae, ppo_loss

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BF16 = torch.bfloat16
HEAD_SHAPES = [(32, 32, 128), (32, 8, 128), (64, 64, 96), (32, 32, 80), (16, 16, 64), (16, 16, 256)]
LOSS_SHAPES = [(8192, 4096, 131072), (8192, 2304, 256000), (32768, 2048, 50304), (32768, 6144, 50432)]


@dataclass
class Case:
    """One kernel at one shape."""

    kernel: str
    shape: str
    ours: callable
    exact: callable  # -> (found, expected in float64), on small inputs
    num_bytes: float = 0.0  # that must move
    flops: float = 0.0  # of 16-bit products that must be done
    baselines: dict[str, callable] = field(default_factory=dict)


def draw(*shape, grad=False):
    return torch.randn(shape, device=DEVICE, dtype=BF16).requires_grad_(grad)


# --- cases ----------------------------------------------------------------------------------------------------------


def document_lens(num_tokens: int, mean: int | None) -> list[int]:
    """Lengths that fill num_tokens: all equal, or log-normal with mean 500."""
    if mean is not None:
        return [mean] * (num_tokens // mean)
    generator, lens = torch.Generator().manual_seed(0), []
    while sum(lens) < num_tokens:
        length = int(math.exp(math.log(500) - 0.32 + 0.8 * torch.randn((), generator=generator).item()))
        lens.append(max(min(length, num_tokens - sum(lens)), 1))
    return lens


def attention_cases(num_tokens, lens_of, shapes):
    for mean, (heads, kv_heads, head_dim) in ((mean, shape) for shape in shapes for mean in lens_of):
        lens = document_lens(num_tokens, mean)
        q, k, v = (draw(1, num_tokens, n, head_dim, grad=True) for n in (heads, kv_heads, kv_heads))
        starts = torch.tensor([0, *lens], device=DEVICE).cumsum(0)
        first_key = starts[:-1].repeat_interleave(torch.tensor(lens, device=DEVICE))[None]
        visible, grad = Visible(first_key), draw(1, num_tokens, heads, head_dim)
        flops = 2 * sum(n * n for n in lens) * heads * head_dim  # causal: half of all pairs
        shape = f"{heads}/{kv_heads} x {head_dim}, {num_tokens} tokens, {'mixed' if mean is None else mean}"
        baselines = attention_baselines(q, k, v, lens, starts, mean)
        exact = partial(exact_attention, heads // kv_heads, head_dim)
        forward = partial(attention, q, k, v, visible)
        ours = partial(without_grad, forward)
        forwards = {name: partial(without_grad, fn) for name, fn in baselines.items()}
        yield Case("attention forward", shape, ours, partial(exact, False), flops=flops, baselines=forwards)
        backwards = {name: lazily(partial(backward, fn, (q, k, v), grad)) for name, fn in baselines.items()}
        ours = backward(forward, (q, k, v), grad)
        yield Case("attention backward", shape, ours, partial(exact, True), flops=2.5 * flops, baselines=backwards)


def without_grad(fn):
    with torch.no_grad():
        return fn()


def backward(fn, inputs, grad):
    """A function that runs the backward of one forward again and again."""
    out = fn()
    return lambda: torch.autograd.grad(out, inputs, grad.view_as(out), retain_graph=True)


def lazily(make):
    """A function that calls make()'s result, which is made at the first call."""
    made = []

    def run():
        if not made:
            made.append(make())
        return made[0]()

    return run


def attention_baselines(q, k, v, lens, starts, mean):
    """(name -> forward) of what torch has; the layouts are as each of them likes it best."""
    found, gqa = {}, q.shape[2] != k.shape[2]
    if mean is not None:  # batches of equal lengths need no mask
        rows = [x.view(len(lens), mean, *x.shape[2:]).transpose(1, 2) for x in (q, k, v)]
        for name, backend in (("SDPA flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):

            def sdpa(backend=backend):
                with sdpa_kernel([backend if ON_GPU else SDPBackend.MATH]):
                    return F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=gqa).transpose(1, 2)

            found[name] = sdpa
    if not ON_GPU:
        return found

    def varlen():
        from torch.nn.attention.varlen import varlen_attn

        parameters = inspect.signature(varlen_attn).parameters
        options = {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}
        keys, values = k[0], v[0]
        if gqa and "enable_gqa" in parameters:
            options["enable_gqa"] = True
        elif gqa:
            keys, values = (x.repeat_interleave(q.shape[2] // k.shape[2], 1) for x in (keys, values))
        return varlen_attn(q[0], keys, values, starts.int(), starts.int(), max(lens), max(lens), **options)

    def make_flex():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        document = torch.arange(len(lens), device=DEVICE).repeat_interleave(torch.tensor(lens, device=DEVICE))
        size = q.shape[1]

        def sees(b, h, i, j):
            return (document[i] == document[j]) & (i >= j)

        mask = create_block_mask(sees, None, None, size, size, DEVICE)
        compiled = torch.compile(flex_attention)
        x, y, z = (x.transpose(1, 2) for x in (q, k, v))
        return lambda: compiled(x, y, z, block_mask=mask, enable_gqa=gqa).transpose(1, 2)

    return found | {"varlen_attn": varlen, "FlexAttention": lazily(make_flex)}


def exact_attention(group, head_dim, gradients):
    """Two documents of 100 and 61 tokens."""
    q, k, v = draw(1, 161, 2 * group, head_dim, grad=True), draw(1, 161, 2, head_dim), draw(1, 161, 2, head_dim)
    first_key = torch.tensor([0] * 100 + [100] * 61, device=DEVICE)[None]
    wide, visible = q.detach().double().requires_grad_(), Visible(first_key)
    keys, values = (x.double().repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    scores = wide.transpose(1, 2) @ keys.transpose(2, 3) / head_dim**0.5
    expected = (scores.masked_fill(~visible.mask, -math.inf).softmax(-1) @ values).transpose(1, 2)
    found = attention(q, k, v, visible)
    if not gradients:
        return found, expected
    grad = draw(*found.shape)
    return torch.autograd.grad(found, q, grad)[0], torch.autograd.grad(expected, wide, grad.double())[0]


def decode_cases(batches, contexts, shapes):
    for (heads, kv_heads, head_dim), batch, context in ((s, b, c) for s in shapes for b in batches for c in contexts):
        q, cache = draw(batch, heads, head_dim), draw(2, batch, kv_heads, context, head_dim)
        step = Step(torch.full((batch,), context, device=DEVICE), context)
        keys, values, queries = cache[0], cache[1], q[:, :, None]

        def sdpa(queries=queries, keys=keys, values=values, gqa=heads != kv_heads):
            return F.scaled_dot_product_attention(queries, keys, values, enable_gqa=gqa)

        def exact(q=q[:2], cache=cache[:, :2], context=context):
            step = Step(torch.tensor([context, context // 2], device=DEVICE), context)
            keys, values = (x.double().repeat_interleave(q.shape[1] // cache.shape[2], 1) for x in cache)
            scores = torch.einsum("bhd,bhkd->bhk", q.double(), keys) / q.shape[2] ** 0.5
            hidden = torch.arange(context, device=DEVICE) >= step.lens[:, None]
            probs = scores.masked_fill(hidden[:, None], -math.inf).softmax(-1)
            return decode_attention(q, cache, step), torch.einsum("bhk,bhkd->bhd", probs, values)

        ours = partial(decode_attention, q, cache, step)
        shape = f"{heads}/{kv_heads} x {head_dim}, batch {batch}, context {context}"
        yield Case("decode attention", shape, ours, exact, num_bytes=cache.nbytes, baselines={"SDPA": sdpa})


def eager_logprobs(hidden, weight, token_ids):
    """Log-probability and entropy as one writes them first."""
    logprobs = (hidden @ weight.T).float().log_softmax(1)
    return logprobs.gather(1, token_ids[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(1)


def our_logprobs(hidden, weight, token_ids):
    largest, sum_exp, target, weighted = linear_logprobs(hidden, weight, token_ids)
    return target - largest - sum_exp.log(), sum_exp.log() - weighted / sum_exp


def train_logprobs(fn, hidden, weight, token_ids, grad):
    logprobs, entropy = fn(hidden, weight, token_ids)
    return torch.autograd.grad((logprobs * grad + 0.01 * entropy).sum(), (hidden, weight))


def exact_logprobs(width, gradients):
    hidden, weight, token_ids, grad = draw(33, width, grad=True), draw(1000, width) / width**0.5, arange_ids(33), 1.0
    weight.requires_grad_()
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logprobs = (wide[0] @ wide[1].T).log_softmax(1)
    expected = logprobs.gather(1, token_ids[:, None])[:, 0]
    if not gradients:
        with torch.no_grad():
            return our_logprobs(hidden, weight, token_ids)[0], expected
    loss = expected - 0.01 * (logprobs.exp() * logprobs).sum(1)
    expected = torch.autograd.grad(loss.sum(), wide)[0]
    return train_logprobs(our_logprobs, hidden, weight, token_ids, grad)[0], expected


def arange_ids(n):
    return torch.arange(n, device=DEVICE) * 7 % 1000


def loss_cases(shapes):
    for tokens, width, vocab in shapes:
        hidden = draw(tokens, width, grad=True)
        weight = (draw(vocab, width) / width**0.5).requires_grad_()
        token_ids, grad = torch.randint(vocab, (tokens,), device=DEVICE), torch.randn(tokens, device=DEVICE)
        shape, flops = f"{tokens} tokens, {width} wide, {vocab} ids", 2.0 * tokens * width * vocab
        inputs = hidden, weight, token_ids
        fns = {"eager float32": eager_logprobs} | ({"torch.compile": torch.compile(eager_logprobs)} if ON_GPU else {})
        forwards = {name: partial(without_grad, partial(fn, *inputs)) for name, fn in fns.items()}
        trains = {name: partial(train_logprobs, fn, *inputs, grad) for name, fn in fns.items()}
        if ON_GPU:
            trains |= {
                "Liger (loss alone)": partial(liger_loss, *inputs),
                "CCE (loss alone)": partial(cce_loss, *inputs),
            }
        ours = partial(without_grad, partial(our_logprobs, *inputs))
        exact = partial(exact_logprobs, width)
        yield Case("log-probabilities forward", shape, ours, partial(exact, False), flops=flops, baselines=forwards)
        ours = partial(train_logprobs, our_logprobs, *inputs, grad)
        yield Case("log-probabilities train", shape, ours, partial(exact, True), flops=3 * flops, baselines=trains)


def liger_loss(hidden, weight, token_ids):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return torch.autograd.grad(LigerFusedLinearCrossEntropyLoss()(weight, hidden, token_ids), (hidden, weight))


def cce_loss(hidden, weight, token_ids):
    from cut_cross_entropy import linear_cross_entropy

    return torch.autograd.grad(linear_cross_entropy(hidden, weight, token_ids), (hidden, weight))


def sampler_cases(shapes):
    for batch, vocab in shapes:
        logits, noise = draw(batch, vocab).float(), torch.rand(batch, device=DEVICE, dtype=torch.float64)
        for sampling in (Sampling(), Sampling(top_k=50, top_p=0.9)):

            def eager(logits=logits, sampling=sampling):
                logprobs = logits.log_softmax(1)
                probs = logprobs.exp()
                if sampling.truncates:
                    ordered, ids = probs.sort(1, descending=True)
                    dropped = (ordered.cumsum(1) - ordered >= sampling.top_p) | (
                        torch.arange(ordered.shape[1], device=DEVICE) >= sampling.top_k
                    )
                    probs = torch.zeros_like(probs).scatter_(1, ids, ordered.masked_fill_(dropped, 0))
                token_ids = probs.multinomial(1)
                return token_ids, logprobs.gather(1, token_ids)

            def exact(logits=logits[:4], noise=noise[:4], sampling=sampling):
                token_ids, logprobs, _ = sample_tokens(logits, noise, sampling)
                return logprobs, logits.double().log_softmax(1).gather(1, token_ids[:, None])[:, 0]

            ours = partial(sample_tokens, logits, noise, sampling)
            shape = f"{batch} x {vocab}{', top-k and top-p' if sampling.truncates else ''}"
            yield Case("sampler", shape, ours, exact, num_bytes=logits.nbytes, baselines={"eager": eager})


def target_cases(shapes):
    for tokens, width, vocab in shapes:
        hidden, weight, bias = draw(tokens, width).relu(), draw(vocab, width), draw(vocab)
        token_ids = torch.randint(vocab, (tokens,), device=DEVICE)

        def product(hidden=hidden, weight=weight, bias=bias, token_ids=token_ids):
            return F.linear(hidden, weight, bias).gather(1, token_ids[:, None])

        def exact(hidden=hidden[:9], weight=weight, bias=bias, token_ids=token_ids[:9]):
            rows = weight[token_ids].double()
            return target_logits(hidden, weight, token_ids, bias), (hidden.double() * rows).sum(1) + bias[token_ids]

        ours = partial(target_logits, hidden, weight, token_ids, bias)
        shape = f"{tokens} tokens, {width} wide, {vocab} ids"
        num_bytes = 2.0 * hidden.nbytes  # as many rows of the weight
        yield Case("target logits", shape, ours, exact, num_bytes=num_bytes, baselines={"vocabulary": product})


def compiled(fn) -> dict:
    """torch.compile as the baseline; without a GPU there is none."""
    return {"torch.compile": torch.compile(fn)} if ON_GPU else {}


def turn(x, cos, sin):
    """The rotary embedding of x [tokens, heads, head_dim], which torch.compile may write where it likes."""
    a, b = x[..., : 2 * cos.shape[-1]].chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., 2 * cos.shape[-1] :]), -1)


def add_norm(x, update, weight, bias):
    x = x + update
    return x, F.layer_norm(x, weight.shape, weight, bias)


def pointwise_cases(tokens, heads, head_dim):
    """Of GPT-NeoX, which turns a quarter of each head: what is eager in our layers."""
    width, half = heads * head_dim, head_dim // 8
    qkv, angle = draw(tokens, 3 * width), torch.randn(tokens, 1, half, device=DEVICE)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    qk = qkv[:, : 2 * width].view(tokens, 2 * heads, head_dim)

    def exact():
        found = rotate_(qkv[:9].clone(), cos[:9], sin[:9], 2 * heads, head_dim, False)[:, : 2 * width]
        return found, turn(*(x[:9].double() for x in (qk, cos, sin))).flatten(1)

    shape = f"{tokens} tokens, {heads} heads of {head_dim}, {2 * half} turned"
    num_bytes = 2.0 * qk[..., : 2 * half].numel() * qk.itemsize  # read and written
    others = {name: partial(fn, qk, cos, sin) for name, fn in compiled(turn).items()}
    ours = partial(rotate_, qkv, cos, sin, 2 * heads, head_dim, False)
    yield Case("rotary, eager", shape, ours, exact, num_bytes=num_bytes, baselines=others)

    x, update, weight, bias = args = draw(tokens, width), draw(tokens, width), draw(width), draw(width)

    def exact_norm():
        few = x[:9], update[:9], weight, bias
        return add_norm(*few)[1], add_norm(*(y.double() for y in few))[1]

    others = {name: partial(fn, *args) for name, fn in compiled(add_norm).items()}
    shape, num_bytes = f"{tokens} x {width}", 4.0 * x.nbytes  # two read, two written
    ours = partial(add_norm, *args)
    yield Case("norm with residual, eager", shape, ours, exact_norm, num_bytes=num_bytes, baselines=others)


def ppo_cases(batch, seq_len, tokens):
    """GAE of a rollout; forward and backward of a micro-batch's token loss."""
    rewards, values = torch.randn(2, batch, seq_len, device=DEVICE)
    mask = torch.arange(seq_len, device=DEVICE).expand(batch, -1) >= seq_len // 2

    def exact():
        wide = rewards.double(), values.double()
        return compute_gae(rewards, values, mask, 1.0, 0.95), compute_gae(*wide, mask, 1.0, 0.95)

    ours, num_bytes = partial(compute_gae, rewards, values, mask, 1.0, 0.95), 3.0 * rewards.nbytes
    yield Case("GAE, eager", f"{batch} x {seq_len}", ours, exact, num_bytes=num_bytes)

    inputs = [(0.1 * torch.randn(tokens, device=DEVICE)).requires_grad_() for _ in range(3)]
    names = ("old_logprobs", "advantages", "values", "returns")
    old = {name: 0.1 * torch.randn(tokens, device=DEVICE) for name in names}
    args = SimpleNamespace(clip_range=0.2, value_clip_range=0.2, value_coef=1.0, entropy_coef=0.01)

    def train(loss, inputs=inputs, old=old):
        return torch.autograd.grad(loss(*inputs, old, args, float(tokens))[0], inputs)[0]

    def exact_loss():
        wide = [x.detach().double().requires_grad_() for x in inputs]
        return train(ppo_loss), train(ppo_loss, wide, {name: x.double() for name, x in old.items()})

    others = {name: partial(train, fn) for name, fn in compiled(ppo_loss).items()}
    ours, num_bytes = partial(train, ppo_loss), 9.0 * old["values"].nbytes  # seven inputs, two gradients
    yield Case("PPO token loss, eager", f"{tokens} tokens", ours, exact_loss, num_bytes=num_bytes, baselines=others)


# --- measuring ------------------------------------------------------------------------------------------------------


def seconds(fn) -> float:
    if ON_GPU:
        return triton.testing.do_bench(fn, warmup=25, rep=100, return_mode="median") / 1000
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def ceilings() -> tuple[float, float]:
    """Bytes a second of a copy (read and written), FLOPs a second of a product."""
    size, width = (1 << 33, 8192) if ON_GPU else (1 << 20, 64)
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    a, b = draw(width, width), draw(width, width)
    return 2 * size / seconds(partial(torch.empty_like(source).copy_, source)), 2 * width**3 / seconds(lambda: a @ b)


def measure(case: Case, bandwidth: float, peak: float) -> dict:
    found, expected = (x.detach().double() for x in case.exact())
    error = float((found - expected).norm() / expected.norm())
    extra = 0
    case.ours()
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.ours()
        extra = torch.cuda.max_memory_allocated() - before
    first, second = seconds(case.ours), seconds(case.ours)
    ours, floor = min(first, second), max(case.num_bytes / bandwidth, case.flops / peak)
    others = {}
    for name, fn in case.baselines.items():
        try:
            fn()
            others[name] = 1000 * min(seconds(fn), seconds(fn))
        except Exception as reason:  # a baseline that is missing or does not take the shape
            others[name] = f"n/a: {type(reason).__name__}: {str(reason).splitlines()[0][:80] if str(reason) else ''}"
    best = min((ms for ms in others.values() if isinstance(ms, float)), default=None)
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "ms": 1000 * ours,
        "floor_ms": 1000 * floor,
        "of_floor": floor / ours,
        "baselines_ms": others,
        "best_over_ours": None if best is None else best / (1000 * ours),
        "error": error,
        "extra_mib": extra / 2**20,
        "spread": abs(first - second) / ours,
    }


def cases(small: bool):
    if small:
        yield from decode_cases([2], [64], [(4, 2, 64)])
        yield from attention_cases(256, [64, None], [(4, 2, 64)])
        yield from loss_cases([(16, 32, 1024)])
        yield from sampler_cases([(4, 256)])
        yield from target_cases([(16, 32, 256)])
        yield from pointwise_cases(16, 2, 64)
        yield from ppo_cases(4, 12, 16)
        return
    yield from decode_cases([8, 32, 128], [512, 2048, 8192], [(32, 32, 128), (32, 8, 128), (16, 16, 64)])
    yield from attention_cases(1 << 16, [512, 2048, 8192, None], HEAD_SHAPES)
    yield from loss_cases(LOSS_SHAPES)
    yield from sampler_cases([(8, 50432), (128, 50432), (128, 131072)])
    yield from target_cases([(32768, 8192, 50432)])
    yield from pointwise_cases(32768, 16, 128)
    yield from ppo_cases(512, 565, 32 * 53)


def main(args: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=480, help="seconds, after which no row begins")
    parser.add_argument("--out", type=Path, help="a JSON file for all rows")
    options = parser.parse_args(args)
    start, rows = time.monotonic(), []
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, triton {getattr(triton, '__version__', 'n/a')}", end=", ")
    print(torch.cuda.get_device_name() if ON_GPU else "no GPU: small shapes once, to see that everything runs")
    bandwidth, peak = ceilings()
    print(f"copy {bandwidth / 1e12:.2f} TB/s, product {peak / 1e12:.0f} TFLOP/s", flush=True)
    print("| kernel | shape | ms | floor ms | of floor | best other | ratio | error | extra MiB | spread |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for case in cases(small=not ON_GPU):
        if time.monotonic() - start > options.budget:
            print(f"{options.budget:.0f} s are over: {case.kernel}, {case.shape} and what follows was not measured")
            break
        row = measure(case, bandwidth, peak)
        rows.append(row)
        timed = {name: ms for name, ms in row["baselines_ms"].items() if isinstance(ms, float)}
        best = min(timed, key=timed.get, default=None)
        other = f"{best} {timed[best]:.3f} | {row['best_over_ours']:.2f}" if best else "n/a | n/a"
        print(
            f"| {row['kernel']} | {row['shape']} | {row['ms']:.3f} | {row['floor_ms']:.3f} | {row['of_floor']:.2f} | "
            f"{other} | {row['error']:.1e} | {row['extra_mib']:.0f} | {row['spread']:.2f} |",
            flush=True,
        )
        for name, ms in row["baselines_ms"].items():
            if isinstance(ms, str):
                print(f"  {name} {ms}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
