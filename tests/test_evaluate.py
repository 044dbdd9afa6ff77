"""evaluate.py against plain counting: wins, ties and their errors, ROUGE-L, perplexity; layouts; what it refuses."""

import contextlib
import io
import itertools
import json
import math
import random
import statistics

import pytest
import torch
import tyro
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import evaluate
from parallel.checkpoint import load_decoder
from parallel.mesh import init_mesh
from parallel.model import ScalarHead
from parallel.reward import save_reward_model
from parallel.rows import Row
from tasks.answers import count_common, rouge_l, split_answer
from tasks.judges import is_same_judge
from tasks.random_walks import make_tokenizer, optimality, walks
from tasks.rewards import Sample
from tests.scripts import make_tiny_model, run_on_ranks

LETTERS = "abcdefghijklmnopqrstu"
LETTER_JUDGE = "tests.letter_reward:share"


def prefer_first(first, second):
    """A judge that only sees the order."""
    return [1.0] * len(first)


def prefer_longer(first, second):
    """A judge that is sure where lengths differ much."""
    return [1 / (1 + math.exp(len(b.response) - len(a.response))) for a, b in zip(first, second, strict=True)]


def prefer_first_or_long(first, second):
    """A judge that takes the first one unless the second is much longer."""
    return [float(len(b.response) < len(a.response) + 4) for a, b in zip(first, second, strict=True)]


def scale_of_ten(first, second):
    return [7.0] * len(first)


def fails(first, second):
    return [1 / 0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two tiny models, two reward models, and data."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_tiny_model(folder / "a", lambda decoder: [p.mul_(4) for p in decoder.parameters()])
    make_tiny_model(folder / "b", lambda decoder: [p.mul_(-3) for p in decoder.parameters()])
    mesh = init_mesh()
    for name, std in (("rm", 0.3), ("rm2", 0.4)):
        decoder = load_decoder(str(folder / "a"), mesh, torch.float32, lm_head=False)
        save_reward_model(decoder, ScalarHead(32, mesh, std=std), folder / name, mesh, make_tokenizer(), 0.1)
    generator = random.Random(1)

    def word(count):
        return "".join(generator.choices(LETTERS, k=count))

    rows = []
    for i in range(9):  # one prompt comes twice
        prompt = rows[0]["prompt"] if i == 5 else word(1 + i % 4)
        rows.append({"prompt": prompt, "chosen": "a" + word(3 + i % 3), "rejected": "u" + word(4)})
    write(folder / "pairs.jsonl", rows)
    write(folder / "texts.jsonl", [{"text": word(n)} for n in (3, 12, 7, 30, 2)])
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(cwd, *flags):
    """(results.json, rows of samples.jsonl, standard output) of a run in this process."""
    out = io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out):
        evaluate.main(tyro.cli(evaluate.Args, args=[str(flag) for flag in flags]))
    folder = next(line.split()[1] for line in out.getvalue().splitlines() if line.startswith("run "))
    rows = [json.loads(line) for line in (cwd / folder / "samples.jsonl").read_text().splitlines()]
    return json.loads((cwd / folder / "results.json").read_text()), rows, out.getvalue()


# --- numbers --------------------------------------------------------------------------------------------------------


def test_clustered_error_matches_its_formula():
    generator = random.Random(2)
    clusters = [str(generator.randrange(7)) for _ in range(60)]
    values = [generator.random() for _ in clusters]
    mean, error = evaluate.clustered_mean(values, clusters)
    assert mean == pytest.approx(statistics.fmean(values), rel=1e-14)
    total = sum(
        (x - mean) * (y - mean)
        for (x, a), (y, b) in itertools.product(zip(values, clusters, strict=True), repeat=2)
        if a == b
    )
    assert error == pytest.approx(math.sqrt(7 / 6 * total) / 60, rel=1e-12)
    # as many of each cluster: the error of the mean of their means
    means = [statistics.fmean(values[i : i + 10]) for i in range(0, 60, 10)]
    mean, error = evaluate.clustered_mean(values, [str(i // 10) for i in range(60)])
    assert error == pytest.approx(statistics.stdev(means) / math.sqrt(6), rel=1e-12)
    assert math.isnan(evaluate.clustered_mean([1.0, 0.0], ["x", "x"])[1])


def test_clustered_error_is_that_of_repeated_evaluations():
    """Prompts that are easier or harder, four samples of each: the estimate against the spread of 1,500 evaluations.

    Were the samples taken for independent, the error would be two thirds of it.
    """
    generator = random.Random(3)
    means, errors, naive = [], [], []
    for _ in range(1500):
        chances = [generator.betavariate(0.8, 0.8) for _ in range(40)]
        values = [float(generator.random() < chance) for chance in chances for _ in range(4)]
        mean, error = evaluate.clustered_mean(values, [str(i // 4) for i in range(160)])
        means.append(mean)
        errors.append(error**2)
        naive.append(statistics.pvariance(values) / len(values))
    spread = statistics.variance(means)
    assert statistics.fmean(errors) == pytest.approx(spread, rel=0.1)
    assert statistics.fmean(naive) < 0.55 * spread


def longest_common(a, b):
    """By its definition: the longest of all subsequences of a that b has, too."""
    for size in range(len(a), 0, -1):
        for words in itertools.combinations(a, size):
            rest = iter(b)
            if all(word in rest for word in words):
                return size
    return 0


def test_rouge_matches_all_subsequences():
    generator = random.Random(4)
    for _ in range(200):
        a, b = ([generator.choice("wxyz") for _ in range(generator.randrange(9))] for _ in range(2))
        common = longest_common(a, b)
        assert count_common(a, b) == common
        precision, recall = common / max(len(a), 1), common / max(len(b), 1)
        expected = 2 * precision * recall / (precision + recall) if common else 0
        assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected, rel=1e-14)
    assert rouge_l("Police killed the gunman.", "police KILL the gunman") == 0.75  # Lin 2004: 3 of 4 words
    assert rouge_l("the gunman kill police", "police kill the gunman") == 0.5
    assert rouge_l("", "a") == rouge_l("...", "...") == 0


def test_perplexity_matches_transformers(place):
    write(place / "mixed.jsonl", [{"text": "abcabc"}, {"prompt": "ab", "completion": "cde"}, {"text": "u"}])
    flags = ("--model", "a", "--against", "b", "--data", "pairs.jsonl", "--judge", LETTER_JUDGE)
    results, _, _ = run(place, *flags, "--perplexity-data", "mixed.jsonl", "--microbatch-size", 2)
    tokenizer = make_tokenizer()
    for name, key in (("a", "perplexity"), ("b", "other_perplexity")):
        model = AutoModelForCausalLM.from_pretrained(place / name)
        nats, count = 0.0, 0
        for prompt, text in (("", "abcabc|"), ("ab", "cde|"), ("", "u|")):
            ids = torch.tensor([tokenizer(prompt + text)["input_ids"]])
            with torch.no_grad():
                logprobs = model(ids).logits[0].double().log_softmax(-1)
            for t in range(max(len(prompt), 1), ids.shape[1]):
                nats, count = nats - logprobs[t - 1, ids[0, t]].item(), count + 1
        assert count == 6 + 4 + 1
        assert results["settings"][0][key] == pytest.approx(math.exp(nats / count), rel=1e-5)


def test_wins_match_counting(place):
    """Every number of a sweep from the texts alone; the prompt that comes twice is one cluster."""
    flags = ("--model", "a", "--against", "data", "--data", "pairs.jsonl", "--judge", LETTER_JUDGE, "--rouge")
    sweep = ("--samples-per-prompt", 3, "--temperatures", 0.5, 1.5, "--top-ks", 0, 5)
    results, rows, out = run(place, *flags, *sweep)
    names = [row["setting"] for row in results["settings"]]
    assert names == ["temperature 0.5", "temperature 0.5, top-k 5", "temperature 1.5", "temperature 1.5, top-k 5"]
    pairs = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    assert results["num_prompts"] == 9 and results["num_samples"] == 27 and len(rows) == 4 * 27
    for metrics in results["settings"]:
        mine = [row for row in rows if row["kind"] == metrics["setting"]]
        assert [row["prompt"] for row in mine] == [pair["prompt"] for pair in pairs for _ in range(3)]
        assert [row["other_response"] for row in mine] == [pair["chosen"] for pair in pairs for _ in range(3)]
        wins, residuals = [], {}
        for row in mine:
            scores = [
                sum(x < "k" for x in row[name]) / max(len(row[name]), 1) for name in ("response", "other_response")
            ]
            assert scores == [row["score"], row["other_score"]]
            wins.append(1.0 if scores[0] > scores[1] else 0.5 if scores[0] == scores[1] else 0.0)
        assert metrics["win_rate"] == pytest.approx(sum(wins) / 27, rel=1e-12) and 0 < metrics["win_rate"] < 1
        assert metrics["ties"] == pytest.approx(wins.count(0.5) / 27, rel=1e-12)
        for row, w in zip(mine, wins, strict=True):
            residuals[row["prompt"]] = residuals.get(row["prompt"], 0) + w - metrics["win_rate"]
        assert len(residuals) == 8
        error = math.sqrt(8 / 7 * sum(x * x for x in residuals.values())) / 27
        assert metrics["win_rate_se"] == pytest.approx(error, rel=1e-12)
        for name in ("score", "other_score", "response_len", "other_response_len", "finished", "rouge_l"):
            assert metrics[name] == pytest.approx(statistics.fmean(row[name] for row in mine), rel=1e-12), name
        assert metrics["other_response_len"] == statistics.fmean(len(row["other_response"]) + 1 for row in mine)
        assert "other_rouge_l" not in metrics and metrics["other_finished"] == 1
        line = next(line for line in out.splitlines() if line.startswith(f"| {metrics['setting']} |"))
        assert f"| {metrics['win_rate']:.3f} +- {metrics['win_rate_se']:.3f} | {metrics['ties']:.3f} |" in line
    assert len({tuple(row["response"] for row in rows if row["kind"] == name) for name in names}) == 4
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 6 and len({line.count("|") for line in table}) == 1 and set(table[1]) <= set("| -")
    # one setting by itself gives the same
    [alone] = run(place, *flags, "--samples-per-prompt", 3, "--sampling.temperature", 1.5)[0]["settings"]
    assert {**alone, "seconds": 0} == {**results["settings"][2], "seconds": 0}


def test_a_model_ties_with_itself(place):
    """The same noise gives the same answers, and equal answers tie, by a reward model, too."""
    flags = ("--model", "a", "--against", "a", "--data", "pairs.jsonl", "--judge", "rm", "--samples-per-prompt", 4)
    [metrics] = run(place, *flags)[0]["settings"]
    assert (metrics["win_rate"], metrics["win_rate_se"], metrics["ties"]) == (0.5, 0.0, 1.0)
    assert metrics["longer"] == 0.5 and metrics["score"] == metrics["other_score"]
    [other] = run(place, *flags, "--against", "b")[0]["settings"]
    assert other["score"] == metrics["score"] and other["ties"] < 1


def test_both_orders(place):
    """A judge that sees only the order says nothing: exactly one half, without error."""
    flags = ("--model", "a", "--against", "b", "--data", "pairs.jsonl", "--judge", "", "--samples-per-prompt", 3)
    [metrics] = run(place, *flags, "--pairwise-judge", "tests.test_evaluate:prefer_first")[0]["settings"]
    assert (metrics["pairwise_win_rate"], metrics["pairwise_win_rate_se"], metrics["pairwise_ties"]) == (0.5, 0.0, 1.0)
    assert metrics["order_dependent"] == 1 and "win_rate" not in metrics
    for judge in (prefer_longer, prefer_first_or_long):
        results, rows, out = run(place, *flags, "--pairwise-judge", f"tests.test_evaluate:{judge.__name__}")
        [metrics] = results["settings"]
        pairs = [(Sample("", row["response"]), Sample("", row["other_response"])) for row in rows]
        ahead = [judge([y], [z])[0] for y, z in pairs]
        behind = [judge([z], [y])[0] for y, z in pairs]
        verdicts = [(p > 0.5) - (p < 0.5) + (q > 0.5) - (q < 0.5) for p, q in zip(ahead, behind, strict=True)]
        assert metrics["order_dependent"] == sum(x != 0 for x in verdicts) / len(pairs)
        expected = [(p + 1 - q) / 2 for p, q in zip(ahead, behind, strict=True)]
        assert metrics["pairwise_win_rate"] == pytest.approx(statistics.fmean(expected), rel=1e-12)
    assert 0 < metrics["order_dependent"] < 1 and "depend on order" in out


def test_defaults_compare_with_the_walks(tmp_path):
    """On a policy that has learnt nothing, which needs no making; the folder is refused to a second run."""
    flags = ("--model", "tasks.random_walks:untrained_policy", "--num-prompts", 60)
    results, rows, out = run(tmp_path, *flags)
    for row, walk in zip(rows, walks()[:60], strict=True):
        assert (row["prompt"], row["other_response"]) == (walk["prompt"], walk["completion"])
        samples = [Sample(row["prompt"], row[name]) for name in ("response", "other_response")]
        assert optimality(samples) == [row["score"], row["other_score"]]
    [metrics] = results["settings"]
    assert metrics["win_rate"] < 0.4 < metrics["other_score"] + 0.1 and metrics["score"] < 0.1
    for name in ("results.json", "samples.jsonl"):
        assert f"runs/evaluate/{name}" in out
    again = (*flags, "--output-dir", "runs/evaluate", "--sampling.temperature", 0)
    assert refused(tmp_path, *again) == "runs/evaluate holds a run: --overwrite replaces it"
    assert run(tmp_path, *again, "--overwrite")[0]["settings"][0]["setting"] == "greedy"


# --- layouts --------------------------------------------------------------------------------------------------------

LAYOUTS = {
    2: [(), ("--layout.pp", 2), ("--layout.zero", 3, "--layout.offload", "frozen")],
    4: [("--layout.tp", 2, "--layout.pp", 2), ("--layout.tp", 2, "--layout.zero", 3)],
}


def test_every_layout_gives_the_same(place, tmp_path):
    """Texts are equal, and so is all that counts them; scores of a reward model and perplexity but for rounding."""
    flags = ["--model", "a", "--against", "b", "--data", "pairs.jsonl", "--judge", "rm", "--samples-per-prompt", 2]
    flags += ["--perplexity-data", "texts.jsonl", "--microbatch-size", 2, "--rouge", "--temperatures", 0.7, 1]
    flags += ["--pairwise-judge", "tests.test_evaluate:prefer_longer", "--num-prompts", 7]
    found = {}
    for ranks, layout in [(1, ())] + [(ranks, layout) for ranks, layouts in LAYOUTS.items() for layout in layouts]:
        folder = tmp_path / f"{ranks}{'-'.join(map(str, layout))}"
        run_on_ranks("evaluate.py", *flags, *layout, "--output-dir", folder, cwd=place, ranks=ranks)
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        found[ranks, layout] = json.loads((folder / "results.json").read_text()), rows
    expected, expected_rows = found.pop((1, ()))
    assert len(expected_rows) == 2 * 14 and 0 < expected["settings"][0]["win_rate"] < 1
    for where, (results, rows) in found.items():
        for row, one in zip(rows, expected_rows, strict=True):
            for name, x in one.items():
                inexact = name in ("score", "other_score")
                assert row[name] == (pytest.approx(x, rel=1e-5, abs=1e-6) if inexact else x), (where, name)
        for metrics, one in zip(results["settings"], expected["settings"], strict=True):
            for name, x in one.items():
                inexact = "score" in name or "perplexity" in name
                assert name == "seconds" or metrics[name] == (pytest.approx(x, rel=1e-5, abs=1e-6) if inexact else x)


# --- files of answers -----------------------------------------------------------------------------------------------


def test_answers_of_files(place, tmp_path):
    """Of the newest iteration and one kind, in order, over again where there are fewer; judged as if just sampled."""
    flags = ("--data", place / "pairs.jsonl", "--judge", place / "rm", "--num-prompts", 4)
    sampled, rows, _ = run(tmp_path, "--model", place / "a", "--against", place / "b", *flags, "--temperatures", 0.6, 1)
    again, copies, out = run(
        tmp_path,
        *("--model", "runs/evaluate/samples.jsonl", "--kind", "temperature 0.6", "--tokenizer", place / "a"),
        *("--against", "data", *flags, "--samples-per-prompt", 2),
    )
    assert [row["response"] for row in copies] == [row["response"] for row in rows[:4] for _ in range(2)]
    for name in ("score", "response_len", "finished"):
        assert again["settings"][0][name] == pytest.approx(sampled["settings"][0][name], rel=1e-6), name
    assert "| as given |" in out
    prompts = [row["prompt"] for row in rows[:4]]
    path = write(
        tmp_path / "samples.jsonl",
        [{"iteration": 5, "scale": 1.0, "prompt": p, "response": "old"} for p in prompts]
        + [
            {"iteration": 10, "scale": s, "prompt": p, "response": t}
            for s, t in ((0.0, "uu"), (8.0, "ab"))
            for p in prompts
        ]
        + [{"iteration": 10, "scale": 8.0, "prompt": prompts[0], "response": "uuuu", "finished": False}],
    )
    flags = ("--data", place / "pairs.jsonl", "--judge", LETTER_JUDGE, "--num-prompts", 4, "--tokenizer", place / "a")
    twice = ("--model", path, "--kind", "8", "--against", path, "--against-kind", "0", "--samples-per-prompt", 2)
    results, rows, _ = run(tmp_path, *twice, *flags)
    assert [row["response"] for row in rows] == ["ab", "uuuu", *["ab"] * 6]
    assert [row["response_len"] for row in rows] == [3, 4, *[3] * 6] and {row["other_response"] for row in rows} == {
        "uu"
    }
    assert results["settings"][0]["win_rate"] == 7.5 / 8 and results["settings"][0]["ties"] == 1 / 8


# --- refusals -------------------------------------------------------------------------------------------------------


def refused(cwd, *flags):
    with pytest.raises(Exception) as caught:
        run(cwd, *flags)
    assert isinstance(caught.value, ValueError | OSError | RuntimeError), caught.value
    return str(caught.value)


def test_the_judge_that_trained_is_refused(place, tmp_path):
    """By path, by a copy of its weights in any form, along the chain of runs, for files of answers; no other one is."""
    folder = tmp_path / "runs/ppo"
    make_tiny_model(folder / "model")
    (tmp_path / "runs/reward").mkdir()
    for name, source in (("model", "rm"), ("copy", "rm"), ("other", "rm2")):
        (tmp_path / "runs/reward" / name).mkdir()
        for path in (place / source).iterdir():
            (tmp_path / "runs/reward" / name / path.name).write_bytes(path.read_bytes())
    (tmp_path / "runs/reward/model/adapters.safetensors").write_text("of a run with --lora.rank, merged in the copy")
    rounded = AutoModelForSequenceClassification.from_pretrained(place / "rm", dtype=torch.bfloat16)
    rounded.save_pretrained(tmp_path / "runs/reward/rounded", max_shard_size="20KB")
    (folder / "args.json").write_text(json.dumps({"model": "a", "reward": "runs/reward/model"}))
    make_tiny_model(tmp_path / "runs/ppo-2/best")
    later = {"model": "runs/ppo/model", "reward": LETTER_JUDGE, "value_model": "head"}
    (tmp_path / "runs/ppo-2/args.json").write_text(json.dumps(later))
    write(folder / "samples.jsonl", [{"prompt": "a", "response": "b"}])
    data = ("--data", write(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}]))
    for model, judge in (
        ("runs/ppo/model", "runs/reward/model"),
        ("runs/ppo/model", "runs/reward/copy"),
        ("runs/ppo/model", "runs/reward/rounded"),
        ("runs/ppo-2/best", "runs/reward/copy"),
        ("runs/ppo-2/best", LETTER_JUDGE),
        ("runs/ppo-2/best", f"{evaluate.__file__.rpartition('/')[0]}/tests/letter_reward.py:share"),
    ):
        message = refused(tmp_path, "--model", model, *data, "--judge", judge)
        assert f"--judge {judge} is the reward" in message and "--allow-training-judge" in message
        assert "is the reward" in refused(tmp_path, "--model", place / "a", "--against", model, *data, "--judge", judge)
    file = ("--model", "runs/ppo/samples.jsonl", "--tokenizer", place / "a")
    assert "from which runs/ppo/samples.jsonl comes" in refused(tmp_path, *file, *data, "--judge", "runs/reward/copy")
    assert not list((tmp_path / "runs").glob("evaluate*/*"))
    run(tmp_path, "--model", "runs/ppo/model", *data, "--judge", "runs/reward/other")
    run(tmp_path, "--model", "runs/ppo/model", *data, "--judge", "runs/reward/copy", "--allow-training-judge")
    (tmp_path / "runs/reward/args.json").write_text("{}")
    assert "is the reward of the run" in refused(
        tmp_path, "--model", "runs/ppo/model", *data, "--judge", "runs/reward/other"
    )
    later |= {"reward": "judges/mine.py:score", "former": [{"reward": "runs/reward/model"}]}  # of a resumed run
    (tmp_path / "runs/ppo-2/args.json").write_text(json.dumps(later | {"model": "a"}))
    (tmp_path / "judges").mkdir()
    (tmp_path / "judges/mine.py").write_text("def score(samples): return [0.0] * len(samples)")
    flags = ("--model", tmp_path / "runs/ppo-2/best", "--data", tmp_path / "data.jsonl", "--judge")
    assert "is the reward of the run" in refused(tmp_path, *flags, "runs/reward/copy")
    assert "is the reward of the run" in refused(tmp_path / "judges", *flags, "mine.py:score")
    (tmp_path / "runs/judge").mkdir()
    (tmp_path / "runs/reward/other").rename(tmp_path / "runs/judge/model")
    make_tiny_model(tmp_path / "runs/sft/model")
    trained = {"model": "a", "reward": "runs/reward/model", "value_model": "runs/sft/model"}
    (folder / "args.json").write_text(json.dumps(trained))
    flags = ("--model", "runs/ppo/model", *data, "--judge", "runs/judge/model")
    for judge, reward in (("reward", "sft"), ("sft", "judge"), ("sft", "sft")):  # what they began from
        (tmp_path / "runs/judge/args.json").write_text(json.dumps({"model": f"runs/{judge}/model"}))
        (tmp_path / "runs/reward/args.json").write_text(json.dumps({"model": f"runs/{reward}/model"}))
        if judge != reward:
            assert "or one is trained from the other" in refused(tmp_path, *flags)
    run(tmp_path, *flags)
    assert not is_same_judge("runs/a", "runs/b") and is_same_judge("http://x/y", "http://x/y")


@pytest.mark.parametrize(
    "rows, flags, message",
    [
        ([], (), "no rows in"),
        ([{"prompt": "a"}], (), "needs a reference answer, for --against data: `completion`, `chosen` or `response`"),
        ([{"prompt": "a", "rejected": "b"}], (), "line 1: needs `chosen` beside `rejected`; it has prompt, rejected"),
        ([{"chosen": "a", "rejected": "b"}], (), "line 1: needs `prompt` beside `chosen` (of whole dialogues, "),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], (), "are the same text"),
        ([{"prompt": "a", "completion": "b", "chosen": None, "rejected": "b"}], (), "`chosen` is None, not a string"),
        ([{"prompt": "a", "chosen": ["b"], "rejected": "c"}], (), "both as strings or both as messages"),
        ([{"prompt": "a", "chosen": "ab"}] * 4, (), "the answer begins with the prompt, as in all rows"),
        ([{"prompt": "a", "completion": " "}], (), "its reference answer is empty"),
        ([{"prompt": "a", "completion": 3}], (), "`completion` is 3, not a string"),
        ([{"prompt": "a"}], ("--against", "", "--rouge"), "for --rouge"),
        ([{"prompt": "a", "chosen": "uu", "rejected": "aa"}, {"prompt": "b", "chosen": "ut", "rejected": "ba"}], (),
         "prefers `chosen` over `rejected` in 0.000 +- 0.000 of the pairs: if the columns are swapped, swap them back"),
        ([{"prompt": "a", "completion": "b"}], ("--against", "answers.jsonl"), "holds answers of the kinds 'x', 'y': "
         "--against-kind should name one"),
        ([{"prompt": "a", "completion": "b"}], ("--against", "answers.jsonl", "--against-kind", "z"), "kinds 'x', 'y'"),
        ([{"prompt": "a", "completion": "b"}], ("--against", "answers.jsonl", "--against-kind", "x"),
         "answers.jsonl has no answer to the prompt 'a', only to 1 others"),
        ([{"prompt": "a", "completion": "b"}], ("--against", "data.jsonl"), "needs `prompt` and `response`"),
        ([{"prompt": "a", "completion": "b"}], ("--against", "none.jsonl"), "none.jsonl: no such file"),
        ([{"prompt": "a", "completion": "b"}], ("--judge", "bare"), "no tokenizer can be loaded from the folder bare"),
        ([{"prompt": "a", "completion": "b"}], ("--judge", "a"), "a is no reward model"),
        ([{"prompt": "a", "completion": "b"}], ("--judge", "./bear"), "no such file or folder; did you mean bare"),
        ([{"prompt": "a", "completion": "b"}], ("--judge", "bear"), "bear is neither a folder here nor module:func"),
        ([{"prompt": "a", "completion": "b"}], ("--model", "ended.jsonl", "--tokenizer", "a"),
         "ended.jsonl, line 1: `finished` is 'false', neither true nor false"),
        ([{"prompt": "a", "completion": "b"}], ("--judge", "", "--pairwise-judge", "tests.test_evaluate:scale_of_ten"),
         "gave 7.0: it should give 1 (first better) to 0"),
        ([{"prompt": "a", "completion": "b"}], ("--judge", "", "--pairwise-judge", "tests.test_evaluate:fails"),
         "raised ZeroDivisionError"),
    ],
    ids=lambda x: x.replace(" ", "_")[:40] if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_input_is_refused(place, tmp_path, rows, flags, message):
    write(tmp_path / "data.jsonl", rows)
    write(tmp_path / "answers.jsonl", [{"prompt": "b", "response": "c", "kind": kind} for kind in "xy"])
    write(tmp_path / "ended.jsonl", [{"prompt": "a", "response": "c", "finished": "false"}])
    for name, source in (("a", "a"), ("bare", "rm")):
        (tmp_path / name).mkdir()
        for path in (place / source).iterdir():
            if name == "a" or "token" not in path.name:
                (tmp_path / name / path.name).write_bytes(path.read_bytes())
    assert message in refused(tmp_path, "--model", "a", "--data", "data.jsonl", "--judge", LETTER_JUDGE, *flags)
    assert not list(tmp_path.glob("runs/evaluate/*")), "something was written"


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(judge=""), "needs a --judge or --pairwise-judge"),
        (dict(against="", pairwise_judge="x:y"), "--against should say whose"),
        (dict(temperatures=(1.0, 1.0)), "holds a number twice"),
        (dict(temperatures=(-1.0,)), "is negative"),
        (dict(top_ps=(2.0,)), "is not in"),
        (dict(model="x.jsonl", tokenizer="t", temperatures=(1.0,)), "are for sampling"),
        (dict(model="x.jsonl"), "--tokenizer is needed"),
        (dict(model="x.jsonl", tokenizer="t", perplexity_data=("x",)), "is for models"),
        (dict(model="data"), "--against data"),
        (dict(kind="greedy"), "choose from a .jsonl file"),
        (dict(samples_per_prompt=0), "--samples-per-prompt 0 should be"),
    ],
    ids=str,
)
def test_bad_flags_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        evaluate.Args(**flags)


def test_rows_as_prompts():
    """Preferences as messages, chats that end with the assistant's turn, and rows that ask only."""
    user, good, bad = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "g"), ("assistant", "b")))

    def split(**fields):
        return split_answer(Row(fields, "x, line 1"))

    for fields in (
        dict(chosen=[user, good], rejected=[user, bad]),
        dict(prompt=[user], chosen=[good], rejected=[bad]),
        dict(prompt=[user], chosen=[user, good], rejected=[user, bad]),
        dict(prompt="q", chosen=[user, good], rejected=[user, bad]),
    ):
        row = split(**fields)
        assert (row["messages"], row["reference"], row["rejected"], row.where) == ([user], "g", "b", "x, line 1")
        assert "prompt" not in row
    assert split(messages=[user, good]) == {"messages": [user], "reference": "g"}
    assert split(messages=[user]) == {"messages": [user]} and split(prompt="q") == {"prompt": "q"}
    assert "rejected" not in split(chosen=[user, good])
    assert split(prompt="q", completion="b", chosen="g", rejected="b")["reference"] == "b"
    for fields in (
        dict(chosen=[user, good], rejected=[bad]),
        dict(prompt="q", chosen=[good], rejected=[bad]),
        dict(chosen=[user, "g"], rejected=[user, bad]),
        dict(chosen=[user, good], rejected=[user, good]),
    ):
        with pytest.raises(ValueError, match="x, line 1: "):
            split(**fields)
