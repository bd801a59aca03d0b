"""`python -m dyndet.report runs=DIR`: runs as a table, as a picture, and as a page to open in a browser."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from dyndet.cli.command import run
from dyndet.report.overview import report_page
from dyndet.report.runs import collect_runs, compute_number
from dyndet.report.tables import pareto_plot, report_table


def report(config: DictConfig) -> Path:
    """Writes `report.html`, `report.md` and `pareto.png` and prints the table."""
    runs = collect_runs(config.runs)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    apart = ["seed", *config.ignore]
    x = config.x or compute_number(runs)
    table = report_table(runs, x=x, y=config.y, ignore=apart)
    (folder / "report.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    picture = pareto_plot(runs, folder / "pareto.png", x=x, y=config.y, ignore=apart)
    page = report_page(
        runs,
        title=f"dyndet: {Path(config.runs).absolute().name}",
        x=x,
        y=config.y,
        ignore=apart,
        full=config.full,
        pictures=config.pictures,
        images=config.images,
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    print(f"table and picture: {folder / 'report.md'}, {picture}")
    print(f"open in a browser: {folder / 'report.html'}")
    return folder


if __name__ == "__main__":
    run(report, "report")
