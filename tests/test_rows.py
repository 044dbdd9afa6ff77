"""Rows and objects by name: every kind of source, and every kind of bad one."""

import gzip
import json
import sys
import types

import pytest

from parallel.data import load_tokenizer
from parallel.rows import load_object, load_rows, resolve_model

# --- reading --------------------------------------------------------------------------------------------------------


def test_rows_are_read_from_files_folders_and_functions(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two\\u2028", "label": 1}\r\n')
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "three"}')
    (tmp_path / "d.txt").write_text("four\n \nfive\u2028six\n")
    (tmp_path / "README.md").write_text("no data")
    texts = ["one", "two\u2028", "three", "four", "five\u2028six"]
    rows = load_rows([str(tmp_path)])
    assert [row["text"] for row in rows] == texts
    assert rows[1].where == f"{tmp_path}/b.jsonl, line 3" and rows[1]["label"] == 1
    assert rows[3]["prompt"] == "four"
    rows = load_rows([str(tmp_path / "c.jsonl.gz"), "tasks.random_walks:prompts"])
    assert len(rows) == 21 and rows[0]["text"] == "three" and rows[1]["prompt"] == "b"
    assert rows[1].where == "tasks.random_walks:prompts, row 0"


def test_hub_data_sets_are_read_with_datasets(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return [{"text": "x"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_rows(["owner/name", "owner/name:test"]) == [{"text": "x"}] * 2
    assert asked == [("owner/name", "train"), ("owner/name", "test")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="owner/name is neither a file nor a folder .* pip install datasets"):
        load_rows(["owner/name"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"bad\.jsonl, line 2: not JSON: "),
        ("bad.jsonl", b'{"text": "a"}\n\n["b"]\n', r"bad\.jsonl, line 3: a row is a JSON object.*\[\"b\"\]"),
        ("bad.jsonl", b'{"text": "\xff"}\n', r"bad\.jsonl, line 1: not JSON: .*utf-8"),
        ("bad.txt", b"a\n\xff\n", r"bad\.txt, line 2: not UTF-8"),
        ("bad.jsonl.gz", b'{"text": "a"}\n', r"bad\.jsonl\.gz cannot be read after row 0: Not a gzipped file"),
        (
            "bad.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:40],
            r"bad\.jsonl\.gz cannot be read after row",
        ),
        ("empty.jsonl", b"\n", r"no rows in .*empty\.jsonl"),
        ("data.csv", b"text\n", r"data\.csv: cannot tell what it holds; a data file ends in \.jsonl"),
    ],
)
def test_load_rows_rejects_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_rows([str(tmp_path / name)])


def test_load_rows_rejects_what_is_not_there(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}')
    with pytest.raises(
        FileNotFoundError, match=r"trian\.jsonl: no such file or folder.* did you mean .*/train\.jsonl\?"
    ):
        load_rows([str(tmp_path / "trian.jsonl")])
    with pytest.raises(FileNotFoundError, match=r"nowhere/train\.jsonl: no such file or folder"):
        load_rows(["nowhere/train.jsonl"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: the folder holds no \.jsonl"):
        load_rows([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="no file was given"):
        load_rows([])


# --- objects by name ------------------------------------------------------------------------------------------------


def test_load_object_reads_modules_and_files(tmp_path):
    (tmp_path / "helper_beside.py").write_text("VALUE = 3\n")
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nimport helper_beside\n"
        "@dataclass\nclass Point:\n    x: int = helper_beside.VALUE\ndef rows():\n    return [{'text': 'a'}]\n"
    )
    assert load_object("json:dumps") is json.dumps
    assert load_object(f"{tmp_path}/mine.py:Point")().x == 3
    assert load_rows([f"{tmp_path}/mine.py:rows"]) == [{"text": "a"}]


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("no colon", ValueError, "'no colon' should be module:function or file.py:function"),
        ("tasks.random_walk:walks", ValueError, r"no module tasks\.random_walk; did you mean tasks\.random_walks\?"),
        ("tasks.random_walks:walk", ValueError, r"tasks\.random_walks has no walk; did you mean walks\?"),
        (
            "{tmp}/mien.py:rows",
            FileNotFoundError,
            r"mien\.py:rows: no such file or folder.* did you mean .*/mine\.py\?",
        ),
        ("{tmp}/mine.py:rws", ValueError, r"mine\.py has no rws; did you mean rows\?"),
        ("{tmp}/syntax.py:rows", ValueError, r"syntax\.py:rows: importing it failed: SyntaxError.*syntax\.py:2"),
        ("{tmp}/raises.py:rows", ValueError, r"failed: ZeroDivisionError: .*raises\.py:2, in <module>: x = 1 / 0"),
        ("{tmp}/missing.py:rows", ValueError, r"failed: ModuleNotFoundError: No module named 'not_installed_at_all'"),
    ],
)
def test_load_object_rejects(tmp_path, spec, error, message):
    (tmp_path / "mine.py").write_text("def rows():\n    return 5\n")
    (tmp_path / "syntax.py").write_text("x = 1\ndef rows(:\n")
    (tmp_path / "raises.py").write_text("y = 2\nx = 1 / 0\n")
    (tmp_path / "missing.py").write_text("import not_installed_at_all\n")
    with pytest.raises(error, match=message):
        load_object(spec.format(tmp=tmp_path))


def test_load_rows_rejects_functions_that_return_no_rows(tmp_path):
    (tmp_path / "mine.py").write_text("def number():\n    return 5\ndef texts():\n    return ['a']\n")
    for name in ("number", "texts"):
        with pytest.raises(ValueError, match=f"mine.py:{name} returned .*not a list of dicts"):
            load_rows([f"{tmp_path}/mine.py:{name}"])


def test_resolve_model_calls_functions_and_rejects_missing_folders(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(f"from pathlib import Path\ndef folder():\n    return Path({str(tmp_path)!r})\n")
    assert resolve_model(f"{tmp_path}/mine.py:folder") == str(tmp_path)
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    assert resolve_model("owner/name") == "owner/name"
    (tmp_path / "models/tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for missing in (f"{tmp_path}/model", "models/tniy", "./tiny", "a/b/c"):
        for load in (resolve_model, load_tokenizer):
            with pytest.raises(FileNotFoundError, match=f"^{missing}: no such file or folder"):
                load(missing)
