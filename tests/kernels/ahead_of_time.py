"""Compile a `Launch` for a GPU that is not there, and read what became of it."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from smi_fast.kernels.common.launch import Launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Compiled:
    """What the machine code of a kernel says: registers a thread, bytes spilled, 16-byte global accesses, products."""

    registers: int
    spills: int
    loads16: int
    stores16: int
    loads: int
    stores: int
    products: int  # instructions for tensor cores


def source_of(launch: Launch) -> ASTSource:
    """The kernel with the types and alignments that a launch on such arguments has."""
    kernel, signature, constants, attributes = launch.kernel, {}, {}, {}
    fixed = {kernel.arg_names[i] if isinstance(i, int) else i for i in kernel.do_not_specialize or ()}
    for index, name in enumerate(kernel.arg_names):
        value = launch.arguments.get(name, launch.constants.get(name))
        if name in launch.constants or value is None:
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]  # what torch's allocators give
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0 and name not in fixed:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(kernel, signature, constants, attributes)


def compile_for(launch: Launch, capability: int) -> Compiled:
    """Compile with Triton and read registers from the cubin, load widths from the PTX."""
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(source_of(launch), target=target, options=launch.options())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    assert found, usage
    ptx = built.asm["ptx"]

    def count(pattern: str) -> int:
        return len(re.findall(pattern, ptx))

    return Compiled(
        registers=int(found[1]),
        spills=int(found[2]) + int(found[3]),
        loads16=count(r"ld\.global\S*\.v4\.b32") + count(r"ld\.global\S*\.v2\.b64"),
        stores16=count(r"st\.global\S*\.v4\.b32") + count(r"st\.global\S*\.v2\.b64"),
        loads=count(r"ld\.global"),
        stores=count(r"st\.global"),
        products=count(r"wgmma\.mma_async|mma\.sync"),
    )
