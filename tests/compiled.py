"""Kernels compiled ahead of time for a GPU that need not be there: registers, spills, shared memory, instructions.

`python -m tests.compiled KERNELS.json`, in a process of its own without the interpreter: reads a list of what to
compile, prints a list of what came out. `compile_all` runs that, with the installed Triton or with that of a folder.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
WATCHED = ("HGMMA", "HMMA", "LDGSTS", "LDL", "STL")


@dataclass(frozen=True)
class Specimen:
    """A kernel with everything that its compilation depends on."""

    module: str
    kernel: str
    types: dict[str, str]  # of its arguments: "*bf16", "i32", "fp32"; pointers are aligned
    constants: dict[str, object]
    capability: int
    num_warps: int
    num_stages: int
    divisible: tuple[str, ...] = ()  # integers that are multiples of 16


def compile_all(specimens: list[Specimen], triton_folder: str | None = None) -> tuple[str, list[dict]]:
    """(Triton's version, what `compile_one` returns for each)."""
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "KERNELS")}
    env["PYTHONPATH"] = os.pathsep.join([*([triton_folder] if triton_folder else []), str(ROOT)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "specimens.json"
        path.write_text(json.dumps([asdict(specimen) for specimen in specimens]))
        command = [sys.executable, "-m", "tests.compiled", str(path)]
        done = subprocess.run(command, env=env | {"TRITON_CACHE_DIR": folder}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version, *lines = done.stdout.splitlines()
    return version, [json.loads(line) for line in lines]


def compile_one(specimen: Specimen) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = getattr(importlib.import_module(specimen.module), specimen.kernel)
    signature, attributes, constants = {}, {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in specimen.constants:
            signature[name], constants[(i,)] = "constexpr", specimen.constants[name]
            continue
        signature[name] = specimen.types[name]
        if signature[name].startswith("*") or name in specimen.divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    kernel = triton.compile(
        ASTSource(fn, signature, constants, attributes),
        target=GPUTarget("cuda", specimen.capability, 32),
        options={"num_warps": specimen.num_warps, "num_stages": specimen.num_stages},
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "--dump-sass")
        )
    body = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE)
    found = {name.lower(): int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK")}
    counts = {name.lower(): sum(x.partition(".")[0] == name for x in body) for name in WATCHED}
    return found | {"shared": kernel.metadata.shared} | counts


if __name__ == "__main__":
    import triton

    print(triton.__version__)
    for given in json.loads(Path(sys.argv[1]).read_text()):
        print(json.dumps(compile_one(Specimen(**given))), flush=True)
