#!/bin/sh
# Core tests of a wheel in fresh environments, without this checkout's package (make try-wheel):
#
#   try_wheel.sh dist/smt_ext-*.whl
#
# TORCHS  versions of torch, the oldest that is supported and the newest by default
# PYTHONS interpreters; those that are installed, of the oldest and of newer ones, by default
# Downloads torch, several GB for a CUDA build: a developer's command, in no test.
set -eu
wheel=$(realpath "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
: "${TORCHS:=torch==2.10.* torch>=2.10}"
if [ -z "${PYTHONS:-}" ]; then
  for python in python3.10 python3.11 python3.12 python3.13 python3.14; do
    if command -v $python >/dev/null; then PYTHONS="${PYTHONS:-} $python"; fi
  done
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cp -r "$root/tests" "$root/tools" "$scratch"  # smt_ext is then the wheel's
cp "$root/pyproject.toml" "$scratch"
failed=0
for python in $PYTHONS; do
  for torch in $TORCHS; do
    echo "== $python, $torch"
    rm -rf "$scratch/venv"
    "$python" -m venv "$scratch/venv"
    "$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        "$torch" "$wheel" pytest hypothesis transformers
    # What is built from csrc is not of the wheel.
    (cd "$scratch" && venv/bin/python -m pytest -q -p no:cacheprovider tests/ops \
        --deselect tests/ops/test_fuzz.py::test_random_calls_are_clean_under_sanitizers \
        tests/core/test_linear.py tests/core/test_optim.py tests/core/test_patching.py) || failed=1
  done
done
exit $failed
