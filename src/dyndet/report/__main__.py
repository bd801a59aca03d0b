"""`python -m dyndet.report runs=DIR`: a table of runs, and accuracy against executed compute as a picture."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from dyndet.cli.command import run
from dyndet.report.runs import collect_runs, compute_number
from dyndet.report.tables import pareto_plot, report_table


def report(config: DictConfig) -> Path:
    """Writes `report.md` and `pareto.png` and prints the table."""
    runs = collect_runs(config.runs)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    apart = ["seed", *config.ignore]
    x = config.x or compute_number(runs)
    table = report_table(runs, x=x, y=config.y, ignore=apart)
    (folder / "report.md").write_text(table + "\n")
    print(table)
    picture = pareto_plot(runs, folder / "pareto.png", x=x, y=config.y, ignore=apart)
    print(f"table and picture: {folder / 'report.md'}, {picture}")
    return folder


if __name__ == "__main__":
    run(report, "report")
