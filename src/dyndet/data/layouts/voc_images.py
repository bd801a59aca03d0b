"""Which image belongs to a VOC xml, where folders hold several of one name: other splits, cameras, masks."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from dyndet.data.layouts.found import other_split, split_of
from dyndet.data.layouts.tree import Listing, Tree
from dyndet.errors import DataError

_NO_PHOTOS = re.compile(r"mask|depth|trimap|segment|thumb|label|annot")
_SAMPLE = 20


class VocImages:
    """The images of a folder by the xml that names them.

    Args:
        tree: names in the folder.
        folders: those that hold xml.
        given: folders of images that the user named; none looks everywhere.
    """

    def __init__(self, tree: Tree, folders: Sequence[Listing], given: Sequence[Path] = ()) -> None:
        self.tree = tree
        self.folders = folders
        roots = [folder.absolute() for folder in given]
        self.listings = [
            listing
            for listing in tree.with_images()
            if not roots or any(listing.path.is_relative_to(root) for root in roots)
        ]
        self._paths = {listing.path for listing in self.listings}
        self._ends: dict[tuple[str, ...], list[Listing]] = defaultdict(list)
        for listing in self.listings:
            parts = self._parts(listing.path)
            for first in range(len(parts)):
                self._ends[parts[first:]].append(listing)
        self._places = {listing.path: self._place(listing) for listing in folders}

    def of(self, file: Path, filename: str) -> Path:
        """The image of the xml's stem, in the folder that is most like the xml's; else the one that it names.

        Raises:
            DataError: if there is none, or several are as likely.
        """
        name = PurePosixPath(filename.replace("\\", "/")).name
        places = self._places[file.parent]
        stem = file.stem
        candidates = (
            self._by_stem.get(stem, []) if places is None else [listing for listing in places if stem in listing.stems]
        )
        candidates = self._of_split(candidates, file)
        exact = os.path.splitext(name)[0] == stem  # noqa: PTH122 - many names
        named = [listing for listing in candidates if exact and listing.has(name)]
        if candidates := named or candidates:
            found = self._best(candidates, file)
            return found.image(name if named else found.stems[stem])
        others = [listing for listing in self._by_stem.get(PurePosixPath(name).stem, []) if listing.has(name)]
        if others := self._of_split(others, file):
            return self._best(others, file).image(name)
        raise DataError(
            f"{file} has no image: neither {stem}.jpg (or .png, ...) nor {name!r} lies where its images are in "
            f"{self.tree.root}: add it or remove the xml"
        )

    def apart(self) -> list[str]:
        """Folders of images that are not those of the xml, for people: where the first of each belongs."""
        found = set[str]()
        for xml in self.folders:
            places = self._places[xml.path]
            likely = places or self._of_split(self._by_stem.get(xml.others[".xml"][0][:-4], []), xml.path / "x")
            if likely and (best := min(likely, key=lambda listing: self._rank(listing, xml.path))).path != xml.path:
                found.add(self.tree.short(best.path))
        return sorted(found)

    def _place(self, xml: Listing) -> list[Listing] | None:
        """The folders of images whose path ends like that of the xml, if they hold half of them; None for any."""
        stems = [name[:-4] for name in xml.others[".xml"]]
        stems = stems[:: max(1, len(stems) // _SAMPLE)]
        parts = self._parts(xml.path)
        same = [xml] if xml.images and xml.path in self._paths else []
        ends = [self._ends[parts[k:]] for k in range(len(parts)) if parts[k:] in self._ends]
        for places in [same, *ends]:
            places = self._of_split(places, xml.path / "x")
            if 2 * sum(any(stem in listing.stems for listing in places) for stem in stems) >= len(stems):
                return places
        return None

    def _best(self, candidates: Sequence[Listing], file: Path) -> Listing:
        if len(candidates) == 1:
            return candidates[0]
        first, second, *_ = sorted(candidates, key=lambda listing: self._rank(listing, file.parent))
        if self._rank(first, file.parent) == self._rank(second, file.parent):
            raise DataError(
                f"{file} could belong to an image in {self.tree.short(first.path)} or {self.tree.short(second.path)}: "
                "say which folder by data.train_images=FOLDER"
            )
        return first

    def _rank(self, listing: Listing, xml: Path) -> tuple[int, int]:
        """The less the likelier: by its name, then by the folders that it shares with those of the xml."""
        name = listing.path.name.lower()
        usual = {"jpegimages": 0, "images": 1}.get(name, 3 if _NO_PHOTOS.search(name) else 2)
        return usual, -len(Path(os.path.commonpath([xml, listing.path])).parts)

    def _of_split(self, listings: Sequence[Listing], file: Path) -> list[Listing]:
        root = self.tree.root
        split = split_of(file.parent, root)
        return [listing for listing in listings if not other_split(listing.path, split, root)]

    def _parts(self, path: Path) -> tuple[str, ...]:
        return path.relative_to(self.tree.root).parts

    @cached_property
    def _by_stem(self) -> dict[str, list[Listing]]:
        found: dict[str, list[Listing]] = defaultdict(list)
        for listing in self.listings:
            for stem in listing.stems:
                found[stem].append(listing)
        return found
