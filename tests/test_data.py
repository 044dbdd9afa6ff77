"""Tokenising, ordering and packing: against by-hand results and plain loops, and every kind of bad input."""

import json
import os
import types
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import parallel.data
from parallel.data import (
    check_vocabulary,
    encode,
    epoch_order,
    load_tokenizer,
    pack_batch,
    prompt_rows,
    render_messages,
    rows_at,
    sft_examples,
)
from parallel.mesh import init_mesh
from parallel.model import Decoder, DecoderConfig
from parallel.rows import Row, load_rows

CORPUS = [
    "the cat sat on the mat.\nthe dog sat on the log.\n",
    "a cat and a dog ran to the red house",
    "user: hello there",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(**special):
    """GPT-2's kind: BPE over bytes, adds nothing around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = sorted(set(special.values()))
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def sentencepiece():
    """Llama's kind: a space is put before every text, and a BOS before that; bytes stand for unknown letters."""
    draft = Tokenizer(models.BPE())
    draft.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    draft.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # merges stay within words
    names = ["<unk>", "<s>", "</s>"]
    draft.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=70, special_tokens=names, show_progress=False))
    trained = json.loads(draft.to_str())["model"]
    vocab = trained["vocab"] | {f"<0x{i:02X}>": len(trained["vocab"]) + i for i in range(256)}
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = draft.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="module")
def gpt():
    return byte_level(bos_token="<|end|>", eos_token="<|end|>")


@pytest.fixture(scope="module")
def llama():
    return sentencepiece()


@pytest.fixture(scope="module")
def chat():
    tokenizer = byte_level(eos_token="<|im_end|>", pad_token="<|im_start|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def rows_of(*rows):
    return [Row(row, f"data.jsonl, line {i + 1}") for i, row in enumerate(rows)]


def learnt(tokenizer, example):
    """The text of the tokens that carry loss."""
    return tokenizer.decode([t for t, m in zip(example.input_ids, example.loss_mask, strict=True) if m])


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_load_tokenizer_rejects_a_folder_without_one(tmp_path, gpt):
    with pytest.raises(ValueError, match=f"no tokenizer can be loaded from the folder {tmp_path}.*--tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')  # for which transformers makes one of no words
    with pytest.raises(ValueError, match=f"from the folder {tmp_path}.*has no vocabulary"):
        load_tokenizer(str(tmp_path))
    gpt.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("the cat")["input_ids"] == gpt("the cat")["input_ids"]


def test_vocabulary_larger_than_the_model_is_rejected(gpt):
    num_ids = len(gpt)
    check_vocabulary(gpt, types.SimpleNamespace(vocab_size=num_ids))
    with pytest.raises(ValueError, match=f"tokenizer has {num_ids} ids but the model only {num_ids - 1} rows"):
        check_vocabulary(gpt, types.SimpleNamespace(vocab_size=num_ids - 1))


def test_prompts_are_what_the_tokenizer_gives_behind_one_bos(gpt, llama):
    rows = rows_of({"prompt": "the cat", "answer": 4}, {"prompt": " dog"})
    for tokenizer in (gpt, llama):
        for bos in ([tokenizer.bos_token_id], []):
            prompts = prompt_rows(rows, tokenizer, 0, 100, add_bos=bool(bos))
            assert [p.prompt_ids for p in prompts] == [bos + encode(tokenizer, [row["prompt"]])[0] for row in rows]
        demonstrations = rows_of(*({"prompt": row["prompt"], "completion": " ran"} for row in rows))
        for prompt, shown in zip(
            prompt_rows(rows, tokenizer, 0, 100), sft_examples(demonstrations, tokenizer, True, True, 100), strict=True
        ):
            assert shown.input_ids[: len(prompt.prompt_ids)] == prompt.prompt_ids and not any(
                shown.loss_mask[: len(prompt.prompt_ids)]
            )
        assert prompts[0].prompt == "the cat" and prompts[0].metadata == {"answer": 4} and prompts[1].metadata == {}
    [doubled] = prompt_rows(rows_of({"prompt": "<s>the cat"}), llama, 0, 100)
    assert doubled.prompt_ids.count(1) == 1


def test_prompts_cut_from_texts_hold_so_many_tokens(gpt, llama):
    rows = rows_of({"text": "the cat sat on the mat", "id": 7}, {"text": "a"})
    for tokenizer in (gpt, llama):
        with pytest.warns(UserWarning, match=r"1 of 2 prompts left out: data\.jsonl, line 2 has . tokens, too few"):
            [prompt] = prompt_rows(rows, tokenizer, 3, 100)
        assert prompt.prompt_ids == [tokenizer.bos_token_id, *encode(tokenizer, [rows[0]["text"]])[0][:3]]
        assert prompt.prompt == tokenizer.decode(prompt.prompt_ids[1:]) and rows[0]["text"].startswith(prompt.prompt)
        assert prompt.metadata == {"id": 7}


def test_overlong_prompts_are_named_and_left_out(gpt):
    rows = rows_of({"prompt": "the cat"}, {"prompt": "x" * 30}, {"prompt": "y" * 30})
    with pytest.warns(UserWarning, match=r"2 of 3 .*: data\.jsonl, line 2 has 30 tokens, .* room for 20, \.\.\."):
        [prompt] = prompt_rows(rows, gpt, 0, 20, add_bos=False)
    assert prompt.prompt == "the cat"
    with pytest.raises(ValueError, match="3 of 3 .* no prompt is left.*--sampling.max-new-tokens"):
        prompt_rows(rows, gpt, 0, 0)


USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello there"}


@pytest.mark.parametrize(
    ("row", "prompt_tokens", "message"),
    [
        ({"question": "a", "id": 3}, 0, "needs `prompt` or `messages`; it has question, id"),
        ({"text": "a"}, 0, "needs `prompt` or `messages`, or --prompt-tokens .*; it has text"),
        ({"prompt": "a"}, 4, r"needs `text`, to cut a prompt from \(--prompt-tokens\); it has prompt"),
        ({"prompt": 5}, 0, "`prompt` is 5, not a string"),
        ({"prompt": ""}, 0, "the prompt is empty"),
        ({"messages": "hi"}, 0, "`messages` should be a list of objects with `role` and `content`"),
        ({"messages": []}, 0, "`messages` should be a list"),
        ({"messages": [{"role": "user"}]}, 0, "`messages` should be a list"),
        ({"messages": [USER, ASSISTANT]}, 0, "`messages` end with the assistant's turn"),
    ],
)
def test_prompt_rows_reject(gpt, row, prompt_tokens, message):
    with pytest.raises(ValueError, match=f"^data.jsonl, line 2.*{message}"):
        prompt_rows(rows_of({"prompt": "ok", "text": "long enough for this"}, row), gpt, prompt_tokens, 100, False)


def test_texts_learn_all_but_the_first_token(gpt, llama):
    text = "the cat sat"
    for tokenizer in (gpt, llama):
        ids, bos, eos = encode(tokenizer, [text])[0], tokenizer.bos_token_id, tokenizer.eos_token_id
        for add_bos, add_eos in ((True, True), (True, False), (False, True), (False, False)):
            [example] = sft_examples(rows_of({"text": text}), tokenizer, add_bos, add_eos, 100)
            assert example.input_ids == [bos] * add_bos + ids + [eos] * add_eos
            assert example.loss_mask == [False] + [True] * (len(example.input_ids) - 1)
        marked = tokenizer.bos_token + text + tokenizer.eos_token
        [example] = sft_examples(rows_of({"text": marked}), tokenizer, True, True, 100)
        assert example.input_ids == encode(tokenizer, [marked])[0]


def test_completions_continue_the_prompts_own_tokens(gpt, llama):
    """Borders between words, inside a word, before a space, behind a line break, at an empty prompt."""
    pairs = [
        ("the cat", " sat"),
        ("the c", "at sat"),
        ("the ", "cat"),
        ("the\n", "\ncat"),
        ("", "the cat"),
        ("the", "."),
    ]
    for tokenizer in (gpt, llama):
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        for prompt, completion in pairs:
            [example] = sft_examples(rows_of({"prompt": prompt, "completion": completion}), tokenizer, True, True, 100)
            prompt_ids = [bos, *encode(tokenizer, [prompt])[0]]
            assert example.input_ids[: len(prompt_ids)] == prompt_ids
            assert example.loss_mask == [i >= len(prompt_ids) for i in range(len(example.input_ids))]
            assert example.input_ids[-1] == eos
            assert tokenizer.decode(example.input_ids, skip_special_tokens=True) == prompt + completion, (
                prompt,
                completion,
            )


def test_chats_learn_the_assistants_turns(chat):
    messages = [USER, ASSISTANT, {"role": "user", "content": "the dog"}, {"role": "assistant", "content": "ran"}]
    rows = rows_of({"messages": messages}, {"messages": [{"role": "system", "content": "the"}, *messages[:3]]})
    long, short = sft_examples(rows, chat, True, True, 200)
    assert learnt(chat, long) == "hello there<|im_end|>ran<|im_end|>"
    assert learnt(chat, short) == "hello there<|im_end|>"
    assert long.input_ids == encode(chat, [render_messages(messages, chat, False)])[0]
    for num_messages in (1, 3):  # what it learns to continue is what it is asked to continue
        [prompt] = prompt_rows(rows_of({"messages": messages[:num_messages]}), chat, 0, 200)
        num_tokens = len(prompt.prompt_ids)
        assert long.input_ids[:num_tokens] == prompt.prompt_ids
        assert long.loss_mask[num_tokens - 1 : num_tokens + 1] == [False, True]
        assert prompt.prompt.endswith("<|im_start|>assistant\n")


def test_chats_without_a_template_use_the_plain_one(gpt, llama):
    messages = [USER, ASSISTANT, {"role": "user", "content": "the dog"}]
    for tokenizer in (gpt, llama):
        eos = tokenizer.eos_token
        text = f"{tokenizer.bos_token}User: hi\n\nAssistant: hello there{eos}\n\nUser: the dog\n\nAssistant:"
        [prompt] = prompt_rows(rows_of({"messages": messages}), tokenizer, 0, 200)
        assert prompt.prompt == text and prompt.prompt_ids == encode(tokenizer, [text])[0]
        assert prompt.prompt_ids[0] == tokenizer.bos_token_id
        [example] = sft_examples(rows_of({"messages": messages}), tokenizer, True, True, 200)
        assert learnt(tokenizer, example).strip() == f"hello there{eos}"
        [prompt] = prompt_rows(rows_of({"messages": messages[:1]}), tokenizer, 0, 200)
        assert example.input_ids[: len(prompt.prompt_ids)] == prompt.prompt_ids
        [without] = sft_examples(rows_of({"messages": messages}), tokenizer, False, True, 200)
        assert without.input_ids == example.input_ids[1:] and without.loss_mask == example.loss_mask[1:]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (CHATML, [USER], "none of its `messages` is the assistant's"),
        (
            "{{ raise_exception('no system role') }}",
            [ASSISTANT],
            "the chat template fails: TemplateError: no system role",
        ),
        ("{{ messages | length }}", [USER, ASSISTANT], "writes the turns before message 1 differently"),
    ],
)
def test_sft_rejects_chats(chat, monkeypatch, template, messages, message):
    monkeypatch.setattr(chat, "chat_template", template)
    with pytest.raises(ValueError, match=f"data.jsonl, line 1: .*{message}"):
        sft_examples(rows_of({"messages": messages}), chat, True, True, 100)


def test_long_demonstrations_are_cut_and_empty_ones_left_out(gpt):
    rows = rows_of({"text": "x" * 30}, {"prompt": "y" * 30, "completion": "a"}, {"text": "the cat"})
    warning = r"of 3 .* 2 cut to 20 tokens \(data.jsonl, line 1 has 32 tokens\), 1 without .* \(data.jsonl, line 2\)"
    with pytest.warns(UserWarning, match=warning):
        examples = sft_examples(rows, gpt, True, True, 20)
    assert [len(example.input_ids) for example in examples] == [20, len(encode(gpt, ["the cat"])[0]) + 2]
    with pytest.raises(ValueError, match="no demonstration has a token to learn within 20 tokens.*line 2"):
        sft_examples(rows[1:2], gpt, True, True, 20)


@pytest.mark.parametrize("row", [{"question": "a"}, {"prompt": "a"}, {"text": None}, {"prompt": "a", "completion": 3}])
def test_sft_rejects_rows_without_their_fields(gpt, row):
    with pytest.raises(
        ValueError, match=r"^data\.jsonl, line 2: (needs `text`, .* it has \w+|`\w+` is .*, not a string)"
    ):
        sft_examples(rows_of({"text": "ok"}, row), gpt, True, True, 100)


# --- order ----------------------------------------------------------------------------------------------------------


def test_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    torch.manual_seed(0)
    first = epoch_order(50, 1, 0)
    assert sorted(first.tolist()) == list(range(50))
    assert (epoch_order(50, 1, 0) == first).all()
    others = [epoch_order(50, 1, 1), epoch_order(50, 2, 0), epoch_order(50, -1, 0)]
    assert all((first != other).any() for other in others)
    assert epoch_order(7, 1, 0).tolist() == [
        1,
        6,
        3,
        0,
        4,
        2,
        5,
    ]  # a resumed run must find the order of the interrupted one


def test_rows_at_walks_epoch_after_epoch():
    everything = [i for epoch in range(6) for i in epoch_order(7, 3, epoch).tolist()]
    assert rows_at(0, 40, 7, 3) == everything[:40]
    for start, count in ((0, 3), (5, 4), (6, 1), (7, 14), (13, 20)):
        assert rows_at(start, count, 7, 3) == everything[start : start + count]


# --- packing --------------------------------------------------------------------------------------------------------


def make_batch(lens):
    """Right-padded fields whose padding is poisoned."""
    width = max(lens) + 3
    position = torch.arange(width)
    real = position < torch.tensor(lens)[:, None]
    input_ids = torch.randint(0, 30, (len(lens), width), generator=torch.Generator().manual_seed(0))
    return {"input_ids": input_ids.where(real, -7), "mask": real & (position > 0)}, torch.tensor(lens)


@pytest.mark.parametrize("one_per_row", [False, True])
def test_packed_rows_hold_every_token_once(one_per_row, monkeypatch):
    monkeypatch.setattr(parallel.data, "PACK_LEN", 64)
    fields, seq_lens = make_batch([5, 40, 1, 30, 23, 64, 17, 9])
    rows = torch.tensor([6, 1, 4, 3, 0, 7, 2])
    packed = pack_batch(fields, seq_lens, rows, one_per_row)
    assert packed["input_ids"].shape == ((7, 40) if one_per_row else (2, 64))
    found = []
    for r, row in enumerate(packed["source"].tolist()):
        starts = [k for k, s in enumerate(row) if s >= 0 and packed["position_ids"][r, k] == 0]
        assert starts[0] == 0
        for start in starts:
            i = row[start] // fields["input_ids"].shape[1]
            span = slice(start, start + int(seq_lens[i]))
            found.append(i)
            assert packed["position_ids"][r, span].tolist() == list(range(int(seq_lens[i])))
            assert (packed["first_key"][r, span] == start).all()
            for name, x in fields.items():
                assert torch.equal(packed[name][r, span], x[i, : int(seq_lens[i])])
                assert torch.equal(packed[name][r, span], x.flatten()[packed["source"][r, span]])
    assert sorted(found) == sorted(rows.tolist())
    assert found == rows.tolist() or not one_per_row
    empty = packed["source"] < 0
    assert int((~empty).sum()) == int(seq_lens[rows].sum())
    assert (packed["input_ids"][empty] == 0).all() and not packed["mask"][empty].any()
    for first_key in packed["first_key"].tolist():
        assert all(a <= b for a, b in pairwise(first_key))  # what kernels rely on


def test_packed_documents_never_see_each_other():
    """Hidden states and gradients of a document are those that it has alone; changing another one changes neither."""
    config = DecoderConfig(
        num_layers=2,
        hidden_size=24,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        ffn_size=40,
        vocab_size=30,
        max_seq_len=64,
        norm="rmsnorm",
        norm_eps=1e-5,
        activation="silu",
        gated=True,
        rotary_dim=6,
        windows=(None, 5),
        init_std=0.3,
    )
    decoder = Decoder(config, init_mesh(), torch.float64, seed=1)
    fields, seq_lens = make_batch([5, 40, 1, 30, 23, 17, 9])

    def hidden_of(i, fields, rows):
        packed = pack_batch(fields, seq_lens, torch.tensor(rows))
        hidden = decoder(packed["input_ids"], packed["position_ids"], packed["first_key"])
        return hidden[packed["source"] // fields["input_ids"].shape[1] == i]

    def gradient(hidden):
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(hidden.square().sum(), list(decoder.layers.parameters()))]
        )

    changed = {**fields, "input_ids": fields["input_ids"].clone()}
    changed["input_ids"][3] = (changed["input_ids"][3] + 1) % 30
    for i in (0, 1, 2, 4, 5, 6):
        alone = hidden_of(i, fields, [i])
        together = hidden_of(i, fields, list(range(7)))
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient(together), gradient(alone), rtol=1e-10, atol=1e-10)
        assert torch.equal(hidden_of(i, changed, list(range(7))), together)


# --- real files -----------------------------------------------------------------------------------------------------

needs_data = pytest.mark.skipif("RLHF_DATA" not in os.environ, reason="RLHF_DATA names no folder of real data")


@needs_data
def test_real_stories_match_transformers_tokens():
    data = Path(os.environ["RLHF_DATA"])
    tokenizer = load_tokenizer(str(data / "models/stories260k"))
    rows = load_rows([str(data / "text/tinystories/valid.jsonl.gz")])[:200]
    prompts = prompt_rows(rows, tokenizer, 8, 500)
    for row, prompt in zip(rows, prompts, strict=True):
        ids = tokenizer(row["text"])["input_ids"]
        assert prompt.prompt_ids == ids[:9] and ids[0] == 1
        assert row["text"].startswith(prompt.prompt)
    for row, example in zip(rows, sft_examples(rows, tokenizer, True, True, 5000), strict=True):
        assert example.input_ids == [*tokenizer(row["text"])["input_ids"], 2]


@needs_data
def test_real_completions_keep_their_text():
    data = Path(os.environ["RLHF_DATA"])
    rows = load_rows([str(data / "text/gsm8k/train.jsonl.gz")])[:100]
    for path in ("models/stories260k/tokenizer.json", "tokenizers/gpt2.json", "tokenizers/20B_tokenizer.json"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(data / path), clean_up_tokenization_spaces=False)
        for row, example in zip(rows, sft_examples(rows, tokenizer, False, False, 5000), strict=True):
            prompt_ids = encode(tokenizer, [row["prompt"]])[0]
            assert example.input_ids[: len(prompt_ids)] == prompt_ids
            assert tokenizer.decode(example.input_ids) == row["prompt"] + row["completion"]
