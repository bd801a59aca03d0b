"""Broken label files and configurations of YOLO sets."""

from __future__ import annotations

from pathlib import Path

from dyndet.data.yolo import YoloDataset
from faults.annotation_cases import SECOND, Case

# The boxes of the first image, which has 60 x 40 pixels.
ONE, TWO = "0 0.3333333333 0.375 0.3333333333 0.25", "1 0.75 0.5 0.1666666667 0.5"
YAML = "train: images\nnames: [a, b]\n"
Parts = tuple[bytes, bytes]


def read(case: Case, folder: Path) -> YoloDataset:
    """A change is the text of the first label file, or it and that of the yaml."""
    label, config = case.change if isinstance(case.change, tuple) else (case.change, YAML)
    (folder / "labels").mkdir()
    for number, text in ((1, label), (2, "0 0.5 0.5 0.25 0.25\n"), (3, "")):
        _write(folder / "labels" / f"{number}.txt", text)
    _write(folder / "data.yaml", config)
    return YoloDataset(folder / "data.yaml")


def _write(file: Path, text: str | bytes) -> None:
    if isinstance(text, bytes):
        file.write_bytes(text)
    else:
        file.write_text(text)


def _line(first: str) -> str:
    return f"{first}\n{TWO}\n"


BOTH = f"{ONE}\n{TWO}\n"
ONLY = [SECOND]
WORDS = "give `class cx cy w h`"
CASES = [
    Case("sound", BOTH),
    Case("CRLF", BOTH.replace("\n", "\r\n")),
    Case("CR", BOTH.replace("\n", "\r").encode()),
    Case("byte order mark", b"\xef\xbb\xbf" + BOTH.encode()),
    Case("tabs", BOTH.replace(" ", "\t")),
    Case("blank lines", f"\n\n{ONE}\n\n{TWO}\n\n\n"),
    Case("blanks at the ends", f"  {ONE}  \n {TWO} "),
    Case("class as float", _line(ONE.replace("0 ", "0.0 ", 1))),
    Case("exponents", _line("0 3.333333333e-1 3.75e-1 3.333333333e-1 2.5E-1")),
    Case("an empty file", "", boxes=[]),
    Case("only blanks", "  \n\n", boxes=[]),
    Case("a polygon", _line("0 0.16666667 0.25 0.5 0.25 0.5 0.5 0.16666667 0.5")),
    Case("NaN", _line("0 nan 0.375 0.3333 0.25"), boxes=ONLY, repairs={"non-finite": 1}),
    Case("inf", _line("0 0.3333 inf 0.3333 0.25"), boxes=ONLY, repairs={"non-finite": 1}),
    Case("1e300", _line("0 1e300 0.375 0.3333 0.25"), boxes=ONLY, repairs={"non-finite": 1}),
    Case("negative width", _line("0 0.3333 0.375 -0.3333 0.25"), boxes=ONLY, repairs={"inverted": 1}),
    Case("no width", _line("0 0.3333 0.375 0 0.25"), boxes=ONLY, repairs={"zero-size": 1}),
    Case("no height", _line("0 0.3333 0.375 0.3 0"), boxes=ONLY, repairs={"zero-size": 1}),
    Case("outside", _line("0 1.5 0.375 0.2 0.25"), boxes=ONLY, repairs={"outside": 1}),
    Case("half outside", _line("0 1 0.375 0.3333333333 0.25"), boxes=[[50, 10, 60, 20], SECOND],
         repairs={"clipped": 1}),
    Case("one box in pixels", _line("0 20 15 20 10"), boxes=ONLY, repairs={"outside": 1}),
    Case("a tiny box", _line("0 0.5 0.5 0.0083333333 0.25"), boxes=[[29.75, 15, 30.25, 25], SECOND],
         repairs={"tiny": 1}),
    Case("unknown class", _line(ONE.replace("0 ", "7 ", 1)), "line 1 has class 7, which the configuration does not"),
    Case("negative class", _line(ONE.replace("0 ", "-1 ", 1)), "line 1 has class -1"),
    Case("class 0.5", _line(ONE.replace("0 ", "0.5 ", 1)), WORDS),
    Case("class by name", _line(ONE.replace("0 ", "a ", 1)), WORDS),
    Case("class NaN", _line(ONE.replace("0 ", "nan ", 1)), WORDS),
    Case("class inf", _line(ONE.replace("0 ", "inf ", 1)), WORDS),
    Case("class left out", _line("0.3333 0.375 0.3333 0.25"), WORDS),
    Case("three numbers", _line("0 0.3 0.3 0.3"), WORDS),
    Case("only a class", _line("0"), WORDS),
    Case("a score", _line(f"{ONE} 0.9"), "the sixth looks like a score"),
    Case("an odd polygon", _line("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4"), WORDS),
    Case("commas", _line(ONE.replace(" ", ",")), WORDS),
    Case("decimal commas", _line(ONE.replace(".", ",")), WORDS),
    Case("words", _line("0 left top right bottom"), WORDS),
    Case("a comment", _line(f"# boxes\n{ONE}"), WORDS),
    Case("json", '{"boxes": []}', WORDS),
    Case("xml", "<annotation></annotation>", WORDS),
    Case("a header", _line(f"class cx cy w h\n{ONE}"), WORDS),
    Case("hexadecimal", _line("0x0 0.3 0.3 0.3 0.3"), WORDS),
    Case("zero bytes", b"\0" * 20, WORDS),
    Case("no utf-8", b"\xff\xfe\x00\x30", "cannot be read as text"),
    Case("an image for a text", b"\xff\xd8\xff\xe0" + b"\x80" * 90, "cannot be read as text"),
    Case("a line of 2 MB", _line("0 " + "0.5 " * 500_000), "a line of"),
    Case("all counted from 1", ("2 0.5 0.5 0.2 0.2\n", "train: images\nnames: [b]\n"), "which the configuration does"),
    Case("yaml: names left out", (BOTH, "train: images\n"), "has no usable names"),
    Case("yaml: names empty", (BOTH, "train: images\nnames: []\n"), "has no usable names"),
    Case("yaml: names are text", (BOTH, "train: images\nnames: a\n"), "has no usable names"),
    Case("yaml: names by word", (BOTH, "train: images\nnames: {a: 0, b: 1}\n"), "has no usable names"),
    Case("yaml: a name twice", (BOTH, "train: images\nnames: [a, a]\n"), "names must be unique"),
    Case("yaml: a name empty", (BOTH, "train: images\nnames: [a, '']\n"), "has no name"),
    Case("yaml: nc differs", (BOTH, f"{YAML}nc: 3\n"), "has nc 3 but 2 names"),
    Case("yaml: nc as text", (BOTH, f"{YAML}nc: '2'\n")),
    Case("yaml: names as mapping", (BOTH, "train: images\nnames: {0: a, 1: b}\n"), names=["a", "b"]),
    Case("yaml: yes and no", (BOTH, "train: images\nnames: [yes, no]\n"), names=["yes", "no"]),
    Case("yaml: unicode", (BOTH, "train: images\nnames: [żółw, 龟]\n"), names=["żółw", "龟"]),
    Case("yaml: byte order mark", (BOTH, b"\xef\xbb\xbf" + YAML.encode()), names=["a", "b"]),
    Case("yaml: CRLF", (BOTH, YAML.replace("\n", "\r\n")), names=["a", "b"]),
    Case("yaml: a list", (BOTH, "- train\n"), "is not a YOLO configuration"),
    Case("yaml: no byte", (BOTH, ""), "is not a YOLO configuration"),
    Case("yaml: broken", (BOTH, "train: [\n"), "is not valid yaml"),
    Case("yaml: tabs", (BOTH, "train:\timages\n\tnames: [a]\n"), "is not valid yaml"),
    Case("yaml: a tag of Python", (BOTH, "train: images\nnames: !!python/object/apply:os.system ['true']\n"),
         "is not valid yaml"),
    Case("yaml: no split", (BOTH, "names: [a, b]\n"), "has no split 'train'"),
    Case("yaml: split is not there", (BOTH, "train: pictures\nnames: [a, b]\n"), "which does not exist"),
    Case("yaml: keypoints", (BOTH, f"{YAML}kpt_shape: many\n"), "has kpt_shape 'many'"),
]  # fmt: skip
assert len({case.name for case in CASES}) == len(CASES)
