#!/bin/sh
# Builds the checks of ../cuda for this machine's GPU and runs them (not yet run on a GPU):
#
#   run.sh                      every case; make test-gpu
#   run.sh --sanitize [CASES]   under compute-sanitizer's four tools; make sanitize-gpu
#   run.sh --build              only builds
#   run.sh --list [CASES]       builds, and lists the cases; fails where there are none
#
# CASES is a filter of GoogleTest. SMT_EXT_CUDA_ARCHS names other architectures than this machine's,
# such as "90;120+PTX".
set -eu
cd "$(dirname "$0")/../../.."
build=build/cpp/gpu
mode=${1:-}
cases=${2:-*}
sanitizer=
if [ "$mode" = --sanitize ]; then
  toolkit=${CUDA_HOME:-/usr/local/cuda}
  for candidate in "$(command -v compute-sanitizer || true)" "$toolkit/bin/compute-sanitizer"; do
    if [ -x "$candidate" ]; then sanitizer=$candidate; fi
  done
  if [ -z "$sanitizer" ]; then
    echo "make sanitize-gpu needs compute-sanitizer, which is neither on PATH nor in $toolkit/bin." >&2
    echo "It is a part of the CUDA toolkit: install the toolkit whole (or, of NVIDIA's packages, such" >&2
    echo "as cuda-sanitizer-13-0), or set CUDA_HOME to where it is." >&2
    exit 1
  fi
fi

cmake -S . -B $build -G Ninja -DSMT_EXT_GPU=ON "-DSMT_EXT_CUDA_ARCHS=${SMT_EXT_CUDA_ARCHS:-}" \
    "-DCMAKE_PREFIX_PATH=$PWD/build/googletest/usr" "-DCMAKE_MAKE_PROGRAM=$(command -v ninja)" ||
    { rm -rf $build; exit 1; }  # CMake would remember that there was no GPU
ninja -C $build
if [ "$mode" = --build ]; then exit 0; fi

failed=
for test in $build/tests/cpp/gpu/test_*_cuda; do
  if [ "$mode" = --list ]; then
    "$test" --gtest_list_tests "--gtest_filter=$cases"
    "$test" --gtest_list_tests "--gtest_filter=$cases" | grep -q '^  ' ||
        failed="$failed $(basename "$test")"
    continue
  fi
  if [ -z "$sanitizer" ]; then
    "$test" || failed="$failed $(basename "$test")"
    continue
  fi
  for tool in memcheck initcheck racecheck synccheck; do
    # What a kernel does that is meant to stop would be reported, too.
    SMT_EXT_COMPUTE_SANITIZER=1 "$sanitizer" --tool $tool --error-exitcode 1 \
        "$test" "--gtest_filter=$cases-*StopsTheKernel*" ||
        failed="$failed $(basename "$test"):$tool"
  done
done
if [ -n "$failed" ]; then
  echo "failed:$failed" >&2
  exit 1
fi
