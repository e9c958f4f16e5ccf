#!/usr/bin/env bash
# The table of the GPU engine: every row of README's, with its yardstick, on one card. Usage: bench/gpu_table.sh OUT_DIR
# The first row's first step starts with cold kernel caches on a fresh machine, the others with warm ones.
set -u
cd "$(dirname "$0")/.."
out=${1:-bench/results}
export PYTHONPATH=${PYTHONPATH:-}:$PWD
caches=$(mktemp -d) # fresh ones: the first row starts cold
export TRITON_CACHE_DIR=$caches/triton XDG_CACHE_HOME=$caches
nvidia-smi --query-gpu=name,driver_version,power.limit --format=csv,noheader
run() { timeout 150 python3 bench/gpu_step.py "$@" --out "$out/gpu_step.csv" 2>&1 | grep -v -i warn | grep -E "^(first|losses|model|yard|clock|[A-Za-z.]*Error)"; }
run d48 --B 16 --tokens 131072 --recompute 2 --seconds 8
run d12 --B 64 --tokens 524288 --recompute 2 --seconds 8
run d48 --B 28 --tokens 114688 --recompute 2 --seconds 12 --rounds 1 --no-yardstick
run d48 --B 34 --tokens 139264 --recompute 2 --seconds 12 --rounds 1 --no-yardstick
run d12 --B 64 --tokens 524288 --recompute 0 --seconds 10 --rounds 1 --no-yardstick
timeout 150 python3 bench/compile_gpt2.py d12 --B 64 --tokens 524288 --seconds 15 2>&1 | tail -2
