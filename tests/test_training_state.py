"""Boxes on disk: every layout's state written once and read by every other layout, bit for bit and lazily."""

import errno
import json
import math
import os
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from parallel import training_state
from parallel.data_parallel import data_parallel
from parallel.families import config_from_hf
from parallel.files import hash_file, hash_meta
from parallel.mesh import Layout, init_mesh
from parallel.optim import AdamW, clip_grad_norm
from parallel.pipeline import forward_backward
from parallel.training_state import (
    Piece,
    load_training_state,
    module_pieces,
    range_boxes,
    save_training_state,
)
from tests.ranks import context, run_ranks
from tests.states import assert_equal_states, full_state, read_state
from tests.test_checkpoint import peak_of
from tests.zero_models import make_loss, make_microbatches, make_roles

CONFIG = config_from_hf(  # two key/value heads for up to four ranks, biases, a vocabulary that divides by nothing
    dict(
        model_type="llama",
        vocab_size=131,
        num_hidden_layers=2,
        hidden_size=48,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=56,
        attention_bias=True,
        max_position_embeddings=64,
    ),
    "test",
)[0]
LAYOUTS = {
    "one": (1, Layout()),
    "tp2": (2, Layout(tp=2)),
    "tp4": (4, Layout(tp=4)),
    "dp2 zero 0": (2, Layout()),
    "dp2 zero 1": (2, Layout(zero=1)),
    "dp2 zero 2": (2, Layout(zero=2)),
    "dp2 zero 3": (2, Layout(zero=3)),
    "tp2 dp2 zero 3": (4, Layout(tp=2, zero=3)),
}


def make_run(layout, config=CONFIG):
    """Mesh, roles, model and optimizer of a small bfloat16 policy with a float32 value head."""
    mesh = init_mesh(layout)
    roles = make_roles(config, mesh, torch.bfloat16)
    model = data_parallel(roles, mesh, layout)
    return mesh, roles, model, AdamW(model, 1e-2, weight_decay=0.1)


def take_step(mesh, roles, model, optimizer):
    microbatches, num_tokens = make_microbatches(mesh, 0, 1, CONFIG.vocab_size)
    model.zero_grad()
    forward_backward(model, microbatches, make_loss(roles, num_tokens))
    clip_grad_norm(model, 1.0, mesh)
    assert optimizer.step()


def train_and_save(folder, layout):
    """The state of a run after one step, gathered; it also lies in the folder then."""
    mesh, roles, model, optimizer = make_run(layout)
    take_step(mesh, roles, model, optimizer)
    stored = [*model.pieces(), *optimizer.pieces()]
    save_training_state(folder, 1, stored, {}, 1, mesh)
    return full_state(model, optimizer)


class CountedFile:
    """An open file of a checkpoint that counts the entries that are read from it."""

    num_read = 0

    def __init__(self, *args):
        self.file = safe_open(*args)
        self.keys = self.file.keys

    def get_slice(self, key):
        return CountedSlice(self.file.get_slice(key))


class CountedSlice:
    def __init__(self, of_file):
        self.of_file, self.get_shape = of_file, of_file.get_shape

    def __getitem__(self, box):
        found = self.of_file[box]
        CountedFile.num_read += found.numel()
        return found


def load_each(folders, layout):
    """Of each folder the state that is gathered after loading, and entries that this rank holds and has read."""
    mesh, roles, model, optimizer = make_run(layout)
    take_step(mesh, roles, model, optimizer)  # nothing may be left of it
    stored = [*model.pieces(), *optimizer.pieces()]
    held = sum(piece.tensor.numel() for piece in stored)
    for folder in folders:
        CountedFile.num_read = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training_state, "safe_open", CountedFile)
            load_training_state(folder, stored, mesh)
        assert CountedFile.num_read == held, (layout, mesh.rank, folder)
        state = full_state(model, optimizer)
        if mesh.is_logger:
            assert_equal_states(state, read_state(folder / "step-1"))
    return held


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Layout -> folder with its checkpoint; each is what the ranks held, every entry of it once."""
    root = tmp_path_factory.mktemp("saved")
    for name, (ranks, layout) in LAYOUTS.items():
        expected = run_ranks(ranks, train_and_save, root / name, layout)[0]
        assert_equal_states(read_state(root / name / "step-1"), expected)
    return {name: root / name for name in LAYOUTS}


@pytest.mark.parametrize("name", LAYOUTS)
def test_state_of_every_layout_is_read_under(name, saved):
    """Equal bits in all tensors, and no rank reads an entry that it does not hold."""
    ranks, layout = LAYOUTS[name]
    held = run_ranks(ranks, load_each, list(saved.values()), layout)
    if layout.zero == 3:
        total = sum(x.numel() for x in read_state(saved["one"] / "step-1").values())
        assert sum(held) < 1.1 * total, "shared out, but for heads and norms"


@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_on_disk_are_those_of_the_state(name, saved):
    """Nothing is stored twice or padded, and every rank that owns a part writes it."""
    ranks, layout = LAYOUTS[name]
    files = sorted((saved[name] / "step-1").glob("rank-*.safetensors"))
    content = [path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in files]
    assert sum(content) == sum(x.nbytes for x in read_state(saved["one"] / "step-1").values())
    writers = ranks if layout.zero else layout.tp
    assert [path.name for path in files] == [f"rank-{rank}.safetensors" for rank in range(writers)]


def test_a_flat_range_is_at_most_three_boxes():
    for shape in [(7,), (1, 5), (5, 1), (4, 6), (2, 3, 4)]:
        full = torch.arange(math.prod(shape)).view(shape)
        for start, stop in product(range(full.numel() + 1), repeat=2):
            boxes = list(range_boxes(shape, start, stop)) if start <= stop else []
            found = torch.cat([full[box].flatten() for box in boxes] + [full.flatten()[:0]])
            assert torch.equal(found, full.flatten()[start:stop]), (shape, start, stop)
            assert len(boxes) <= 2 * len(shape) - 1


def heads_round_trip(folder, layout):
    mesh = init_mesh(layout)
    head = make_roles(CONFIG, mesh, torch.float32)["policy"]
    expected = {name: p.detach().clone() for name, p in head.named_parameters()}
    stored = list(module_pieces("target", head, mesh))
    save_training_state(folder, 1, stored, {}, 1, mesh)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(2)
    load_training_state(folder, stored, mesh)
    return all(torch.equal(p, expected[name]) for name, p in head.named_parameters())


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=4), Layout(tp=2)], ids=str)
def test_a_module_outside_of_units_comes_back(layout, tmp_path):
    assert all(run_ranks(4, heads_round_trip, tmp_path, layout))
    read_state(tmp_path / "step-1")


# --- what does not fit ----------------------------------------------------------------------------------------------


def edit_file(folder, file, edit):
    """Rewrites a rank's file, and its hash, with what `edit` makes of its dict of tensors."""
    meta = json.loads((folder / "meta.json").read_text())
    save_file(edit(load_file(folder / file)), folder / file)
    meta["sha256"][file] = hash_file(folder / file)
    meta["sha256"]["meta.json"] = hash_meta(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def errors_of_loads(folder):
    """Messages of loads into pieces that are not those of the checkpoint; none of them changes anything."""
    mesh, roles, model, optimizer = make_run(Layout(zero=3))
    stored = [*model.pieces(), *optimizer.pieces()]
    before = [x.tensor.clone() for x in stored]
    extra = Piece("policy.extra", [2], (0,), torch.ones(2), mesh.is_logger)
    first = "policy.layers.0.qkv.weight"
    reshaped = [Piece(x.name, [7, 9], x.offset, x.tensor, x.is_written) if x.name == first else x for x in stored]
    messages = []
    for pieces in ([*stored, extra], [x for x in stored if x.name != first], reshaped, stored):
        with pytest.raises(ValueError) as raised:
            load_training_state(folder, pieces, mesh)
        messages.append(str(raised.value))
    assert all(torch.equal(x.tensor, old) for x, old in zip(stored, before, strict=True))
    return messages


def test_load_names_the_first_tensor_that_does_not_fit(tmp_path):
    run_ranks(2, train_and_save, tmp_path, Layout(zero=3))
    key = next(
        key for key in load_file(tmp_path / "step-1/rank-1.safetensors") if key.startswith("policy.layers.1.qkv")
    )
    edit_file(tmp_path / "step-1", "rank-1.safetensors", lambda x: {k: v for k, v in x.items() if k != key})
    of_rank_0, of_rank_1 = run_ranks(2, errors_of_loads, tmp_path)
    assert of_rank_0 == of_rank_1
    missing, unknown, shape, incomplete = of_rank_0
    assert "the checkpoint has no tensor policy.extra" in missing
    assert "a tensor policy.layers.0.qkv.weight that is not here: it is of another model" in unknown
    assert "policy.layers.0.qkv.weight is [72, 48] in the checkpoint but [7, 9] here" in shape
    assert "step-1 is incomplete: it holds " in incomplete and f"entries of {key.split('@')[0]}" in incomplete


def save_with_a_full_disk_on_rank_1(folder):
    mesh, roles, model, optimizer = make_run(Layout(zero=3))
    stored = [*model.pieces(), *optimizer.pieces()]
    save_training_state(folder, 1, stored, {}, 2, mesh)
    write = training_state.write_tensors

    def no_space(tensors, path):
        write(dict(list(tensors.items())[:3]), path)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        if mesh.rank == 1:
            patch.setattr(training_state, "write_tensors", no_space)
        with pytest.raises(RuntimeError) as raised:
            save_training_state(folder, 2, stored, {}, 2, mesh)
    names = sorted(path.name for path in folder.iterdir())
    mesh.barrier()
    assert load_training_state(folder, stored, mesh)["step"] == 1
    save_training_state(folder, 2, stored, {}, 2, mesh)
    return str(raised.value), names, load_training_state(folder, stored, mesh)["step"]


def test_an_error_of_one_rank_stops_all_and_leaves_the_checkpoint_before(tmp_path):
    for message, names, step in run_ranks(2, save_with_a_full_disk_on_rank_1, tmp_path):
        assert message.startswith("rank 1: cannot write") and "step-2: " in message and "No space left" in message
        assert names == ["step-1"] and step == 2


def load_where_a_file_is_gone(folder):
    mesh, roles, model, optimizer = make_run(Layout(zero=3))
    stored = [*model.pieces(), *optimizer.pieces()]
    with pytest.warns(UserWarning) as warned:
        step = load_training_state(folder, stored, mesh)["step"]
    return step, [str(warning.message) for warning in warned if "damaged" in str(warning.message)]


def test_ranks_share_the_files_they_check_and_agree(tmp_path):
    """Two ranks look at the files of four; what one of them finds, both know."""
    run_ranks(4, save_twice, tmp_path)
    (tmp_path / "step-2/rank-3.safetensors").unlink()
    one, other = run_ranks(2, load_where_a_file_is_gone, tmp_path)
    assert one == other == (1, [f"{tmp_path}/step-2 is damaged (there is no rank-3.safetensors); going on from step-1"])


def save_twice(folder):
    mesh, roles, model, optimizer = make_run(Layout(tp=2, zero=3))
    for step in (1, 2):
        save_training_state(folder, step, [*model.pieces(), *optimizer.pieces()], {}, 2, mesh)


# --- memory ---------------------------------------------------------------------------------------------------------


def peaks_of_state(folder):
    mesh, size = init_mesh(), 1 << 20
    flat = torch.ones(64 * size)  # 256 MiB
    stored = [Piece(f"x{i}", [1024, 1024], (0, 0), flat[i * size :][:size].view(1024, 1024), True) for i in range(64)]
    _, save = peak_of(lambda: save_training_state(folder, 1, stored, {}, 1, mesh))
    halves = [Piece(x.name, x.full_shape, (o, 0), x.tensor[o : o + 512], not o) for x in stored for o in (0, 512)]
    _, load = peak_of(lambda: load_training_state(folder, halves, mesh))
    return save / flat.nbytes, load / flat.nbytes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_neither_save_nor_load_copies_the_state(tmp_path):
    with context.Pool(1) as pool:  # without freed memory to use again
        for peak in pool.apply(peaks_of_state, (tmp_path,)):
            assert peak < 1.5 / 64, "more than one parameter"
