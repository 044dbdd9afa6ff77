"""Weights in and out: Hugging Face folders. What a resumed run goes on from lies elsewhere, in `training_state.py`.

Every folder is written under another name and renamed when it is complete, so that a crash never leaves one that looks
whole. Only rank 0 writes; an error there stops all ranks.
"""

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from parallel.families import config_from_hf, pieces
from parallel.files import read_json, write_folder, write_json
from parallel.mesh import Mesh
from parallel.model import Decoder, DecoderConfig
from parallel.rows import resolve_model
from parallel.tensor import fill_local, full_tensor, placements

FILE_BYTES = 5 << 30  # of one file of exported weights
HEADS = ("lm_head.weight", "embed_out.weight")  # transformers 5 holds GPT-NeoX's embed_out as lm_head
# buffers that files of some families hold, and the head of a reward model
IGNORED = re.compile(r"(\.attn(ention)?\.(masked_)?bias|rotary_emb\.inv_freq|^score\.weight)$")
CLASSIFIER = "ForSequenceClassification"  # how the architecture of a reward model ends
ADAPTERS = "adapters"  # .safetensors and .json beside a model that was trained with them
LM_HEAD = re.compile(r"^(lm_head|embed_out)\.(weight|bias)$")

# --- Hugging Face folders -------------------------------------------------------------------------------------------


def read_config(spec: str) -> DecoderConfig:
    """The config of a model flag: a folder or hub id, of which config.json alone is read, or module:function.

    Raises: FileNotFoundError or ValueError naming what is missing or not implemented.
    """
    source = resolve_model(spec)
    if Path(source).expanduser().exists() or source.count("/") > 1:
        path = find_folder(source) / "config.json"
    else:
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(source, "config.json"))
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise FileNotFoundError(
                f"{source} is no folder here, and the hub gives no config.json: {reason}"
            ) from error
    return config_from_hf(read_json(path), str(path))[0]


def load_decoder(path_or_id: str, mesh: Mesh, dtype: torch.dtype, lm_head: bool = True) -> Decoder:
    """A decoder from a Hugging Face folder or hub id, read tensor by tensor: no second copy of the model exists.

    On several ranks weights are not read yet: `data_parallel` has each rank read what it is to hold, and no more.
    Args: lm_head: False passes over the files' LM head, if they hold one.
    Communication: every rank reads what it needs; with stages one gather over pp of the names of tensors.
    Raises: FileNotFoundError or ValueError naming the file or tensor that does not fit.
    """
    folder = find_folder(path_or_id)
    hf_config = read_json(folder / "config.json")
    config, notes = config_from_hf(hf_config, f"{path_or_id}/config.json")
    classifiers = [x for x in hf_config.get("architectures") or [] if str(x).endswith(CLASSIFIER)]
    if lm_head and classifiers:
        raise ValueError(f"{path_or_id} is a {classifiers[0]}: it scores texts and has no LM head to write any")
    if notes and mesh.is_logger:
        print(f"{path_or_id}: {', '.join(notes)}")
    is_deferred = mesh.world_size > 1
    decoder = Decoder(config, mesh, dtype, seed=None, lm_head=lm_head, has_storage=not is_deferred)
    decoder.hf_config, decoder.source = hf_config, str(path_or_id)
    generation_config = folder / "generation_config.json"
    decoder.generation_config = read_json(generation_config) if generation_config.exists() else {}
    files = WeightFiles(folder)
    check_tensors(files, decoder, IGNORED if lm_head else re.compile(rf"{IGNORED.pattern}|{LM_HEAD.pattern}"))
    if is_deferred:
        decoder.files = files
        return decoder
    with files, torch.no_grad():
        for name, parameter in decoder.named_parameters():
            files.read(decoder, name, parameter.view(-1), 0)
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

    def __deepcopy__(self, _):
        return self

    def names(self) -> list[str]:
        return list(self.place)

    def find(self, name: str):
        """The slice object of a tensor, also where a file leaves out the base model's prefix or renames the head."""
        for candidate in (name, name.partition(".")[2], *(HEADS if name in HEADS else ())):
            if candidate in self.place:
                self.used.add(candidate)
                return self.place[candidate].get_slice(candidate)
        raise ValueError(f"{self.folder}: there is no tensor {name}, which config.json calls for")

    def locate(self, decoder: Decoder, name: str, shape: torch.Size) -> list[tuple]:
        """The stored tensors, each with its pieces, that make up one of a decoder's; shape: of this rank's part.

        Raises: ValueError naming a tensor that is missing or of another shape.
        """
        full_shape = decoder.placements[name].full_shape(shape)
        parts = pieces(name, full_shape[0], decoder.config, decoder.hf_config["model_type"])
        found = []
        for hf_name in dict.fromkeys(piece.hf_name for piece in parts):
            of_name = [piece for piece in parts if piece.hf_name == hf_name]
            stored = self.find(hf_name)
            expected = [sum(piece.size for piece in of_name), *full_shape[1:]]
            expected = expected[::-1] if of_name[0].transposed else expected
            if stored.get_shape() != expected:
                raise ValueError(
                    f"{self.folder}: {hf_name} is {stored.get_shape()}, where config.json calls for {expected}"
                )
            found.append((stored, of_name))
        return found

    def read(self, decoder: Decoder, name: str, out: Tensor, first: int) -> None:
        """Fills out [n] with entries first, first + 1, ... of this rank's part of a tensor.

        Only the rows that those entries lie in are read; padded rows of a vocabulary become 0.
        Raises: ValueError naming the tensor if it holds a NaN or an infinite weight.
        """
        shape = decoder.get_parameter(name).shape
        row, stored = shape[1:].numel(), self.locate(decoder, name, shape)
        begun = min(-first % row, len(out))  # entries of a row whose others this rank does not want
        broken = (len(out) - begun) % row
        place = first
        for some in out.split([begun, len(out) - begun - broken, broken]):
            top, column = divmod(place, row)
            if len(some) % row == 0:
                self.read_rows(decoder, name, stored, some.view(-1, *shape[1:]), top)
            else:
                rows = some.new_empty(1, *shape[1:])
                self.read_rows(decoder, name, stored, rows, top)
                some.copy_(rows.view(-1)[column : column + len(some)])
            place += len(some)

    def read_rows(self, decoder: Decoder, name: str, stored: list[tuple], rows: Tensor, top: int) -> None:
        """Fills rows [n, ...] with those from `top` on of this rank's part of a tensor; stored: by `locate`."""
        placement, shape = decoder.placements[name], decoder.get_parameter(name).shape
        if placement.vocab_size is not None:
            rows.zero_()
        boxes = placement.boxes(shape, decoder.mesh.tp)
        for (tensor, of_name), (here, there) in itertools.product(stored, boxes):
            shift = here[0].start - there[0].start  # from rows of the full tensor to those of this rank's
            for piece in of_name:
                start = max(piece.start, there[0].start, top - shift)
                stop = min(piece.start + piece.size, there[0].stop, top + len(rows) - shift)
                if start >= stop:
                    continue
                lines = slice(start - piece.start + piece.hf_start, stop - piece.start + piece.hf_start)
                source = tensor[there[1], lines].t() if piece.transposed else tensor[(lines, *there[1:])]
                if not all(bound.isfinite() for bound in source.aminmax()):  # isfinite on it all would copy it
                    raise ValueError(f"{self.folder}: {piece.hf_name} holds a NaN or an infinite weight")
                rows[(slice(start + shift - top, stop + shift - top), *here[1:])].copy_(source)


def check_tensors(files: WeightFiles, decoder: Decoder, ignored: re.Pattern) -> None:
    """Returns if the files hold all tensors that the decoder's config calls for, in their shapes, and no others.

    Communication: with stages one gather over pp of the names of tensors.
    Raises: ValueError naming the first tensor that does not fit.
    """
    for name, parameter in decoder.named_parameters():
        files.locate(decoder, name, parameter.shape)
    if decoder.ties_lm_head and decoder.embedding is not None:
        check_tied_head(files, decoder)
    used = set().union(*decoder.mesh.gather_objects(files.used, "pp"))  # each stage has its own
    unknown = sorted(name for name in set(files.names()) - used if not ignored.search(name))
    if unknown:
        raise ValueError(
            f"{files.folder}: {len(unknown)} tensors have no place in a {decoder.hf_config['model_type']} of this "
            f"config, the first being {unknown[0]}"
        )


def check_tied_head(files: WeightFiles, decoder: Decoder) -> None:
    """Raises ValueError if the files hold an LM head of its own where config.json ties it to the embedding."""
    shape, placement = decoder.embedding.weight.shape, decoder.placements["embedding.weight"]
    [(stored, _)] = files.locate(decoder, "embedding.weight", shape)
    for name in set(HEADS) & set(files.names()):
        for _, there in placement.boxes(shape, decoder.mesh.tp):
            if not torch.equal(files.find(name)[there], stored[there]):
                raise ValueError(
                    f"{files.folder}: {name} differs from the embedding, which config.json ties it to: set "
                    "tie_word_embeddings to false there if the model was trained with a head of its own"
                )


def hf_tensors(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """The decoder's weights under their Hugging Face names and in their shapes, one tensor in memory at a time.

    Communication: that of `Decoder.full_parameters`.
    """
    for name, full in decoder.full_parameters():
        parts = pieces(name, len(full), decoder.config, decoder.hf_config["model_type"])
        for hf_name in dict.fromkeys(piece.hf_name for piece in parts):
            of_name = [piece for piece in parts if piece.hf_name == hf_name]
            size = sum(piece.size for piece in of_name)
            whole = torch.empty(size, *full.shape[1:], dtype=full.dtype)
            for piece in of_name:
                whole[piece.hf_start : piece.hf_start + piece.size] = full[piece.start : piece.start + piece.size]
            yield hf_name, whole.t().contiguous() if of_name[0].transposed else whole


def save_decoder(
    decoder: Decoder, folder: Path | str, mesh: Mesh, tokenizer=None, heads: dict[str, nn.Module] | None = None
) -> None:
    """Writes a folder that plain AutoModelForCausalLM and AutoTokenizer open, replacing one that is there.

    Adapters are merged into the weights, and written beside them, too.
    Args: heads: role -> head, written beside the model as heads.safetensors and heads.json.
    Communication: that of `hf_tensors` and `full_tensor`, and one barrier; rank 0 writes.
    """
    head_tensors = full_heads(heads or {}, mesh)
    adapters = full_adapters(decoder)
    tensors = hf_tensors(decoder)

    def write(temporary: Path) -> None:
        write_model(temporary, decoder, decoder.hf_config, tensors, tokenizer)
        write_adapters(temporary, decoder, adapters)
        if heads:
            write_heads(temporary, heads, head_tensors)

    write_folder(Path(folder), write, mesh, tensors)


def write_model(
    folder: Path, decoder: Decoder, hf_config: dict, tensors: Iterable[tuple[str, Tensor]], tokenizer=None
) -> None:
    """config.json, generation_config.json, the tokenizer's files and weights of at most FILE_BYTES a file."""
    config = {**hf_config, "dtype": str(decoder.dtype).removeprefix("torch.")}
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


def full_adapters(decoder: Decoder) -> dict[str, Tensor]:
    """The adapters by name in full shapes, on the first replica. Communication: that of `Decoder.full_parameters`."""
    return dict(decoder.full_parameters(adapters=True)) if decoder.has_adapters else {}


def write_adapters(folder: Path, decoder: Decoder, adapters: dict[str, Tensor]) -> None:
    """adapters.safetensors and adapters.json (of which base, and how they are applied) of a decoder that has any."""
    if not adapters:
        return
    lora = decoder.tuning.lora
    save_file({name: x.contiguous() for name, x in adapters.items()}, folder / f"{ADAPTERS}.safetensors")
    said = {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets)}
    write_json(folder / f"{ADAPTERS}.json", {"base": decoder.source, "fingerprint": decoder.base, **said})


def full_heads(heads: dict[str, nn.Module], mesh: Mesh) -> dict[str, dict[str, Tensor]]:
    """Role -> name -> full tensor. Communication: one all-gather over tp per tensor sharded there."""
    found = {}
    for role, head in heads.items():
        placed = placements(head)
        found[role] = {name: full_tensor(p.detach(), placed[name], mesh.tp) for name, p in head.named_parameters()}
    return found


def write_heads(folder: Path, heads: dict[str, nn.Module], tensors: dict[str, dict[str, Tensor]]) -> None:
    """heads.safetensors (<role>.<name>) and heads.json (role -> kind and shapes) of what `full_heads` gives."""
    named = {f"{role}.{name}": x for role, of_head in tensors.items() for name, x in of_head.items()}
    save_file({name: x.clone() for name, x in named.items()}, folder / "heads.safetensors", {"format": "pt"})
    described = {
        role: {"kind": type(heads[role]).__name__, "shapes": {name: list(x.shape) for name, x in of_head.items()}}
        for role, of_head in tensors.items()
    }
    write_json(folder / "heads.json", described)


def holds_heads(folder: Path | str, role: str) -> bool:
    """Whether a model's folder holds this head beside its weights."""
    path = (Path(folder) if Path(folder).is_dir() else find_folder(str(folder))) / "heads.json"
    return path.exists() and role in read_json(path)


@torch.no_grad()
def load_heads(folder: Path | str, heads: dict[str, nn.Module], mesh: Mesh) -> None:
    """Fills heads from a folder of `save_decoder`. Raises: FileNotFoundError, or ValueError naming the tensor."""
    path = (Path(folder) if Path(folder).is_dir() else find_folder(str(folder))) / "heads.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no heads.safetensors")
    tensors = load_file(path)
    for role, head in heads.items():
        placed = placements(head)
        for name, parameter in head.named_parameters():
            stored, shape = tensors.get(f"{role}.{name}"), placed[name].full_shape(parameter.shape)
            if stored is None or list(stored.shape) != shape:
                found = "missing" if stored is None else list(stored.shape)
                raise ValueError(f"{path}: {role}.{name} is {found}, needed as {shape}")
            fill_local(parameter, stored, placed[name], mesh.tp)


def eos_ids(path_or_id: str, tokenizer) -> list[int]:
    """Every id that ends a text: those of generation_config.json, config.json and the tokenizer."""
    ids = {tokenizer.eos_token_id}
    folder = find_folder(path_or_id)
    for file in ("generation_config.json", "config.json"):
        stored = read_json(folder / file).get("eos_token_id") if (folder / file).exists() else None
        ids |= set(stored) if isinstance(stored, list) else {stored}
    return sorted(ids - {None})
