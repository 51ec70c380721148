"""What `check.sh` found, as JSON: the device and the versions, every test that did not pass, and the benchmarks.

python tests/gpu/check_report.py device cuda        # prints the device and the versions
python tests/gpu/check_report.py report OUT CODE SECONDS ["tests benchmark"]

CODE is pytest's exit status, or "-" where the tests did not end. A check that was killed leaves its files in OUT; the
second command then makes check.json of what there is.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


KINDS = ("passed", "failed", "skipped")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub", "bitsandbytes")


def describe(name: str) -> dict[str, Any]:
    """The device and what runs on it.

    Raises:
        SystemExit: there is no such device.
    """
    import torch  # not for the report, which is made often

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


def read_tests(path: Path, code: str) -> dict[str, Any]:
    """Counts, and the reason of every test that failed or was skipped; of a run that was cut off, those that ended."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    tests = [json.loads(line) for line in lines]
    found: dict[str, Any] = {kind: {t["test"]: t["reason"] for t in tests if t["outcome"] == kind} for kind in KINDS}
    found["passed"] = len(found["passed"].keys() - found["failed"].keys())  # it may fail after it has passed
    finished = code in ("0", "1")  # all passed, or some failed
    return {"finished": finished, "seconds": round(sum(test["seconds"] for test in tests), 1), **found}


def report(out: Path, code: str, seconds: int, only: str = "tests benchmark") -> bool:
    """Writes check.json; whether all is well of the parts in `only`."""
    tests = read_tests(out / "tests.jsonl", code)
    benchmarks = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("benchmark-*.json"))}
    missed = [row["name"] for each in benchmarks.values() for row in each["rows"] if row["met"] is False]
    late = [name for name, reason in tests["skipped"].items() if "no time was left" in reason]
    tested = "tests" not in only or (code == "0" and not tests["failed"] and not late)
    well = tested and ("benchmark" not in only or bool(benchmarks)) and not missed
    found = {
        **json.loads((out / "device.json").read_text()),
        "well": well,
        "seconds": seconds,
        "tests": tests,
        "goals_missed": missed,
        "benchmarks": benchmarks,
    }
    (out / "check.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    counts = ", ".join(f"{tests[kind] if kind == 'passed' else len(tests[kind])} {kind}" for kind in KINDS)
    cut = "" if tests["finished"] else " (cut off)"
    print(f"{counts}{cut}; goals missed: {', '.join(missed) or 'none'}; {seconds} s; {out / 'check.json'}")
    return well


if __name__ == "__main__":
    if sys.argv[1] == "device":
        print(json.dumps(describe(sys.argv[2])))
    else:
        sys.exit(not report(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), *sys.argv[5:]))
