"""Dense against sparse execution of masked 3x3 convolutions: paired timings of this machine, checked in the same run.

    python scripts/bench_sparse.py [--mode conv|block|train|head|trainhead|step|subm] [--device cuda] [--json FILE] ...
    python scripts/bench_sparse.py --suite cpu --json outputs/bench.jsonl    (then scripts/check_goals.py)

conv       one convolution, rows in, rows out, the plan ready; dense: conv2d of the channels-last maps
block      two convolutions with norms, gate and residual, plans included; dense: the same on every position
train      forward and backward of one convolution
head       a whole fine-grained head whose gates are forced open at the wanted density; dense: every position of the
           same head (CUDA: the fixed head)
trainhead  a whole head forward and backward; dense: the fixed head
step       a whole training step of bccd_dyn; dense: with the fixed head
subm       rows to the same rows; "dense": the submanifold convolution of spconv-triton, where that is installed

Every round times each variant once, in rotated order; a ratio is the median over rounds of dense / sparse time. A case
in which the dense side, timed twice, differs from itself by more than 10 % is measured again, and given up after that.
CUDA: device time between events, a flushed L2 cache, graph replay on both sides of block and head at batch 1.
Exits with 1 when a result is further from float64 than its type allows, or when a case fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from bench import gpu
from bench.cases import DTYPES, MODES, NORMS, Case, defaults, shapes_of, suite
from bench.environment import environment, load
from bench.masks import MASKS, density_for, dilated, share
from bench.modes import UnavailableError, build
from bench.reference import poisoned, worst
from bench.timing import Timing, compare

from dyndet.ops.sparse import IMPLS

RETRIES = 3
MOST_NOISE = 0.1
COLUMNS = "case|density %|achieved|dilated|N|path|dense ms|sparse ms|ratio|10-90 %|others|error"


class TooNoisyError(Exception):
    """A machine too busy to tell."""


def measure(case: Case, rounds: int, *, strict: bool = True) -> dict[str, Any]:
    """Times and checks a case.

    Args:
        case: what to run.
        rounds: of timing.
        strict: give up when the machine is noisy.

    Returns:
        The record that goes to the JSON file.

    Raises:
        TooNoisyError: when the dense side differs from itself on every try.
        UnavailableError: when the case cannot run here.
    """
    device = torch.device(case.device)
    env = environment(device)
    bench = build(case)
    counts: dict[str, int] = {}
    with poisoned():
        output = bench.sparse()
    errors = [bench.error(output)]
    variants = {"dense": bench.dense, "sparse": bench.sparse, "repeat": bench.dense, **bench.others}
    if device.type == "cuda" and case.mode in ("block", "head"):
        counts["syncs"] = gpu.syncs(bench.sparse)
        if launches := gpu.launches(bench.sparse):
            counts["launches"] = launches
    if case.graphed:
        variants = {name: gpu.graphed(run) for name, run in variants.items()}
        errors.append(bench.error(variants["sparse"]()))
    timings = _timings(variants, device, rounds, strict)
    dense, sparse, repeat = (timings.pop(name) for name in ("dense", "sparse", "repeat"))
    return {
        **asdict(case),
        "case": case.name,
        "macs_asked": case.macs,
        "macs": bench.macs,
        "achieved": 100 * share(bench.masks),
        "dilated": 100 * share([dilated(mask) for mask in bench.masks]),
        "N": sum(int(mask.sum()) for mask in bench.masks),
        "path": bench.path,
        "graphed": case.graphed,
        "rounds": rounds,
        "ms_dense": dense.ms,
        "ms_dense_min": dense.least,
        "ms_sparse": sparse.ms,
        "ms_sparse_min": sparse.least,
        "ratio": sparse.ratio,
        "ratio_low": sparse.low,
        "ratio_high": sparse.high,
        "repeat": repeat.ratio,
        "others": {name: {"ms": timing.ms, "ratio": timing.ratio} for name, timing in timings.items()},
        **counts,
        "err": worst(errors),
        "limit": case.limit,
        "env": env | {"load_after": load()},
    }


def _timings(
    variants: dict[str, Callable[[], object]], device: torch.device, rounds: int, strict: bool
) -> dict[str, Timing]:
    ratio = 1.0
    for _ in range(1 + RETRIES):
        timings = compare(variants, device, rounds)
        ratio = timings["repeat"].ratio
        if not strict or abs(ratio - 1) <= MOST_NOISE:
            return timings
    raise TooNoisyError(
        f"too noisy: dense against itself differs by {abs(ratio - 1):.0%} after {RETRIES} retries (load {load()}): "
        "try again on a quiet machine"
    )


def row(record: dict[str, Any]) -> str:
    """A record as a row of the Markdown table."""
    others = [f"{name} {other['ms']:.2f} ({other['ratio']:.2f}x)" for name, other in record["others"].items()]
    others += [f"{record[name]} {name}" for name in ("syncs", "launches") if name in record]
    cells = [
        record["case"], f"{record['density']:g}", f"{record['achieved']:.1f}", f"{record['dilated']:.1f}",
        f"{record['N']}", record["path"], f"{record['ms_dense']:.3f}", f"{record['ms_sparse']:.3f}",
        f"{record['ratio']:.2f}x", f"{record['ratio_low']:.2f}-{record['ratio_high']:.2f}", ", ".join(others),
        f"{record['err']:.1e}{'' if right(record) else ' WRONG'}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def right(record: dict[str, Any]) -> bool:
    """Whether the result is as near to float64 as its type allows; NaN never is."""
    return record["err"] <= record["limit"]


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """The cases that the command line asks for."""
    if arguments.suite:
        chosen = [case for case in suite(arguments.suite) if arguments.mode in (None, case.mode)]
        if arguments.norm:
            chosen = [replace(case, norm=arguments.norm) for case in chosen]
    else:
        given = {
            name: getattr(arguments, name)
            for name in ("device", "dtype", "levels", "mask", "channels", "depth", "impl", "norm")
            if getattr(arguments, name) is not None
        }
        base = replace(defaults(arguments.mode or "conv"), **given)
        batched = [replace(base, batch=batch) for batch in arguments.batch or [base.batch]]
        chosen = [replace(case, density=density) for case in batched for density in arguments.density]
        if arguments.macs is not None:
            chosen = [
                replace(
                    case,
                    density=100 * density_for(arguments.macs, case.mask, case.shapes, case.batch),
                    macs=arguments.macs,
                )
                for case in batched
            ]
    for case in chosen:
        yield case.tiny() if arguments.smoke else case


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, help="default: conv; of a suite all")
    parser.add_argument(
        "--suite", choices=("cpu", "gpu"), help="the cases of the goals; only --mode, --norm and --smoke change them"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=tuple(DTYPES))
    parser.add_argument("--levels", type=_levels, help="of 800 x 1333: P3 ... P7, P3,P4, all; or bccd, tiny")
    parser.add_argument("--batch", type=_numbers(int, 1), help="images, e.g. 1,4,16")
    parser.add_argument("--density", type=_numbers(float, 0, 100), default=[1.0, 5.0, 10.0, 20.0, 30.0, 50.0, 100.0])
    parser.add_argument("--macs", type=float, help="instead: the density of blocks with this share of multiply-adds")
    parser.add_argument("--mask", choices=MASKS)
    parser.add_argument("--channels", type=int)
    parser.add_argument("--depth", type=int, help="nodes per branch of a head")
    parser.add_argument("--impl", choices=IMPLS)
    parser.add_argument("--norm", choices=NORMS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="append records to this file, one per line")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, however noisy: times mean nothing")
    arguments = parser.parse_args(argv)
    for name, value in (("rounds", arguments.rounds), ("channels", arguments.channels), ("depth", arguments.depth)):
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if arguments.macs is not None and not 0 < arguments.macs <= 1:
        parser.error(f"--macs is a share, above 0 and at most 1, got {arguments.macs:g}")
    chosen = list(cases(arguments))
    if not chosen:
        parser.error(f"suite {arguments.suite} has no cases of mode {arguments.mode}")
    if any(case.device == "cuda" for case in chosen) and not torch.cuda.is_available():
        parser.error("these cases need a CUDA device, and torch sees none")
    return arguments


def _levels(text: str) -> str:
    try:
        shapes_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _numbers(kind: Callable[[str], Any], least: float, most: float = float("inf")) -> Callable[[str], list[Any]]:
    def numbers(text: str) -> list[Any]:
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"numbers separated by commas, got {text!r}") from error
        if not all(least <= value <= most for value in values):
            raise argparse.ArgumentTypeError(f"numbers from {least:g} to {most:g}, got {text!r}")
        return values

    return numbers


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    chosen = list(cases(arguments))
    # The dense side at its best; float32 in full on both sides, which are compared.
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    print(
        "; ".join(f"{key}: {value}" for key, value in environment(torch.device(chosen[0].device)).items()), end="\n\n"
    )
    print(f"| {' | '.join(COLUMNS.split('|'))} |\n|{'---|' * len(COLUMNS.split('|'))}")
    wrong = failed = left = 0
    for case in chosen:
        try:
            record = measure(case, arguments.rounds, strict=not arguments.smoke)
        except (TooNoisyError, UnavailableError) as error:
            left += 1
            print(f"{case.name} at {case.density:g} %: {error}", file=sys.stderr)
            continue
        except Exception:  # a broken case must not cost the others their measurement
            failed += 1
            print(f"{case.name} at {case.density:g} % failed:\n{traceback.format_exc()}", file=sys.stderr)
            continue
        wrong += not right(record)
        print(row(record), flush=True)
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            with arguments.json.open("a") as file:
                file.write(json.dumps(record) + "\n")
    print(f"\nload after: {load()}; {len(chosen)} cases: {wrong} wrong, {failed} failed, {left} not measured")
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main())
