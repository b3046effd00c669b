#!/bin/sh
# A manylinux wheel in dist/: CPU kernels, and CUDA kernels where nvcc is (make wheel). torch's own
# libraries are left to torch; the CUDA runtime is linked in.
set -eu
cd "$(dirname "$0")/.."
rm -rf build/wheel
python -m build --wheel --no-isolation --outdir build/wheel
wheel=$(ls build/wheel/*.whl)
auditwheel show "$wheel"
auditwheel repair "$wheel" --wheel-dir dist \
    --exclude 'libtorch*.so' --exclude 'libc10*.so' --exclude 'libcuda*.so*'
repaired=$(ls -t dist/*.whl | head -1)
abi3audit --strict --summary "$repaired"
python -m zipfile -e "$repaired" build/wheel/unpacked
torch-abi-audit --check both build/wheel/unpacked/smt_ext
twine check --strict "$repaired"
echo "$repaired"
