"""The state of a run on disk: every rank writes what it owns, and any layout goes on from it.

A checkpoint is a folder step-<step>: meta.json, and rank-<rank>.safetensors of each rank that has something to write.
A stored tensor is a box of a full one, in coordinates without padding. Its key says which tensor and where the box
begins, `policy.layers.0.qkv.weight|m@96,0`; its shape is the box's size. A rank's part of a flat unit is a
few boxes of each parameter, and so is a slice of tensor parallelism; each box is written once. Hence no rank ever
gathers another's state, and to resume under another layout is to copy what two sets of boxes share.

A folder is written under another name and renamed when it is complete, so that a crash never leaves one that looks
whole; an error on any rank stops all.
"""

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from parallel.collectives import Axis, RankError
from parallel.files import (
    discard_folder,
    finish_folder,
    flush,
    hash_file,
    hash_meta,
    on_all,
    on_logger,
    read_json,
    restore_replaced,
    start_folder,
    write_json,
)
from parallel.mesh import Mesh
from parallel.tensor import Placement, placements

META = "meta.json"
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}

Box = tuple[slice, ...]

# --- what a rank holds ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A box of a full tensor, and the memory of this rank that holds it."""

    name: str  # of the tensor; optimizer state has |m, |v or |master behind its parameter's
    full_shape: list[int]  # without padding
    offset: tuple[int, ...]  # where the box begins in the full tensor
    tensor: Tensor  # a view in the box's shape
    is_written: bool  # by this rank: of those that hold the same box one writes it


def make_pieces(
    name: str, entries: Tensor, first: int, shape: torch.Size, placement: Placement, tp: Axis, is_written: bool
) -> Iterator[Piece]:
    """What a rank holds of a tensor, given as a flat range of its slice of it; padding is left out.

    Args: entries: a flat view of the slice's entries from `first` on. shape: of the slice. is_written: whether this
        replica writes them; of the ranks of tp that hold the same box the first one does.
    """
    full_shape = placement.full_shape(shape)
    boxes = placement.boxes(shape, tp)
    before = [placement.boxes(shape, Axis(tp.name, tp.size, rank)) for rank in range(tp.rank)]
    written_before = [there for of_rank in before for _, there in of_rank]
    for box in range_boxes(shape, first, first + len(entries)):
        sizes = [x.stop - x.start for x in box]
        view = entries[: math.prod(sizes)].view(sizes)
        entries = entries[math.prod(sizes) :]
        for here, there in boxes:
            shared = intersect(box, here)
            if shared is not None:
                offset = tuple(s.start - h.start + t.start for s, h, t in zip(shared, here, there, strict=True))
                own = is_written and there not in written_before
                yield Piece(name, full_shape, offset, view[shift(shared, box)], own)


def module_pieces(role: str, module: nn.Module, mesh: Mesh) -> Iterator[Piece]:
    """Weights of a module that is no role of `data_parallel`, whole on each replica and stage."""
    placed, first = placements(module), mesh.folded_dp.rank == 0
    for name, parameter in module.named_parameters():
        entries = parameter.detach().view(-1)
        yield from make_pieces(f"{role}.{name}", entries, 0, parameter.shape, placed[name], mesh.tp, first)


def range_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Boxes that are, one after the other, the entries [start, stop) of a tensor that lies row by row.

    Of a matrix at most three: the end of a row, whole rows, the beginning of a row.
    """
    if len(shape) == 1:
        if start < stop:
            yield (slice(start, stop),)
        return
    row = math.prod(shape[1:])
    whole = min(-(-start // row) * row, stop), max(stop // row * row, start)  # where whole rows begin and end
    for begin, end in pairwise(sorted({start, *whole, stop})):
        i = begin // row
        if begin % row == end % row == 0:
            yield (slice(i, end // row), *(slice(0, n) for n in shape[1:]))
        else:
            for box in range_boxes(shape[1:], begin - i * row, end - i * row):
                yield (slice(i, i + 1), *box)


def intersect(a: Box, b: Box) -> Box | None:
    """The box that two boxes share."""
    shared = tuple(slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True))
    return shared if all(x.start < x.stop for x in shared) else None


def shift(box: Box, origin: Box) -> Box:
    """A box in coordinates that count from where another begins."""
    return tuple(slice(x.start - o.start, x.stop - o.start) for x, o in zip(box, origin, strict=True))


def full_shapes(pieces: list[Piece], mesh: Mesh) -> dict[str, list[int]]:
    """Name -> full shape of every tensor that any rank holds; the same on all ranks."""
    firsts = {x.name: x.full_shape for x in pieces if x.is_written and not any(x.offset)}  # each on one rank
    return {name: shape for of_rank in mesh.gather_objects(firsts) for name, shape in of_rank.items()}


# --- save -----------------------------------------------------------------------------------------------------------


def save_training_state(folder: Path, step: int, pieces: list[Piece], meta: dict, keep: int, mesh: Mesh) -> None:
    """Writes folder/step-<step>, tensor by tensor on all ranks at once; the newest `keep` stay.

    Communication: names and shapes are gathered, besides a few barriers.
    Raises: RankError on every rank if the disk does not take it; the checkpoints before stay.
    """
    target, file = folder / f"step-{step}", f"rank-{mesh.rank}.safetensors"
    temporary, failure = target.with_name(f"tmp-{target.name}"), f"cannot write {target}"
    written: dict[str, str] = {}  # file -> hash

    def remove_leftovers() -> None:
        restore_replaced(folder, "step-*")
        for leftover in folder.glob("tmp-*"):
            shutil.rmtree(leftover)

    def write() -> None:
        tensors = {f"{x.name}@{','.join(map(str, x.offset))}": x.tensor for x in pieces if x.is_written}
        if tensors:
            written[file] = write_tensors(tensors, temporary / file)

    def finish() -> None:
        content = json.loads(json.dumps({"step": step, **meta, "shapes": shapes}))
        content["sha256"] = {**hashes, META: hash_meta(content)}
        write_json(temporary / META, content)
        finish_folder(target)

    def prune() -> None:
        for old in list_steps(folder)[keep:]:
            os.rename(old, old.with_name(f"tmp-{old.name}"))
            shutil.rmtree(old.with_name(f"tmp-{old.name}"))

    on_logger(remove_leftovers, f"cannot remove what a crash left in {folder}", mesh)
    try:
        on_logger(lambda: start_folder(target), failure, mesh)
        on_all(write, failure, mesh)
        shapes = full_shapes(pieces, mesh)
        hashes = {name: digest for of_rank in mesh.gather_objects(written) for name, digest in of_rank.items()}
        on_logger(finish, failure, mesh)
    except RankError:
        on_logger(lambda: discard_folder(target), failure, mesh)  # a full disk gets its space back
        raise
    on_logger(prune, f"cannot remove old checkpoints in {folder}", mesh)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> str:
    """Writes a safetensors file, with one tensor at a time in memory, flushes it to disk and returns its sha256.

    safetensors' own save_file takes all tensors on the CPU, and hashing its file would read all of it again.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # then each lies aligned
    header, end = {}, 0
    for key, x in ordered:
        header[key] = {"dtype": DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in (len(text).to_bytes(8, "little"), text, *(x for _, x in ordered)):
            if isinstance(part, Tensor):
                part = part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            file.write(part)
            digest.update(part)
    flush(path)
    return digest.hexdigest()


# --- load -----------------------------------------------------------------------------------------------------------


def load_training_state(folder: Path, pieces: list[Piece], mesh: Mesh) -> dict | None:
    """Fills the pieces from the newest intact checkpoint and returns its meta; None without any.

    A damaged checkpoint is named and passed over. Nothing is filled unless all fits; padding stays as it is.
    Communication: hashes are shared out over the ranks, and what they find is gathered, as are names and shapes.
    Raises: ValueError on all ranks if all are damaged or the newest is of another model, naming the first tensor that
        does not fit; RankError if a rank cannot read it.
    """
    steps = []

    def look() -> None:
        restore_replaced(folder, "step-*")
        steps.extend(path.name for path in list_steps(folder))

    on_logger(look, f"cannot read the checkpoints in {folder}", mesh)
    path, damaged = None, []
    for name in mesh.broadcast_object(steps):
        meta, problem = find_damage(folder / name, mesh)
        if problem is None:
            path = folder / name
            break
        damaged.append(f"{folder / name} is damaged ({problem})")
    if damaged:
        if path is None:
            raise ValueError(f"{'; '.join(damaged)}; there is none before it: --overwrite starts anew")
        warnings.warn(f"{'; '.join(damaged)}; going on from {path.name}", stacklevel=2)
    if path is None:
        return None
    check_shapes(path, meta["shapes"], full_shapes(pieces, mesh))
    stored = StoredBoxes()
    on_all(lambda: stored.open(path, meta), f"{path} cannot be read here", mesh)
    stored.check_complete(path, meta["shapes"])
    on_all(lambda: stored.fill(pieces), f"{path} cannot be read here", mesh)
    return meta


class StoredBoxes:
    """The boxes of a checkpoint by the tensor's name; of the files only headers are read until a box is copied."""

    def __init__(self):
        self.of_name: dict[str, list[tuple[Box, str, safe_open]]] = {}  # name -> (box, key, file)

    def open(self, path: Path, meta: dict) -> None:
        for file in sorted(meta["sha256"].keys() - {META}):
            handle = safe_open(path / file, "pt")
            for key in handle.keys():
                name, _, offset = key.rpartition("@")
                starts = [int(n) for n in offset.split(",") if n]
                sizes = handle.get_slice(key).get_shape()
                box = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
                self.of_name.setdefault(name, []).append((box, key, handle))

    def check_complete(self, path: Path, shapes: dict[str, list[int]]) -> None:
        """Raises ValueError naming the first tensor whose boxes, of which no two overlap, are not all of it."""
        for name, shape in shapes.items():
            boxes = [box for box, _, _ in self.of_name.get(name, [])]
            entries = sum(math.prod(x.stop - x.start for x in box) for box in boxes)
            if entries != math.prod(shape):
                raise ValueError(
                    f"{path} is incomplete: it holds {entries:,} of {math.prod(shape):,} entries of {name}"
                )

    @torch.no_grad()
    def fill(self, pieces: list[Piece]) -> None:
        """Copies what the boxes share with each piece; a slice of a file is a view of it, read as it is copied."""
        for piece in pieces:
            wanted = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.tensor.shape, strict=True))
            for box, key, handle in self.of_name[piece.name]:
                shared = intersect(wanted, box)
                if shared is not None:
                    piece.tensor[shift(shared, wanted)].copy_(handle.get_slice(key)[shift(shared, box)])


def check_shapes(path: Path, stored: dict[str, list[int]], here: dict[str, list[int]]) -> None:
    """Raises ValueError naming the first tensor that only one side has, or that has another shape."""
    for name, shape in here.items():
        if name not in stored:
            raise ValueError(
                f"{path}: the checkpoint has no tensor {name}: it belongs to another model or was saved without it"
            )
        if stored[name] != shape:
            raise ValueError(
                f"{path}: {name} is {stored[name]} in the checkpoint but {shape} here: it is of another model"
            )
    for name in stored:
        if name not in here:
            raise ValueError(f"{path}: the checkpoint has a tensor {name} that is not here: it is of another model")


def list_steps(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    paths = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(paths, key=lambda path: -int(path.name.removeprefix("step-")))


def find_damage(path: Path, mesh: Mesh) -> tuple[dict, str | None]:
    """Meta of a checkpoint and what is wrong with it, if anything; the same on all ranks, which share out the files."""
    meta, problem = mesh.broadcast_object(read_meta(path) if mesh.is_logger else None)
    if problem is not None:
        return meta, problem
    for file in sorted(meta["sha256"].keys() - {META})[mesh.rank :: mesh.world_size]:
        try:
            if not (path / file).is_file():
                problem = f"there is no {file}"
            elif hash_file(path / file) != meta["sha256"][file]:
                problem = f"{file} is not what was written"
        except OSError as error:
            problem = f"{file} cannot be read: {error}"
        if problem is not None:
            break
    return meta, next(filter(None, mesh.gather_objects(problem)), None)


def read_meta(path: Path) -> tuple[dict, str | None]:
    """meta.json of a checkpoint, and what is wrong with it."""
    if not (path / META).is_file():
        return {}, f"there is no {META}"
    try:
        meta = read_json(path / META)
    except ValueError as error:
        return {}, str(error)
    if not all(isinstance(meta.get(name), dict) for name in ("sha256", "shapes")):
        return {}, f"{META} cannot be read: it names no files or no shapes"
    return meta, None if hash_meta(meta) == meta["sha256"].get(META) else f"{META} is not what was written"
