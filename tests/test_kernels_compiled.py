"""All kernels compiled ahead of time for sm_80 and sm_90, with the tiles that they run with there.

What comes out is compared with tests/results/compiled.json, by Triton's version: registers, stack (spilled registers),
shared memory and tensor-core instructions. That file holds everything, and hashes of the sources that it was compiled
from, without which a test fails: `python -m tests.test_kernels_compiled [FOLDER]` compiles what has changed, with the
Triton of FOLDER, too. By default a part is compiled again, with ALL_KERNELS=1 everything; with TRITON_36, a folder that
holds Triton 3.6, with that, too.
"""

import ast
import hashlib
import io
import json
import os
import sys
import tokenize
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest

from kernels import attention, decode, linear_logprobs, sampler, target_logits
from kernels.launch import PIECES, padded_head, triton
from tests.compiled import ROOT, Specimen, compile_all

TABLE = ROOT / "tests/results/compiled.json"
STACK = 64  # bytes a thread may spill
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes of a block
TYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
TENSOR_CORES = {  # kernels whose 16-bit products must run there -> instruction on (sm_80, sm_90)
    "flash_forward": ("hmma", "hgmma"),
    "flash_backward_kv": ("hmma", "hgmma"),
    "flash_backward_q": ("hmma", "hgmma"),
    "fused_statistics_kernel": ("hmma", "hgmma"),
    "split_kernel": ("hmma", "hmma"),  # 16 rows of queries: fewer than wgmma takes
    # dk and dv of the 64 keys that wgmma takes fill all registers: 184 to 832 bytes of them would spill
    "flash_backward_kv 256": ("hmma", "hmma"),
}


def heads():
    """(name of the type, bytes of a number, head dim) of what is compiled: all head dims in bf16, and a padded one."""
    for name, itemsize in TYPES.items():
        head_dims = (12, *PIECES) if name == "bf16" else (12, 64, 128) if name == "fp32" else (64, 128)
        yield from ((name, itemsize, head_dim) for head_dim in head_dims)


def head_constants(head_dim):
    d0, d1 = PIECES[padded_head(head_dim)]
    return {"HEAD_DIM": head_dim, "D0": d0, "D1": d1}


def attention_specimens(arch):
    strides = [f"{x}_{y}" for x in "qkvg" for y in ("batch", "token", "head")]
    tensors = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "grad_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
    numbers = dict.fromkeys(strides, "i32") | {"scale": "fp32", "seq_len": "i32"}
    numbers |= {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "earliest_ptr": "*i32", "after_ptr": "*i32"}
    for name, itemsize, head_dim in heads():
        types = numbers | dict.fromkeys(tensors, f"*{name}")
        of_head, divisible = head_constants(head_dim), (*strides,) if head_dim % 16 == 0 else ()
        kernels = ("flash_forward", "flash_backward_kv", "flash_backward_q")
        for kernel, tiles in zip(kernels, attention.tiles_of(head_dim, itemsize, arch), strict=True):
            constants = {"GROUP": 4, **of_head, "BM": tiles.rows, "BN": tiles.columns}
            shape = arch, tiles.num_warps, tiles.num_stages, divisible
            yield f"{kernel} {head_dim} {name}", Specimen("kernels.attention", kernel, types, constants, *shape)
        constants = {**of_head, "BM": attention.DELTA_ROWS}
        shape = arch, 4, 3, divisible
        yield f"flash_delta {head_dim} {name}", Specimen("kernels.attention", "flash_delta", types, constants, *shape)


def decode_specimens(arch):
    pointers = {"lens_ptr": "*i64", "acc_ptr": "*fp32", "stats_ptr": "*fp32"}
    strides = ("qkv_stride", "q_stride", "q_head_stride", "kind_stride", "slot_stride", "head_stride", "token_stride")
    numbers = ("max_len", "window", "num_heads", "num_kv_heads", "group", "num_splits")
    types = pointers | {"scale": "fp32"} | dict.fromkeys((*strides, *numbers), "i32")
    for name, itemsize, head_dim in heads():
        tiles, of_head = decode.TILES[arch, padded_head(head_dim), 8 * itemsize], head_constants(head_dim)
        tensors = dict.fromkeys(("qkv_ptr", "q_ptr", "cache_ptr", "cos_ptr", "sin_ptr", "out_ptr"), f"*{name}")
        width = {"HEAD_DIM": head_dim, "PADDED": 1 << (head_dim - 1).bit_length()}
        split = {"ROWS": decode.QUERY_ROWS, "SPLIT": tiles.rows, "BN": tiles.columns, **of_head}
        rotary = {"HALF": head_dim // 4, "INTERLEAVED": head_dim == 256, "HEADS": decode.APPEND_HEADS}
        for kernel, constants, num_warps, num_stages in (
            ("split_kernel", split, tiles.num_warps, tiles.num_stages),
            ("merge_kernel", {"SPLIT": tiles.rows} | width, 1, 3),
            ("append_kernel", rotary | width, 4, 3),
        ):
            shape = arch, num_warps, num_stages, strides if head_dim % 16 == 0 else ()
            yield f"{kernel} {head_dim} {name}", Specimen("kernels.decode", kernel, types | tensors, constants, *shape)


def sampler_specimens(arch):
    types = dict.fromkeys(("logits_ptr", "largest_ptr", "border_ptr", "logprobs_ptr"), "*fp32")
    types |= dict.fromkeys(("sums_ptr", "mass_ptr", "prefix_ptr", "noise_ptr", "total_ptr"), "*fp64")
    types |= {"token_ids_ptr": "*i64", "temperature": "fp32"}
    numbers = ("stride", "num_ids", "num_rows", "num_blocks", "vocab", "top_k", "first_block", "num_local_blocks")
    types |= dict.fromkeys(numbers, "i32")
    sums, border, draw = (sampler.TILES[name] for name in ("sum", "border", "draw"))
    search = {"ROWS": border.rows, "IDS": border.columns, "ONE": sampler.ONE, "HALVINGS": sampler.HALVINGS}
    for kernel, constants, tiles in (
        ("sum_kernel", {"BLOCK": sampler.BLOCK, "BLOCKS": sums.rows, "HAS_BORDER": True}, sums),
        ("border_kernel", search | {"HAS_MASS": True}, border),
        ("draw_kernel", {"BLOCK": sampler.BLOCK, "PADDED": 2048, "ROWS": draw.rows, "HAS_BORDER": True}, draw),
    ):
        shape = arch, tiles.num_warps, tiles.num_stages, ("stride",)
        yield f"{kernel} fp32", Specimen("kernels.sampler", kernel, types, constants, *shape)


def logprobs_specimens(arch):
    file = linear_logprobs
    tiles, row_tiles = file.TILES[arch], file.ROW_TILES
    ints = ("num_rows", "num_valid", "vocab_start", "width", "stride", "num_slices")
    ints += ("hidden_stride", "weight_stride", "out_stride", "grads_stride")
    floats = ("parts_ptr", "products_ptr", "largest_ptr", "grads_ptr", "out_ptr")
    numbers = dict.fromkeys(ints, "i32") | {"scale": "fp32", "ids_ptr": "*i64"} | dict.fromkeys(floats, "*fp32")
    sizes = {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": file.DEPTH}
    sizes |= {"SLICE": file.SLICE_BLOCKS * tiles.columns, "GROUP": file.GROUP_BLOCKS}
    rows = {"ROWS": row_tiles.rows, "COLUMNS": row_tiles.columns}
    for name in TYPES:
        types = numbers | dict.fromkeys(("hidden_ptr", "weight_ptr", "bias_ptr"), f"*{name}")
        kernels = {"row_gradient_kernel": (types | {"out_ptr": f"*{name}"}, rows, row_tiles)}
        if name != "fp32":
            kernels["fused_statistics_kernel"] = types, sizes, tiles
        if name == "bf16":
            kernels["fused_statistics_kernel without bias"] = types, sizes | {"bias_ptr": None}, tiles
            kernels["row_statistics_kernel"] = types, rows, row_tiles
            kernels["merge_slices_kernel"] = types, {"ROWS": 128}, row_tiles._replace(num_warps=4)
        for kernel, (given, constants, its_tiles) in kernels.items():
            divisible = ("width", "hidden_stride", "weight_stride", "stride")
            shape = arch, its_tiles.num_warps, its_tiles.num_stages, divisible
            yield f"{kernel} {name}", Specimen("kernels.linear_logprobs", kernel.split()[0], given, constants, *shape)


def target_specimens(arch):
    file, tiles = target_logits, target_logits.TILES
    numbers = dict.fromkeys(("hidden_stride", "weight_stride", "num_rows", "width", "vocab_start", "num_local"), "i32")
    constants, shape = {"ROWS": tiles.rows, "COLUMNS": tiles.columns}, (arch, tiles.num_warps, tiles.num_stages)
    for name in TYPES:
        types = numbers | dict.fromkeys(("hidden_ptr", "weight_ptr", "bias_ptr"), f"*{name}")
        types |= {"ids_ptr": "*i64", "out_ptr": "*fp32"}
        divisible = ("hidden_stride", "weight_stride", "width")
        yield (
            f"target_logits_kernel {name}",
            Specimen(file.__name__, "target_logits_kernel", types, constants, *shape, divisible),
        )


SPECIMENS = {
    f"{name} sm_{arch}": specimen
    for arch in (80, 90)
    for of_file in (attention_specimens, decode_specimens, sampler_specimens, logprobs_specimens, target_specimens)
    for name, specimen in of_file(arch)
}


MODULES = sorted({specimen.module for specimen in SPECIMENS.values()})


def jitted(module):
    """Functions of a file that Triton compiles, as parsed, and the file's text."""
    text = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    functions = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef))
    return [node for node in functions if any(ast.unparse(x) == "jit" for x in node.decorator_list)], text


def sources(module):
    """Text of the functions that Triton compiles for a file's kernels: its own, and those that it imports."""
    functions, text = jitted(module)
    found = [ast.get_source_segment(text, node) for node in functions]
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("kernels."):
            theirs, text = jitted(node.module)
            names = {x.name for x in node.names}
            found += [ast.get_source_segment(text, function) for function in theirs if function.name in names]
    return found


def fingerprint(module):
    """Of what the compilation of a file's kernels depends on, but for Triton: code without comments, and specimens."""
    code = "\n".join(sources(module)) + "\n"
    words = (x.string for x in tokenize.generate_tokens(io.StringIO(code).readline) if x.type != tokenize.COMMENT)
    specimens = {name: asdict(x) for name, x in SPECIMENS.items() if x.module == module}
    given = json.dumps([[word for word in words if word.strip()], specimens], sort_keys=True)
    return hashlib.sha256(given.encode()).hexdigest()[:16]


def chosen(folder):
    """Names of what a test compiles: all with ALL_KERNELS=1, else of each Triton a part."""
    if os.environ.get("ALL_KERNELS"):
        return list(SPECIMENS)
    parts = ["96 bf16 sm_90", "draw_kernel", "fused_statistics_kernel bf16"]
    if not folder:
        parts += ["128 bf16 sm_80", "split_kernel 128 fp32 sm_90", "border_kernel", "row_gradient_kernel bf16"]
        parts += ["row_statistics_kernel", "merge_slices_kernel", "target_logits_kernel bf16"]
    return [name for name in SPECIMENS if any(part in name for part in parts)]


def compile_named(names, folder):
    """(Triton's version, name -> what came out), by two processes."""
    halves = [names[::2], names[1::2]]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda half: compile_all([SPECIMENS[name] for name in half], folder), halves))
    results = {}
    for half, (_, rows) in zip(halves, found, strict=True):
        results |= dict(zip(half, rows, strict=True))
    return found[0][0], {name: results[name] for name in names}


@pytest.mark.skipif(triton is None, reason="needs the package triton")
@pytest.mark.parametrize("folder", ["", os.environ.get("TRITON_36", "?")], ids=["installed", "3.6"])
def test_kernels_compile(folder):
    if folder == "?":
        pytest.skip("needs Triton 3.6 in the folder that TRITON_36 names")
    version, found = compile_named(chosen(folder), folder or None)
    expected = json.loads(TABLE.read_text()).get(version, {}).get("kernels")  # of another patch release there is none
    for name, row in found.items():
        check(name, row)
        assert expected is None or row == expected[name], name


def check(name, row):
    specimen = SPECIMENS[name]
    assert row["stack"] <= STACK, (name, row)
    assert row["shared"] <= SHARED[specimen.capability], (name, row)
    instructions = TENSOR_CORES.get(" ".join(name.split()[:2]), TENSOR_CORES.get(specimen.kernel))
    if instructions and " fp32 " not in name:
        assert row[instructions[specimen.capability == 90]] > 0, (name, row)


def test_table_is_of_every_kernel_as_it_is_now():
    table = json.loads(TABLE.read_text())
    assert {version.rpartition(".")[0] for version in table} >= {"3.6", "3.9"}
    for version, found in table.items():
        assert set(found["kernels"]) == set(SPECIMENS), version
        for name, row in found["kernels"].items():
            check(name, row)
        for module in MODULES:
            assert found["sources"][module] == fingerprint(module), (
                f"{module} has changed since tests/results/compiled.json was written with Triton {version}: "
                "python -m tests.test_kernels_compiled"
            )


def test_every_kernel_that_is_launched_is_compiled():
    for module in MODULES:
        launched = {node.name for node in jitted(module)[0] if "program_id" in ast.unparse(node)}
        assert launched == {x.kernel for x in SPECIMENS.values() if x.module == module}, module
    files = [f"kernels.{file.stem}" for file in sorted((ROOT / "kernels").glob("*.py"))]
    assert [name for name in files if jitted(name)[0]] == MODULES


def version_of(folder):
    return compile_all([], folder)[0]


if __name__ == "__main__":
    table, hashes = json.loads(TABLE.read_text()), {module: fingerprint(module) for module in MODULES}
    for folder in (None, *sys.argv[1:]):
        version = version_of(folder)
        old = table.get(version, {"sources": {}, "kernels": {}})
        kept = [module for module in MODULES if old["sources"].get(module) == hashes[module]]
        names = [name for name, x in SPECIMENS.items() if x.module not in kept or name not in old["kernels"]]
        rows = {name: row for name, row in old["kernels"].items() if name in SPECIMENS}
        rows |= compile_named(names, folder)[1]
        table[version] = {"sources": hashes, "kernels": {name: rows[name] for name in SPECIMENS}}
    lines = []
    for version, found in sorted(table.items()):
        rows = ",\n".join(f'  "{name}": {json.dumps(row)}' for name, row in found["kernels"].items())
        lines.append(f' "{version}": {{"sources": {json.dumps(found["sources"])}, "kernels": {{\n{rows}\n }}}}')
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
