#!/usr/bin/env bash
# The table of the GPU engine: every row of README's, with its yardstick, on one GPU.
# Usage: bench/gpu_table.sh [OUT_DIR [ROW ...]]   rows 1 to 6, all by default: about 6 minutes.
# The first row's first step starts with cold kernel caches on a fresh machine, the others with warm ones.
set -u -o pipefail
out=${1:-$(dirname "$0")/results}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
rows=" ${*:2} "
[[ $rows == "  " ]] && rows=" 1 2 3 4 5 6 "
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=${PYTHONPATH:-}:$PWD PYTHONUNBUFFERED=1 # what was printed outlives a time limit
caches=$(mktemp -d) # fresh ones: the first row starts cold
export TRITON_CACHE_DIR=$caches/triton XDG_CACHE_HOME=$caches
nvidia-smi --query-gpu=name,driver_version,power.limit --format=csv,noheader
row() { # ROW SCRIPT ARGUMENT...
  local number=$1
  shift
  [[ $rows == *" $number "* ]] || return 0
  timeout 240 python3 "$@" 2>&1 | grep -v -i warn | grep -E "^(first|losses|model|clock|torch.compile|[A-Za-z.]*Error)" \
    || echo "row $number ended with status $?"
}
step() { row "$@" --out "$out/gpu_step.csv"; }
step 1 bench/gpu_step.py d48 --B 16 --tokens 131072 --recompute 1 --seconds 10
step 2 bench/gpu_step.py d12 --B 64 --tokens 524288 --recompute 0 --seconds 10
step 3 bench/gpu_step.py d48 --B 16 --tokens 131072 --recompute 2 --seconds 12 --rounds 1 --no-yardstick
step 4 bench/gpu_step.py d48 --B 34 --tokens 139264 --recompute 2 --seconds 12 --rounds 1 --no-yardstick
step 5 bench/gpu_step.py d48 --B 28 --tokens 114688 --recompute 2 --seconds 12 --rounds 1 --no-yardstick
row 6 bench/compile_gpt2.py d12 --B 64 --tokens 524288 --seconds 15
