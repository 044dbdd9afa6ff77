"""Files that are whole or not there: folders written under another name and renamed when they are complete.

An error on a rank that writes stops all ranks.
"""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError

from parallel.mesh import Mesh

REPLACED = "tmp-old-"  # prefix of a folder that is being replaced


def write_folder(folder: Path, write: Callable[[Path], None], mesh: Mesh, tensors: Iterable = ()) -> None:
    """Has rank 0 fill tmp-<name> by `write`, flush it to disk and rename it; the folder that was there goes last.

    Args: tensors: what `write` writes, if making it takes all ranks: the others run through it meanwhile, and rank 0
        finishes it also where writing fails.
    """

    def make() -> None:
        try:
            write(start_folder(folder))
            finish_folder(folder)
        except BaseException:
            discard_folder(folder)
            raise
        finally:
            for _ in tensors:
                pass

    mesh.at("saving")
    if not mesh.is_logger:
        for _ in tensors:
            pass
    on_logger(make, f"cannot write {folder}", mesh)


def start_folder(folder: Path) -> Path:
    """Makes an empty tmp-<name> in which a folder is to be written."""
    temporary, old = folder.with_name(f"tmp-{folder.name}"), folder.with_name(REPLACED + folder.name)
    restore_replaced(folder.parent, glob.escape(folder.name))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def finish_folder(folder: Path) -> None:
    """Flushes tmp-<name> to disk and gives it its name; the folder that was there goes last."""
    temporary, old = folder.with_name(f"tmp-{folder.name}"), folder.with_name(REPLACED + folder.name)
    for path in temporary.rglob("*"):
        flush(path)
    flush(temporary)
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def discard_folder(folder: Path) -> None:
    """Removes tmp-<name> and puts back what it was to replace."""
    restore_replaced(folder.parent, glob.escape(folder.name))
    shutil.rmtree(folder.with_name(f"tmp-{folder.name}"), ignore_errors=True)  # a full disk gets its space back


def restore_replaced(parent: Path, pattern: str) -> None:
    """Undoes replacements that a crash cut off between the two renames."""
    for old in parent.glob(REPLACED + pattern):
        folder = parent / old.name.removeprefix(REPLACED)
        if not folder.exists():
            os.rename(old, folder)


def on_logger(function: Callable[[], None], failure: str, mesh: Mesh) -> None:
    """Calls a function on rank 0; the others wait, and all ranks stop if it fails."""
    on_all(function if mesh.is_logger else lambda: None, failure, mesh)


def on_all(function: Callable[[], None], failure: str, mesh: Mesh) -> None:
    """Calls a function on every rank; all wait for all, and stop if it fails on one."""
    error = None
    try:
        function()
    except (OSError, SafetensorError) as caught:  # safetensors reports a full disk by its own error
        error = ValueError(f"{failure}: {caught}")
    except Exception as caught:
        error = caught
    mesh.wait_for_all("all ranks to read or write their files")
    mesh.raise_together(error)


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_meta(meta: dict) -> str:
    """Of all entries but the hashes."""
    rest = {name: value for name, value in meta.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {content!r:.40}, not an object")
    return content
