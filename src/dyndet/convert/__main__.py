"""`python -m dyndet.convert source=FILE out=FILE [experiment=NAME] [trust=true]`: a released checkpoint as ours."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from omegaconf import DictConfig

from dyndet.cli.command import run
from dyndet.convert.release import read_release, save_release
from dyndet.errors import UserError


def convert(config: DictConfig) -> Path:
    """Converts a file and says what became of its tensors."""
    if Path(config.out).resolve() == Path(config.source).resolve():
        raise UserError(f"out={config.out} is the source: give another file")
    converted = read_release(config.source, config.experiment, trust=config.trust is True)
    out = save_release(converted, config.out)
    report = converted.report
    print(f"{config.source}: {converted.source}, as experiment {converted.experiment}")
    for override in converted.overrides:
        print(f"  with {override}")
    print(f"{len(report.used)} tensors used, {len(report.unused)} not needed, {len(report.filled)} filled")
    for reason, number in Counter([*report.unused.values(), *report.filled.values()]).items():
        print(f"  {number}: {reason}")
    if converted.note:
        print(f"note: {converted.note}")
    print(f"written: {out}; python -m dyndet.predict ckpt={out} source=IMAGES")
    return out


if __name__ == "__main__":
    run(convert, "convert")
