#!/usr/bin/env bash
# The first hour on a Mac: everything that is worth knowing of the Metal backend on real hardware, into
# one archive to send back. Needs Apple silicon, macOS 14 or later, the Xcode command line tools, and
# Homebrew's cmake, ninja and googletest. Run it in the repository root:
#
#     bash tests/mac_first_hour.sh [FOLDER]   # the report: FOLDER.tgz; FOLDER is build/mac-report
#
# A step that fails does not stop the ones behind it; what cannot run here is said aloud, with the
# reason. GGUF=/path/to/a/moe.gguf adds that model, beside llama-bench where it is installed. The report
# holds no names of people or machines: look into the folder before you send it.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:-$PWD/build/mac-report}
build=$PWD/build/mac
rm -rf "$out"
mkdir -p "$out"
: >"$out/summary.txt"
failed=0

say() { echo "$*" | tee -a "$out/summary.txt"; }

# step NAME COMMAND...: runs it with its output in NAME.log.
step() {
  local name=$1 begin=$SECONDS status=0
  shift
  "$@" >"$out/$name.log" 2>&1 || status=$?
  if [ $status = 0 ]; then
    say "passed   $name ($((SECONDS - begin)) s)"
  else
    failed=$((failed + 1))
    say "FAILED   $name (status $status, $((SECONDS - begin)) s): $(tail -n 1 "$out/$name.log")"
  fi
  return $status
}

missing() { say "MISSING  $1: $2"; }

# has TOOL STEP WHERE: whether the tool is there; says so where it is not.
has() {
  command -v "$1" >/dev/null && return
  missing "$2" "$1 is not here ($3)"
  return 1
}

facts() {
  uname -srm
  git rev-parse HEAD
  git status --short
  if command -v sw_vers >/dev/null; then
    sw_vers
    sysctl -n machdep.cpu.brand_string hw.memsize hw.pagesize hw.perflevel0.physicalcpu
    sysctl iogpu.wired_limit_mb
    system_profiler SPDisplaysDataType | grep -Ev 'Serial|UUID'
    pmset -g | grep -i lowpower
    xcodebuild -version
    clang++ --version
  fi
  return 0
}
step facts facts
mac=0
[ "$(uname -s)" = Darwin ] && mac=1

# 1. The kernels through Apple's own compiler, as the one text that the driver will get.
kernel_text() {
  cmake -DOUT="$out/kernel_source.cpp" -P metal/embed.cmake &&
    sed -e '1,/R"metal(/s/.*R"metal(//' -e 's/)metal";.*//' -e '/^\/\/ Made by/d' \
      "$out/kernel_source.cpp" | sed -e '/^#include "metal\/host/d' -e '/^namespace moesaic::metal {$/d' \
      >"$out/kernels.metal" && grep -c 'kernel void' "$out/kernels.metal"
}
if has cmake kernel_text 'brew install cmake'; then step kernel_text kernel_text; fi
if [ $mac = 0 ]; then
  missing kernel_compile "Apple's Metal compiler exists on macOS only"
elif ! xcrun -sdk macosx --find metal >/dev/null 2>&1; then
  missing kernel_compile 'xcrun finds no metal (Xcode; of Xcode 26: xcodebuild -downloadComponent MetalToolchain)'
else
  for standard in metal3.0 metal3.2; do
    step "kernel_compile_$standard" xcrun -sdk macosx metal -std=$standard -fno-fast-math -Wall -Wextra \
      -c "$out/kernels.metal" -o "$out/kernels_$standard.air"
  done
fi

# 2. The library, its tests and the bench. Warnings are wanted in the log and are no errors here.
python=$PWD/build/mac-venv/bin/python
packages() {
  python3 -m venv build/mac-venv && "$python" -m pip install -q numpy gguf pytest pybind11 ninja cmake &&
    { [ $mac = 0 ] || "$python" -m pip install -q 'mlx-metal>=0.26,<1'; }
}
built=0
if [ $mac = 0 ]; then
  missing build 'the backend is built on macOS only; `nox -s gpu` has what can be known elsewhere'
elif step packages packages; then
  cpp=$("$python" -c 'import mlx; print(*[p + "/include/metal_cpp" for p in mlx.__path__][:1])')
  step configure cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DMOESAIC_TESTS=ON \
    -DMOESAIC_WERROR=OFF -DMOESAIC_METAL=ON "-DMOESAIC_METAL_CPP=$cpp" -DMOESAIC_PYTHON=ON \
    "-DPython_EXECUTABLE=$python" && step build cmake --build "$build" && built=1
fi

# 3. The tests on the real driver, where an absent backend is a failure; then under Apple's checkers.
export MOESAIC_REQUIRE_BACKEND=metal
programs=(contract_test metal_ops_test metal_forward_test metal_int4_test metal_threads_test)
for name in "${programs[@]}"; do
  if [ $built = 0 ]; then
    missing "$name" 'nothing was built'
    continue
  fi
  program=$build/tests/$name
  step "$name" "$program" "--gtest_output=json:$out/$name.json"
  step "${name}_api" env MTL_DEBUG_LAYER=1 METAL_DEVICE_WRAPPER_TYPE=1 "$program" --gtest_brief=1
  step "${name}_shaders" env MTL_DEBUG_LAYER=1 MTL_SHADER_VALIDATION=1 "$program" --gtest_brief=1
  step "${name}_pools" env OBJC_DEBUG_MISSING_POOLS=YES "$program" --gtest_brief=1
done
if [ $built = 1 ]; then
  step ctest ctest --test-dir "$build" --output-junit "$out/ctest.xml" -LE 'emulation|metal|gpu-compile'
else
  missing ctest 'nothing was built'
fi

# 4. Times: of the GPU and by our clock, then of a layer as Python calls it.
if [ $built = 1 ]; then
  step metal_bench "$build/tests/metal_bench"
  step metal_bench_oss "$build/tests/metal_bench" --hidden 2880 --intermediate 2880 --experts 32 --top-k 4 \
    --formats MXFP4
  cp "$build"/python/bindings/_core*.so python/moesaic/
  export PYTHONPATH=$PWD/python
  step info "$python" -m moesaic info --json
  for shape in qwen3-30b-a3b gpt-oss-20b; do
    step "bench_$shape" "$python" -m moesaic bench --device metal --shape "$shape" --peers none \
      --tokens 1,8,64,512 --json "$out/bench_$shape.json"
  done
  step bench_cpu "$python" -m moesaic bench --peers none --tokens 1,8,64,512 --json "$out/bench_cpu.json"
else
  missing bench 'nothing was built'
fi
if [ -z "${GGUF:-}" ]; then
  missing llama_bench 'GGUF names no model'
elif has llama-bench llama_bench 'brew install llama.cpp'; then
  step llama_bench llama-bench -m "$GGUF" -p 8,64,512 -n 64 -o json
fi

tar czf "$out.tgz" -C "$(dirname "$out")" "$(basename "$out")"
echo
say "$failed steps failed; the report is $out.tgz"
[ $failed = 0 ]
