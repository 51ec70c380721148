#!/usr/bin/env bash
# All that a GPU can tell, in one command and at most eight minutes: the tests of this folder, then the benchmark.
#
#   tests/gpu/check.sh [OUT]                              # OUT (gpu-check) gets check.json and the logs
#   WHEELS=wheels tests/gpu/check.sh                      # packages that are missing come from a folder of wheels
#   SEP_PEFT_GPU_TESTS_ON=cpu tests/gpu/check.sh          # a rehearsal without a GPU, of tiny models
#
# The machine needs torch and transformers; nothing is downloaded. It exits with 0 where all tests pass and every goal
# that was measured is met.
set -euo pipefail
cd "$(dirname "$0")/../.."

out=$(mkdir -p "${1:-gpu-check}" && cd "${1:-gpu-check}" && pwd)
limit=${SECONDS_AT_MOST:-460}
python=python3
rm -f "$out"/*.json "$out"/*.xml "$out"/*.log

if [ -n "${WHEELS:-}" ]; then
  $python -m venv --system-site-packages "$out/venv"
  python=$out/venv/bin/python
  # what is there and new enough stays
  $python -m pip install --quiet --no-index --find-links "$WHEELS" "peft>=0.21" "accelerate>=1.10" "typer>=0.29" \
    "psutil>=5.9.5" pytest >"$out/install.log" 2>&1 || { cat "$out/install.log"; exit 2; }
fi
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1
device=${SEP_PEFT_GPU_TESTS_ON:-cuda}
$python tests/gpu/check_report.py device "$device" >"$out/device.json"

left() { echo $((limit - SECONDS)); }

echo "== tests"
code=0
export SEP_PEFT_GPU_TESTS_SECONDS=$((limit * 6 / 10)) # what then is left is skipped and fails the check
timeout --kill-after=10 $((limit * 8 / 10)) $python -m pytest tests/gpu -rfs -v -p no:cacheprovider --durations=10 \
  --junitxml "$out/tests.xml" >"$out/tests.log" 2>&1 || code=$?
tail -n 3 "$out/tests.log"

measure() { # NAME OPTIONS...
  local name=$1
  shift
  [ "$(left)" -gt 25 ] || { echo "no time is left for $name"; return; }
  echo "== $name"
  $python examples/benchmark.py --device "$device" --seconds $(($(left) - 15)) --output "$out/$name.json" "$@" \
    >"$out/$name.log" 2>&1 || echo "it ended with $?"
  tail -n 12 "$out/$name.log"
}
if [ "$device" = cpu ]; then
  measure benchmark-tiny --fast --no-compile --rounds 1 --batches 1
else
  # compiling takes minutes and comes last: what the time is too short for shall be that
  limit=$((limit * 8 / 10)) measure benchmark-b16 --models ViT-B/16 --rounds 3 --no-compile
  limit=$((limit * 9 / 10)) measure benchmark-l14 --models ViT-L/14-336 --rounds 3 --no-compile
  measure benchmark-compiled --models ViT-B/16 --rounds 3 --batches 1 32
fi

exec $python tests/gpu/check_report.py report "$out" "$code" "$SECONDS"
