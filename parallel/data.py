"""From rows to tensors: tokens, prompts and demonstrations, which rows come next, and packing.

Everything here is a pure function of its arguments; every rank has the same rows and takes its slice of them.

A continuation's tokens are those that follow its prompt's own (`encode_parts`), so that what a model learns to continue
is, id by id, what it is later asked to continue.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from parallel.rows import Row, reject_missing_folder, warn

PACK_LEN = 32  # packed rows are at least this long: on a CPU short rows keep attention cheap beside the matrix products

# For tokenizers without a chat template. As in any template, an undefined token renders as nothing.
PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


# --- tokens ---------------------------------------------------------------------------------------------------------


def load_tokenizer(path_or_id: str | Path):
    """The tokenizer of a folder or hub id. Raises: ValueError or FileNotFoundError naming it."""
    from transformers import AutoTokenizer

    reject_missing_folder(str(path_or_id))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_id)
        if not set(tokenizer.get_vocab()).difference(tokenizer.all_special_tokens):  # what some are without any file
            raise ValueError("it has no vocabulary")
        return tokenizer
    except Exception as error:
        where = "folder" if Path(path_or_id).is_dir() else "folder or hub id"
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"no tokenizer can be loaded from the {where} {path_or_id} ({type(error).__name__}: {reason}); "
            "--tokenizer names another one"
        ) from error


def check_vocabulary(tokenizer, config, name: str = "the model") -> None:
    """Raises ValueError if the tokenizer can give an id that the model has no row for."""
    num_ids = max(tokenizer.get_vocab().values()) + 1
    if num_ids > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {num_ids} ids but {name} only {config.vocab_size} rows: give the --tokenizer that "
            "the model was trained with"
        )


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of each text, without the tokens that the tokenizer puts around a text."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def encode_parts(tokenizer, parts_of: list[list[str]]) -> list[list[list[int]]]:
    """Ids of each part of each text, a part's being those that follow the ids of the parts before it.

    Where a token would reach across the border, the part is tokenised behind a line break or a letter instead: alone,
    it would gain the space that SentencePiece puts before a text.

    Args: parts_of: for each text, the strings that it is the concatenation of.
    """
    prefixes = [["".join(parts[: i + 1]) for i in range(len(parts))] for parts in parts_of]
    flat = iter(encode(tokenizer, [prefix for text in prefixes for prefix in text]))
    result = []
    for parts in parts_of:
        ids_of, before = [], []
        for part in parts:
            ids = next(flat)
            ids_of.append(ids[len(before) :] if ids[: len(before)] == before else encode_behind(tokenizer, part))
            before = ids
        result.append(ids_of)
    return result


def encode_behind(tokenizer, text: str) -> list[int]:
    """Ids of a text as it continues another one."""
    for anchor in ("\n", "a"):
        anchor_ids, ids = encode(tokenizer, [anchor, anchor + text])
        if ids[: len(anchor_ids)] == anchor_ids:
            return ids[len(anchor_ids) :]
    return encode(tokenizer, [text])[0]


def render_messages(messages: list[dict], tokenizer, add_generation_prompt: bool) -> str:
    """Text of a chat by the tokenizer's template, or by PLAIN_CHAT_TEMPLATE where it has none.

    Args: messages: dicts with `role` and `content`. add_generation_prompt: ends with what opens an assistant's turn.
    """
    template = tokenizer.chat_template or PLAIN_CHAT_TEMPLATE
    options = dict(tokenize=False, add_generation_prompt=add_generation_prompt, chat_template=template)
    return tokenizer.apply_chat_template(messages, **options)


def render_row(row: Row, tokenizer, num_messages: int | None, add_generation_prompt: bool) -> str:
    """`render_messages` of the first of a row's messages, its errors naming the row."""
    messages = row["messages"]
    if not isinstance(messages, list) or not messages or not all(is_message(m) for m in messages):
        raise ValueError(f"{row.where}: `messages` should be a list of objects with `role` and `content`, as strings")
    for message in messages:
        Row(message, row.where).text("content")
    try:
        return render_messages(messages[:num_messages], tokenizer, add_generation_prompt)
    except Exception as error:  # templates raise errors of their own, for roles that they do not know
        raise ValueError(f"{row.where}: the chat template fails: {type(error).__name__}: {error}") from error


def is_message(message) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def split_turns(row: Row, tokenizer) -> tuple[list[str], list[bool]]:
    """A chat's text in parts, and which of them the assistant wrote, each through the end of its turn."""
    render_row(row, tokenizer, None, False)  # checks it
    parts, is_assistant, done = [], [], ""
    for i, message in enumerate(row["messages"]):
        if message["role"] == "assistant":
            opened = render_row(row, tokenizer, i, True)
            closed = render_row(row, tokenizer, i + 1, False)
            if not opened.startswith(done) or not closed.startswith(opened):
                raise ValueError(
                    f"{row.where}: the chat template writes the turns before message {i} differently once it follows: "
                    "the assistant's own tokens cannot be told; give `prompt` and `completion` instead"
                )
            parts += [opened[len(done) :], closed[len(opened) :]]
            is_assistant += [False, True]
            done = closed
    if not parts:
        raise ValueError(f"{row.where}: none of its `messages` is the assistant's")
    return parts, is_assistant


@dataclass
class PromptRow:
    """A prompt, tokenised, and the other fields of its row."""

    prompt_ids: list[int]
    prompt: str
    metadata: dict


def prompt_rows(
    rows: list[Row], tokenizer, prompt_tokens: int, max_prompt_len: int, add_bos: bool = True
) -> list[PromptRow]:
    """Prompts from `prompt`, `messages`, or the first prompt_tokens tokens of `text`, behind the tokenizer's BOS.

    A chat's BOS is its template's. Left out, with one warning: prompts longer than max_prompt_len, and texts that end
    within prompt_tokens.
    Raises: ValueError naming the row that lacks its field, or when no prompt is left.
    """
    texts = []
    for row in rows:
        if prompt_tokens:
            if "text" not in row:
                raise row.misfit("`text`, to cut a prompt from (--prompt-tokens)")
            texts.append(row.text("text"))
        elif "prompt" in row:
            texts.append(row.text("prompt"))
        elif "messages" in row:
            texts.append(render_row(row, tokenizer, len(row["messages"]), True))
            if row["messages"][-1]["role"] == "assistant":
                raise ValueError(f"{row.where}: its `messages` end with the assistant's turn, which is to be sampled")
        else:
            hint = ", or --prompt-tokens to cut a prompt from `text`" if "text" in row else ""
            raise row.misfit(f"`prompt` or `messages`{hint}")
    bos = [tokenizer.bos_token_id] if add_bos and tokenizer.bos_token_id is not None else []
    prompts, dropped = [], []
    for row, text, ids in zip(rows, texts, encode(tokenizer, texts), strict=True):
        field = "text" if prompt_tokens else "prompt" if "prompt" in row else "messages"
        if field != "messages" and ids[:1] != bos:
            ids = bos + ids
        if prompt_tokens and len(ids) <= len(bos) + prompt_tokens:
            dropped.append(f"{row.where} has {len(ids)} tokens, too few to cut {prompt_tokens} from")
            continue
        if prompt_tokens:
            ids = ids[: len(bos) + prompt_tokens]
            text = tokenizer.decode(ids, skip_special_tokens=True)
        if len(ids) > max_prompt_len:
            dropped.append(f"{row.where} has {len(ids)} tokens, and the context has room for {max_prompt_len}")
            continue
        if not ids:
            raise ValueError(f"{row.where}: the prompt is empty, and no BOS stands before it; write one")
        prompts.append(PromptRow(ids, text, {name: x for name, x in row.items() if name != field}))
    if dropped:
        message = f"{len(dropped)} of {len(rows)} prompts left out: {dropped[0]}{', ...' if len(dropped) > 1 else ''}"
        if not prompts:
            raise ValueError(f"{message}; no prompt is left: shorten prompts or responses (--sampling.max-new-tokens)")
        warn(message)
    return prompts


@dataclass
class Example:
    """A demonstration: its tokens, and which of them carry loss."""

    input_ids: list[int]
    loss_mask: list[bool]
    ends: list[int | None] = field(default_factory=list)  # last loss token of each learnt part; None: it has none


def sft_examples(rows: list[Row], tokenizer, add_bos: bool, add_eos: bool, max_len: int) -> list[Example]:
    """Demonstrations from `text`, `prompt` + `completion` or `messages`.

    Loss lies on the whole text, on the completion, or on the assistant's turns: each through its EOS where the template
    writes one, else whole. BOS and EOS are the tokenizer's, never doubled; within a chat the template places them, and
    add_bos False takes its BOS away. The first token never carries loss, since nothing predicts it.
    Longer ones are cut to max_len and those without a token to learn left out, with one warning.
    Raises: ValueError naming the row that lacks its fields, or when no demonstration is left.
    """
    parts_of, has_loss = [], []
    for row in rows:
        if "messages" in row:
            parts, is_learnt = split_turns(row, tokenizer)
        elif "prompt" in row and "completion" in row:
            parts, is_learnt = [row.text("prompt"), row.text("completion")], [False, True]
        elif "text" in row:
            parts, is_learnt = [row.text("text")], [True]
        else:
            raise row.misfit("`text`, or `prompt` and `completion`, or `messages`")
        parts_of.append(parts)
        has_loss.append(is_learnt)
    examples, cut, empty = [], [], []
    for row, example in zip(rows, join_parts(rows, parts_of, has_loss, tokenizer, add_bos, add_eos), strict=True):
        if len(example.input_ids) > max_len:
            cut.append(f"{row.where} has {len(example.input_ids)} tokens")
        example = Example(example.input_ids[:max_len], [False, *example.loss_mask[1:max_len]])
        if any(example.loss_mask):
            examples.append(example)
        else:
            empty.append(row.where)
    if not examples:
        raise ValueError(f"no demonstration has a token to learn within {max_len} tokens, the first being {empty[0]}")
    if cut or empty:
        notes = [f"{len(cut)} cut to {max_len} tokens ({cut[0]})"] if cut else []
        notes += [f"{len(empty)} without a token to learn left out ({empty[0]})"] if empty else []
        warn(f"of {len(rows)} demonstrations " + ", ".join(notes))
    return examples


def join_parts(rows: list[Row], parts_of, has_loss, tokenizer, add_bos: bool, add_eos: bool) -> list[Example]:
    """Each row's parts as one sequence; `sft_examples` says where BOS and EOS come from.

    Args: parts_of: for each row the strings that it is the concatenation of. has_loss: which of them are learnt.
    Returns: `ends` holds for chats only.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    examples = []
    for row, ids_of, is_learnt in zip(rows, encode_parts(tokenizer, parts_of), has_loss, strict=True):
        input_ids, loss_mask, ends = [], [], []
        for ids, learnt in zip(ids_of, is_learnt, strict=True):
            end = len(ids)
            if "messages" in row and eos in ids:
                end -= ids[::-1].index(eos)  # what follows the end of a turn is the template's
            if learnt:
                ends.append(len(input_ids) + end - 1 if end else None)
            input_ids += ids
            loss_mask += [learnt and i < end for i in range(len(ids))]
        begun, ended = input_ids[:1] == [bos], input_ids[-1:] == [eos]
        if "messages" in row:
            if begun and not add_bos:
                input_ids, loss_mask = input_ids[1:], loss_mask[1:]
                ends = [end and end - 1 for end in ends]
        else:
            if add_bos and bos is not None and not begun:
                input_ids, loss_mask = [bos, *input_ids], [False, *loss_mask]
            if add_eos and eos is not None and not ended:
                input_ids, loss_mask = [*input_ids, eos], [*loss_mask, True]
        examples.append(Example(input_ids, loss_mask, ends))
    return examples


# --- order and packing ----------------------------------------------------------------------------------------------


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of the rows in an epoch, a function of its arguments alone. Shapes: -> [num_rows] int64"""
    bits = np.random.MT19937(np.random.SeedSequence([seed % 2**64, epoch]))
    return np.random.RandomState(bits).permutation(num_rows)  # numpy keeps RandomState's numbers for good


def rows_at(start: int, count: int, num_rows: int, seed: int) -> list[int]:
    """The rows that are read as number start, start + 1, ... since the run began, epoch after epoch."""
    rows: list[int] = []
    while len(rows) < count:
        epoch, i = divmod(start + len(rows), num_rows)
        rows += epoch_order(num_rows, seed, epoch)[i : i + count - len(rows)].tolist()
    return rows


def pad_batch(columns: dict[str, list[list]]) -> tuple[dict[str, Tensor], Tensor]:
    """Lists of numbers, one list per sequence and field, as right-padded tensors.

    Args: columns: fields whose lists for a sequence are equally long.
    Returns: fields [batch, seq_len] each, 0 behind a sequence's end; seq_lens [batch]
    """
    seq_lens = [len(sequence) for sequence in next(iter(columns.values()))]
    fields = {}
    for name, sequences in columns.items():
        dtype = torch.tensor(sequences[0][:1]).dtype
        fields[name] = torch.zeros(len(sequences), max(seq_lens), dtype=dtype)
        for i, sequence in enumerate(sequences):
            fields[name][i, : len(sequence)] = torch.tensor(sequence, dtype=dtype)
    return fields, torch.tensor(seq_lens)


def pack_batch(
    fields: dict[str, Tensor], seq_lens: Tensor, rows: Tensor, one_per_row: bool = False
) -> dict[str, Tensor]:
    """Lays some sequences of a right-padded batch into as few rows as fit, invisible to each other.

    A row is as long as the longest sequence, and at least PACK_LEN: short sequences share rows (first fit, longest
    first). With one_per_row it is as long as the longest sequence, and the order is that of `rows`.

    Shapes: fields [batch, seq_len] each, seq_lens [batch], rows [n] which sequences -> [num_rows, row_len] each, 0
        where no token lies. Adds position_ids (within the sequence), first_key (where its sequence begins in the row)
        and source (where each token came from in the flattened [batch * seq_len], -1 where none lies).
    """
    lens = seq_lens[rows]
    device = seq_lens.device
    row_len = int(lens.max()) if one_per_row else max(PACK_LEN, int(lens.max()))
    room: list[int] = []  # left in each row
    place = [(0, 0)] * len(rows)  # row and offset of each sequence
    sizes = lens.tolist()
    order = range(len(sizes)) if one_per_row else sorted(range(len(sizes)), key=lambda i: -sizes[i])
    for i in order:
        row = next((r for r, left in enumerate(room) if left >= sizes[i] and not one_per_row), len(room))
        if row == len(room):
            room.append(row_len)
        place[i] = (row, row_len - room[row])
        room[row] -= sizes[i]
    starts = torch.tensor([row * row_len + offset for row, offset in place], device=device)  # [n]
    sequence = torch.repeat_interleave(torch.arange(len(rows), device=device), lens)  # [tokens]
    within = torch.arange(len(sequence), device=device) - (lens.cumsum(0) - lens)[sequence]  # [tokens]
    target = starts[sequence] + within
    seq_len = next(iter(fields.values())).shape[1]
    num_places = len(room) * row_len
    source = torch.full((num_places,), -1, device=device)
    source[target] = rows.to(device)[sequence] * seq_len + within
    first_key = torch.arange(num_places, device=device) % row_len  # a place without a token sees itself alone
    first_key[target] = starts[sequence] % row_len
    position_ids = torch.zeros(num_places, dtype=torch.long, device=device)
    position_ids[target] = within
    packed = {"position_ids": position_ids, "first_key": first_key, "source": source}
    for name, x in fields.items():
        packed[name] = torch.zeros(num_places, dtype=x.dtype, device=device)
        packed[name][target] = x.reshape(-1)[source[target]]
    return {name: x.view(len(room), row_len) for name, x in packed.items()}
