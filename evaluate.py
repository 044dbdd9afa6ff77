"""Evaluation: one model's answers against another's or the reference answers, by a judge that training did not use.

For a prompt x with the answers y (of --model) and z (of --against), a judge that scores one answer at a time gives (1),
one that sees both, as p(first, second) in [0, 1], is asked in both orders and gives (2):

    w = [s(x, y) > s(x, z)] + 1/2 [s(x, y) = s(x, z)]                                                          (1)
    w = 1/2 (p(y, z) + 1 - p(z, y))                                                                            (2)

The win-rate is the mean of w over all n pairs; w = 1/2 is a tie. Pairs of one prompt are not independent, be they
samples of a model or rows of the data, so the standard error of this and every other mean m is that of G clusters, the
different prompts,

    se^2 = G / (G - 1) * sum over prompts g of (sum over pairs i of g of (w_i - m))^2 / n^2                    (3)

with as many pairs of each prompt the variance of the prompts' means over G. Against reference answers r

    ROUGE-L = 2 P R / (P + R)    P = LCS(y, r) / |y|    R = LCS(y, r) / |r|                                    (4)

counts the words of the longest common subsequence (lower case, letters and digits of ASCII, no stemming), and of texts

    perplexity = exp(- mean over their tokens t of log pi(t | what stands before))                             (5)

Both models answer the same prompts with the same sampling noise. A judge that trained one of them, or a model that they
come from, is refused: it would only say how well training has pleased it.

Sources: Zheng et al. 2023 (arXiv 2306.05685, section 3.4: both orders); Miller 2024 (2411.00640, clustered errors); Lin
2004 (ROUGE); Hyyro 2004 (the subsequence by bits). Differs from the first: a verdict that depends on the order is not
made a tie, its two probabilities are averaged, and how many there are is reported.

    torchrun evaluate.py
    torchrun evaluate.py --model runs/ppo/model --against runs/sft/model --data prompts.jsonl --judge runs/judge/model

The first command asks how the embedded task's base policy, cloned from 1,000 walks, compares with them: 0.49 +- 0.01.
"""

import itertools
import json
import math
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch

from parallel.checkpoint import eos_ids, holds_heads, load_decoder, read_config
from parallel.data import PromptRow, check_vocabulary, load_tokenizer, pack_batch, pad_batch, sft_examples
from parallel.data_parallel import data_parallel
from parallel.files import on_logger
from parallel.generation import EVALUATION, Sampling, generate, stop_at
from parallel.mesh import Layout, init_mesh
from parallel.model import Decoder
from parallel.pipeline import forward_only
from parallel.plan import describe_memory
from parallel.reshard import rollout_weights
from parallel.rows import load_object, load_rows, resolve_model
from parallel.run import Run, check_flags, finite_or_null, flat_flags, launch, write_atomically
from parallel.tensor import hidden_before, vocab_parallel_logprobs
from tasks.answers import given_answers, is_file, lies_there, make_text_samples, read_prompts, rouge_l
from tasks.judges import judge_both_orders, refuse_training_judge, score_new
from tasks.rewards import Sample, SampleContext, give_equal_ids, make_reward, make_samples, score_together

SWAPPED = 4  # standard errors by which a judge's accuracy on the data's own pairs must lie below 1/2 to be refused
PREFIXES = ("", "other_")  # of what is said of --model's answers, and of those of --against
COLUMNS = (  # of the table: heading, metric, format, whether with its standard error
    ("win-rate", "win_rate", ".3f", True),
    ("ties", "ties", ".3f", False),
    ("pairwise win-rate", "pairwise_win_rate", ".3f", True),
    ("pairwise ties", "pairwise_ties", ".3f", False),
    ("depend on order", "order_dependent", ".3f", False),
    ("score", "score", ".3f", True),
    ("ROUGE-L", "rouge_l", ".3f", True),
    ("perplexity", "perplexity", ".4g", False),
    ("length", "response_len", ".1f", False),
    ("longer", "longer", ".3f", False),
    ("finished", "finished", ".3f", False),
)


@dataclass
class Args:
    """Evaluation. The defaults compare the embedded task's base policy with the walks that it was cloned from."""

    model: str = "tasks.random_walks:base_policy"
    """Hugging Face folder, hub id, module:function that returns a folder, or a .jsonl file of answers already sampled:
    rows of `prompt`, `response` and, where it did not end by itself, `finished` false, such as a run's samples.jsonl"""
    against: str = "data"
    """what it is compared with: the same, or "data" = the reference answers in --data; empty = nothing"""
    tokenizer: str = ""
    """folder or hub id; empty = that of the model that samples, which both must share"""
    data: tuple[str, ...] = ("tasks.random_walks:walks",)
    """JSONL or text files, folders, hub names, module:function; rows of `prompt` or `messages`, with the reference
    answer, where it is needed, as `completion`, `chosen` or `response`, or as the last of the messages"""
    prompt_tokens: int = 0
    """cut prompts of this many tokens from rows of `text`; 0 = rows hold prompts"""
    num_prompts: int = 0
    """the first so many rows of --data; 0 = all"""
    samples_per_prompt: int = 1
    """answers to each prompt; of a file the first so many, over again where it has fewer"""
    bos: bool = True
    """begin each prompt with the tokenizer's BOS, where it has one, as sft.py does"""
    kind: str = ""
    """which answers of the file --model, where rows have several `kind`s or `scale`s; the newest iteration counts"""
    against_kind: str = ""
    """which answers of the file --against, likewise"""
    judge: str = "tasks.random_walks:optimality"
    """scores one answer at a time: a function, an endpoint or a reward model, as ppo.py's --reward; empty = none"""
    pairwise_judge: str = ""
    """module:function or file.py:function called as judge(first, second) on two lists of samples -> how much better
    each first one is than its second, in [0, 1]"""
    allow_training_judge: bool = False
    """judge also by the reward that one of the models was trained with"""
    rouge: bool = False
    """ROUGE-L of the answers against the reference answers in --data"""
    perplexity_data: tuple[str, ...] = ()
    """texts whose perplexity is measured: rows of `text`, `prompt` + `completion` or `messages`, as sft.py has them"""
    temperatures: tuple[float, ...] = ()
    """a sweep: each is evaluated, with each of --top-ks and --top-ps; none = that of --sampling"""
    top_ks: tuple[int, ...] = ()
    """likewise; none = that of --sampling"""
    top_ps: tuple[float, ...] = ()
    """likewise; none = that of --sampling"""
    rollout_timeout: float = 7200.0
    """seconds that ranks wait for one that lives but is still sampling or judging; a dead one is noticed after 60"""
    output_dir: str = ""
    """run folder; empty = the next free of runs/evaluate, runs/evaluate-2, ..."""
    overwrite: bool = False
    """replace the run that --output-dir holds"""
    seed: int = 1
    """of the sampling noise"""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """of parameters and activations"""
    microbatch_size: int = 16
    """texts of --perplexity-data in a forward, per rank; changes memory and speed only"""
    sampling: Sampling = field(default_factory=Sampling)
    layout: Layout = field(default_factory=Layout)

    resume, allow_change, track, log_every = False, (), "none", 1  # no flags: it is made anew, and logs no steps

    def __post_init__(self):
        zero = "prompt_tokens num_prompts rollout_timeout"
        check_flags(self, {1: "samples_per_prompt microbatch_size", 0: zero})
        if self.model == "data":
            raise ValueError("--model data: the reference answers are what --against data compares with")
        if self.against and not (self.judge or self.pairwise_judge):
            raise ValueError(
                "--against needs a --judge or --pairwise-judge to compare by; --against '' compares nothing"
            )
        if self.pairwise_judge and not self.against:
            raise ValueError("--pairwise-judge sees two answers: --against should say whose the second is")
        lists = {"temperatures": self.temperatures, "top-ks": self.top_ks, "top-ps": self.top_ps}
        for name, values in lists.items():
            if len(set(values)) < len(values):
                raise ValueError(f"--{name} {values} holds a number twice")
        self.settings()  # checks them
        if lies_there(self.model) and (not self.against or lies_there(self.against)):
            if any(lists.values()):
                raise ValueError("--temperatures, --top-ks and --top-ps are for sampling, and all answers lie there")
            if self.perplexity_data:
                raise ValueError("--perplexity-data is for models, and neither --model nor --against is one")
            if not self.tokenizer:
                raise ValueError(f"--tokenizer is needed: {self.model} holds answers and no model to take it from")
        for name, spec, kind in (("model", self.model, self.kind), ("against", self.against, self.against_kind)):
            if kind and not is_file(spec):
                raise ValueError(f"--kind and --against-kind choose from a .jsonl file, and --{name} {spec} is none")

    def settings(self) -> list[Sampling]:
        """What is swept over, an empty list standing for what --sampling says."""
        base = self.sampling
        lists = self.temperatures or (base.temperature,), self.top_ks or (base.top_k,), self.top_ps or (base.top_p,)
        return [replace(base, temperature=t, top_k=k, top_p=p) for t, k, p in itertools.product(*lists)]


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """One of those that are compared: a model that samples, or answers that lie there already."""

    name: str  # "model" or "against"
    spec: str
    policy: Decoder | None = None
    eos: list[int] = field(default_factory=list)
    answers: list[Sample] = field(default_factory=list)  # by sample id, where there is no policy


# ---------------------------------------------------------------------------------------------------------------------
# Means and their errors
# ---------------------------------------------------------------------------------------------------------------------


def clustered_mean(values: list[float], clusters: list[str]) -> tuple[float, float]:
    """Mean and its standard error (eq. 3); NaN for the error of a single cluster."""
    mean = math.fsum(values) / len(values)
    of_cluster: dict[str, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        of_cluster.setdefault(cluster, []).append(value - mean)
    num = len(of_cluster)
    squares = math.fsum(math.fsum(residuals) ** 2 for residuals in of_cluster.values())
    return mean, math.sqrt(num / (num - 1) * squares) / len(values) if num > 1 else math.nan


def win(ours: float, theirs: float) -> float:
    """1, 1/2 for a tie, or 0 (eq. 1)."""
    return 0.5 + 0.5 * ((ours > theirs) - (ours < theirs))


def summarise(rows: list[dict]) -> dict[str, float]:
    """Means over the rows of one setting, each with its clustered error as <name>_se."""
    columns = {name: [row[name] for row in rows] for name, x in rows[0].items() if not isinstance(x, str)}

    def compare(name: str, ours: str, theirs: str) -> None:
        if ours in columns and theirs in columns:
            columns[name] = [win(y, z) for y, z in zip(columns[ours], columns[theirs], strict=True)]

    compare("win_rate", "score", "other_score")
    compare("longer", "response_len", "other_response_len")  # the win-rate of a judge that takes the longer answer
    if "win_rate" in columns:
        columns["ties"] = [w == 0.5 for w in columns["win_rate"]]
        columns["score_difference"] = [row["score"] - row["other_score"] for row in rows]
    if "preference" in columns:
        columns["pairwise_win_rate"] = columns.pop("preference")
        columns["pairwise_ties"] = [w == 0.5 for w in columns["pairwise_win_rate"]]
    metrics = {}
    for name, values in columns.items():
        metrics[name], metrics[f"{name}_se"] = clustered_mean(values, [row["prompt"] for row in rows])
    return metrics


def describe_setting(sampling: Sampling) -> str:
    """In words, for the table."""
    words = [f"temperature {sampling.temperature:g}" if sampling.temperature else "greedy"]
    words += [f"top-k {sampling.top_k}"] * bool(sampling.top_k) + [f"top-p {sampling.top_p:g}"] * (sampling.top_p < 1)
    return ", ".join(words)


def format_markdown(settings: list[dict]) -> str:
    """A table with a row for each setting, of the metrics that there are; "a / b" is --model's and --against's."""
    shown = [column for column in COLUMNS if column[1] in settings[0]]

    def cell(metrics: dict, name: str, digits: str, with_error: bool) -> str:
        cells = []
        for key in (name, f"other_{name}"):
            if key in metrics:
                error = f" +- {metrics[f'{key}_se']:{digits}}" if with_error else ""
                cells.append(f"{metrics[key]:{digits}}{error}")
        return " / ".join(cells)

    headings = [name + " / other's" * (f"other_{key}" in settings[0]) for name, key, *_ in shown]
    lines = [["setting", *headings], ["---"] * (1 + len(shown))]
    lines += [[metrics["setting"], *(cell(metrics, *column[1:]) for column in shown)] for metrics in settings]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_perplexity(policy: Decoder, examples, args) -> float:
    """Perplexity over the loss tokens of all examples (eq. 5). Communication: one sum over all replicas."""
    mesh = policy.mesh
    nats = torch.zeros((), dtype=torch.float64, device=mesh.device)

    def sum_nats(hidden, microbatch):
        mask = microbatch["loss_mask"]
        states = hidden_before(hidden["policy"], mask)
        return -vocab_parallel_logprobs(states, policy, microbatch["input_ids"][mask])[0].double().sum()

    mine, microbatches = examples[mesh.dp.rank :: mesh.dp.size], []
    for i in range(0, len(mine), args.microbatch_size):
        some = mine[i : i + args.microbatch_size]
        columns = {"input_ids": [e.input_ids for e in some], "loss_mask": [e.loss_mask for e in some]}
        fields, seq_lens = pad_batch(columns)
        packed = pack_batch(fields, seq_lens, torch.arange(len(some)))
        microbatches.append({name: x.to(mesh.device) for name, x in packed.items()})
    with rollout_weights(policy):  # replicas may have different numbers of micro-batches
        for _, of_microbatch in forward_only({"policy": policy}, microbatches, sum_nats):
            nats += of_microbatch
    loss = mesh.sum(nats, "dp").item() / sum(sum(example.loss_mask) for example in examples)
    return math.exp(min(loss, 700))


def answer(side: Side, rows: list[PromptRow], sample_ids: list[int], sampling, args, tokenizer) -> list[Sample]:
    """A side's answers to some prompts. Communication: that of `rollout_weights`."""
    if side.policy is None:
        return [side.answers[i] for i in sample_ids]
    with rollout_weights(side.policy) as sampler:
        generation = generate(
            sampler,
            [row.prompt_ids for row in rows],
            sampling,
            eos_ids=side.eos,
            sample_ids=sample_ids,
            seed=args.seed,
            stream=EVALUATION,
            stop_fn=stop_at(tokenizer, sampling.stop),
            num_ids=len(tokenizer),
        )
    return make_samples(generation, rows, tokenizer, side.eos, sampling.stop)


def evaluate(sides, sampling, prompts, judge, pairwise_judge, known, args, tokenizer, mesh) -> list[dict]:
    """One row for each sample of all ranks: both answers and what is said of them, of the second as other_...

    Args: judge: a reward. pairwise_judge: p(y, z) and p(z, y) of pairs; None, as judge. known: see `score_new`. mesh:
        without stages.
    Communication: texts and scores are gathered over dp.
    """
    sample_ids = list(range(len(prompts) * args.samples_per_prompt))[mesh.dp.rank :: mesh.dp.size]
    mine = [i // args.samples_per_prompt for i in sample_ids]
    rows, answers = [prompts[i] for i in mine], []
    columns: dict[str, list] = {"prompt": [row.prompt for row in rows]}
    for prefix, side in zip(PREFIXES, sides, strict=False):
        samples = answer(side, rows, sample_ids, sampling, args, tokenizer)
        answers.append(samples)
        columns[f"{prefix}response"] = [sample.response for sample in samples]
        columns[f"{prefix}finished"] = [sample.finished for sample in samples]
        columns[f"{prefix}response_len"] = [len(sample.response_ids) for sample in samples]
        if judge is not None:
            keys = [(i, sample.response, sample.finished) for i, sample in zip(mine, samples, strict=True)]
            score_new(judge, dict(zip(keys, samples, strict=True)), known, mesh, args.rollout_timeout)
            columns[f"{prefix}score"] = [known[key] for key in keys]
        if args.rouge and side.spec != "data":
            columns[f"{prefix}rouge_l"] = [rouge_l(s.response, s.metadata["reference"]) for s in samples]
    if pairwise_judge is not None:
        pairs = list(zip(*answers, strict=True))
        both = score_together(pairwise_judge, pairs, mesh, args.rollout_timeout)
        columns["preference"] = [(p + (1 - q)) / 2 for p, q in both]  # eq. 2
        columns["order_dependent"] = [win(p, 0.5) != win(0.5, q) for p, q in both]
    everyone = mesh.gather_objects((sample_ids, list(zip(*columns.values(), strict=True))), "dp")
    found = dict(pair for ids, rows in everyone for pair in zip(ids, rows, strict=True))
    return [dict(zip(columns, found[i], strict=True)) for i in sorted(found)]


def judge_preferences(prompts, judge, pairwise_judge, known, args, tokenizer, mesh) -> dict[str, float]:
    """How often the judge prefers `chosen` over `rejected`, the data's own pairs, as `summarise` gives it."""
    sides = []
    for name in ("chosen", "rejected"):
        texts = [(row.metadata[name], True) for row in prompts for _ in range(args.samples_per_prompt)]
        sides.append(Side(name, "data", answers=make_text_samples(prompts, texts, tokenizer)))
    return summarise(evaluate(sides, args.sampling, prompts, judge, None, known, args, tokenizer, mesh))


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    specs = {"model": args.model} | ({"against": args.against} if args.against else {})
    folders = {name: resolve_model(spec) for name, spec in specs.items() if not lies_there(spec)}
    configs = {name: read_config(folder) for name, folder in folders.items()}
    mesh = init_mesh(args.layout, next(iter(configs.values()), None))
    run = Run("evaluate", args, mesh)
    dtype = getattr(torch, args.dtype)
    if args.judge and not args.allow_training_judge:
        origins = [folders.get(name, spec) for name, spec in specs.items()]
        on_logger(partial(refuse_training_judge, args.judge, origins), "the judge cannot be told from rewards", mesh)

    # data: prompts, and the answers that lie there already
    tokenizer = load_tokenizer(args.tokenizer or next(iter(folders.values())))
    for name, folder in folders.items():
        check_vocabulary(tokenizer, configs[name], folder)
        if not args.tokenizer and not give_equal_ids(tokenizer, load_tokenizer(folder)):
            raise ValueError(
                f"{folder} has another tokenizer than {args.model}: give the --tokenizer of both, or sample from it by "
                f"evaluate.py --model {folder} --against '' and compare with the samples.jsonl of that run"
            )
    context_len = min((config.max_seq_len for config in configs.values()), default=1 << 31)
    new_tokens = args.sampling.max_new_tokens if folders else 0
    needs_reference = ["--against data"] * (args.against == "data") + ["--rouge"] * args.rouge
    prompts = read_prompts(
        load_rows(args.data)[: args.num_prompts or None],
        " and ".join(needs_reference),
        tokenizer,
        args.prompt_tokens,
        context_len - new_tokens,
        args.bos,
    )
    count = args.samples_per_prompt
    kinds = {"model": (args.kind, "--kind"), "against": (args.against_kind, "--against-kind")}
    sides = [Side(name, spec) for name, spec in specs.items()]
    for side in sides:
        if side.name in folders:
            side.eos = eos_ids(folders[side.name], tokenizer)
        else:
            side.answers = given_answers(side.spec, *kinds[side.name], prompts, count, tokenizer)
    examples = []
    if args.perplexity_data:
        examples = sft_examples(load_rows(args.perplexity_data), tokenizer, args.bos, True, context_len)

    # judges
    given = [sample for side in sides for sample in side.answers]
    lens = [len(row.prompt_ids) + new_tokens for row in prompts]
    lens += [len(sample.prompt_ids + sample.response_ids) for sample in given]
    eos = sorted({i for side in sides for i in side.eos} | {tokenizer.eos_token_id} - {None})
    context = SampleContext(mesh, tokenizer, eos, args.bos, dtype, max(lens))
    judge = make_reward(args.judge, context) if args.judge else None
    pairwise_judge = None
    if args.pairwise_judge:
        pairwise_judge = partial(judge_both_orders, load_object(args.pairwise_judge), args.pairwise_judge)

    # models: frozen, hence never divided into stages
    roles = {name: load_decoder(folder, mesh.folded, dtype) for name, folder in folders.items()}
    model = data_parallel({name: role.requires_grad_(False) for name, role in roles.items()}, mesh, args.layout)
    for side in sides:
        side.policy = roles.get(side.name)
    settings = args.settings()
    run.describe(
        [
            ("model", args.model),
            ("against", args.against or "nothing"),
            ("judge", " and ".join(filter(None, (args.judge, args.pairwise_judge))) or "none"),
            ("layout", mesh.describe()),
            ("memory", describe_memory(model, None)),
            ("data", f"{len(prompts)} prompts x {count} samples, {len(settings)} settings"),
        ]
    )
    for folder in folders.values():
        if holds_heads(folder, "q_heads"):
            run.note(f"{folder} samples without its Q heads; ilql.py --max-steps 0 writes samples with them")
    shared = prompts, judge, pairwise_judge, {}, args, tokenizer, mesh.folded

    # does the judge agree with the preferences of the data?
    summary = {"num_prompts": len(prompts), "num_samples": len(prompts) * count, "flags": flat_flags(args)}
    if judge is not None and args.against == "data" and all("rejected" in row.metadata for row in prompts):
        metrics = judge_preferences(*shared)
        accuracy, error = metrics["win_rate"], metrics["win_rate_se"]
        told = f"{args.judge} prefers `chosen` over `rejected` in {accuracy:.3f} +- {error:.3f} of the pairs"
        if accuracy + SWAPPED * error < 0.5:
            raise ValueError(
                f"{told}: if the columns are swapped, swap them back; if not, take another judge, or leave `rejected` "
                "out of the rows"
            )
        run.note(told)
        summary |= {"judge_accuracy": accuracy, "judge_accuracy_se": error}

    # perplexity, which no setting changes
    perplexity = {}
    for side, prefix in zip(sides, PREFIXES, strict=False):
        if examples and side.policy is not None:
            perplexity[f"{prefix}perplexity"] = evaluate_perplexity(side.policy, examples, args)

    results, table = [], []

    def write():
        if len(results) == 1:
            run.begin()
        lines = (json.dumps(finite_or_null(row)) + "\n" for row in table)
        write_atomically(run.folder / "samples.jsonl", lines)
        content = {**summary, "settings": [finite_or_null(row) for row in results]}
        write_atomically(run.folder / "results.json", [json.dumps(content, indent=2) + "\n"])

    for i, sampling in enumerate(settings):
        # sample and judge
        mesh.at("evaluation", i)
        started = time.perf_counter()
        rows = evaluate(sides, sampling, *shared)
        seconds = time.perf_counter() - started

        # write: everything so far
        setting = describe_setting(sampling) if folders else "as given"
        results.append({"setting": setting, **summarise(rows), **perplexity, "seconds": seconds})
        table += [{"kind": setting, **row} for row in rows]
        on_logger(write, f"cannot write into {run.folder}", mesh)
        run.note(f"{i + 1}/{len(settings)}  {setting}  {seconds:.1f} s")
    run.note(f"\n{format_markdown(results)}\n")
    run.finish()
    mesh.close()


if __name__ == "__main__":
    launch(main, Args)
