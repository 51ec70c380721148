"""What `check.sh` found, as JSON: the device and the versions, every test that did not pass, and the benchmarks.

python tests/gpu/check_report.py device cuda        # prints the device and the versions
python tests/gpu/check_report.py report OUT CODE SECONDS
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch


KINDS = ("passed", "failed", "skipped")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub", "bitsandbytes")


def describe(name: str) -> dict[str, Any]:
    """The device and what runs on it.

    Raises:
        SystemExit: there is no such device.
    """
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device. SEP_PEFT_GPU_TESTS_ON=cpu rehearses the check without one.")
    found = {"python": platform.python_version(), "device": name, "versions": {p: installed(p) for p in PACKAGES}}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        found |= {
            "card": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver, clock, power limit": subprocess.run(query, capture_output=True, text=True).stdout.strip(),
        }
    return found


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def read_tests(path: Path) -> dict[str, Any]:
    """Counts, and the message of every test that failed or was skipped; of a run that was cut off, nothing."""
    if not path.exists():
        return {"finished": False}
    suite = ElementTree.parse(path).getroot().find("testsuite")
    assert suite is not None, "pytest writes one"
    found: dict[str, Any] = {"finished": True, "seconds": float(suite.get("time", 0)), "passed": 0}
    found |= {"failed": {}, "skipped": {}}
    for case in suite.iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        failed, skipped = (case.find(kind) for kind in ("failure", "skipped"))
        failed = case.find("error") if failed is None else failed
        if failed is not None:
            found["failed"][name] = f"{failed.get('message')}\n{(failed.text or '')[-2000:]}"
        elif skipped is not None:
            found["skipped"][name] = skipped.get("message")
        else:
            found["passed"] += 1
    return found


def report(out: Path, code: int, seconds: int) -> bool:
    """Writes check.json; whether all is well."""
    tests = read_tests(out / "tests.xml")
    benchmarks = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("benchmark-*.json"))}
    missed = [row["name"] for each in benchmarks.values() for row in each["rows"] if row["met"] is False]
    late = [name for name, reason in tests.get("skipped", {}).items() if "no time was left" in (reason or "")]
    well = code == 0 and tests["finished"] and not (tests["failed"] or late) and bool(benchmarks) and not missed
    found = {
        **json.loads((out / "device.json").read_text()),
        "well": well,
        "seconds": seconds,
        "tests": tests,
        "goals_missed": missed,
        "benchmarks": benchmarks,
    }
    (out / "check.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    counts = ", ".join(
        f"{tests[kind] if kind == 'passed' else len(tests[kind])} {kind}" for kind in KINDS if kind in tests
    )
    print(
        f"{counts or 'tests cut off'}; goals missed: {', '.join(missed) or 'none'}; {seconds} s; {out / 'check.json'}"
    )
    return well


if __name__ == "__main__":
    if sys.argv[1] == "device":
        print(json.dumps(describe(sys.argv[2])))
    else:
        sys.exit(not report(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
