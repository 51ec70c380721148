"""Run PEFT's own generic tuner tests over a tiny CLIP with SEP, and with LoRA as the yardstick.

    python tests/peft_suite/run.py                         # fetches the source of the installed PEFT from PyPI
    python tests/peft_suite/run.py --source peft-0.21.2    # takes it from a folder
    python tests/peft_suite/run.py -- -k "training and sep"  # what follows -- goes to pytest

PEFT does not install its tests; its source distribution has them. Only that one file is fetched: no dependency, no
build tool, nothing from the Hub. The cases are in `cases.py` beside this file. The exit code is pytest's.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path


CASES = Path(__file__).resolve().with_name("cases.py")
REPOSITORY = CASES.parents[2]

#: What PEFT's test helpers import and our cases do not use; written where the real package is not installed.
STUBS = {
    "diffusers": "class StableDiffusionPipeline:\n    pass\n",
    "datasets": "def load_dataset(*args, **kwargs):\n    raise RuntimeError('a stub: nothing is downloaded here')\n",
}


def download(version: str, folder: Path) -> Path:
    """Fetch and unpack the source distribution of PEFT; returns its folder."""
    # Without build isolation, as pip would download setuptools merely to read the version of the file.
    options = ["--no-deps", "--no-binary=:all:", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, f"--dest={folder}", f"peft=={version}"]
    if subprocess.run(command).returncode != 0:
        sys.exit(
            f"error: pip could not download the source of peft {version}; its message is above. It needs pip and "
            "setuptools in this environment and access to PyPI; or unpack the source yourself and pass --source DIR."
        )
    (archive,) = folder.glob("peft-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def check_source(source: Path, version: str) -> None:
    """Stop where a folder is not the source distribution of the installed PEFT."""
    for name in ("PKG-INFO", "tests/testing_common.py"):
        if not (source / name).is_file():
            sys.exit(f"error: {source} is no unpacked source distribution of peft: it has no {name}.")
    found = metadata.Distribution.at(source).version
    if found != version:
        sys.exit(f"error: {source} is peft {found}, but peft {version} is installed; their tests may differ.")


def prepare(source: Path, folder: Path) -> None:
    """Make PEFT's tests importable from a folder as `peft_tests`, a name that our own `tests` do not hide."""
    shutil.copytree(source / "tests", folder / "peft_tests")
    for name, text in STUBS.items():
        if importlib.util.find_spec(name) is None:
            (folder / f"{name}.py").write_text(text)


def run_pytest(folder: Path, arguments: list[str]) -> int:
    """Run our cases with what `prepare` put into a folder; returns pytest's exit code."""
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", str(CASES), f"--confcutdir={CASES.parent}", "-rfEs", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, metavar="DIR", help="unpacked source distribution of the installed peft")
    parser.add_argument("pytest_arguments", nargs="*", metavar="ARG", help="for pytest, after --")
    arguments = parser.parse_args()
    version = metadata.version("peft")
    with tempfile.TemporaryDirectory(prefix="peft_suite_") as name:
        folder = Path(name)
        source = arguments.source or download(version, folder)
        check_source(source, version)
        prepare(source, folder)
        return run_pytest(folder, arguments.pytest_arguments)


if __name__ == "__main__":
    sys.exit(main())
