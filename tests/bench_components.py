"""Generation and a training step beside plain transformers, same weights, same machine, interleaved.

    python tests/bench_components.py --threads 2

For a small random GPT-2, GPT-NeoX and Llama (4 layers, 256 wide, 8 heads, vocabulary 1024): 64 prompts of 16 tokens and
48 sampled tokens each without an EOS, and forward + backward + AdamW over 64 x 64 tokens. Ratios are of minima.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers

from parallel.checkpoint import load_decoder
from parallel.data_parallel import data_parallel
from parallel.generation import Sampling, generate
from parallel.mesh import Layout, init_mesh
from parallel.optim import AdamW, clip_grad_norm
from parallel.pipeline import forward_backward
from parallel.tensor import hidden_before, vocab_parallel_logprobs

BATCH, PROMPT, NEW, VOCAB, HIDDEN, HEADS, LAYERS = 64, 16, 48, 1024, 256, 8, 4


def make_model(family):
    """A random model of transformers; its embeddings are scaled so that sampling is neither flat nor greedy."""
    torch.manual_seed(0)
    ends = dict(vocab_size=VOCAB, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    sizes = dict(num_hidden_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, max_position_embeddings=256)
    config = {
        "gpt2": lambda: transformers.GPT2Config(
            n_layer=LAYERS,
            n_embd=HIDDEN,
            n_head=HEADS,
            n_positions=256,
            attn_pdrop=0,
            resid_pdrop=0,
            embd_pdrop=0,
            **ends,
        ),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**sizes, intermediate_size=4 * HIDDEN, **ends),
        "llama": lambda: transformers.LlamaConfig(
            **sizes, num_key_value_heads=HEADS // 2, intermediate_size=int(HIDDEN * 8 / 3), **ends
        ),
    }[family]()
    return transformers.AutoModelForCausalLM.from_config(config).float()


def interleaved(functions, rounds):
    """Seconds of each function over the rounds, called in turn; the first round is thrown away."""
    seconds = [[] for _ in functions]
    for i in range(rounds + 1):
        for function, times in zip(functions, seconds, strict=True):
            started = time.perf_counter()
            function()
            if i:
                times.append(time.perf_counter() - started)
    return seconds


def generation_pair(theirs, ours):
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(1, VOCAB, (BATCH, PROMPT), generator=generator)
    options = dict(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=NEW, pad_token_id=0, eos_token_id=None)

    @torch.no_grad()
    def transformers_generate():
        out = theirs.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), use_cache=True, **options)
        assert out.shape == (BATCH, PROMPT + NEW)

    def our_generate():
        sampling = Sampling(max_new_tokens=NEW)
        out = generate(ours, prompts.tolist(), sampling, eos_ids=[], sample_ids=list(range(BATCH)), seed=0)
        assert out.input_ids.shape == (BATCH, PROMPT + NEW)

    return transformers_generate, our_generate, BATCH * NEW


def training_pair(theirs, ours, mesh):
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(1, VOCAB, (BATCH, PROMPT + NEW), generator=generator)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    theirs.train()

    def transformers_step():
        theirs(input_ids=input_ids, labels=input_ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model = data_parallel({"policy": ours}, mesh, Layout())
    our_optimizer = AdamW(model, 1e-4, weight_decay=0.1)
    positions = torch.arange(PROMPT + NEW).expand_as(input_ids)
    mask = positions > 0
    microbatch = {"input_ids": input_ids, "position_ids": positions, "first_key": torch.zeros_like(input_ids)}

    def loss_fn(hidden, mb):
        states = hidden_before(hidden["policy"], mask)
        return -vocab_parallel_logprobs(states, ours, mb["input_ids"][mask])[0].sum() / mask.sum(), {}

    def our_step():
        model.zero_grad()
        forward_backward(model, [microbatch], loss_fn)
        clip_grad_norm(model, 1.0, mesh)
        our_optimizer.step()

    return transformers_step, our_step, input_ids.numel()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    mesh = init_mesh()
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {args.threads} threads, tokens/s (best)"
    )
    print(f"{'':22}{'transformers':>14}{'ours':>10}{'ratio':>8}{'ratio of medians':>19}")
    for family in ("gpt2", "gpt_neox", "llama"):
        theirs = make_model(family)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            ours = load_decoder(folder, mesh, torch.float32)
        for what, pair in (("generate", generation_pair(theirs, ours)), ("train", training_pair(theirs, ours, mesh))):
            a, b = interleaved(pair[:2], args.rounds)
            medians = statistics.median(a) / statistics.median(b)
            print(
                f"{family + ' ' + what:22}{pair[2] / min(a):>14,.0f}{pair[2] / min(b):>10,.0f}{min(a) / min(b):>8.2f}"
                f"{medians:>19.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
