"""Where data comes from: objects named on the command line, and rows of files, functions and hub data sets.

Every rank reads the same rows; an error names the file and the line.
"""

import difflib
import gzip
import importlib
import importlib.util
import json
import os
import pkgutil
import sys
import traceback
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")


def warn(message: str) -> None:
    """A warning of the first process alone; all processes read the same data."""
    if os.environ.get("RANK", "0") == "0":
        warnings.warn(message, stacklevel=3)


# --- objects by name ------------------------------------------------------------------------------------------------


def is_object_spec(spec: str) -> bool:
    """Whether spec has the form module:function or file.py:function."""
    module, colon, name = spec.rpartition(":")
    return bool(colon) and name.isidentifier() and (module.endswith(".py") or module.replace(".", "_").isidentifier())


def load_object(spec: str):
    """The object that "module:name" or "path/file.py:name" names.

    Raises: FileNotFoundError or ValueError naming the spec, what was looked for, and what comes close.
    """
    module_name, _, name = spec.rpartition(":")
    if not is_object_spec(spec):
        raise ValueError(f"{spec!r} should be module:function or file.py:function")
    try:
        module = load_file(spec, module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
    except FileNotFoundError:
        raise
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):  # the module is there and misses one that it imports
            raise ValueError(f"{spec}: importing it failed: {describe_error(error)}") from error
        parent, _, last = module_name.rpartition(".")
        path = sys.modules[parent].__path__ if parent in sys.modules else None
        close = [f"{parent}.{m}".lstrip(".") for m in similar(last, (m.name for m in pkgutil.iter_modules(path)))]
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(
            f"{spec}: there is no module {error.name}; {hint}A file of your own is given as path/file.py:{name}"
        ) from error
    except Exception as error:
        raise ValueError(f"{spec}: importing it failed: {describe_error(error)}") from error
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        close = similar(name, public)
        hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(sorted(public)) or 'nothing'}"
        raise ValueError(f"{spec}: {module_name} has no {name}; {hint}")
    return getattr(module, name)


def load_file(spec: str, path: str):
    """The module that a Python file defines; it may import the files beside it."""
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise missing_file(spec, file)
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    module_spec = importlib.util.spec_from_file_location(f"{file.stem}_loaded_from_file", file)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickle look their module up
    module_spec.loader.exec_module(module)
    return module


def describe_error(error: Exception, file: str = "") -> str:
    """Type, message and place of an error: the innermost line in `file`, or else the innermost of all."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    frame = ([f for f in frames if f.filename == file] or frames)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno}, in {frame.name}: {frame.line})"


def similar(name: str, names: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(names), n=1)


def missing_file(spec: str, path: Path) -> FileNotFoundError:
    """The error for a path that does not exist, naming what comes close."""
    close = similar(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else []
    hint = f"did you mean {path.parent / close[0]}?" if close else f"looked for {path.absolute()}"
    return FileNotFoundError(f"{spec}: no such file or folder; {hint}")


def resolve_model(spec: str) -> str:
    """A model's folder or hub id; of module:function, what the function returns."""
    if is_object_spec(spec):
        return str(load_object(spec)())
    reject_missing_folder(spec)
    return spec


def reject_missing_folder(spec: str) -> None:
    """Raises FileNotFoundError for a path that does not exist and cannot be meant as a hub id, owner/name."""
    path = Path(spec)
    if not path.exists() and (spec[:1] in "/.~" or spec.count("/") > 1 or ("/" in spec and path.parent.is_dir())):
        raise missing_file(spec, path)


# --- rows -----------------------------------------------------------------------------------------------------------

MAX_NUMBER = 1e15  # of rewards and margins, so that sums of squares stay finite in float32


class Row(dict):
    """The fields of one row, and where they were read: "prompts.jsonl, line 3"."""

    def __init__(self, fields: dict, where: str):
        super().__init__(fields)
        self.where = where

    def misfit(self, needed: str) -> ValueError:
        """The error for a row that does not hold what is needed."""
        return ValueError(f"{self.where}: needs {needed}; it has {', '.join(self) or 'no fields'}")

    def number(self, value, what: str) -> float:
        """A field's value, or a part of one. Raises: ValueError unless it is a number whose square is one too."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:
            raise ValueError(f"{self.where}: {what} {value!r:.40}, which is not a number between +-{MAX_NUMBER:.0e}")
        return float(value)

    def text(self, name: str) -> str:
        if not isinstance(self[name], str):
            raise ValueError(f"{self.where}: `{name}` is {self[name]!r:.80}, not a string")
        try:
            self[name].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{self.where}: `{name}` holds half a surrogate pair: {error}") from error
        return self[name]


def load_rows(specs: Iterable[str]) -> list[Row]:
    """The rows of JSONL and text files (plain or .gz), folders of those, hub data sets, or module:function.

    A non-empty line of a text file is a row whose `text` and `prompt` are that line. A hub name may end in :split
    (default: train).
    Raises: FileNotFoundError, or ValueError with file and line.
    """
    rows = [row for spec in specs for row in load_source(spec)]
    if not rows:
        raise ValueError(f"no rows in {', '.join(specs) or 'the data: no file was given'}")
    return rows


def load_source(spec: str) -> list[Row]:
    path = Path(spec).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES))
        if not files:
            raise ValueError(f"{spec}: the folder holds no {', '.join(SUFFIXES)} file")
        return [row for file in files for row in read_file(file)]
    if path.is_file():
        return read_file(path)
    module = spec.rpartition(":")[0]
    if is_object_spec(spec) and ("." in module or importlib.util.find_spec(module) is not None):  # else name:split
        rows = load_object(spec)()
        if not isinstance(rows, list | tuple) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{spec} returned {rows!r:.80}, not a list of dicts")
        return [Row(row, f"{spec}, row {i}") for i, row in enumerate(rows)]
    if path.suffix in (".jsonl", ".txt", ".gz", ".json", ".csv", ".parquet") or path.is_absolute() or spec[:1] in ".~":
        raise missing_file(spec, path)
    return load_hub_rows(spec)


def load_hub_rows(spec: str) -> list[Row]:
    name, _, split = spec.partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"{spec} is neither a file nor a folder here; to read it from the hub: pip install datasets"
        ) from error
    try:
        rows = load_dataset(name, split=split or "train")
    except Exception as error:
        raise ValueError(f"{spec}: the hub data set cannot be read: {type(error).__name__}: {error}") from error
    return [Row(row, f"{spec}, row {i}") for i, row in enumerate(rows)]


def read_file(path: Path) -> list[Row]:
    """Rows of one file, by its suffix."""
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: cannot tell what it holds; a data file ends in {', '.join(SUFFIXES)}")
    is_text = path.name.removesuffix(".gz").endswith(".txt")
    rows = []
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                try:
                    line = line.decode("utf-8").rstrip("\r\n")
                    if not line.strip():
                        continue
                    fields = {"text": line, "prompt": line} if is_text else json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where}: not {'UTF-8' if is_text else 'JSON'}: {error}") from error
                if not isinstance(fields, dict):
                    raise ValueError(f"{where}: a row is a JSON object, {{...}}, not {line:.80}")
                rows.append(Row(fields, where))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read after row {len(rows)}: {error}") from error
    return rows
