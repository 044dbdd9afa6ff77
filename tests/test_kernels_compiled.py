"""Flash attention compiled ahead of time for sm_80 and sm_90, with the tiles that it runs with there.

What comes out is compared with tests/results/compiled_attention.json, by Triton's version: registers, stack (spilled
registers), shared memory and tensor-core instructions. `python -m tests.test_kernels_compiled` writes that file anew.
By default a part is compiled, with ALL_KERNELS=1 everything; with TRITON_36, a folder that holds Triton 3.6, with that,
too.
"""

import itertools
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from kernels.attention import PIECES, tiles_of
from kernels.launch import triton
from tests.compiled import ROOT, Specimen, compile_all

TABLE = ROOT / "tests/results/compiled_attention.json"
STACK = 64  # bytes a thread may spill
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes of a block
TYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
ALL = bool(os.environ.get("ALL_KERNELS"))
ATTENTION_KERNELS = ("flash_forward", "flash_backward_kv", "flash_backward_q")


def attention_specimens():
    """(name, specimen) of each kernel, head dim, type and architecture."""
    strides = [f"{x}_{y}" for x in "qkvg" for y in ("batch", "token", "head")]
    tensors = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "grad_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
    for arch, (name, itemsize), head_dim in itertools.product((80, 90), TYPES.items(), PIECES):
        if name != "bf16" and head_dim not in (64, 128):
            continue
        types = dict.fromkeys(tensors, f"*{name}") | dict.fromkeys(strides, "i32") | {"scale": "fp32", "seq_len": "i32"}
        types |= {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "earliest_ptr": "*i32", "after_ptr": "*i32"}
        d0, d1 = PIECES[head_dim]
        for kernel, tiles in zip(ATTENTION_KERNELS, tiles_of(head_dim, itemsize, arch), strict=True):
            constants = {"GROUP": 4, "D0": d0, "D1": d1, "BM": tiles.rows, "BN": tiles.columns}
            yield (
                f"{kernel} {head_dim} {name} sm_{arch}",
                Specimen(
                    "kernels.attention", kernel, types, constants, arch, tiles.num_warps, tiles.num_stages, (*strides,)
                ),
            )


SPECIMENS = dict(attention_specimens())


def chosen(folder):
    """Names of what this run compiles: of the other Triton less."""
    if ALL:
        return list(SPECIMENS)
    if folder:
        return [name for name in SPECIMENS if " 64 bf16 sm_90" in name]
    return [name for name in SPECIMENS if " 128 bf16" in name or " 96 bf16 sm_90" in name]


def compile_named(names, folder):
    """(Triton's version, name -> what came out), by two processes."""
    halves = [names[::2], names[1::2]]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda half: compile_all([SPECIMENS[name] for name in half], folder), halves))
    results = {}
    for half, (_, rows) in zip(halves, found, strict=True):
        results |= dict(zip(half, rows, strict=True))
    return found[0][0], results


@pytest.mark.skipif(triton is None, reason="needs the package triton")
@pytest.mark.parametrize("folder", ["", os.environ.get("TRITON_36", "?")], ids=["installed", "3.6"])
def test_kernels_compile(folder):
    if folder == "?":
        pytest.skip("needs Triton 3.6 in the folder that TRITON_36 names")
    version, found = compile_named(chosen(folder), folder or None)
    expected = json.loads(TABLE.read_text()).get(version, {})
    for name, row in found.items():
        arch = SPECIMENS[name].capability
        assert row["stack"] <= STACK, (name, row)
        assert row["shared"] <= SHARED[arch], (name, row)
        if " fp32 " not in name:
            assert row["hgmma" if arch == 90 else "hmma"] > 0, (name, row)
        if expected:
            assert row == expected[name], name


if __name__ == "__main__":
    ALL = True
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for folder in ("", *sys.argv[1:]):
        version, found = compile_named(list(SPECIMENS), folder or None)
        table[version] = found
        for name, row in found.items():
            print(version, name, row)
    lines = [f' "{version}": {{\n' + ",\n".join(f'  "{name}": {json.dumps(row)}' for name, row in rows.items()) + "\n }"
             for version, rows in sorted(table.items())]  # fmt: skip
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
