"""Downloads COCO 2017 detection data into the official layout that `data=coco` expects. Standard library only.

usage: python scripts/get_coco.py [FOLDER] [--parts annotations val train]
"""

from __future__ import annotations

import argparse
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

SOURCE = "http://images.cocodataset.org"
PARTS = {
    "annotations": ("annotations/annotations_trainval2017.zip", "annotations/instances_val2017.json"),
    "val": ("zips/val2017.zip", "val2017/000000000139.jpg"),
    "train": ("zips/train2017.zip", "train2017/000000000009.jpg"),
}
"""Name -> archive, and a file that is there once the archive has been unpacked."""


def fetch(url: str, target: Path) -> None:
    """Downloads to `target`, going on where an interrupted download stopped."""
    partial = target.with_suffix(".part")
    done = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    total = None
    try:
        with urllib.request.urlopen(request, timeout=60) as response, partial.open("ab") as file:
            if done and response.status != 206:  # the server starts over
                file.truncate(0)
                done = 0
            length = response.headers.get("Content-Length")
            total = None if length is None else done + int(length)
            while chunk := response.read(1 << 20):
                file.write(chunk)
                done += len(chunk)
                print(f"\r{target.name}: {done / 2**20:.0f} of {(total or 0) / 2**20:.0f} MiB", end="", flush=True)
        print()
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the file was complete already
            raise
    if total is not None and done < total:
        raise urllib.error.URLError(f"the connection ended after {done} of {total} bytes")
    partial.rename(target)


def main() -> int:
    parser = argparse.ArgumentParser(description="Download COCO 2017 (about 19 GB; val and annotations 1 GB).")
    parser.add_argument("folder", nargs="?", default="data/coco", type=Path)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    for part in arguments.parts:
        archive_name, witness = PARTS[part]
        archive = folder / Path(archive_name).name
        if (folder / witness).exists() and not archive.exists():  # the archive goes once all of it is unpacked
            print(f"{part}: already there")
            continue
        try:
            if not archive.exists():
                fetch(f"{SOURCE}/{archive_name}", archive)
            with zipfile.ZipFile(archive) as file:
                file.extractall(folder)
        except (urllib.error.URLError, TimeoutError) as error:
            print(f"error: {SOURCE}/{archive_name} could not be reached ({error}); run again to go on", file=sys.stderr)
            return 2
        except zipfile.BadZipFile:
            archive.unlink()
            print(f"error: {archive} is damaged and was removed; run again", file=sys.stderr)
            return 2
        archive.unlink()
    print(f"done: python -m dyndet.train +experiment=fcos_d8_dyn data.root={folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
