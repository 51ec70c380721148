#!/usr/bin/env bash
# All that a GPU can tell, in one command and at most eight minutes: the tests of this folder, then the benchmark.
#
#   tests/gpu/check.sh [OUT]                              # OUT (gpu-check) gets check.json and what it is made of
#   WHEELS=wheels tests/gpu/check.sh                      # packages that are missing come from a folder of wheels
#   ONLY=tests tests/gpu/check.sh                         # or benchmark
#   SECONDS_AT_MOST=270 tests/gpu/check.sh                # in another time than 460 seconds
#   SEP_PEFT_GPU_TESTS_ON=cpu tests/gpu/check.sh          # a rehearsal without a GPU, of tiny models
#
# The machine needs torch and transformers; nothing is downloaded. It exits with 0 where all tests pass and every goal
# that was measured is met. Every test and every figure is written when it is there, and check.json after every part.
set -euo pipefail
cd "$(dirname "$0")/../.."

out=$(mkdir -p "${1:-gpu-check}" && cd "${1:-gpu-check}" && pwd)
limit=${SECONDS_AT_MOST:-460}
only=${ONLY:-tests benchmark}
python=python3
rm -f "$out"/{device,check,benchmark-*}.json "$out"/tests.jsonl "$out"/check.log

if [ -n "${WHEELS:-}" ]; then
  room=$(mktemp -d)
  trap 'rm -rf "$room"' EXIT
  $python -m venv --system-site-packages "$room/venv"
  python=$room/venv/bin/python
  # what is there and new enough stays
  $python -m pip install --quiet --no-index --find-links "$WHEELS" "peft>=0.21" "accelerate>=1.10" "typer>=0.29" \
    "psutil>=5.9.5" pytest >"$out/check.log" 2>&1 || { cat "$out/check.log"; exit 2; }
fi
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
device=${SEP_PEFT_GPU_TESTS_ON:-cuda}
$python tests/gpu/check_report.py device "$device" >"$out/device.json"

code=-
left() { echo $((limit - SECONDS)); }
report() { $python tests/gpu/check_report.py report "$out" "$code" "$SECONDS" "$only"; }

run_tests() {
  echo "== tests"
  local share=$1 processes=()
  if [ "$(nproc)" -ge 8 ] && $python -c "import xdist" 2>/dev/null; then
    processes=(-n 4 --dist worksteal)
  fi
  export SEP_PEFT_GPU_TESTS_RESULTS=$out/tests.jsonl
  export SEP_PEFT_GPU_TESTS_SECONDS=$((limit * share / 100)) # what then is left is skipped and fails the check
  local status=0
  timeout --kill-after=10 $((limit * (share + 15) / 100)) $python -m pytest tests/gpu -rfs -v -p no:cacheprovider \
    "${processes[@]}" --durations=10 >>"$out/check.log" 2>&1 || status=$?
  code=$status
  tail -n 3 "$out/check.log"
}

measure() { # NAME OPTIONS...
  local name=$1
  shift
  [ "$(left)" -gt 25 ] || { echo "no time is left for $name"; return; }
  echo "== $name"
  # its own clock starts when all is imported
  timeout --kill-after=5 "$(left)" $python examples/benchmark.py --device "$device" --seconds $(($(left) - 15)) --output "$out/$name.json" "$@" \
    >>"$out/check.log" 2>&1 || echo "it ended with $?"
  tail -n 12 "$out/check.log"
  report || true
}

if [[ $only == *tests* ]]; then
  share=80
  [[ $only != *benchmark* ]] || share=55
  run_tests $share
  report || true
fi
if [[ $only != *benchmark* ]]; then
  true
elif [ "$device" = cpu ]; then
  measure benchmark-tiny --fast --no-compile --rounds 1 --batches 1
else
  # compiling takes minutes and comes last: what the time is too short for shall be that
  limit=$((SECONDS + ($(left) * 45 / 100))) measure benchmark-b16 --models ViT-B/16 --rounds 3 --no-compile
  limit=$((SECONDS + ($(left) * 50 / 100))) measure benchmark-l14 --models ViT-L/14-336 --rounds 3 --no-compile
  measure benchmark-compiled --models ViT-B/16 --rounds 3 --batches 32 1
fi

report
