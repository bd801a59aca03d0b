"""Compile every Triton kernel for GPUs that are not there, and check what the compiler made of it.

    python scripts/compile_kernels.py --sm 80 90 [--quick]

The launchers run on meta tensors, which records each launch with the constants, warps and stages that it would use on
that architecture; each is compiled and disassembled with the tools inside the Triton package. Exits with 1 when a
kernel spills, takes more registers or shared memory than there are, or misses the instructions it is fast through:
tensor cores in the matrix products of 16-bit types and of TF32, asynchronous copies in the gathered one. This proves
that kernels compile and what they take, not that they are right or fast.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dyndet import kernels
from dyndet.kernels import configs, launch

# Multiprocessors of an A100 and an H200, and the bytes of shared memory a program may take: for sm_80 those of 8.6
# and 8.9, which run the same table.
MULTIPROCESSORS = {80: 108, 90: 132}
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024}
MOST_REGISTERS = 255
MATRIX_PRODUCTS = {"gather_gemm", "weight_grad_gemm"}
GATHERED_PRODUCTS = {"gather_gemm"}

POSITIONS, SEGMENTS = 400_000, 80
# Many channels, groups that are no power of two, fewer channels than a tile.
CHANNELS = {torch.bfloat16: (256, 88, 64), torch.float16: (256,), torch.float32: (256, 88)}
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Report:
    """What the compiler made of one launch."""

    kernel: str
    variant: str
    sm: int
    registers: int
    stack: int
    local: int
    shared: int
    tensor_core: int
    copies: int

    def faults(self) -> Iterator[str]:
        if self.stack or self.local:
            yield f"spills ({self.stack} bytes of stack, {self.local} local loads and stores)"
        if self.registers > MOST_REGISTERS:
            yield f"takes {self.registers} registers"
        if self.shared > SHARED_MEMORY[self.sm]:
            yield f"takes {self.shared} bytes of shared memory, there are {SHARED_MEMORY[self.sm]}"
        kind, *options = self.variant.split()
        if self.kernel in MATRIX_PRODUCTS and ("16" in kind or "tf32" in options) and not self.tensor_core:
            yield "uses no tensor cores"
        if self.kernel in GATHERED_PRODUCTS and not self.copies:
            yield "copies nothing asynchronously"


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def hints() -> list[float]:
    """Densities that reach every entry of the tables."""
    tables = (configs.CONV, configs.WEIGHT_GRAD)
    limits = {limit for table in tables for entries in table.values() for limit, _ in entries}
    return sorted(min(limit / POSITIONS, 1.0) for limit in limits)


def calls(quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launchers with arguments of every kind, and the variant's name, which begins with the type of the rows."""
    positions, inverse, neighbours = meta(POSITIONS), meta(POSITIONS + 1), meta(POSITIONS, 9)
    segment, offsets = meta(POSITIONS), meta(SEGMENTS + 1)
    yield "", partial(kernels.plan, meta(POSITIONS, dtype=torch.float32), None, neighbours, segment, SEGMENTS, (0, 1))
    valid = meta(POSITIONS, dtype=torch.bool)
    yield "valid", partial(kernels.plan, valid, valid, neighbours, segment, SEGMENTS, (0, 1))

    for dtype, widths in CHANNELS.items():
        if quick and dtype != torch.bfloat16:
            continue
        name = TYPES[dtype]
        for channels in widths[:1] if quick else widths:
            rows, vector = meta(POSITIONS + 1, channels, dtype=dtype), meta(channels, dtype=torch.float32)
            weight = meta(channels, channels, 3, 3, dtype=dtype)
            variant = f"{name} {channels}"
            gather = (positions, inverse, neighbours, offsets)
            whole = (positions, None, neighbours, offsets)

            position_norm = kernels.PositionNorm(vector, vector, 8 if channels == 88 else channels // 8, 1e-5, True)
            densities = hints()[::3] if quick else hints() if channels == 256 else hints()[1:2]
            for density in densities:
                conv = partial(kernels.conv, rows, weight, density=density)
                weight_grad = partial(kernels.conv_weight_grad, rows, rows, *gather, density=density)
                yield f"{variant} forward", partial(conv, vector, *whole)
                yield f"{variant} transposed", partial(conv, None, *gather, transposed=True)
                yield f"{variant} norm", partial(conv, vector, *whole, norm=position_norm)
                if dtype == torch.float32:
                    yield f"{variant} forward tf32", partial(conv, vector, *whole, tf32=True)
                    yield f"{variant} transposed tf32", partial(conv, None, *gather, transposed=True, tf32=True)
                    yield f"{variant} norm tf32", partial(conv, vector, *whole, norm=position_norm, tf32=True)
                    yield f"{variant} tf32", partial(weight_grad, tf32=True)
                yield variant, weight_grad
            yield (
                f"{variant} norm scatter",
                partial(kernels.conv, rows, weight, None, *whole, norm=position_norm, scatter=True),
            )

            single = meta(channels, 1, 3, 3, dtype=dtype)
            yield f"{variant} forward", partial(kernels.depthwise, rows, single, vector, *whole, scatter=True)
            yield f"{variant} transposed", partial(kernels.depthwise, rows, single, None, *gather, transposed=True)
            yield variant, partial(kernels.depthwise_weight_grad, rows, rows, *gather)
            if channels > 64:
                plan = (positions, inverse, segment, offsets)
                for stats in ("active",) if quick else ("active", "position"):
                    yield from normalisations(variant, rows, vector, plan, position_norm.groups, stats)


def normalisations(
    variant: str, rows: Tensor, vector: Tensor, plan: tuple[Tensor, ...], groups: int, stats: str
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The calls of `group_norm`, `scatter_add` and their gradients."""
    positions, inverse, segment, offsets = plan
    gate = meta(POSITIONS, dtype=torch.float32)
    statistics = meta(POSITIONS if stats == "position" else SEGMENTS, groups, dtype=torch.float32)
    options: dict[str, Any] = {"groups": groups, "eps": 1e-5, "stats": stats, "relu": True}
    yield f"{variant} {stats}", partial(kernels.group_norm, rows, vector, vector, offsets, **options)
    operands = (rows, rows, rows, vector, statistics, statistics, offsets)
    yield f"{variant} {stats}", partial(kernels.group_norm_backward, *operands, stats=stats)
    for residual in (None, rows):
        ending = f"{variant} scatter {stats}" if residual is None else f"{variant} scatter {stats} residual"
        operands = (rows, vector, vector, gate, residual, inverse, segment, offsets)
        yield ending, partial(kernels.scatter_add, *operands, **options)
        operands = (rows, rows, rows, vector, vector, statistics, statistics, gate, positions, offsets)
        yield ending, partial(kernels.scatter_add_backward, *operands, stats=stats, residual=residual is not None)


@cache
def launches(sms: tuple[int, ...], quick: bool) -> list[tuple[int, str, launch.Launch]]:
    """(sm, variant, launch), each different program once."""
    found: dict[tuple[Any, ...], tuple[int, str, launch.Launch]] = {}
    for sm in sms:
        with launch.recorded(launch.Target(sm, MULTIPROCESSORS[sm])) as records:
            for variant, call in calls(quick):
                start = len(records)
                call()
                for item in records[start:]:
                    signature, constants, attributes = specialised(item)
                    key = (sm, item.kernel.__name__, *map(str, (signature, constants, attributes, item.options)))
                    found.setdefault(key, (sm, variant, item))
    return list(found.values())


def specialised(item: launch.Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Signature, constants and alignments that Triton would compile a launch with."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(item.kernel.params):
        named = index >= len(item.arguments)
        value = item.options[parameter.name] if named else item.arguments[index]
        free = parameter.do_not_specialize
        if named or value is None or (isinstance(value, int) and value == 1 and not free):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not free:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def inspect(index: int, sms: tuple[int, ...], quick: bool) -> Report:
    """Compile one launch and read its resources."""
    sm, variant, item = launches(sms, quick)[index]
    signature, constants, attributes = specialised(item)
    options = {name: value for name, value in item.options.items() if name not in constants}
    source = ASTSource(item.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options | {"enable_fp_fusion": True})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = tool(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path)
        code = tool(knobs.nvidia.nvdisasm.path, "-c", path)
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if numbers is None:
        raise RuntimeError(f"no resources in the output of cuobjdump: {usage!r}")
    block = "x".join(str(value) for name, value in item.options.items() if name.startswith("block"))
    count = partial(instructions, code)
    return Report(
        kernel=item.kernel.__name__,
        variant=f"{variant} [{block}/{item.options['num_warps']}w]",
        sm=sm,
        registers=int(numbers[1]),
        stack=int(numbers[2]),
        local=count("LDL|STL"),
        shared=compiled.metadata.shared,
        tensor_core=count("HGMMA|HMMA"),
        copies=count("LDGSTS"),
    )


def tool(program: str, option: str, path: Path) -> str:
    return subprocess.run([program, option, path], capture_output=True, text=True, check=True).stdout


def instructions(code: str, names: str) -> int:
    return len(re.findall(rf"\b(?:{names})\b", code))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sm", type=int, nargs="+", default=[80, 90], choices=sorted(MULTIPROCESSORS))
    parser.add_argument("--quick", action="store_true", help="bfloat16 with 256 channels and a few tiles alone")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    arguments = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", None) is not None:  # decides at import what a kernel is: start again
        os.execv(sys.executable, [sys.executable, *sys.argv])
    sms = tuple(arguments.sm)
    work = partial(inspect, sms=sms, quick=arguments.quick)
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        reports = list(pool.map(work, range(len(launches(sms, arguments.quick))), chunksize=4))
    print(
        f"{'kernel':18}{'variant':50}{'sm':>3}{'regs':>6}{'stack':>6}{'local':>6}{'shared':>8}{'tensor':>7}{'async':>6}"
    )
    for report in sorted(reports, key=lambda report: (report.kernel, report.variant, report.sm)):
        print(
            f"{report.kernel:18}{report.variant:50}{report.sm:3}{report.registers:6}{report.stack:6}{report.local:6}"
            f"{report.shared:8}{report.tensor_core:7}{report.copies:6}"
        )
    faults = [
        f"sm_{report.sm} {report.kernel} {report.variant}: {fault}" for report in reports for fault in report.faults()
    ]
    print(f"{len(reports)} programs, {len(faults)} faults")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
