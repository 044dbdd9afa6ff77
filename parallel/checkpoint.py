"""Weights in and out: Hugging Face folders, and the state that a resumed run goes on from.

Every folder is written under another name and renamed when it is complete, so that a crash never leaves one that looks
whole. Only rank 0 writes; an error there stops all ranks.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from parallel.families import config_from_hf, pieces
from parallel.files import hash_file, hash_meta, on_logger, read_json, restore_replaced, write_folder, write_json
from parallel.mesh import Mesh
from parallel.model import Decoder

FILE_BYTES = 5 << 30  # of one file of exported weights
STATE, META = "state.safetensors", "meta.json"  # the files of a checkpoint
HEADS = ("lm_head.weight", "embed_out.weight")  # transformers 5 holds GPT-NeoX's embed_out as lm_head
# buffers that files of some families hold, and the head of a reward model
IGNORED = re.compile(r"(\.attn(ention)?\.(masked_)?bias|rotary_emb\.inv_freq|^score\.weight)$")
LM_HEAD = re.compile(r"^(lm_head|embed_out)\.(weight|bias)$")

# --- Hugging Face folders -------------------------------------------------------------------------------------------


def load_decoder(path_or_id: str, mesh: Mesh, dtype: torch.dtype, lm_head: bool = True) -> Decoder:
    """A decoder from a Hugging Face folder or hub id, read tensor by tensor: no second copy of the model exists.

    Args: lm_head: False passes over the files' LM head, if they hold one.
    Communication: none; every rank reads what it needs.
    Raises: FileNotFoundError or ValueError naming the file or tensor that does not fit.
    """
    folder = find_folder(path_or_id)
    hf_config = read_json(folder / "config.json")
    config, notes = config_from_hf(hf_config, f"{path_or_id}/config.json")
    if notes and mesh.is_logger:
        print(f"{path_or_id}: {', '.join(notes)}")
    decoder = Decoder(config, mesh, dtype, seed=None, lm_head=lm_head)
    decoder.hf_config, decoder.source = hf_config, str(path_or_id)
    generation_config = folder / "generation_config.json"
    decoder.generation_config = read_json(generation_config) if generation_config.exists() else {}
    with WeightFiles(folder) as files, torch.no_grad():
        for name, parameter in decoder.named_parameters():
            read_parameter(files, name, parameter, decoder)
        if lm_head and config.tied_embeddings:
            check_tied_head(files, decoder)
        ignored = IGNORED if lm_head else re.compile(rf"{IGNORED.pattern}|{LM_HEAD.pattern}")
        unknown = sorted(name for name in set(files.names()) - files.used if not ignored.search(name))
        if unknown:
            raise ValueError(
                f"{folder}: {len(unknown)} tensors have no place in a {hf_config['model_type']} of this config, "
                f"the first being {unknown[0]}"
            )
    return decoder


def find_folder(path_or_id: str) -> Path:
    """A local folder, or the local copy of a hub id."""
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise FileNotFoundError(f"{folder} holds no config.json: it is no Hugging Face model folder")
        return folder
    if folder.exists() or path_or_id.startswith(("/", ".", "~")) or path_or_id.count("/") > 1:
        raise FileNotFoundError(f"{path_or_id} is no folder with a Hugging Face model")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_id, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{path_or_id} is no folder here and cannot be fetched from the hub ({type(error).__name__}: {reason})"
        ) from error


class WeightFiles:
    """The tensors of a folder's safetensors files, opened lazily: slices are views of the mapped file."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.used: set[str] = set()
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index} holds no weight_map from tensors to files")
            files = sorted(set(weight_map.values()))
        elif single.exists():
            files = [single.name]
        else:
            pickled = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)]
            if pickled:
                raise ValueError(
                    f"{folder}: {pickled[0]} is pickled, and loading it could run any code; convert it once where you "
                    f"trust it: AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER)"
                )
            raise FileNotFoundError(
                f"{folder} holds neither model.safetensors nor model.safetensors.index.json, the only formats read here"
            )
        self.handles, self.place = [], {}
        for file in files:
            try:
                handle = safe_open(folder / file, "pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{folder / file} cannot be read: {error}") from error
            self.handles.append(handle)
            self.place |= dict.fromkeys(handle.keys(), handle)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handles, self.place = [], {}

    def names(self) -> list[str]:
        return list(self.place)

    def find(self, name: str):
        """The slice object of a tensor, also where a file leaves out the base model's prefix or renames the head."""
        for candidate in (name, name.partition(".")[2], *(HEADS if name in HEADS else ())):
            if candidate in self.place:
                self.used.add(candidate)
                return self.place[candidate].get_slice(candidate)
        raise ValueError(f"{self.folder}: there is no tensor {name}, which config.json calls for")


def read_parameter(files: WeightFiles, name: str, parameter: Tensor, decoder: Decoder) -> None:
    """Fills a local tensor from its pieces; padded vocabulary rows become 0."""
    num_rows = unpadded_rows(name, parameter, decoder)
    parts = pieces(name, num_rows, decoder.config, decoder.hf_config["model_type"])
    parameter[num_rows:] = 0
    for hf_name in dict.fromkeys(piece.hf_name for piece in parts):
        of_name = [piece for piece in parts if piece.hf_name == hf_name]
        stored = files.find(hf_name)
        expected = [sum(piece.size for piece in of_name), *parameter.shape[1:]]
        expected = expected[::-1] if of_name[0].transposed else expected
        if stored.get_shape() != expected:
            raise ValueError(
                f"{files.folder}: {hf_name} is {stored.get_shape()}, where config.json calls for {expected}"
            )
        for piece in of_name:
            rows = slice(piece.hf_start, piece.hf_start + piece.size)
            source = stored[:, rows].t() if piece.transposed else stored[rows]
            if not all(bound.isfinite() for bound in source.aminmax()):  # isfinite on it all would copy it
                raise ValueError(f"{files.folder}: {hf_name} holds a NaN or an infinite weight")
            parameter[piece.start : piece.start + piece.size].copy_(source)


def check_tied_head(files: WeightFiles, decoder: Decoder) -> None:
    """Raises ValueError if the files hold an LM head of its own where config.json ties it to the embedding."""
    embedding = decoder.embedding.weight[: decoder.config.vocab_size]
    for name in set(HEADS) & set(files.names()):
        if not torch.equal(files.find(name)[:].to(embedding), embedding):
            raise ValueError(
                f"{files.folder}: {name} differs from the embedding, which config.json ties it to: set "
                "tie_word_embeddings to false there if the model was trained with a head of its own"
            )


def unpadded_rows(name: str, parameter: Tensor, decoder: Decoder) -> int:
    """Rows of a local tensor that exist in the files: vocabulary rows are padded here only."""
    is_vocab = name.split(".")[0] in ("embedding", "lm_head")
    return decoder.config.vocab_size if is_vocab else parameter.shape[0]


def hf_tensors(decoder: Decoder, weights: dict[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The decoder's weights under their Hugging Face names and in their shapes, one tensor in memory at a time.

    Args: weights: what `Decoder.full_parameters` gave; None where they are not sharded.
    """
    for name, parameter in (weights or dict(decoder.named_parameters())).items():
        num_rows = unpadded_rows(name, parameter, decoder)
        parts = pieces(name, num_rows, decoder.config, decoder.hf_config["model_type"])
        for hf_name in dict.fromkeys(piece.hf_name for piece in parts):
            of_name = [piece for piece in parts if piece.hf_name == hf_name]
            size = sum(piece.size for piece in of_name)
            whole = torch.empty(size, *parameter.shape[1:], dtype=parameter.dtype)
            for piece in of_name:
                local = parameter.detach()[piece.start : piece.start + piece.size]
                whole[piece.hf_start : piece.hf_start + piece.size] = local
            yield hf_name, whole.t().contiguous() if of_name[0].transposed else whole


def save_decoder(
    decoder: Decoder, folder: Path | str, mesh: Mesh, tokenizer=None, heads: dict[str, nn.Module] | None = None
) -> None:
    """Writes a folder that plain AutoModelForCausalLM and AutoTokenizer open, replacing one that is there.

    Args: heads: role -> head, written beside the model as heads.safetensors and heads.json.
    Communication: one barrier; before it, sharded weights are gathered on rank 0, unit by unit.
    """
    weights = decoder.full_parameters()

    def write(temporary: Path) -> None:
        write_model(temporary, decoder, decoder.hf_config, hf_tensors(decoder, weights), tokenizer)
        if heads:
            write_heads(temporary, heads)

    write_folder(Path(folder), write, mesh)


def write_model(
    folder: Path, decoder: Decoder, hf_config: dict, tensors: Iterable[tuple[str, Tensor]], tokenizer=None
) -> None:
    """config.json, generation_config.json, the tokenizer's files and weights of at most FILE_BYTES a file."""
    config = {**hf_config, "dtype": str(decoder.embedding.weight.dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    write_json(folder / "config.json", config)
    if decoder.generation_config:
        write_json(folder / "generation_config.json", decoder.generation_config)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    groups: list[dict[str, Tensor]] = [{}]
    sizes, weight_map = [0], {}
    for name, tensor in tensors:
        if sizes[-1] and sizes[-1] + tensor.nbytes > FILE_BYTES:
            save_file(groups[-1], folder / f"part-{len(groups)}", {"format": "pt"})
            groups[-1].clear()
            groups.append({})
            sizes.append(0)
        groups[-1][name] = tensor
        sizes[-1] += tensor.nbytes
        weight_map[name] = len(groups)
    save_file(groups[-1], folder / f"part-{len(groups)}", {"format": "pt"})
    if len(groups) == 1:
        os.rename(folder / "part-1", folder / "model.safetensors")
        return
    file_of = {i: f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)}
    for i, file in file_of.items():
        os.rename(folder / f"part-{i}", folder / file)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": {n: file_of[i] for n, i in weight_map.items()}}
    write_json(folder / "model.safetensors.index.json", index)


def write_heads(folder: Path, heads: dict[str, nn.Module]) -> None:
    """heads.safetensors (<role>.<name>) and heads.json (role -> kind and shapes)."""
    named = {f"{role}.{name}": p for role, head in heads.items() for name, p in head.named_parameters()}
    save_file({name: p.detach().clone() for name, p in named.items()}, folder / "heads.safetensors", {"format": "pt"})
    described = {
        role: {"kind": type(head).__name__, "shapes": {n: list(p.shape) for n, p in head.named_parameters()}}
        for role, head in heads.items()
    }
    write_json(folder / "heads.json", described)


def holds_heads(folder: Path | str, role: str) -> bool:
    """Whether a model's folder holds this head beside its weights."""
    path = Path(folder) / "heads.json"
    return path.exists() and role in read_json(path)


@torch.no_grad()
def load_heads(folder: Path | str, heads: dict[str, nn.Module]) -> None:
    """Fills heads from a folder of `save_decoder`. Raises: FileNotFoundError, or ValueError naming the tensor."""
    path = Path(folder) / "heads.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no heads.safetensors")
    tensors = load_file(path)
    for role, head in heads.items():
        for name, parameter in head.named_parameters():
            stored = tensors.get(f"{role}.{name}")
            if stored is None or stored.shape != parameter.shape:
                found = "missing" if stored is None else list(stored.shape)
                raise ValueError(f"{path}: {role}.{name} is {found}, needed as {list(parameter.shape)}")
            parameter.copy_(stored)


def eos_ids(path_or_id: str, tokenizer) -> list[int]:
    """Every id that ends a text: those of generation_config.json, config.json and the tokenizer."""
    ids = {tokenizer.eos_token_id}
    folder = find_folder(path_or_id)
    for file in ("generation_config.json", "config.json"):
        stored = read_json(folder / file).get("eos_token_id") if (folder / file).exists() else None
        ids |= set(stored) if isinstance(stored, list) else {stored}
    return sorted(ids - {None})


# --- the state of a run ---------------------------------------------------------------------------------------------


def save_training_state(folder: Path, step: int, tensors: dict[str, Tensor], meta: dict, keep: int, mesh: Mesh) -> None:
    """Writes folder/step-<step>: state.safetensors, and meta.json with the hashes of both; the newest `keep` stay.

    Args: tensors: full tensors under full names; optimizer state as <name>|m, |v and |master.
    Communication: one barrier.
    Raises: RankError on every rank if the disk does not take it; the checkpoints before stay.
    """

    def write(temporary: Path) -> None:
        # views of a flat unit may share its memory: safetensors refuses only tensors that overlap
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, temporary / STATE)
        content = json.loads(json.dumps({"step": step, **meta}))
        content["sha256"] = {STATE: hash_file(temporary / STATE), META: hash_meta(content)}
        write_json(temporary / META, content)

    def remove_leftovers() -> None:
        restore_replaced(folder, "step-*")
        for leftover in folder.glob("tmp-*"):
            shutil.rmtree(leftover)

    def prune() -> None:
        for old in list_steps(folder)[keep:]:
            os.rename(old, old.with_name(f"tmp-{old.name}"))
            shutil.rmtree(old.with_name(f"tmp-{old.name}"))

    on_logger(remove_leftovers, f"cannot remove what a crash left in {folder}", mesh)
    write_folder(folder / f"step-{step}", write, mesh)
    on_logger(prune, f"cannot remove old checkpoints in {folder}", mesh)


def load_training_state(folder: Path, mesh: Mesh) -> tuple[dict[str, Tensor], dict] | None:
    """Tensors and meta of the newest intact checkpoint; None without any. A damaged one is named and passed over.

    Communication: rank 0 decides and tells the others.
    Raises: ValueError on all ranks if all are damaged.
    """
    chosen, damaged = None, []

    def choose() -> None:
        nonlocal chosen
        restore_replaced(folder, "step-*")
        for path in list_steps(folder):
            problem = find_damage(path)
            if problem is None:
                chosen = path.name
                return
            damaged.append(f"{path} is damaged ({problem})")

    on_logger(choose, f"cannot read the checkpoints in {folder}", mesh)
    chosen, damaged = mesh.broadcast_object((chosen, damaged))
    if damaged:
        if chosen is None:
            raise ValueError(f"{'; '.join(damaged)}; there is none before it: --overwrite starts anew")
        warnings.warn(f"{'; '.join(damaged)}; going on from {chosen}", stacklevel=2)
    if chosen is None:
        return None
    error, state = None, None
    try:
        state = load_file(folder / chosen / STATE), read_json(folder / chosen / META)
    except (OSError, ValueError, SafetensorError) as caught:
        error = ValueError(f"{folder / chosen} cannot be read here: {caught}")
    mesh.raise_together(error)
    return state


def list_steps(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    paths = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(paths, key=lambda path: -int(path.name.removeprefix("step-")))


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    for name in (META, STATE):
        if not (path / name).is_file():
            return f"there is no {name}"
    try:
        meta = json.loads((path / META).read_text())
        written = meta["sha256"]
        found = {STATE: hash_file(path / STATE), META: hash_meta(meta)}
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"{META} cannot be read: {type(error).__name__}: {error}"
    changed = [name for name in found if found[name] != written.get(name)]
    return f"{changed[0]} is not what was written" if changed else None
