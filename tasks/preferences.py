r"""The two classic preference tasks as files that the scripts read: Anthropic's HH, OpenAI's TL;DR, and sets like them.

    python -m tasks.preferences hh --source Anthropic/hh-rlhf --eval-source Anthropic/hh-rlhf:test --output-dir data/hh
    python -m tasks.preferences tldr --tokenizer EleutherAI/pythia-1b-deduped --output-dir data/tldr
    python -m tasks.preferences pairs --source my.jsonl --prompt-column question --output-dir data/mine

A source is a hub name (with `datasets` installed), JSONL files, or folders of them. The folder then holds, each with a
twin NAME_eval.jsonl from the evaluation's source, or of conversations, posts or prompts that are held out,

    sft.jsonl      `text`, or `prompt` and `completion`    demonstrations for sft.py
    pairs.jsonl    `prompt`, `chosen`, `rejected`          for reward_model.py
    prompts.jsonl  `prompt`, `completion`                  each prompt once, with a human's or the chosen answer: for
                                                           ppo.py, evaluate.py, and as reward_model.py's demonstrations
    rated.jsonl    `prompt`, `response`, `reward`          chosen answers as +1, rejected ones as -1: for ilql.py

and, if asked for, judge.jsonl: pairs that none of the above knows, for a reward model that judges the others.

HH: whole dialogues are split at the last "\n\nAssistant:" that both share; it ends the prompt. TL;DR: a prompt is

    SUBREDDIT: r/<subreddit>\n\nTITLE: <title>\n\nPOST: <post>\n\nTL;DR:

where a post that makes it longer than 512 tokens is cut at its last newline until it fits (without a newline, by a
character); a response is a space and the summary. The scripts add the EOS, which counts in all lengths.

Sources: Bai et al. 2022 (arXiv 2204.05862: HH); Stiennon et al. 2020 (2009.01325: TL;DR, its prompts and their cut);
Huang et al. 2024 (2403.17031: lengths, and a loss on prompts, too); trlX (Havrilla et al. 2023: +1 and -1 for ILQL).
Differs from them: what is too long is left out instead of cut, and said.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from parallel.data import encode, epoch_order, load_tokenizer
from parallel.files import discard_folder, finish_folder, start_folder
from parallel.rows import Row, load_rows, similar
from parallel.run import launch

ASSISTANT, HUMAN = "\n\nAssistant:", "\n\nHuman:"
TLDR_PROMPT = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
KINDS = ("sft", "pairs", "prompts", "rated")
FILES = {f"{kind}{part}.jsonl" for kind in KINDS for part in ("", "_eval")} | {"judge.jsonl"}
MAX_MISFITS = 0.1  # of the rows: published sets have a few odd ones, the wrong columns make all odd


@dataclass
class Common:
    """Flags of all three."""

    output_dir: str
    """folder of the files; it appears whole or not at all"""
    overwrite: bool = False
    """replace the files that --output-dir holds"""
    eval_share: float = 0.1
    """of the conversations, posts or prompts, held out where no source for evaluation is given"""
    judge_share: float = 0.0
    """of the same, whose pairs go to judge.jsonl and nowhere else"""
    seed: int = 1
    """of what is held out"""
    loss_on_prompts: bool = True
    """sft.jsonl holds whole texts, as in the published recipes; otherwise sft.py has its loss on the answers alone"""

    def __post_init__(self):
        for name in ("eval_share", "judge_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is no share: from 0 to below 1")


@dataclass
class HH(Common):
    """Dialogues of a human and an assistant with two last answers, as Anthropic published them or split already."""

    source: tuple[str, ...] = ("Anthropic/hh-rlhf",)
    """JSONL files, folders or hub names"""
    eval_source: tuple[str, ...] = ()
    """the same for the evaluation; none = --eval-share of --source"""
    prompt_column: str = "prompt"
    """dialogue before the last answers; rows without it hold whole dialogues in the other two"""
    chosen_column: str = "chosen"
    """preferred answer, or whole dialogue"""
    rejected_column: str = "rejected"
    """the other one"""
    max_prompt_tokens: int = 0
    """leave longer prompts out of prompts.jsonl; 0 = none"""
    tokenizer: str = ""
    """folder or hub id, to count those tokens"""

    def read(self, row: Row) -> "Pair":
        return read_dialogue(row, self.prompt_column, self.chosen_column, self.rejected_column)


@dataclass
class Pairs(HH):
    """Prompts with two answers each, under any column names. Prompt and answer are joined with nothing between."""

    source: tuple[str, ...] = ()
    """JSONL files, folders or hub names"""
    loss_on_prompts: bool = False
    """sft.jsonl holds whole texts; otherwise sft.py has its loss on the answers alone"""

    def read(self, row: Row) -> "Pair":
        return read_answers(row, self.prompt_column, self.chosen_column, self.rejected_column)


@dataclass
class TLDR(Common):
    """Posts with summaries, and pairs of summaries of which one was preferred."""

    tokenizer: str = "EleutherAI/pythia-1b-deduped"
    """folder or hub id: counts the tokens; the Pythias of all sizes have the same"""
    demonstrations: tuple[str, ...] = ("vwxyzjn/summarize_from_feedback_tldr_3_filtered",)
    """JSONL files, folders or hub names; rows of subreddit, title, post, summary"""
    eval_demonstrations: tuple[str, ...] = ()
    """the same for the evaluation (published: NAME:validation); none = --eval-share of --demonstrations"""
    comparisons: tuple[str, ...] = ("vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144",)
    """likewise; rows of `info`, `summaries`, `choice` as published, or of subreddit, title, post, chosen, rejected"""
    eval_comparisons: tuple[str, ...] = ()
    """the same for the evaluation; none = --eval-share of --comparisons"""
    subreddit_column: str = "subreddit"
    """where a post appeared"""
    title_column: str = "title"
    """of the post"""
    post_column: str = "post"
    """its text"""
    summary_column: str = "summary"
    """a human's, in --demonstrations"""
    chosen_column: str = "chosen"
    """preferred summary, in --comparisons"""
    rejected_column: str = "rejected"
    """the other one"""
    prompt_tokens: int = 512
    """of a prompt, at most: posts are cut"""
    sft_response_tokens: int = 53
    """of a summary in --demonstrations, at most; longer ones are left out"""
    sft_tokens: int = 562
    """of prompt and summary together"""
    pair_response_tokens: int = 169
    """of a summary in --comparisons, at most; longer ones are left out"""
    pair_tokens: int = 638
    """of prompt and summary together"""


# --- rows ------------------------------------------------------------------------------------------------------------


@dataclass
class Demonstration:
    """A prompt with a good answer."""

    prompt: str
    completion: str
    topic: str  # what is held out never shares it


@dataclass
class Pair:
    """A prompt with two answers."""

    prompt: str
    chosen: str
    rejected: str
    topic: str


class Unusable(ValueError):
    """Why a row is left out."""


class Misfit(ValueError):
    """What is wrong with a row; many of them are an error."""


def read_rows(rows: list[Row], read: Callable[[Row], object]) -> tuple[list, dict[str, list[str]]]:
    """What `read` makes of each row, and by reason where the rows stand that are left out.

    Raises: ValueError for a missing column; the first Misfit's, if more than MAX_MISFITS of the rows are such, or if
        nothing is left.
    """
    found, left_out, misfits = [], {}, []
    for row in rows:
        try:
            found.append(read(row))
        except Unusable as reason:
            left_out.setdefault(str(reason), []).append(row.where)
        except Misfit as misfit:
            misfits.append(f"{row.where}: {misfit}")
    if len(misfits) > MAX_MISFITS * len(rows):
        raise ValueError(f"{misfits[0]} ({len(misfits):,} of {len(rows):,} rows are like this)")
    if misfits:
        left_out["odd"] = misfits
    if not found:
        reason, where = next(iter(left_out.items()))
        raise ValueError(f"none of {len(rows):,} rows can be used; {where[0]}: {reason}")
    return found, left_out


def column(row: Row, name: str, flag: str) -> str:
    """A text field. Raises: ValueError that names what the row has instead, and the flag that names another column."""
    if name not in row:
        close = similar(name, row)
        hint = f"did you mean {close[0]}? " if close else ""
        hint += "these are comparisons of summaries: give them as --comparisons. " if "summaries" in row else ""
        raise ValueError(
            f"{row.where}: there is no column `{name}` but {', '.join(row) or 'none at all'}; {hint}"
            f"{flag} names the right one"
        )
    if isinstance(row[name], list):
        raise ValueError(f"{row.where}: `{name}` holds messages; sft.py and reward_model.py read those as they are")
    return row.text(name)


def make_pair(prompt: str, chosen: str, rejected: str, topic: str) -> Pair:
    if not chosen.strip() or not rejected.strip():
        raise Unusable("an answer is empty")
    if chosen == rejected:
        raise Unusable("both answers are the same")
    return Pair(prompt, chosen, rejected, topic)


def read_dialogue(row: Row, prompt_column: str, chosen_column: str, rejected_column: str) -> Pair:
    """The dialogue up to its last "Assistant:", and what two assistants then said. Its topic is how it began."""
    chosen, rejected = column(row, chosen_column, "--chosen-column"), column(row, rejected_column, "--rejected-column")
    names = f"`{chosen_column}` and `{rejected_column}`"
    if prompt_column in row:
        prompt = row.text(prompt_column)
        if not prompt.rstrip().endswith(ASSISTANT):
            swapped = "; other columns do: are they swapped? " if chosen.rstrip().endswith(ASSISTANT) else "; "
            raise Misfit(
                f"`{prompt_column}` does not end in {ASSISTANT!r}{swapped}"
                f"--prompt-column, --chosen-column and --rejected-column name them"
            )
        if chosen.startswith(prompt) and rejected.startswith(prompt):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        if HUMAN in chosen or HUMAN in rejected:
            raise Misfit(f"{names} hold a turn of the human: they are not the last answers to `{prompt_column}`")
    else:
        if ASSISTANT not in chosen or ASSISTANT not in rejected:
            raise Misfit(
                f"{names} are no whole dialogues, for one has no {ASSISTANT!r}, and there is no column "
                f"`{prompt_column}`: --prompt-column names that of the dialogue before them"
            )
        opening = os.path.commonprefix([chosen, rejected])
        split = opening.rfind(ASSISTANT) + len(ASSISTANT)
        prompt, chosen, rejected = chosen[:split], chosen[split:], rejected[split:]
        if ASSISTANT not in opening or HUMAN in chosen or HUMAN in rejected:
            raise Misfit(
                f"{names} differ before their last answers: they do not continue the same dialogue; --chosen-column "
                "and --rejected-column name the right columns"
            )
    return make_pair(prompt, chosen, rejected, prompt.partition(ASSISTANT)[0])


def read_answers(row: Row, prompt_column: str, chosen_column: str, rejected_column: str) -> Pair:
    """A prompt and its two answers, as they stand there."""
    prompt = column(row, prompt_column, "--prompt-column")
    chosen, rejected = column(row, chosen_column, "--chosen-column"), column(row, rejected_column, "--rejected-column")
    if prompt and chosen.startswith(prompt) and rejected.startswith(prompt):
        raise Misfit(
            f"`{chosen_column}` and `{rejected_column}` both begin with `{prompt_column}`: leave it out of the answers"
        )
    return make_pair(prompt, chosen, rejected, prompt)


def reject_swapped(rows: list[Row], args: "Pairs") -> None:
    """Raises ValueError if nearly all prompts begin or end with their chosen answers, or with their rejected ones.

    Single ones do by right, such as those that end with the options to choose from.
    """
    for name in (args.chosen_column, args.rejected_column):
        held = []
        for row in rows:
            prompt, answer = row[args.prompt_column].strip(), row[name].strip()
            if answer and (prompt.startswith(answer) or prompt.endswith(answer)):
                held.append(row.where)
        if len(held) > (1 - MAX_MISFITS) * len(rows):
            raise ValueError(
                f"{held[0]}: `{args.prompt_column}` holds what `{name}` says: are columns swapped? --prompt-column, "
                f"--chosen-column and --rejected-column name them ({len(held):,} of {len(rows):,} rows are like this)"
            )


class Summaries:
    """Rows of TL;DR, with a tokenizer that counts."""

    def __init__(self, args: TLDR, tokenizer):
        self.args, self.tokenizer = args, tokenizer

    def count(self, text: str) -> int:
        return len(encode(self.tokenizer, [text])[0])

    def prompt(self, row: Row) -> str:
        """The prompt of a row's post, cut where it is too long."""
        args = self.args
        fields = {
            "subreddit": column(row, args.subreddit_column, "--subreddit-column"),
            "title": column(row, args.title_column, "--title-column"),
            "post": column(row, args.post_column, "--post-column"),
        }
        if not fields["post"].strip():
            raise Unusable("the post is empty")
        while (excess := self.count(text := TLDR_PROMPT.format(**fields)) - args.prompt_tokens) > 0:
            post = fields["post"]
            if not post:
                raise Unusable(f"the prompt has more than {args.prompt_tokens} tokens without its post")
            step = max(1, excess // 8)  # as if character by character: none has 8 tokens
            fields["post"] = post[: post.rfind("\n")] if "\n" in post else post[:-step]
        return text

    def check_lengths(self, prompt: str, response: str, of_response: int, together: int) -> None:
        if self.count(response) + 1 > of_response:  # and the EOS
            raise Unusable(f"a summary has more than {of_response} tokens")
        if self.count(prompt + response) + 1 > together:
            raise Unusable(f"prompt and summary have more than {together} tokens")

    def check_order(self, row: Row, name: str, summary: str) -> None:
        if len(summary) > len(row[self.args.post_column]):
            raise Misfit(
                f"`{name}` is longer than `{self.args.post_column}`: are columns swapped? --post-column and "
                f"--{'summary' if name == self.args.summary_column else 'chosen'}-column name them"
            )

    def read_demonstration(self, row: Row) -> Demonstration:
        args, summary = self.args, column(row, self.args.summary_column, "--summary-column")
        prompt, response = self.prompt(row), " " + summary
        self.check_order(row, args.summary_column, summary)
        if not summary.strip():
            raise Unusable("the summary is empty")
        self.check_lengths(prompt, response, args.sft_response_tokens, args.sft_tokens)
        return Demonstration(prompt, response, prompt)

    def read_comparison(self, row: Row) -> Pair:
        args = self.args
        if "info" in row and "summaries" in row:
            row = flatten(row, args)
        prompt = self.prompt(row)
        answers = []
        for name, flag in ((args.chosen_column, "--chosen-column"), (args.rejected_column, "--rejected-column")):
            answer = column(row, name, flag)
            self.check_order(row, name, answer)
            answers.append(answer if answer[:1].isspace() else " " + answer)  # the published ones begin with a space
        pair = make_pair(prompt, *answers, prompt)
        for answer in answers:
            self.check_lengths(prompt, answer, args.pair_response_tokens, args.pair_tokens)
        return pair


def flatten(row: Row, args: TLDR) -> Row:
    """A comparison as published, with its post and both summaries as columns."""
    info, summaries, choice = row["info"], row["summaries"], row.get("choice")
    texts = [s.get("text") for s in summaries if isinstance(s, dict)] if isinstance(summaries, list) else []
    if not isinstance(info, dict) or len(texts) != 2 or isinstance(choice, bool) or choice not in (0, 1):
        raise ValueError(
            f"{row.where}: a comparison has `info` with the post, two `summaries` with `text`, and `choice` 0 or 1"
        )
    if info.get("post") is None and info.get("article") is not None:
        raise Unusable("it is about a news article, not a post")
    names = {args.subreddit_column: "subreddit", args.title_column: "title", args.post_column: "post"}
    fields = {name: info[published] for name, published in names.items() if published in info}
    answers = {args.chosen_column: texts[int(choice)], args.rejected_column: texts[int(1 - choice)]}
    return Row({**fields, **answers}, row.where)


# --- files -----------------------------------------------------------------------------------------------------------


def split_topics(topics: list[str], eval_share: float, args: Common) -> dict[str, str]:
    """For each topic "eval", "judge" or "train": shares of the different ones, drawn by --seed."""
    different = list(dict.fromkeys(topics))
    num_eval, num_judge = (math.ceil(share * len(different)) for share in (eval_share, args.judge_share))
    if num_eval + num_judge >= len(different):
        raise ValueError(
            f"{len(different)} different conversations, posts or prompts leave nothing to train on beside {num_eval} "
            f"for evaluation (--eval-share) and {num_judge} for a judge (--judge-share)"
        )
    parts = ["eval"] * num_eval + ["judge"] * num_judge
    parts += ["train"] * (len(different) - len(parts))
    return {different[i]: part for i, part in zip(epoch_order(len(different), args.seed, 0), parts, strict=True)}


def make_files(demonstrations: dict[str, list], pairs: dict[str, list], args: Common, fits) -> dict[str, list[dict]]:
    """The rows of each file, from what is to "train", "eval" and "judge"; fits(prompt) says what may be sampled."""
    files = {}
    for part, suffix in (("train", ""), ("eval", "_eval")):
        some, prompts = demonstrations[part], {}
        for x in some:
            prompts.setdefault(x.prompt, x.completion)
        texts = [{"text": x.prompt + x.completion} for x in some]
        turns = [{"prompt": x.prompt, "completion": x.completion} for x in some]
        files[f"sft{suffix}.jsonl"] = texts if args.loss_on_prompts else turns
        files[f"pairs{suffix}.jsonl"] = [pair_row(pair) for pair in pairs[part]]
        files[f"prompts{suffix}.jsonl"] = [{"prompt": p, "completion": c} for p, c in prompts.items() if fits(p)]
        files[f"rated{suffix}.jsonl"] = [
            {"prompt": pair.prompt, "response": response, "reward": reward}
            for pair in pairs[part]
            for response, reward in ((pair.chosen, 1), (pair.rejected, -1))
        ]
    if pairs["judge"]:
        files["judge.jsonl"] = [pair_row(pair) for pair in pairs["judge"]]
    return files


def pair_row(pair: Pair) -> dict:
    return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}


def prepare(args) -> tuple[dict[str, list[dict]], list[str]]:
    """The rows of each file, and lines that say what was left out of them."""
    notes, fits = [], lambda prompt: True

    def load(sources: tuple[str, ...], read) -> list:
        rows = load_rows(sources)
        found, left_out = read_rows(rows, read)
        for reason, where in left_out.items():
            notes.append(f"left out {len(where):,} of {len(rows):,} rows of {' '.join(sources)}: {reason}, {where[0]}")
        if isinstance(args, Pairs):
            reject_swapped(rows, args)
        return found

    if isinstance(args, TLDR):
        summaries = Summaries(args, load_tokenizer(args.tokenizer))
        read_pair, read_demonstration = summaries.read_comparison, summaries.read_demonstration
        if bool(args.eval_demonstrations) != bool(args.eval_comparisons):
            raise ValueError("give both --eval-demonstrations and --eval-comparisons, or neither")
        demonstrations = load(args.demonstrations, read_demonstration)
        pairs = load(args.comparisons, read_pair)
        eval_demonstrations = load(args.eval_demonstrations, read_demonstration) if args.eval_demonstrations else []
        eval_pairs = load(args.eval_comparisons, read_pair) if args.eval_comparisons else []
    else:
        if args.max_prompt_tokens:
            if not args.tokenizer:
                raise ValueError("--max-prompt-tokens counts tokens: --tokenizer says whose")
            tokenizer = load_tokenizer(args.tokenizer)

            def fits(prompt: str) -> bool:
                return len(encode(tokenizer, [prompt])[0]) <= args.max_prompt_tokens

        pairs = load(args.source, args.read)
        eval_pairs = load(args.eval_source, args.read) if args.eval_source else []
        demonstrations, eval_demonstrations = (
            [Demonstration(x.prompt, x.chosen, x.topic) for x in some] for some in (pairs, eval_pairs)
        )

    eval_share = 0.0 if eval_pairs else args.eval_share
    part_of = split_topics([x.topic for x in demonstrations + pairs], eval_share, args)
    held_out = {x.topic for x in eval_demonstrations + eval_pairs}
    known = len(held_out & part_of.keys())
    if held_out and known == len(held_out):
        raise ValueError("all prompts of the evaluation's rows are in the others, too: give rows that are held out")
    if known:
        notes.append(f"{known} of the evaluation's {len(held_out)} topics are in training, too")

    def divide(items: list, eval_items: list) -> dict[str, list]:
        parts = {name: [x for x in items if part_of[x.topic] == name] for name in ("train", "eval", "judge")}
        return {**parts, "eval": parts["eval"] + eval_items}

    files = make_files(divide(demonstrations, eval_demonstrations), divide(pairs, eval_pairs), args, fits)
    for suffix in ("", "_eval"):
        for kind in KINDS:
            if not files[f"{kind}{suffix}.jsonl"]:
                raise ValueError(
                    f"{kind}{suffix}.jsonl would be empty: give more rows, room for longer ones, or a larger share"
                )
    return files, notes


def write_files(folder: Path, files: dict[str, list[dict]], overwrite: bool) -> None:
    """Writes the folder whole. Raises: ValueError if it holds something else, or files of before without overwrite."""
    if folder.resolve() == Path.cwd():
        raise ValueError(f"--output-dir {folder} is replaced as a whole, and is where you are: give a folder in it")
    held = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in held if name not in FILES]
    if foreign:
        raise ValueError(f"{folder} holds {foreign[0]}, which is not of this command: give another --output-dir")
    if held and not overwrite:
        raise ValueError(f"{folder} holds {held[0]} already: --overwrite replaces such files")
    try:
        temporary = start_folder(folder)
        for name, rows in files.items():
            with open(temporary / name, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        finish_folder(folder)
    except BaseException:
        discard_folder(folder)
        raise


def main(args) -> None:
    files, notes = prepare(args)
    write_files(Path(args.output_dir), files, args.overwrite)
    for line in notes:
        print(line)
    for name, rows in files.items():
        print(f"{Path(args.output_dir) / name}  {len(rows):,} rows")


Command = (
    Annotated[HH, tyro.conf.subcommand("hh")]
    | Annotated[TLDR, tyro.conf.subcommand("tldr")]
    | Annotated[Pairs, tyro.conf.subcommand("pairs")]
)

if __name__ == "__main__":
    launch(main, Command)
