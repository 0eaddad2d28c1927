#!/usr/bin/env bash
# A GPU for twelve minutes: nothing is built there, every step has a limit of its own, writes a log
# and stops no other.
#
# Before, on a machine with nvcc and the Python of the GPU machine:
#   cmake --preset dev && cmake --build --preset dev --target contract_test
#   mkdir -p dist && cp build/dev/tests/contract_test dist/
#   python -m pip wheel . --no-deps -w dist --config-settings=cmake.define.MOESAIC_CUDA=ON \
#       --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=90a-real
#   python -m pip download --no-deps -d dist humming-kernels    # a peer, if wanted
# Then there, in a copy of this tree with dist/:
#   OUT=results tests/gpu_minutes.sh check     # 420 s at most: is it right?
#   OUT=results tests/gpu_minutes.sh bench     # 300 s at most: how fast is it?
set -uo pipefail
shopt -s nullglob
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=default
case ${1:-} in check | bench) ;; *) echo "usage: OUT=folder $0 check|bench" >&2 && exit 2 ;; esac
out=${OUT:?names the folder of the results}
mkdir -p "$out"
site=$(mktemp -d)
start=$SECONDS

step() { # step NAME LIMIT COMMAND...: its whole output goes to the log, the end of it here
  local name=$1 limit=$2 began=$SECONDS status
  shift 2
  timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  echo "[$((SECONDS - start)) s] $name: status $status, $((SECONDS - began)) s"
  tail -n 8 "$out/$name.log"
}

# As CTest does it, but on the GPU: the contract of a backend, without torch.
sanitizer() { # sanitizer TOOL LIMIT
  step "$1" "$2" compute-sanitizer --tool "$1" --error-exitcode 9 dist/contract_test
}
tests() { # tests NAME LIMIT ARGUMENTS...: torch warns of what is no fault here
  step "$1" "$2" python3 tests/python/gpu_processes.py -m gpu -q -W default "${@:3}"
}
bench() { # bench NAME LIMIT ARGUMENTS...: results so far are kept whatever ends it
  step "$1" "$2" python3 -m moesaic bench --device cuda --rounds 3 --time-limit "$(($2 - 15))" \
    --tokens 1,8,64,512,2048,8192 --json "$out/$1.json" "${@:3}"
}

step install 30 python3 -m pip install --no-index --no-deps --no-compile --target "$site" dist/*.whl
export PYTHONPATH=$site MOESAIC_CUDA_PLUGIN=$site/moesaic/libmoesaic_cuda.so
step info 10 python3 -m moesaic info
case $1 in
  check)
    tests first_call 40 tests/python/test_gpu_graphs.py -k first_call
    step contract 50 dist/contract_test --gtest_brief=1
    tests graphs 50 tests/python/test_gpu_graphs.py
    tests forwards 100 tests/python/test_gpu_forward.py
    tests rest 50 --ignore tests/python/test_gpu_graphs.py --ignore tests/python/test_gpu_forward.py
    sanitizer memcheck 35
    sanitizer racecheck 35
    sanitizer synccheck 20
    ;;
  bench)
    step kernels 50 python3 tests/gpu_kernels.py --json "$out/kernels.json"
    bench int4 60 --shape qwen3-30b-a3b-gptq --peers torch-grouped
    bench k_types 45 --shape qwen3-30b-a3b --peers none
    step counters 45 ncu --clock-control none --set full --launch-count 18 --csv --page details \
      -k 'regex:narrow|wide|down_sum|stage|sort|tiles|route' --log-file "$out/counters.csv" \
      python3 tests/gpu_kernels.py --once
    bench humming 60 --shape qwen3-30b-a3b-gptq --peers humming-int4
    ;;
esac
echo "[$((SECONDS - start)) s] done; logs and results are in $out"
