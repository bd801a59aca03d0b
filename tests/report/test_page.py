"""The page: everything that is text is escaped, everything is in one file, a stranger's names do no harm."""

from __future__ import annotations

import base64
import json
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_runs import log, make, numbers

from commands import forked
from dyndet.metrics.validation import ImageFacts, read_validation
from dyndet.report.charts import Line, Point, bar_chart, histogram, line_chart, scatter_chart
from dyndet.report.history import line_of, read_history
from dyndet.report.overview import report_page
from dyndet.report.page import Html, document, element, figure, html, matrix, picture, section, shade, table
from dyndet.report.pictures import MISSED, close_up, outlined, read_picture
from dyndet.report.runs import collect_runs
from dyndet.structures import Category, Detections, Target

EVIL = '<script>alert("1")</script>&amp;\'"'


class Reader(HTMLParser):
    """Checks that tags are balanced, and keeps the tags, the text and the links."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.anchors: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.anchors += [value or "" for name, value in attrs if name == "id"]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if not self.open or self.open[-1] != "style" else ""


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=30))
def test_text_comes_out_as_it_went_in(text: str) -> None:
    text = text.replace("\r", "").replace("\0", "")
    page = html([element("p", text, title=text), Html("<br>"), 1.5])
    reader = Reader(page)
    assert reader.text == text + "1.5" and reader.tags == ["p", "br"]
    assert "<script" not in html(f"<script>{text}")


def test_every_building_block_escapes() -> None:
    blocks = [
        section(EVIL, EVIL, anchor=EVIL, note=EVIL),
        figure(EVIL, EVIL),
        table([{EVIL: EVIL}]),
        matrix([EVIL], [EVIL], [[EVIL]], [[0.5]], titles=[[EVIL]], corner=EVIL),
        line_chart([Line(EVIL, [0, 1], [0, 1]), Line(EVIL, [0], [1])], x_label=EVIL, y_label=EVIL),
        scatter_chart([Point(0, 0, EVIL, EVIL)], x_label=EVIL, y_label=EVIL),
        histogram([1.0, 2.0], x_label=EVIL, y_label=EVIL),
        bar_chart({EVIL: 1.0}, {EVIL: EVIL}, {EVIL: "#123456"}),
        picture(Image.new("RGB", (2, 2)), EVIL),
    ]
    page = document(EVIL, *blocks, subtitle=EVIL, links={EVIL: EVIL})
    assert "<script" not in page
    reader = Reader(page)
    assert reader.text.count(EVIL) > 20
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in reader.links)


def test_pictures_are_inside() -> None:
    source = re.search(r'src="data:image/jpeg;base64,([^"]+)"', picture(Image.new("RGB", (30, 20), "red"), "red"))
    assert source
    with Image.open(BytesIO(base64.b64decode(source[1]))) as image:
        assert image.size == (30, 20)


def test_shades_and_numbers() -> None:
    assert shade(0) == "#ffffff" and shade(-1) == shade(0) and shade(2) == shade(1) == "#194b8c"
    assert table([{"a": "0.5", "b": "x"}, {"a": "", "b": "1"}]).count('class="number"') == 3


def points_of(chart: str) -> list[list[float]]:
    return [[float(x) for x in re.split("[ ,]", match)] for match in re.findall(r' points="([^"]+)"', chart)]


def test_charts_put_data_where_they_belong() -> None:
    chart = line_chart(
        [Line("a", [0, 5, 10], [0, math.nan, 1])], x_label="x", y_label="", x_range=(0, 10), y_range=(0, 1)
    )
    ((x0, y0, x1, y1),) = points_of(chart)
    assert x0 == 46 and x1 == 366 and y1 == 12 and y0 == 196  # the corners of the frame; nan is left out
    assert ">10<" in chart and ">0.4<" in chart
    assert "nothing to draw" in line_chart([Line("a", [1], [math.nan])], x_label="x", y_label="y")
    bars = [int(found) for found in re.findall(r": (\d+) images", histogram([1, 1, 2, 9], x_label="x"))]
    assert sum(bars) == 4 and bars[0] == 3 and bars[-1] == 1
    assert histogram([3.0], x_label="x").count("<rect") == 1


def test_history_joins_the_logs_of_a_resumed_run(tmp_path: Path) -> None:
    home = make(tmp_path / "a", [])
    log(home, "epoch,step,train/loss,val/AP\n0,9,2.0,\n0,19,1.0,0.1\n0,29,9.0,bad\n")
    log(home, "step,train/loss\n29,0.5\n39,0.25\n", "csv/version_1")
    log(make(home / "inner", []), "step,train/loss\n9,7.0\n")
    for number, path in enumerate(sorted(home.glob("csv/*/metrics.csv"))):
        os.utime(path, (1e9 + number, 1e9 + number))
    history = read_history(home, [home, home / "inner"])
    line = line_of(history, "train/loss", "loss")
    assert (line.name, line.x, line.y) == ("loss", [9, 19, 29, 39], [2.0, 1.0, 0.5, 0.25])
    assert history["val/AP"] == {19: 0.1} and line_of(history, "none").x == []


def test_long_lines_are_averaged() -> None:
    line = line_of({"a": {step: float(step) for step in range(1000)}}, "a")
    assert len(line.x) == 200 and line.y[0] == 2.0 and line.x == line.y


NAMES = [Category(7, EVIL), Category(9, "cat")]
TARGETS = [
    Target(
        torch.tensor([[10.25, 10, 60, 50.0], [70, 20, 90, 45]]), torch.tensor([0, 1]),
        torch.tensor([False, index == 2]),
        image_id=30 - index, original_size=(80, 100),
    )
    for index in range(4)
]  # fmt: skip


def found(index: int) -> Detections:
    boxes = torch.tensor([[11, 10, 60, 50.0], [68, 20, 92, 44.5], [0, 60, 20, 79]])
    return Detections(
        boxes, torch.tensor([0.9, 0.8 - 0.1 * index, 0.7]), torch.tensor([0, index % 2, 1]), macs=1e9 + index
    )


def left_by_a_run(folder: Path) -> Path:
    """A run's folder with three images that are there and one that is gone."""
    facts = ImageFacts()
    for index, target in enumerate(TARGETS):
        path = folder / "images" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if index < 3:
            Image.new("RGB", (100, 80), (40 * index, 90, 120)).save(path)
        target.path = str(path)
        facts.add(found(index), target, (80, 100), NAMES, hard=index == 1)
    facts.write(folder, NAMES)
    return folder


def test_what_a_validation_left_reads_back(tmp_path: Path) -> None:
    validation = read_validation(left_by_a_run(tmp_path))
    assert validation is not None and validation.categories == NAMES
    assert [target.image_id for target in validation.targets] == [27, 28, 29, 30]
    assert validation.hard == [False, False, True, False]
    for target, detections, index in zip(validation.targets, validation.detections, (3, 2, 1, 0), strict=True):
        assert torch.equal(target.boxes, TARGETS[index].boxes) and torch.equal(target.labels, TARGETS[index].labels)
        assert torch.equal(target.crowd, TARGETS[index].crowd) and target.original_size == (80, 100)
        expected = found(index)
        order = expected.scores.argsort(descending=True, stable=True)
        assert torch.equal(detections.boxes, expected.boxes[order]) and detections.macs == 1e9 + index
        assert torch.equal(detections.scores, expected.scores[order])
    assert json.loads((tmp_path / "ground_truth.json").read_text())["images"][0]["path"] == "images/0.png"
    (tmp_path / "elsewhere").mkdir()
    for name in ("ground_truth.json", "detections.json", "compute.json", "images"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    assert read_validation(tmp_path) is None
    moved = read_validation(tmp_path / "elsewhere")
    assert moved is not None and read_picture(moved.targets[3]) is not None


@pytest.mark.parametrize("text", ["[", "{}", '{"images": [{"id": 1}]}', "[1]"])
def test_broken_files_are_told(tmp_path: Path, text: str) -> None:
    (left_by_a_run(tmp_path) / "ground_truth.json").write_text(text)
    with pytest.raises(ValueError, match=r"ground_truth\.json.*cannot be read"):
        read_validation(tmp_path)


def test_pictures_show_boxes_where_they_are(tmp_path: Path) -> None:
    target = TARGETS[0]
    image = Image.new("RGB", (200, 160))  # twice as large as annotated
    whole = outlined(image, target, [((10, 10, 60, 50), MISSED)], width=200)
    assert whole.size == (200, 160) and whole.getpixel((60, 20)) == MISSED and whole.getpixel((60, 60)) == (0, 0, 0)
    near = close_up(image, target, (90, 70, 100, 80), [((90, 70, 100, 80), MISSED)], width=200)
    assert near.size == (200, 200) and near.getpixel((150, 198)) == MISSED  # a third of the image, at its corner
    assert close_up(image, target, (0, 0, 100, 80), [], width=100).size == (100, 80)


def test_report_of_one_run(tmp_path: Path) -> None:
    names = numbers(0.4, 0.5) | {f"val/AP/{EVIL}": 0.25, "gates/cls.0.up/P3": 0.75, "step": 39.0}
    home = left_by_a_run(make(tmp_path / "run", [f"data.root={EVIL}", "a=1"], names))
    log(home)
    done = forked(tmp_path, "report", f"runs={home}")
    assert done.returncode == 0, done.stderr
    page = (home / "report.html").read_text()
    reader = Reader(page)
    assert not {"script", "link", "iframe"} & set(reader.tags) and "http" not in page
    assert all(link.startswith("data:image/jpeg;base64,") or link[1:] in reader.anchors for link in reader.links)
    assert {"summary", "curves", "classes", "confusion", "errors", "worst-errors", "compute", "images"} <= {
        *reader.anchors
    }
    for text in (EVIL, "75%", "classification", "2 settings differ", "1.000 GMAC", "hard route"):
        assert text in reader.text, text
    assert reader.tags.count("img") > 10
    assert (home / "report.md").is_file() and (home / "pareto.png").is_file()


@pytest.mark.parametrize("empty", ["detections", "objects", "both", "macs"])
def test_a_validation_with_nothing_in_it(tmp_path: Path, empty: str) -> None:
    facts = ImageFacts()
    for index, target in enumerate(TARGETS):
        items, none = found(index), torch.zeros(0, dtype=torch.int64)
        if empty in ("detections", "both"):
            items = Detections(torch.zeros(0, 4), torch.zeros(0), none)
        things = target[none] if empty in ("objects", "both") else target
        facts.add(replace(items, macs=None), replace(things, path=""), (80, 100), NAMES)
    facts.write(make(tmp_path / "run", [], numbers(0.0, 0.5)), NAMES)
    page = report_page(collect_runs(tmp_path), title="", x="macs/head_ratio", y="val/AP")
    assert {"classes", "confusion", "errors", "worst-errors", "images"} <= set(Reader(page).anchors)


def test_pictures_that_moved_are_found_by_their_names(tmp_path: Path) -> None:
    home = left_by_a_run(make(tmp_path / "run", [], numbers(0.4, 0.5)))
    (home / "images").rename(tmp_path / "moved")
    runs = collect_runs(home)
    gone, again = (
        Reader(report_page(runs, title="", x="macs/head_ratio", y="val/AP", images=images))
        for images in (None, tmp_path / "moved")
    )
    assert "img" not in gone.tags and "report again with images=FOLDER" in gone.text
    assert again.tags.count("img") > 10 and "images=FOLDER" not in again.text


def test_report_of_several_runs(tmp_path: Path) -> None:
    for index in range(3):
        home = make(tmp_path / str(index), [f"budget.weight={index}"], numbers(0.3 + 0.1 * index, 0.2 + 0.2 * index))
        log(home)
        if index == 2:
            left_by_a_run(home)
    make(tmp_path / "3", ["budget.weight=9"])
    (make(tmp_path / "4", ["budget.weight=10"], numbers(0.1, 0.1)) / "detections.json").write_text("[")
    for name in ("ground_truth.json", "compute.json"):
        (tmp_path / "4" / name).write_text("[]")
    done = forked(tmp_path, "report", f"runs={tmp_path}", "full=9", f"out={tmp_path}/out", "pictures=2")
    assert done.returncode == 0, done.stderr
    reader = Reader((tmp_path / "out" / "report.html").read_text())
    assert all(link.startswith("data:") or link[1:] in reader.anchors for link in reader.links)
    assert {"runs", "pareto", "curves"} <= set(reader.anchors) and len(set(reader.anchors)) == len(reader.anchors)
    assert "no validation yet (3)" in reader.text and "cannot be read" in reader.text
    assert reader.text.count("evaluate it once to get them") == 2 and "Pareto front" in reader.text
