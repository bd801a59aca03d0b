"""The wheel holds the whole tree, and runs outside the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TREES = {"dyndet/": ROOT / "src" / "dyndet", "dyndet/conf/": ROOT / "conf", "dyndet/kernels/": ROOT / "kernels"}


def test_every_package_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join([*prefix.strip("/").split("/"), *path.parent.relative_to(folder).parts])
        for prefix, folder in TREES.items()
        for path in folder.rglob("__init__.py")
    }
    assert found == listed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # what an older build left there goes into the wheel
    line = [sys.executable, "-m", "build", "--wheel", "--installer", "uv", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode and "uv" in done.stderr:
        line = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_tree(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"dyndet/py.typed"}
    for prefix, folder in TREES.items():
        for path in [file for kind in ("py", "yaml", "css") for file in folder.rglob(f"*.{kind}")]:
            expected.add(prefix + path.relative_to(folder).as_posix())
    assert inside == expected


@pytest.mark.slow
def test_the_wheel_trains_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    """Installed without its dependencies, which come from this environment; nothing comes from the checkout."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    script = (
        "import sys, runpy;"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)];"
        "import dyndet; assert dyndet.__file__.startswith(sys.argv[1]), dyndet.__file__;"
        "sys.argv = ['train', *sys.argv[2:]]; runpy.run_module('dyndet.train', run_name='__main__')"
    )
    tiny = ["data.size=64", "data.train_images=8", "data.val_images=4", "data.batch_size=4", "trainer.max_epochs=1"]
    done = subprocess.run(
        [sys.executable, "-c", script, str(site), *tiny, "trainer.accelerator=cpu"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
    assert list(tmp_path.glob("outputs/shapes_dyn/*/checkpoints/best.ckpt"))
