"""Reward models: a decoder without LM head and one score per sequence, read from the state on its last token.

Their folders have Hugging Face's sequence-classification layout, so that plain AutoModelForSequenceClassification opens
them. transformers has no place for a bias: what is to be subtracted from its score is `reward_offset` in config.json.
"""

import copy
import itertools
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from parallel.checkpoint import (
    CLASSIFIER,
    WeightFiles,
    find_folder,
    full_adapters,
    hf_tensors,
    load_decoder,
    write_adapters,
    write_model,
)
from parallel.data import pack_batch, pad_batch
from parallel.files import read_json, write_folder
from parallel.mesh import Mesh
from parallel.model import Decoder, ScalarHead

FAMILIES = {  # model_type -> what transformers' classes begin with
    "gpt2": "GPT2",
    "gptj": "GPTJ",
    "gpt_neox": "GPTNeoX",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}

# --- scores ---------------------------------------------------------------------------------------------------------


def pack_sequences(sequences: list[list[int]], device: torch.device) -> dict[str, Tensor]:
    """Sequences packed into rows, invisible to each other, as `read_scores` takes them.

    Shapes: -> as `pack_batch`, [num_rows, row_len] each, with is_last, True on each sequence's last token
    """
    fields, seq_lens = pad_batch({"input_ids": sequences})
    position = torch.arange(fields["input_ids"].shape[1])
    fields["is_last"] = position == seq_lens[:, None] - 1  # [sequences, seq_len]
    packed = pack_batch(fields, seq_lens, torch.arange(len(seq_lens)))
    return {name: x.to(device) for name, x in packed.items()}


def read_scores(hidden: Tensor, reward_head: nn.Module, packed: dict[str, Tensor]) -> Tensor:
    """Scores of packed sequences, in the order in which they were given, from a reward model's states.

    Shapes: hidden [rows, row_len, hidden_size] -> [sequences], at least float32
    """
    is_last = packed["is_last"]
    order = packed["source"][is_last].argsort()  # packing lays long sequences first
    return reward_head(hidden[is_last][order])


# --- folders --------------------------------------------------------------------------------------------------------


def save_reward_model(
    decoder: Decoder,
    head: ScalarHead,
    folder: Path | str,
    mesh: Mesh,
    tokenizer,
    reward_offset: float,
    add_bos: bool = True,
) -> None:
    """Writes a folder that AutoModelForSequenceClassification opens as a model of one label, replacing one there.

    Args: decoder: without LM head. head: its bias is not written; whoever reads the folder subtracts reward_offset.
        add_bos: whether the texts that it was trained on begin with the tokenizer's BOS.
    Communication: one barrier.
    """
    hf_config = decoder.hf_config
    eos = list_eos(tokenizer.eos_token_id, hf_config, decoder.generation_config)
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token_id in eos:
        tokenizer.pad_token = None  # better an error in transformers than scores read from the padding
    config = {
        **hf_config,
        "architectures": [FAMILIES[hf_config["model_type"]] + CLASSIFIER],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "pad_token_id": choose_pad_id(
            tokenizer.pad_token_id, hf_config.get("pad_token_id"), eos, decoder.config.vocab_size
        ),
        "reward_offset": reward_offset,
        "add_bos": add_bos,
    }

    adapters = full_adapters(decoder)
    tensors = itertools.chain(hf_tensors(decoder), [("score.weight", head.weight.detach())])

    def write(temporary: Path) -> None:
        write_model(temporary, decoder, config, tensors, tokenizer)
        write_adapters(temporary, decoder, adapters)

    write_folder(Path(folder), write, mesh, tensors)


def list_eos(*sources) -> set[int]:
    """The ids that end a text: numbers, and entries of configs."""
    found = [source.get("eos_token_id") if isinstance(source, dict) else source for source in sources]
    return {i for ids in found for i in (ids if isinstance(ids, list) else [ids]) if i is not None}


def choose_pad_id(tokenizer_pad: int | None, config_pad: int | None, eos: set[int], vocab_size: int) -> int:
    """The tokenizer's padding, or the config's, or the smallest id: the first that the model has and that ends no text.

    transformers reads the score from the last token that is not padding. Every text ends in an EOS, so any other id
    finds it, but with EOS as padding the token before it would be scored.
    """
    candidates = [tokenizer_pad, config_pad, *range(len(eos) + 1)]
    return next(i for i in candidates if i is not None and 0 <= i < vocab_size and i not in eos)


def is_reward_model(path_or_id: str) -> bool:
    """Whether a folder's config.json names a sequence classifier."""
    return any(name.endswith(CLASSIFIER) for name in read_architectures(find_folder(path_or_id)))


def read_architectures(folder: Path) -> list[str]:
    return read_json(folder / "config.json").get("architectures") or []


@torch.no_grad()
def load_reward_model(path_or_id: str, mesh: Mesh, dtype: torch.dtype) -> tuple[Decoder, ScalarHead]:
    """Decoder without LM head, and head, of a sequence classifier with one label; the bias is minus its reward_offset.

    Raises: FileNotFoundError or ValueError naming what the folder holds instead.
    """
    folder = find_folder(path_or_id)
    if not is_reward_model(path_or_id):
        found = ", ".join(read_architectures(folder)) or "no architecture"
        raise ValueError(
            f"{path_or_id} is no reward model: its config.json names {found}, not a ...{CLASSIFIER}; "
            "reward_model.py trains one"
        )
    decoder = load_decoder(path_or_id, mesh, dtype, lm_head=False)
    head = ScalarHead(decoder.config.hidden_size, mesh, torch.promote_types(dtype, torch.float32))
    with WeightFiles(folder) as files:
        weight = files.find("score.weight")[:]
    if weight.dim() == 2 and len(weight) != 1:
        raise ValueError(f"{path_or_id} tells {len(weight)} labels apart; a reward model has a single one")
    if weight.shape != head.weight.shape or not weight.isfinite().all():
        raise ValueError(
            f"{path_or_id}: score.weight is {list(weight.shape)}, needed as {list(head.weight.shape)} finite numbers"
        )
    offset = decoder.hf_config.get("reward_offset", 0.0)
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not math.isfinite(offset):
        raise ValueError(f"{path_or_id}/config.json: its reward_offset is {offset!r:.40}, not a finite number")
    head.weight.copy_(weight)
    head.bias.fill_(-offset)
    return decoder, head
