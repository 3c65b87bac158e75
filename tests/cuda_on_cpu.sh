#!/usr/bin/env bash
# Runs tests of CUDA's kernels on the processor, as on a GPU of a compute capability: cuda_on_cpu.sh 90 cuda::attention::large_scores
# On Linux, with CUDA's compiler in target/cuda-12.8, where tests/check.sh installs it.
set -euo pipefail
cd "$(dirname "$0")/.."

capability=$1
shift
suite=$(cargo test --locked --features cuda --no-run --test suite --message-format=json | grep -o '"executable":"[^"]*/suite-[^"]*"' | cut -d '"' -f 4)
if [ ! -e target/cuda-12.8/include ]; then
    echo "no CUDA in target/cuda-12.8: tests/check.sh installs it" >&2
    exit 1
fi
if ! "$suite" --list "$@" | grep ': test$' >/dev/null; then
    echo "no test is named so: $*" >&2
    exit 1
fi
driver=$(mktemp -d)
trap 'rm -rf "$driver"' EXIT
for name in libcuda.so libcuda.so.1; do
    cp "$(dirname "$suite")/libcuda_driver.so" "$driver/$name"
done
CUDA_PATH=$PWD/target/cuda-12.8 LD_LIBRARY_PATH=$driver:$PWD/target/cuda-12.8/nvidia/cuda_nvrtc/lib \
    ORPO_WGPU_CAPABILITY=$capability ORPO_WGPU_RUNS_KERNELS=1 "$suite" "$@"
