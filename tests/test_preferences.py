"""The preference tasks: files made of published and own rows, and the chains that tasks/README.md documents."""

import contextlib
import gzip
import importlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import tyro
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ilql
import reward_model
from parallel.checkpoint import save_decoder
from parallel.data import load_tokenizer, prompt_rows, sft_examples
from parallel.families import config_from_hf
from parallel.mesh import init_mesh
from parallel.model import Decoder
from parallel.rows import Row, load_object, load_rows
from parallel.run import launch
from tasks.preferences import FILES, HH, TLDR, Command, Pairs, Summaries, Unusable, main, prepare
from tests.scripts import ROOT, read_commands, read_rows, run_on_ranks

CHAINS = (ROOT / "tasks/README.md").read_text()
DATA = Path(os.environ.get("RLHF_DATA", "nowhere"))
BEGINNING = "\n\nHuman: How do I boil egg {}?\n\nAssistant: In water.\n\nHuman: How long?\n\nAssistant:"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def split_rows(count=40):
    return [{"prompt": BEGINNING.format(i), "chosen": " Six minutes.", "rejected": f" {i} days"} for i in range(count)]


def transcripts(count=40):
    return [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in split_rows(count)]


def byte_tokenizer(folder):
    """One token per byte, and an EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({x: i for i, x in enumerate([*alphabet, "<|endoftext|>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Its folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(folder)
    return str(folder)


# --- HH --------------------------------------------------------------------------------------------------------------


def test_hh_files(tmp_path):
    """Whole dialogues as published and rows that are split already give the same files, which hold what they should."""
    common = dict(eval_share=0.2, judge_share=0.25, seed=3)
    for name, rows in (("split", split_rows()), ("whole", transcripts())):
        source = write(tmp_path / f"{name}.jsonl", rows)
        main(HH(output_dir=str(tmp_path / name), source=(source,), **common))
    found = {path.name: path.read_text() for path in (tmp_path / "split").iterdir()}
    assert found == {path.name: path.read_text() for path in (tmp_path / "whole").iterdir()}
    rows = {name: read(tmp_path / "split" / name) for name in found}
    assert {name: len(x) for name, x in rows.items()} == {
        "sft.jsonl": 22,
        "pairs.jsonl": 22,
        "prompts.jsonl": 22,
        "rated.jsonl": 44,
        "sft_eval.jsonl": 8,
        "pairs_eval.jsonl": 8,
        "prompts_eval.jsonl": 8,
        "rated_eval.jsonl": 16,
        "judge.jsonl": 10,
    }
    everything = rows["pairs.jsonl"] + rows["pairs_eval.jsonl"] + rows["judge.jsonl"]
    assert sorted(map(str, everything)) == sorted(map(str, split_rows()))
    for suffix in ("", "_eval"):
        pairs = rows[f"pairs{suffix}.jsonl"]
        assert rows[f"sft{suffix}.jsonl"] == [{"text": x["prompt"] + x["chosen"]} for x in pairs]
        assert rows[f"prompts{suffix}.jsonl"] == [{"prompt": x["prompt"], "completion": x["chosen"]} for x in pairs]
        rated = [{"prompt": x["prompt"], "response": x[k], "reward": r} for x in pairs for k, r in RATED]
        assert rows[f"rated{suffix}.jsonl"] == rated


RATED = (("chosen", 1), ("rejected", -1))


def test_hh_holds_out_whole_conversations(tmp_path):
    """Rows of one conversation, told by how it began, lie on one side; sources of evaluation are taken whole."""
    rows = []
    for i in range(30):
        opening = f"\n\nHuman: Question {i}\n\nAssistant:"
        rows.append({"prompt": opening, "chosen": " Yes.", "rejected": " No."})
        rows.append({"prompt": f"{opening} Yes.\n\nHuman: Why?\n\nAssistant:", "chosen": " So.", "rejected": " Hm."})
    source = write(tmp_path / "all.jsonl", rows)
    files, _ = prepare(HH(output_dir="", source=(source,), eval_share=0.3, judge_share=0.3))
    openings = []
    for name in ("pairs.jsonl", "pairs_eval.jsonl", "judge.jsonl"):
        openings.append({row["prompt"].partition("\n\nAssistant:")[0] for row in files[name]})
        assert len(files[name]) == 2 * len(openings[-1])
    assert len(set.union(*openings)) == sum(map(len, openings)) == 30
    assert prepare(HH(output_dir="", source=(source,), eval_share=0.3, judge_share=0.3))[0] == files
    assert prepare(HH(output_dir="", source=(source,), eval_share=0.3, judge_share=0.3, seed=2))[0] != files
    mine = [{**row, "prompt": row["prompt"].replace("Human: ", "Human: Well, ", 1)} for row in rows[:4]]
    own = write(tmp_path / "own.jsonl", mine)
    files, notes = prepare(HH(output_dir="", source=(source,), eval_source=(own,)))
    assert len(files["pairs.jsonl"]) == 60 and files["pairs_eval.jsonl"] == mine and "judge.jsonl" not in files
    assert not notes
    own = write(tmp_path / "own.jsonl", mine + rows[-2:])
    assert prepare(HH(output_dir="", source=(source,), eval_source=(own,)))[1] == [
        "1 of the evaluation's 3 topics are in training, too"
    ]
    with pytest.raises(ValueError, match="all prompts of the evaluation's rows are in the others, too"):
        prepare(HH(output_dir="", source=(source,), eval_source=(source,)))


def test_hh_leaves_out_and_says_so(tmp_path, tokenizer, capsys):
    """Empty and equal answers, a few dialogues that disagree, and prompts too long to sample from."""
    rows = transcripts(50)
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[4]["chosen"] = rows[4]["chosen"].removesuffix(" Six minutes.")
    rows[5]["rejected"] = rows[6]["rejected"]
    source = write(tmp_path / "rows.jsonl", rows)
    length = len(BEGINNING.format(9))  # the others have one more digit
    flags = ("hh", "--source", source, "--tokenizer", tokenizer, "--max-prompt-tokens", length, "--output-dir")
    status, out, _ = command(capsys, *flags, tmp_path / "hh")
    assert status == 0
    for line in (
        f"left out 1 of 50 rows of {source}: both answers are the same, {source}, line 4",
        f"left out 1 of 50 rows of {source}: an answer is empty, {source}, line 5",
        f"left out 1 of 50 rows of {source}: odd, {source}, line 6: `chosen` and `rejected` differ before their last",
        f"{tmp_path}/hh/pairs.jsonl  42 rows",
    ):
        assert line in out, out
    prompts = read(tmp_path / "hh/prompts.jsonl") + read(tmp_path / "hh/prompts_eval.jsonl")
    assert len(prompts) == 7 and max(len(row["prompt"]) for row in prompts) == length


@pytest.mark.skipif(not DATA.is_dir(), reason="RLHF_DATA holds no preferences")
@pytest.mark.parametrize("name", ["hh_harmless", "hh_helpful"])
def test_real_dialogues_are_split_where_the_set_splits_them(name, tmp_path):
    """Every row, joined to whole dialogues as Anthropic published them, comes apart as the data at hand has it."""
    rows = load_rows([str(DATA / f"preferences/{name}/{part}.jsonl.gz") for part in ("train", "test")])
    whole = [{key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in rows]
    files, notes = prepare(HH(output_dir="", source=(write(tmp_path / "whole.jsonl", whole),)))
    assert not notes
    found = files["pairs.jsonl"] + files["pairs_eval.jsonl"]
    assert sorted(map(str, found)) == sorted(str({k: row[k] for k in ("prompt", "chosen", "rejected")}) for row in rows)


# --- TL;DR -----------------------------------------------------------------------------------------------------------


def post_row(i=0, post="My cat sits on my keyboard.\nWhat can I do?", **fields):
    return {
        "id": str(i),
        "subreddit": "cats",
        "title": f"Cat {i}",
        "post": post,
        "summary": "Cat sits there.",
        **fields,
    }


def comparison(i=0, choice=1, texts=(" Cat.", " A cat sits on keys."), **info):
    info = {**{key: post_row(i)[key] for key in ("id", "subreddit", "title", "post")}, "article": None, **info}
    return {"info": info, "summaries": [{"text": x, "policy": "sup"} for x in texts], "choice": choice, "batch": "b"}


def tldr(tmp_path, tokenizer, demonstrations, comparisons, **flags):
    sources = {"demonstrations": demonstrations, "comparisons": comparisons}
    sources = {name: (write(tmp_path / f"{name}.jsonl", rows),) for name, rows in sources.items()}
    return prepare(TLDR(output_dir="", tokenizer=tokenizer, **sources, **flags))


def test_tldr_format(tmp_path, tokenizer):
    """The prompt and the answers of the published recipe, letter by letter, from the rows as published."""
    demonstrations, comparisons = [post_row(i) for i in range(20)], [comparison(i, i % 2) for i in range(20)]
    files, notes = tldr(tmp_path, tokenizer, demonstrations, comparisons)
    assert not notes
    prompt = "SUBREDDIT: r/cats\n\nTITLE: Cat 7\n\nPOST: My cat sits on my keyboard.\nWhat can I do?\n\nTL;DR:"
    rows = {name: files[f"{name}.jsonl"] + files[f"{name}_eval.jsonl"] for name in ("sft", "pairs", "prompts", "rated")}
    assert {"text": prompt + " Cat sits there."} in rows["sft"]
    assert {"prompt": prompt, "completion": " Cat sits there."} in rows["prompts"]
    assert {"prompt": prompt, "chosen": " A cat sits on keys.", "rejected": " Cat."} in rows["pairs"]
    assert {"prompt": prompt, "response": " A cat sits on keys.", "reward": 1} in rows["rated"]
    assert {"prompt": prompt, "response": " Cat.", "reward": -1} in rows["rated"]
    even = prompt.replace("Cat 7", "Cat 8")
    assert {"prompt": even, "chosen": " Cat.", "rejected": " A cat sits on keys."} in rows["pairs"]
    assert [len(rows[name]) for name in ("sft", "prompts", "pairs", "rated")] == [20, 20, 20, 40]
    held_out = {row["prompt"] for row in files["prompts_eval.jsonl"]}
    assert held_out == {row["prompt"] for row in files["pairs_eval.jsonl"]}  # the same posts
    files, _ = tldr(tmp_path, tokenizer, demonstrations, comparisons, loss_on_prompts=False)
    assert files["sft.jsonl"][0].keys() == {"prompt", "completion"}


def test_posts_are_cut_at_their_last_fitting_newline(tmp_path, tokenizer):
    """Of the post, of what stands before each of its newlines and of all parts of its first line the longest to fit."""
    posts = ["One.\n\nTwo, somewhat longer.\nThree\nand the last line, the longest of all", "no newline " * 9]
    summaries = Summaries(TLDR(output_dir=""), load_tokenizer(tokenizer))
    for limit, post in itertools.product(range(50, 160, 3), posts):
        summaries.args.prompt_tokens = limit
        ends = [len(post), *(i for i, x in enumerate(post) if x == "\n"), *range(len(post.partition("\n")[0]))]
        texts = [f"SUBREDDIT: r/cats\n\nTITLE: Cat 0\n\nPOST: {post[:end]}\n\nTL;DR:" for end in ends]
        fitting = [text for text in texts if len(text) <= limit]
        if fitting:
            assert summaries.prompt(Row(post_row(0, post), "here")) == max(fitting, key=len)
        else:
            with pytest.raises(Unusable, match=f"the prompt has more than {limit} tokens without its post"):
                summaries.prompt(Row(post_row(0, post), "here"))
    summaries.args.prompt_tokens, count = 512, mock.Mock(side_effect=summaries.count)
    with mock.patch.object(summaries, "count", count):  # what is very long costs some tokenisations, not thousands
        assert summaries.count(summaries.prompt(Row(post_row(0, "no newline " * 4000), "here"))) == 512
    assert count.call_count < 100


def test_tldr_lengths_count_the_eos(tmp_path, tokenizer):
    """An answer of as many tokens as allowed stays, one more and the row is left out; likewise with its prompt."""
    demonstrations = [post_row(i) for i in range(20)]
    prompt = len("SUBREDDIT: r/cats\n\nTITLE: Cat 7\n\nPOST: My cat sits on my keyboard.\nWhat can I do?\n\nTL;DR:")
    answer = len(" Cat sits there.") + 1
    pair = len(" A cat sits on keys.") + 1
    comparisons = [comparison(i) for i in range(20)]
    exact = dict(
        sft_response_tokens=answer,
        sft_tokens=prompt + 1 + answer,  # from "Cat 10" on there is one letter more
        pair_response_tokens=pair,
        pair_tokens=prompt + 1 + pair,
    )
    files, notes = tldr(tmp_path, tokenizer, demonstrations, comparisons, **exact)
    assert not notes and len(files["sft.jsonl"] + files["sft_eval.jsonl"]) == 20
    for name, reason in (("sft_tokens", "prompt and summary have more than"), ("pair_tokens", "prompt and summary")):
        _, notes = tldr(tmp_path, tokenizer, demonstrations, comparisons, **{**exact, name: exact[name] - 1})
        assert len(notes) == 1 and "left out 10 of 20 rows" in notes[0] and reason in notes[0], notes
    demonstrations[4]["summary"] += "!"
    comparisons[5] = comparison(5, 0, (" Cat.", " A cat sits on keys!!"))
    _, notes = tldr(tmp_path, tokenizer, demonstrations, comparisons, **exact)
    assert len(notes) == 2 and f"a summary has more than {answer} tokens" in notes[0] and "line 5" in notes[0]
    assert f"a summary has more than {pair} tokens" in notes[1] and "line 6" in notes[1], notes


def test_tldr_leaves_news_out_and_reads_other_columns(tmp_path, tokenizer):
    news = comparison(99, post=None, title=None, subreddit=None, article="It rained.")
    demonstrations = [post_row(i) for i in range(20)]
    files, notes = tldr(tmp_path, tokenizer, demonstrations, [*map(comparison, range(20)), news])
    assert len(notes) == 1 and "it is about a news article, not a post" in notes[0] and "line 21" in notes[0]
    flat = []
    for i in range(20):
        row = {"r": "cats", "head": f"Cat {i}", "body": post_row()["post"]}
        flat.append({**row, "best": "A cat sits on keys.", "worse": "Cat."})  # without the leading space
    rows = [
        {"r": "cats", "head": f"Cat {i}", "body": post_row()["post"], "short": "Cat sits there."} for i in range(20)
    ]
    columns = dict(subreddit_column="r", title_column="head", post_column="body", summary_column="short")
    columns |= dict(chosen_column="best", rejected_column="worse")
    assert tldr(tmp_path, tokenizer, rows, flat, **columns)[0] == files
    assert tldr(tmp_path, tokenizer, rows, [comparison(i, 1.0) for i in range(20)], **columns)[0] == files


@pytest.mark.skipif(not DATA.is_dir(), reason="RLHF_DATA holds no tokenizer")
def test_tldr_lengths_with_the_published_tokenizer(tmp_path):
    """With the Pythias' tokenizer: prompts of at most 512 tokens, texts of 562 and 638, as the scripts read them."""
    folder = tmp_path / "neox"
    backend = Tokenizer.from_file(str(DATA / "tokenizers/20B_tokenizer.json"))
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end).save_pretrained(folder)
    stories = load_rows([str(DATA / "text/tinystories/valid.jsonl.gz")])[:120]
    texts = ["\n".join(story["text"] for story in stories[3 * i : 3 * i + 4]) for i in range(12)]
    demonstrations = [post_row(i, text, summary=text[: 100 + 20 * i]) for i, text in enumerate(texts)]
    comparisons = [comparison(i, 0, (" " + x[: 80 * i + 9], " " + x[9:90]), post=x) for i, x in enumerate(texts)]
    files, notes = tldr(tmp_path, str(folder), demonstrations, comparisons)
    for reason in ("a summary has more than 53 tokens", "a summary has more than 169 tokens"):
        assert any(reason in note for note in notes), notes
    tokenizer = load_tokenizer(folder)
    rows = {name: [Row(x, name) for x in files[f"{name}.jsonl"]] for name in ("sft", "prompts", "pairs", "rated")}
    prompts = prompt_rows(rows["prompts"], tokenizer, 0, 512, add_bos=False)
    lengths = [len(prompt.prompt_ids) for prompt in prompts]
    assert len(prompts) == len(rows["prompts"]) and 300 < min(lengths) and max(lengths) <= 512
    examples = sft_examples(rows["sft"], tokenizer, False, True, 562)
    for example, prompt in zip(examples, prompts, strict=True):
        assert example.input_ids[: len(prompt.prompt_ids)] == prompt.prompt_ids and example.input_ids[-1] == 0
        assert len(example.input_ids) - len(prompt.prompt_ids) <= 53 and all(example.loss_mask[1:])
    pairs = reward_model.read_pairs(rows["pairs"], tokenizer, False, 638)
    assert len(pairs) == len(rows["pairs"]) and len(
        ilql.read_dialogues(rows["rated"], tokenizer, False, 638)
    ) == 2 * len(pairs)


# --- own columns, files, bad input -----------------------------------------------------------------------------------


def test_pairs_of_any_columns(tmp_path):
    rows = [
        {"question": f"Is {i} even?", "good": " It is." if i % 2 == 0 else " No.", "bad": " Hm."} for i in range(20)
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    columns = dict(prompt_column="question", chosen_column="good", rejected_column="bad")
    files, notes = prepare(Pairs(output_dir="", source=(source,), **columns))
    assert not notes and len(files["pairs.jsonl"]) == 18
    assert {"prompt": "Is 4 even?", "completion": " It is."} in files["sft.jsonl"] + files["sft_eval.jsonl"]


def test_prompts_may_end_with_an_answer(tmp_path):
    """Where they list what to choose from."""
    rows = [
        {"prompt": f"Pet {i}: cats or dogs", "chosen": [" cats", " dogs"][i % 2], "rejected": [" dogs", " cats"][i % 2]}
        for i in range(20)
    ]
    files, notes = prepare(Pairs(output_dir="", source=(write(tmp_path / "rows.jsonl", rows),)))
    assert not notes and len(files["pairs.jsonl"] + files["pairs_eval.jsonl"]) == 20


def command(capsys, *flags):
    """(status, output, error) of python -m tasks.preferences."""
    capsys.readouterr()
    status = 0
    with mock.patch("sys.argv", ["preferences", *map(str, flags)]):
        try:
            launch(main, Command)
        except SystemExit as stop:
            status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def edited(rows, **changes):
    return [{changes.get(name, name): value for name, value in row.items()} for row in rows]


LONG = "\n\nHuman: Hello?\n\nAssistant: Hi.\n\nHuman: Bye.\n\nAssistant:"
HH_ERRORS = {
    "missing": (
        edited(split_rows(), chosen="choosen"),
        [
            ", line 1: there is no column `chosen` but prompt, choosen, rejected",
            "did you mean choosen?",
            "--chosen-col",
        ],
    ),
    "prompt and chosen swapped": (
        edited(split_rows(), prompt="chosen", chosen="prompt"),
        [
            "line 1: `prompt` does not end in '\\n\\nAssistant:'",
            "are they swapped?",
            "--prompt-column",
            "40 of 40 rows",
        ],
    ),
    "answers alone": (
        [{"chosen": " Yes.", "rejected": " No."}] * 9,
        ["line 1: `chosen` and `rejected` are no whole dialogues", "--prompt-column"],
    ),
    "of different rows": (
        [
            {"chosen": a["chosen"], "rejected": b["chosen"]}
            for a, b in zip(transcripts(8), transcripts(9)[1:], strict=True)
        ],
        ["line 1: `chosen` and `rejected` differ before their last answers", "--rejected-column"],
    ),
    "of another dialogue": (
        [{**row, "chosen": LONG + row["chosen"]} for row in split_rows()],
        ["line 1: `chosen` and `rejected` hold a turn of the human: they are not the last answers to `prompt`"],
    ),
    "null": ([{**split_rows()[0], "rejected": None}], ["line 1: `rejected` is None, not a string"]),
    "messages": (
        [{"chosen": [{"role": "assistant", "content": "x"}], "rejected": "y"}],
        ["line 1: `chosen` holds messages", "reward_model.py"],
    ),
    "nothing left": ([{**split_rows()[0], "chosen": " "}], ["none of 1 rows can be used", "an answer is empty"]),
    "one conversation": (split_rows(1), ["1 different conversations", "--eval-share"]),
}


@pytest.mark.parametrize("case", HH_ERRORS)
def test_hh_rejects_bad_rows(case, tmp_path, capsys):
    rows, parts = HH_ERRORS[case]
    source = write(tmp_path / "rows.jsonl", rows)
    status, _, err = command(capsys, "hh", "--source", source, "--output-dir", tmp_path / "out")
    assert status == 1 and err.startswith("error: ") and "Traceback" not in err
    assert all(part in err for part in [*parts, *([source] if "line" in parts[0] else [])]), err
    assert not (tmp_path / "out").exists()


PAIRS_ERRORS = {
    "prompt is the chosen answer": [
        {"prompt": r["chosen"], "chosen": r["chosen"], "rejected": "x"} for r in split_rows()
    ],
    "prompt and rejected swapped": [{"prompt": "a b c", "chosen": "x", "rejected": "a b"}] * 5,
    "prompt holds the whole text": [{"prompt": "Why? So.", "chosen": " So.", "rejected": " No."}] * 5,
}


@pytest.mark.parametrize("case", PAIRS_ERRORS)
def test_pairs_rejects_swapped_columns(case, tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", PAIRS_ERRORS[case])
    status, _, err = command(capsys, "pairs", "--source", source, "--output-dir", tmp_path / "out")
    assert status == 1 and f"{source}, line 1: `prompt` holds what `" in err, err
    assert "are columns swapped? --prompt-column, --chosen-column and --rejected-column" in err


def test_pairs_rejects_answers_that_repeat_the_prompt(tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", [{"prompt": "Why?", "chosen": "Why? So.", "rejected": "Why? No."}] * 5)
    status, _, err = command(capsys, "pairs", "--source", source, "--output-dir", tmp_path / "out")
    assert status == 1 and "line 1: `chosen` and `rejected` both begin with `prompt`" in err, err


def test_tldr_rejects_bad_rows(tmp_path, tokenizer, capsys):
    posts, comparisons = [post_row(i) for i in range(20)], [comparison(i) for i in range(20)]
    broken = [{**comparisons[0], "choice": 2}]
    cases = [
        (
            edited(posts, summary="abstract"),
            comparisons,
            ["demonstrations.jsonl, line 1", "`summary`", "--summary-column"],
        ),
        (edited(posts, summary="post", post="summary"), comparisons, ["`summary` is longer than `post`", "swapped?"]),
        (comparisons, comparisons, ["there is no column", "give them as --comparisons"]),
        (posts, posts, ["comparisons.jsonl, line 1", "no column `chosen`", "--chosen-column"]),
        (posts, broken, ["comparisons.jsonl, line 1", "`choice` 0 or 1"]),
        (edited(posts, subreddit="forum"), comparisons, ["no column `subreddit`", "--subreddit-column"]),
    ]
    for demonstrations, pairs, parts in cases:
        sources = (
            write(tmp_path / "demonstrations.jsonl", demonstrations),
            write(tmp_path / "comparisons.jsonl", pairs),
        )
        flags = ("--demonstrations", sources[0], "--comparisons", sources[1], "--tokenizer", tokenizer)
        status, _, err = command(capsys, "tldr", *flags, "--output-dir", tmp_path / "out")
        assert status == 1 and all(part in err for part in parts), (parts, err)
        assert not (tmp_path / "out").exists()


def test_folder_appears_whole(tmp_path, capsys, monkeypatch):
    """It is replaced on demand only, by nothing half-written, and never where other files lie."""
    source = write(tmp_path / "rows.jsonl", split_rows())
    args = HH(output_dir=str(tmp_path / "hh"), source=(source,))
    main(args)
    before = {path.name: path.read_text() for path in (tmp_path / "hh").iterdir()}
    with pytest.raises(ValueError, match="holds pairs.jsonl already: --overwrite"):
        main(args)
    with monkeypatch.context() as patch:
        patch.setattr("tasks.preferences.finish_folder", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(replace(args, overwrite=True, seed=2))
    assert {path.name: path.read_text() for path in (tmp_path / "hh").iterdir()} == before
    main(replace(args, overwrite=True, seed=2))
    assert {path.name: path.read_text() for path in (tmp_path / "hh").iterdir()} != before
    (tmp_path / "hh/empty").mkdir()
    monkeypatch.chdir(tmp_path / "hh/empty")
    with pytest.raises(ValueError, match="--output-dir . is replaced as a whole, and is where you are"):
        main(replace(args, output_dir="."))
    (tmp_path / "hh/empty").rmdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hh/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds notes.txt, which is not of this command"):
        main(replace(args, overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hh", "rows.jsonl"]


# --- the documented chains -------------------------------------------------------------------------------------------

LAPTOP, SIZES = "On a laptop", ("1B", "2.8B", "6.9B")
TASKS = {"HH: helpful and harmless": "hh", "TL;DR: summaries of Reddit posts": "tldr"}
SECTIONS = [(task, part) for task in TASKS for part in (LAPTOP, *(f"Pythia {size} on 8 GPUs" for size in SIZES))]
SECTIONS += [("Happy stories",)]


def split_command(line):
    """(script or module, flags) of a command."""
    words = shlex.split(line)
    place = next(i for i, word in enumerate(words) if word.endswith(".py") or word.startswith(("tasks.", "tests.")))
    return words[place], words[place + 1 :]


def parse(name, flags):
    """The arguments of a command, as its script reads them."""
    if name.startswith("tests."):
        return None
    module = importlib.import_module(name.removesuffix(".py"))
    return tyro.cli(Command if name == "tasks.preferences" else module.Args, args=flags)


@pytest.mark.parametrize("headings", SECTIONS, ids=" / ".join)
def test_chains_parse_and_read_what_they_have_made(headings):
    """Each file of a chain, and each model, is that of an earlier command."""
    lines = read_commands(CHAINS, *headings)
    if "8 GPUs" in headings[-1] and headings[0].startswith("TL;DR"):
        lines = read_commands(CHAINS, headings[0])[:1] + lines
    made = set()
    scripts = []
    for line in lines:
        name, flags = split_command(line)
        args = parse(name, flags)
        scripts.append(name)
        if name == "tests.rated_stories":
            assert flags[0] in made and importlib.util.find_spec(name)
            made.add(flags[1])
            continue
        for word in flags:
            if word.startswith(("data/", "runs/")) and word != args.output_dir:
                assert word in made, (name, word)
            if ":" in word and word.startswith("tests/"):
                assert callable(load_object(str(ROOT / word)))
        names = FILES if name == "tasks.preferences" else {"model", "best", "samples.jsonl"}
        made |= {f"{args.output_dir}/{name}" for name in names}
    scripts = [name for name in scripts if not name.startswith("tests.")]
    assert set(scripts) == {"tasks.preferences", *(path.name for path in ROOT.glob("*.py"))}


def test_own_columns_are_shown():
    [line] = read_commands(CHAINS, "Sets of your own")
    assert isinstance(parse(*split_command(line)), Pairs)


def print_plan(task, size, name, flags, folder):
    """What --plan prints of a documented command; the models of earlier ones are configs of the same size."""
    config = ROOT / f"tests/configs/pythia-{size.lower()}/config.json"
    for word in flags:
        if re.fullmatch(r"runs/.*/model", word):
            (folder / word).mkdir(parents=True, exist_ok=True)
            shutil.copy(config, folder / word)
    flags = [str(config.parent) if word.startswith("EleutherAI/") else word for word in flags]
    longest = {"hh": 896 if size == "1B" else 384, "tldr": 512}[task]
    flags += ["--plan", "80", "--world-size", "8", *(["--prompt-tokens", str(longest)] if name == "ppo.py" else [])]
    out = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out):
        importlib.import_module(name.removesuffix(".py")).main(parse(name, flags))
    return out.getvalue()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("heading", TASKS)
def test_large_chains_have_the_layouts_that_the_plan_recommends(heading, size, tmp_path):
    planned = set()
    for line in read_commands(CHAINS, heading, f"Pythia {size} on 8 GPUs"):
        name, flags = split_command(line)
        if name not in ("sft.py", "reward_model.py", "ppo.py", "ilql.py") or name in planned:
            continue
        assert "--nproc-per-node 8" in line and "--dtype bfloat16" in line
        planned.add(name)
        out = print_plan(TASKS[heading], size, name, flags, tmp_path)
        recommended = re.search(r"^recommended: (.*?), ", out, re.MULTILINE)
        given = re.match(r"(.*) on 8 ranks", out)
        assert recommended and given and recommended[1] == given[1], (line, out)
    assert len(planned) == 4


def make_model(folder):
    """A small decoder with one token per byte."""
    hf_config = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "vocab_size": 257}
    hf_config |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    hf_config |= {"max_position_embeddings": 512, "hidden_act": "gelu", "eos_token_id": 256, "bos_token_id": None}
    mesh = init_mesh()
    decoder = Decoder(config_from_hf(hf_config, str(folder))[0], mesh, seed=1)
    decoder.hf_config = hf_config
    save_decoder(decoder, folder, mesh, byte_tokenizer(folder / "tokenizer"))
    return str(folder)


@pytest.mark.parametrize("heading", TASKS)
def test_laptop_chain(heading, tmp_path, monkeypatch, capsys):
    """Every command as documented, on rows of our own, with a small model and few steps, up to the win-rates."""
    model = make_model(tmp_path / "model")
    monkeypatch.setenv("RLHF_DATA", str(tmp_path / "real"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real/models").mkdir(parents=True)
    shutil.copytree(model, tmp_path / "real/models/stories260k")
    folder = tmp_path / "real/preferences/hh_harmless"
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        with gzip.open(folder / f"{part}.jsonl.gz", "wt") as file:
            rows = transcripts(72)
            file.writelines(json.dumps(row) + "\n" for row in (rows[:60] if part == "train" else rows[60:]))
    published = {"EleutherAI/pythia-14m": model}
    for part, numbers in (("", range(60)), (":validation", range(60, 80))):
        pairs = [comparison(i, i % 2, (" Sat.", " Sat!")[:: 1 if i % 2 else -1]) for i in numbers]
        for name, rows in (("tldr_3_filtered", map(post_row, numbers)), ("oai_preprocessing_1706381144", pairs)):
            path = tmp_path / f"{name}{part.strip(':')}.jsonl"
            published[f"vwxyzjn/summarize_from_feedback_{name}{part}"] = write(path, rows)
    sizes = {
        "sft.py": "--max-steps 20 --eval-every 20 --save-every 20 --batch-size 8 --optim.lr 1e-2",
        "reward_model.py": "--max-steps 30 --eval-every 30 --save-every 30 --batch-size 8 --optim.lr 1e-2",
        "ppo.py": "--max-iterations 1 --eval-every 1 --save-every 1 --batch-size 8 --minibatch-size 8 --eval-samples 4",
        "ilql.py": "--max-steps 2 --eval-every 2 --save-every 2 --batch-size 8 --eval-samples 4 --advantage-scales 0 4",
        "evaluate.py": "--num-prompts 4 --samples-per-prompt 1",
    }
    for line in read_commands(CHAINS, heading, LAPTOP):
        name, flags = split_command(os.path.expandvars(line))
        flags = [published.get(word, word) for word in flags]
        if name == "tasks.preferences":
            assert command(capsys, *flags)[0] == 0
            continue
        flags += sizes[name].split()
        if "--sampling.max-new-tokens" in flags:
            flags += ["--sampling.max-new-tokens", "8"]
        if "ilql-answers" in flags[flags.index("--output-dir") + 1]:
            flags += ["--max-steps", "0", "--advantage-scales", "4", "--eval-samples", "8"]
        run_on_ranks(name, *flags, cwd=tmp_path, ranks=2)
    [runs], [files] = ((tmp_path / name).iterdir() for name in ("runs", "data"))
    losses = [row["eval_loss"] for row in read_rows(runs / "sft", "eval")]
    assert losses[-1] < 0.6 * losses[0], losses
    for judge in ("reward", "judge"):
        assert read_rows(runs / judge, "eval")[-1]["eval_accuracy"] > 0.9
    assert read_rows(runs / "ppo")[-1]["kl"] is not None
    sampled = read(runs / "ilql-answers/samples.jsonl")
    assert len(sampled) == 8 and all(x["scale"] == 4 and isinstance(x["finished"], bool) for x in sampled)
    for name in ("ppo", "ilql"):
        results = json.loads((runs / f"evaluate-{name}/results.json").read_text())
        [setting] = results["settings"]
        samples = read(runs / f"evaluate-{name}/samples.jsonl")
        wins = [(x["score"] > x["other_score"]) + (x["score"] == x["other_score"]) / 2 for x in samples]
        assert results["num_prompts"] == len(wins) == 4 and setting["win_rate"] == sum(wins) / 4
        assert {x["prompt"] for x in samples} <= {x["prompt"] for x in read(files / "prompts_eval.jsonl")}
