"""Answers that lie there already: reference answers of data, files of what was sampled before; how alike two are.

They become samples like those of a model: the tokens that follow the prompt's own and, if they are finished, the EOS.
"""

import re
from collections import Counter

from parallel.data import PromptRow, encode_parts, is_message, prompt_rows
from parallel.rows import Row, load_rows
from tasks.rewards import Sample

FIELDS = ("completion", "chosen", "response")  # that may hold a row's reference answer
MANY = 4  # rows of which all answers repeat their prompts by no accident


def is_file(spec: str) -> bool:
    return spec.endswith((".jsonl", ".jsonl.gz"))


def lies_there(spec: str) -> bool:
    """Whether a spec names answers and no model."""
    return spec == "data" or is_file(spec)


def split_answer(row: Row) -> Row:
    """A row as a prompt; its answer, if it has one, becomes `reference`, a string.

    Raises: ValueError naming the row whose columns are missing or do not fit together.
    """
    fields = dict(row)
    if "rejected" in row and "chosen" not in row:
        raise row.misfit("`chosen` beside `rejected`")
    pair = [name for name in ("chosen", "rejected") if name in row]
    if len({isinstance(row[name], list) for name in pair}) == 2:
        raise row.misfit("`chosen` and `rejected` both as strings or both as messages")
    if pair and isinstance(row["chosen"], list):  # messages, of which the last is the answer
        for name in pair:
            if not row[name] or not all(map(is_message, row[name])):
                raise ValueError(f"{row.where}: `{name}` should be a list of objects with `role` and `content`")
        opening, prompt = row["chosen"][:-1], fields.pop("prompt", [])
        if opening != row[pair[-1]][:-1]:
            raise ValueError(f"{row.where}: `chosen` and `rejected` differ before their last message")
        if isinstance(prompt, str) and not opening:
            raise ValueError(f"{row.where}: beside a single message `prompt` should be messages too")
        if isinstance(prompt, list) and opening[: len(prompt)] != prompt:
            opening = prompt + opening
        fields |= {name: row[name][-1]["content"] for name in pair}
        fields |= {"messages": opening, "reference": fields["chosen"]}
    elif name := next((name for name in FIELDS if name in row), None):
        if not {"prompt", "messages", "text"} & row.keys():
            raise row.misfit(f"`prompt` beside `{name}` (of whole dialogues, tasks/preferences.py makes both)")
        fields["reference"] = row.text(name)
    elif isinstance(row.get("messages"), list) and row["messages"] and is_message(row["messages"][-1]):
        *opening, last = row["messages"]
        if last["role"] == "assistant":
            fields |= {"messages": opening, "reference": last["content"]}
    result = Row(fields, row.where)
    if "rejected" in row and result.text("chosen") == result.text("rejected"):
        raise ValueError(f"{row.where}: `chosen` and `rejected` are the same text: there is nothing to prefer")
    return result


def read_prompts(
    rows: list[Row], flag: str, tokenizer, prompt_tokens: int, max_prompt_len: float, add_bos: bool
) -> list[PromptRow]:
    """Prompts as `prompt_rows` makes them, each with its reference answer in its metadata.

    Args: flag: what needs the reference answers, "" if nothing does.
    Raises: ValueError naming the row that lacks its prompt or answer, or whose answer repeats the prompt.
    """
    rows = [split_answer(row) for row in rows]
    for row in rows if flag else ():
        if "reference" not in row:
            names = "`completion`, `chosen` or `response`, or the assistant's turn at the end of `messages`"
            raise row.misfit(f"a reference answer, for {flag}: {names}")
        if not row["reference"].strip():
            raise ValueError(f"{row.where}: its reference answer is empty")
    repeats = [bool(row.get("prompt")) and row.get("reference", "").startswith(str(row["prompt"])) for row in rows]
    if len(rows) >= MANY and all(repeats):
        raise ValueError(
            f"{rows[0].where}: the answer begins with the prompt, as in all rows: leave the prompt out of it, or, if "
            "the two columns are swapped, swap them back"
        )
    return prompt_rows(rows, tokenizer, prompt_tokens, max_prompt_len, add_bos)


def given_answers(
    spec: str, kind: str, flag: str, prompts: list[PromptRow], samples_per_prompt: int, tokenizer
) -> list[Sample]:
    """The answers that a spec names, one for each sample of each prompt; of data the reference answer for all.

    Args: kind, flag: see `read_answers`.
    """
    if spec == "data":
        texts = [(row.metadata["reference"], True) for row in prompts for _ in range(samples_per_prompt)]
    else:
        texts = take_answers(read_answers(spec, kind, flag), prompts, samples_per_prompt, spec)
    return make_text_samples(prompts, texts, tokenizer)


def read_answers(spec: str, kind: str, flag: str) -> dict[str, list[tuple[str, bool]]]:
    """The answers of a file by prompt, each with whether it ended by itself: of one kind and the newest iteration.

    Args: kind: of rows that have a `kind` or `scale`; "" if there is only one. flag: that names it.
    """
    rows = load_rows([spec])
    for row in rows:
        if "prompt" not in row or "response" not in row:
            raise row.misfit("`prompt` and `response`, as a run's samples.jsonl has them")
        if not isinstance(row.get("finished", True), bool):
            raise ValueError(f"{row.where}: `finished` is {row['finished']!r:.40}, neither true nor false")

    def kind_of(row: Row) -> str:
        found = row.get("kind", row.get("scale", ""))
        return f"{found:g}" if isinstance(found, float) else str(found)

    kinds = dict.fromkeys(map(kind_of, rows))
    if kind not in kinds and (kind or len(kinds) > 1):
        raise ValueError(f"{spec} holds answers of the kinds {', '.join(map(repr, kinds))}: {flag} should name one")
    rows = [row for row in rows if not kind or kind_of(row) == kind]
    iterations = [row.number(row.get("iteration", 0), "its `iteration` is") for row in rows]
    found: dict[str, list[tuple[str, bool]]] = {}
    for row, iteration in zip(rows, iterations, strict=True):
        if iteration == max(iterations):
            found.setdefault(row.text("prompt"), []).append((row.text("response"), row.get("finished", True)))
    return found


def take_answers(
    found: dict[str, list[tuple[str, bool]]], prompts: list[PromptRow], samples_per_prompt: int, spec: str
) -> list[tuple[str, bool]]:
    """For each of a prompt's samples its next answer, over again where there are fewer; a prompt may come again.

    Raises: ValueError naming the file and the prompt that has none.
    """
    taken: Counter[str] = Counter()
    answers = []
    for row in prompts:
        if row.prompt not in found:
            raise ValueError(
                f"{spec} has no answer to the prompt {row.prompt!r:.120}, only to {len(found)} others: give the "
                "--data, --prompt-tokens and --tokenizer that it was sampled with, or fewer --num-prompts"
            )
        for _ in range(samples_per_prompt):
            answers.append(found[row.prompt][taken[row.prompt] % len(found[row.prompt])])
            taken[row.prompt] += 1
    return answers


def make_text_samples(prompts: list[PromptRow], answers: list[tuple[str, bool]], tokenizer) -> list[Sample]:
    """Texts as if they had been sampled; each prompt has as many."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = [prompts[i * len(prompts) // len(answers)] for i in range(len(answers))]
    ids_of = encode_parts(tokenizer, [[row.prompt, text] for row, (text, _) in zip(rows, answers, strict=True)])
    return [
        Sample(row.prompt, text, row.prompt_ids, ids + eos * finished, finished, row.metadata)
        for row, (text, finished), (_, ids) in zip(rows, answers, ids_of, strict=True)
    ]


def count_common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, a bit for each word of `a`. Source: Hyyro 2004."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    row = everywhere = (1 << len(a)) - 1  # a bit is 0 where the length grows
    for word in b:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & everywhere
    return len(a) - row.bit_count()


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words: lower case, letters and digits of ASCII, no stemming.

    Source: Lin 2004, section 3.
    """
    a, b = (re.findall("[a-z0-9]+", text.lower()) for text in (answer, reference))
    common = count_common(a, b)
    return 2 * common / (len(a) + len(b)) if common else 0.0
