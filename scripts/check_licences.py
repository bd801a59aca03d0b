"""Licences of everything that dyndet installs: exits with 1 where one is not permissive, or unknown.

python scripts/check_licences.py            what a user gets
python scripts/check_licences.py wandb dev  and with these extras
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PERMISSIVE = (
    "mit", "bsd", "apache", "isc", "python software foundation", "psf", "mozilla public license 2", "mpl-2.0", "hpnd",
    "historical permission", "mit-cmu", "cmu", "zlib", "unlicense", "cc0", "blueoak", "matplotlib", "0bsd",
)  # fmt: skip
NAMED = {
    "nvidia": "CUDA's own libraries, which may be passed on with programs that use them",
    "cuda": "likewise",
    "triton": "MIT",
}
"""By the first word of a package's name, where its metadata says otherwise than its licence."""
COPYLEFT = re.compile(r"\b(a|l)?gpl|gnu (affero|lesser|general)", re.IGNORECASE)


def licences(extras: set[str]) -> Iterator[tuple[str, str, bool]]:
    """Package and version, licence, whether it is permissive."""
    waiting, seen = [("dyndet", extras)], set()
    while waiting:
        name, wanted = waiting.pop()
        key = (canonicalize_name(name), frozenset(wanted))
        if key in seen:
            continue
        seen.add(key)
        try:
            package = distribution(name)
        except PackageNotFoundError:  # of another platform
            continue
        text = _licence(package)
        named = NAMED.get(re.split(r"[-_]", canonicalize_name(name))[0])
        good = named is not None or (any(word in text.lower() for word in PERMISSIVE) and not COPYLEFT.search(text))
        yield f"{package.name} {package.version}", named or text or "none named", good
        for line in package.requires or []:
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ["", *wanted]):
                waiting.append((requirement.name, set(requirement.extras)))


def _licence(package: Distribution) -> str:
    fields: Any = package.metadata
    if expression := fields.get("License-Expression"):
        return expression
    classified = [item.split(" :: ")[-1] for item in fields.get_all("Classifier") or [] if item.startswith("License")]
    lines = (fields.get("License") or "").strip().splitlines()
    files = [file for file in package.files or [] if "LICEN" in file.name.upper()]
    texts = [" ".join(file.read_text().split()[:4]) for file in files[:1]]
    return ", ".join(classified) or (lines[0][:80] if lines else "".join(texts))


def main(extras: list[str]) -> int:
    found = sorted(set(licences(set(extras))))
    for package, text, good in found:
        print(f"{'ok ' if good else 'NOT'} {package:40} {text}")
    bad = [package for package, _, good in found if not good]
    print(f"{len(found)} packages, {len(bad)} not permissive or unknown{': ' * bool(bad)}{', '.join(bad)}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
