"""Reward models trained from scratch on a real set of preferences, three sizes, against baselines that do not read.

    RLHF_DATA=FOLDER python -m tests.bench_reward_model
    RLHF_DATA=FOLDER python -m tests.bench_reward_model --processes 2

FOLDER/preferences/ethics_util holds pairs of situations, of which one is the more pleasant (ETHICS, utilitarianism:
Hendrycks et al. 2021). Each model starts at random, and a byte-pair tokenizer is made from the training texts. One size
is also shown after language-model pre-training on those same texts (the loss of sft.py). A tenth of the training pairs
is held out and chooses the evaluation whose accuracy on the test pairs is reported. Prints a table and draws
tests/results/preference_curves.png. None of these passes the bag of tokens: accuracy no longer grows from 2 x 64 on.
"""

import argparse
import math
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import reward_model as script
import sft
from parallel.data import epoch_order, rows_at, sft_examples
from parallel.data_parallel import data_parallel
from parallel.families import config_from_hf
from parallel.mesh import Layout, init_mesh
from parallel.model import Decoder, ScalarHead
from parallel.optim import AdamW, Optim, clip_grad_norm
from parallel.pipeline import forward_backward
from parallel.rows import Row, load_rows
from tasks.baselines import bag_accuracy, length_accuracy

PICTURE = Path(__file__).parent / "results" / "preference_curves.png"
MODELS = ((1, 32, 0), (2, 64, 0), (2, 128, 0), (2, 64, 4))  # layers, width, epochs of language-model pre-training
SEEDS = (1, 2, 3)
VOCAB_SIZE = 4096
MAX_LEN = 256
BATCH = 64  # texts or pairs of a step
LM_OPTIM = Optim(lr=3e-3, schedule="cosine", warmup_steps=20, weight_decay=0.1)
PAIR_EPOCHS, PAIR_OPTIM = 3, Optim(lr=1e-3, schedule="cosine", warmup_steps=10, weight_decay=0.1)
EVALS = 6  # evaluations of a run, the last at its end


@dataclass
class Curve:
    """One run: (step, accuracy on held-out pairs, accuracy on test pairs) of each evaluation."""

    name: str
    seed: int
    num_parameters: int
    points: list[tuple[int, float, float]]
    seconds: float

    @property
    def chosen(self) -> tuple[int, float, float]:
        """The evaluation with the best held-out accuracy."""
        return max(self.points, key=lambda point: point[1])


def load_pairs():
    """Tokenizer, training texts, and pairs: for training, held out of it, and for the test."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = Path(os.environ["RLHF_DATA"]) / "preferences/ethics_util"
    rows, test_rows = (load_rows([str(folder / f"{split}.jsonl.gz")]) for split in ("train", "test"))
    texts = list(dict.fromkeys(row[name] for row in rows for name in ("chosen", "rejected")))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    special, alphabet = ["<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    pairs = script.read_pairs(rows, tokenizer, True, MAX_LEN)
    order, num_held_out = epoch_order(len(pairs), 0, 0), len(pairs) // 10
    held_out, train = ([pairs[i] for i in part] for part in (order[:num_held_out], order[num_held_out:]))
    return tokenizer, texts, train, held_out, script.read_pairs(test_rows, tokenizer, True, MAX_LEN)


def train_model(roles, optim, items, epochs, seed, make_microbatches, make_loss, evaluate_at=None):
    """A plain training loop; evaluate_at(step, num_steps) is called before each step and after the last."""
    mesh = init_mesh()
    model = data_parallel(roles, mesh, Layout())
    optimizer = AdamW(model, optim.lr, weight_decay=optim.weight_decay)
    num_steps = epochs * len(items) // BATCH
    for step in range(num_steps):
        if evaluate_at is not None:
            evaluate_at(step, num_steps)
        batch = [items[i] for i in rows_at(step * BATCH, BATCH, len(items), seed)]
        model.zero_grad()
        forward_backward(model, list(make_microbatches(batch)), make_loss(batch))
        clip_grad_norm(model, optim.max_grad_norm, mesh)
        optimizer.step(optim.lr_multiplier(step, num_steps))
    if evaluate_at is not None:
        evaluate_at(num_steps, num_steps)


def name_model(layers: int, width: int, lm_epochs: int) -> str:
    return f"{layers} x {width}" + ", pre-trained" * bool(lm_epochs)


def run(layers: int, width: int, lm_epochs: int, seed: int) -> Curve:
    """Language-model pre-training on the training texts, then preferences."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    tokenizer, texts, train, held_out, test = load_pairs()
    mesh = init_mesh()
    hf_config = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 32),
        "intermediate_size": 5 * width // 2,
        "max_position_embeddings": MAX_LEN,
        "tie_word_embeddings": True,
    }
    decoder = Decoder(config_from_hf(hf_config, "bench")[0], mesh, seed=seed)
    examples = sft_examples([Row({"text": text}, "text") for text in texts], tokenizer, True, True, MAX_LEN)
    sft_args, args = sft.Args(microbatch_size=BATCH), script.Args(microbatch_size=BATCH)

    def make_sft_loss(batch):
        num_tokens = sum(sum(example.loss_mask) for example in batch)
        return partial(sft.sft_loss, policy=decoder, num_tokens=num_tokens)

    train_model(
        {"policy": decoder},
        LM_OPTIM,
        examples,
        lm_epochs,
        seed,
        partial(sft.make_microbatches, args=sft_args, device=mesh.device),
        make_sft_loss,
    )
    roles = {
        "reward_model": decoder,
        "reward_head": ScalarHead(width, mesh, std=1 / math.sqrt(width + 1), seed=seed),
    }
    roles["reward_head"].bias.requires_grad_(False)
    curve = Curve(name_model(layers, width, lm_epochs), seed, decoder.num_parameters, [], 0.0)

    def evaluate_at(step, num_steps):
        if step % (num_steps // EVALS) == 0 or step == num_steps:
            accuracies = (script.evaluate(roles, pairs, args, mesh)["eval_accuracy"] for pairs in (held_out, test))
            curve.points.append((step, *accuracies))

    train_model(
        roles,
        PAIR_OPTIM,
        train,
        PAIR_EPOCHS,
        seed,
        partial(script.make_microbatches, args=args, device=mesh.device),
        lambda batch: partial(script.pair_loss, roles=roles, num_pairs=len(batch)),
        evaluate_at,
    )
    curve.seconds = time.perf_counter() - started
    step, held, accuracy = curve.chosen
    print(
        f"{curve.name:20}  seed {seed}  step {step:4}  held out {held:.3f}  test {accuracy:.4f}  {curve.seconds:.0f} s",
        flush=True,
    )
    return curve


def summarise(accuracies: list[float], num_test: int) -> tuple[float, float]:
    """Mean over seeds, and its standard error from the finite test set and from the seeds together."""
    mean = statistics.mean(accuracies)
    return mean, math.sqrt(mean * (1 - mean) / num_test + statistics.variance(accuracies) / len(accuracies))


def draw(curves: list[Curve], bag: float, length: float, num_test: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    for name in dict.fromkeys(curve.name for curve in curves):
        runs = [curve for curve in curves if curve.name == name]
        steps = [point[0] for point in runs[0].points]
        stats = [summarise([curve.points[i][2] for curve in runs], num_test) for i in range(len(steps))]
        label = f"{name}, {runs[0].num_parameters / 1e6:.2f}M parameters"
        axis.errorbar(steps, [m for m, _ in stats], [e for _, e in stats], marker="o", capsize=3, label=label)
    axis.axhline(bag, color="black", linestyle="--", linewidth=1, label=f"bag of tokens, {bag:.3f}")
    axis.axhline(length, color="gray", linestyle=":", linewidth=1, label=f"the longer text, {length:.3f}")
    axis.set_xlabel(f"steps of {BATCH} pairs")
    axis.set_ylabel(f"accuracy on {num_test:,} test pairs")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, each on one thread")
    args = parser.parse_args()
    _, _, train, held_out, test = load_pairs()
    bag, length = bag_accuracy(train + held_out, test), length_accuracy(test)
    print(f"bag of tokens {bag:.4f}  the longer text {length:.4f}  ({len(test):,} test pairs)", flush=True)
    with ProcessPoolExecutor(args.processes) as pool:
        jobs = [pool.submit(run, *model, seed) for model in MODELS for seed in SEEDS]
        curves = [job.result() for job in jobs]
    print(f"\n{'layers x width':20}{'parameters':>12}{'test accuracy':>20}{'best step':>14}{'seconds':>10}")
    for name in dict.fromkeys(curve.name for curve in curves):
        runs = [curve for curve in curves if curve.name == name]
        mean, error = summarise([curve.chosen[2] for curve in runs], len(test))
        steps = ", ".join(str(curve.chosen[0]) for curve in runs)
        seconds = sum(curve.seconds for curve in runs)
        print(f"{name:20}{runs[0].num_parameters:12,}{f'{mean:.4f} +- {error:.4f}':>20}{steps:>14}{seconds:10.0f}")
    draw(curves, bag, length, len(test))


if __name__ == "__main__":
    main()
