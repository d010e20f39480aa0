#!/usr/bin/env bash
# Everything a machine with a GPU is asked, without a network and in less than nine minutes: build
# (150 s at most), the kernels' tests (170 s), then the bench (200 s). OUT: where gpu.csv goes
# (default: bench/results); LOGS: where the logs go (default: a temporary folder).
# REHEARSE=1: the same steps on a CPU, with small cases in Triton's interpreter and nothing built.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
OUT="${OUT:-bench/results}"
LOGS="${LOGS:-$(mktemp -d)}"
mkdir -p "$OUT" "$LOGS"
status=0
if [ -z "${REHEARSE:-}" ]; then
  SPARSETICKET_BUILD_JOBS="$(nproc)" timeout 150 "$PYTHON" -m pip install --no-index --no-deps \
    --no-build-isolation --no-cache-dir -q -e . >"$LOGS/build.log" 2>&1 || {
    tail -40 "$LOGS/build.log"
    exit 1
  }
  workers="$("$PYTHON" -c 'import xdist; print("-n 8")' 2>/dev/null || true)"
  # shellcheck disable=SC2086  # no words where there is no xdist
  timeout 170 "$PYTHON" -m pytest tests/kernels -q -p no:cacheprovider $workers \
    >"$LOGS/tests.log" 2>&1 || status=1
  tail -25 "$LOGS/tests.log"
  timeout 200 "$PYTHON" -m bench.device --out "$OUT/gpu.csv" --seconds 170 || status=1
else
  export TRITON_INTERPRET=1
  "$PYTHON" -m pytest tests/kernels/test_triton_mask_ops.py -q -p no:cacheprovider || status=1
  "$PYTHON" -m bench.device --out "$OUT/gpu.csv" --small || status=1
fi
exit "$status"
