"""Full tensors of a run's state: put together from a checkpoint's files, and gathered from the ranks that hold them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from parallel.tensor import full_tensor


def read_state(folder):
    """Name -> full tensor of a checkpoint's folder, where each entry must lie in exactly one file."""
    shapes = json.loads((Path(folder) / "meta.json").read_text())["shapes"]
    tensors, times_seen = {}, {}
    for path in sorted(Path(folder).glob("rank-*.safetensors")):
        for key, x in load_file(path).items():
            name, offset = key.split("@")
            if name not in tensors:
                tensors[name] = torch.zeros(shapes[name], dtype=x.dtype)
                times_seen[name] = torch.zeros(shapes[name], dtype=torch.uint8)
            box = tuple(
                slice(int(i), int(i) + n) for i, n in zip(filter(None, offset.split(",")), x.shape, strict=True)
            )
            tensors[name][box] = x
            times_seen[name][box] += 1
    assert tensors.keys() == shapes.keys()
    for name, times in times_seen.items():
        assert (times == 1).all(), name
    return tensors


def full_tensors(unit, flat):
    """Name -> full tensor of a unit's weights, gradients or optimizer state; shared out, on the first replica alone."""
    found = zip(unit.tensors(flat), unit.placements, strict=False)
    return {name: full_tensor(local, placement, unit.tp).clone() for (name, local), placement in found}


def full_state(model, optimizer):
    """What a checkpoint should hold, on the first replica."""
    state = {"optimizer|steps": optimizer.steps.clone(), "optimizer|num_skipped": optimizer.num_skipped.clone()}
    for unit in optimizer.units:
        state |= full_tensors(unit, unit.flat)
        for key, flat in optimizer.state[unit].items():
            if key != "master" or unit.flat.dtype != flat.dtype:
                state |= {f"{name}|{key}": x for name, x in full_tensors(unit, flat).items()}
    return state


def assert_equal_states(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype and torch.equal(actual[name], x), name
