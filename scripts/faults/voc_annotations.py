"""Broken VOC xml."""

from __future__ import annotations

from pathlib import Path

from dyndet.data.voc import OriginalFolder, VocDataset
from faults.annotation_cases import SECOND, SIZE, Case


def _box(xmin: object = 10, ymin: object = 10, xmax: object = 30, ymax: object = 20) -> str:
    return f"<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox>"


def _object(box: str = _box(), name: str = "<name>a</name>", more: str = "") -> str:
    return f"<object>{name}{more}{box}</object>"


SIZED = f"<size><width>{SIZE[1]}</width><height>{SIZE[0]}</height><depth>3</depth></size>"
OTHER = _object(_box(40, 10, 50, 30), "<name>b</name>")


def _page(objects: str = _object(), size: str = SIZED) -> str:
    return f"<annotation><filename>1.jpg</filename>{size}{objects}{OTHER}</annotation>"


def read(case: Case, folder: Path) -> VocDataset:
    """A change is the first file."""
    (folder / "Annotations").mkdir()
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "train.txt").write_text("1\n2\n")
    file = folder / "Annotations" / "1.xml"
    if isinstance(case.change, bytes):
        file.write_bytes(case.change)
    else:
        file.write_text(case.change)
    (folder / "Annotations" / "2.xml").write_text(_page())
    return VocDataset(OriginalFolder(folder, folder / "images"))


def _with(**sides: object) -> str:
    return _page(_object(_box(**sides)))


ONLY = [SECOND]
DTD = '<!DOCTYPE annotation [<!ENTITY a "b">]>'
CASES = [
    Case("sound", _page()),
    Case("declared", f'<?xml version="1.0" encoding="utf-8"?>\n{_page()}'),
    Case("byte order mark", b"\xef\xbb\xbf" + _page().encode()),
    Case("utf-16", ('<?xml version="1.0" encoding="utf-16"?>' + _page()).encode("utf-16")),
    Case("latin-1",
         ('<?xml version="1.0" encoding="latin-1"?>' + _page(_object(name="<name>é</name>"))).encode("latin-1"),
         names=["a", "b", "é"]),
    Case("CRLF and indents", _page().replace("><", ">\r\n\t<")),
    Case("comments", _page().replace("<object>", "<object><!-- an object -->", 1)),
    Case("blanks around numbers", _page(_object(_box(" 10 ", "\n10", "30\t", " 20 ")))),
    Case("floats", _with(xmin="10.0", ymax="2.0e1")),
    Case("no byte", "", "is not valid xml"),
    Case("cut in half", _page()[:100], "is not valid xml"),
    Case("text", "10 10 30 20", "is not valid xml"),
    Case("json", '{"boxes": []}', "is not valid xml"),
    Case("zero bytes", b"\0" * 50, "is not valid xml"),
    Case("tags crossed", _page().replace("</object>", "</objekt>", 1), "is not valid xml"),
    Case("two roots", _page() + _page(), "is not valid xml"),
    Case("unknown encoding", '<?xml version="1.0" encoding="klingon"?>' + _page(), "is not valid xml"),
    Case("an ampersand", _page(_object(name="<name>a&b</name>")), "is not valid xml"),
    Case("a DTD", DTD + _page(), "holds a DTD or entities"),
    Case("nested deep", "<a>" * 100_000, "is not valid xml"),
    Case("NaN", _with(xmin="nan"), boxes=ONLY, repairs={"non-finite": 1}),
    Case("inf", _with(xmax="inf"), boxes=ONLY, repairs={"non-finite": 1}),
    Case("1e400", _with(xmax="1e400"), boxes=ONLY, repairs={"non-finite": 1}),
    Case("inverted", _with(xmin=30, xmax=10), boxes=ONLY, repairs={"inverted": 1}),
    Case("inverted in y", _with(ymin=20, ymax=10), boxes=ONLY, repairs={"inverted": 1}),
    Case("no width", _with(xmin=30), boxes=ONLY, repairs={"zero-size": 1}),
    Case("no height", _with(ymin=20), boxes=ONLY, repairs={"zero-size": 1}),
    Case("outside", _with(xmin=100, xmax=120), boxes=ONLY, repairs={"outside": 1}),
    Case("half outside", _with(xmin=50, xmax=90), boxes=[[50, 10, 60, 20], SECOND], repairs={"clipped": 1}),
    Case("negative corner", _with(xmin=-9), boxes=[[0, 10, 30, 20], SECOND], repairs={"clipped": 1}),
    Case("tiny", _with(xmin=29.5), boxes=[[29.5, 10, 30, 20], SECOND], repairs={"tiny": 1}),
    Case("a corner left out", _page(_object(_box().replace("<xmin>10</xmin>", ""))), "has bndbox/xmin None"),
    Case("a corner empty", _with(ymin=""), "has bndbox/ymin ''"),
    Case("a word", _with(xmax="right"), "has bndbox/xmax 'right'"),
    Case("a decimal comma", _with(xmax="30,0"), "has bndbox/xmax '30,0'"),
    Case("no box", _page(_object("")), "has bndbox/xmin None"),
    Case("box empty", _page(_object("<bndbox/>")), "has bndbox/xmin None"),
    Case("name left out", _page(_object(name="")), "has no name"),
    Case("name empty", _page(_object(name="<name> </name>")), "has no name"),
    Case("name unicode", _page(_object(name="<name>żółw</name>")), names=["a", "b", "żółw"]),
    Case("name with blanks", _page(_object(name="<name> a </name>")), names=["a", "b"]),
    Case("difficult", _page(_object(more="<difficult>1</difficult>")), crowd=[True, False]),
    Case("difficult as word", _page(_object(more="<difficult>Unspecified</difficult>")), crowd=[False, False]),
    Case("difficult empty", _page(_object(more="<difficult/>")), crowd=[False, False]),
    Case("difficult perhaps", _page(_object(more="<difficult>perhaps</difficult>")), "has difficult 'perhaps'"),
    Case("size left out", _page(size="")),
    Case("size 0", _page(size=SIZED.replace("60", "0").replace("40", "0"))),
    Case("size of another image", _page(size=SIZED.replace("60", "640")), "is for an image of 40 x 640"),
    Case("size exchanged", _page(size=SIZED.replace("60", "x").replace("40", "60").replace("x", "40")),
         "is for an image of 60 x 40"),
    Case("size as word", _page(size=SIZED.replace("60", "wide")), "has size/width 'wide'"),
    Case("size NaN", _page(size=SIZED.replace("60", "nan")), "is for an image of 40 x nan"),
    Case("size as float", _page(size=SIZED.replace("60", "60.0"))),
    Case("no object", _page("").replace(OTHER, ""), boxes=[]),
    Case("another root", "<html/>", boxes=[]),
]  # fmt: skip
assert len({case.name for case in CASES}) == len(CASES)
