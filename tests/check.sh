#!/usr/bin/env bash
# Every check of the project: format, lints, tests (the shaders' on a software Vulkan adapter where there is no GPU), documentation.
# Installs what they need beyond a Rust toolchain: on Debian and Ubuntu that adapter, and below target what of CUDA compiles kernels.
set -euo pipefail
cd "$(dirname "$0")/.."

as_root=$([ "$(id -u)" = 0 ] || echo sudo)
has_vulkan() {
    /sbin/ldconfig -p | grep 'libvulkan\.so\.1' >/dev/null || return 1
    compgen -G '/usr/share/vulkan/icd.d/*.json' >/dev/null || compgen -G '/etc/vulkan/icd.d/*.json' >/dev/null
}
if [ "$(uname)" = Linux ] && [ "${ORPO_WGPU_SKIP_GPU:-}" != 1 ] && ! has_vulkan; then
    if ! command -v apt-get >/dev/null; then
        echo "no Vulkan driver: install one (Mesa's lavapipe is enough), or set ORPO_WGPU_SKIP_GPU=1 to leave the GPU tests out" >&2
        exit 1
    fi
    $as_root apt-get update -qq
    $as_root apt-get install -y -qq --no-install-recommends libvulkan1 mesa-vulkan-drivers
fi
for component in rustfmt clippy; do
    cargo "${component/rust/}" --version >/dev/null 2>&1 || rustup component add "$component"
done

set -x
cargo fmt --all --check
cargo clippy --locked --workspace --all-targets -- -D warnings
# With CUDA compiled in where there is any, so that dependencies are built once; the tests under cuda:: need an NVIDIA GPU, or cuda_on_cpu.sh.
[ "$(uname)" = Darwin ] || cuda="--features cuda"
cargo clippy --locked --workspace --all-targets ${cuda:-} -- -D warnings
suite=$(cargo test --locked ${cuda:-} --no-run --test suite --message-format=json | grep -o '"executable":"[^"]*/suite-[^"]*"' | cut -d '"' -f 4)
if command -v apt-get >/dev/null; then
    # Beside the other tests, as a process has its driver compile shaders on one core.
    ORPO_WGPU_NEED_MATRICES=1 bash tests/newer_mesa.sh "$suite" --exact gpu::product::every_matrix_variant_multiplies \
        gpu::lora_linear::on_matrices gpu::attention::on_matrices gpu::attention::narrow_heads gpu::token_logps::gpu_takes_a_weight_of_halves \
        plain_engine::lora_linear::on_matrices plain_engine::routes::a_product_is_right_whichever_route_makes_it \
        plain_engine::routes::tuning_finds_a_route gpu::tune::a_tuned_product_is_right_whoever_makes_it \
        gpu::tune::every_way_is_right_on_the_known_product memory::cudas_engine_takes_what_is_predicted >target/matrices.log 2>&1 &
    trap 'kill $! 2>/dev/null || true' EXIT
else
    echo "LEFT OUT: the tests on a software adapter with cooperative matrices, which need Debian or Ubuntu" >&2
    [ -z "${CI:-}" ]
fi
# CUDA's compiler, for the kernels of GPUs that are not here, and the headers that it reads; 12.8 knows Volta as well as Blackwell.
if [ -n "${cuda:-}" ] && [ ! -e target/cuda-12.8/include ]; then
    rm -rf target/cuda-12.8
    if [ "$(uname -sm)" = "Linux x86_64" ] && python3 -m pip install --quiet -t target/cuda-12.8 \
        "nvidia-cuda-nvrtc-cu12==12.8.*" "nvidia-cuda-runtime-cu12==12.8.*" "nvidia-cuda-nvcc-cu12==12.8.*"; then
        cp -r target/cuda-12.8/nvidia/cuda_*/include target/cuda-12.8
    else
        echo "LEFT OUT: the kernels of NVIDIA's GPUs, whose compiler pip installs on Linux on x86-64" >&2
        [ -z "${CI:-}" ]
    fi
fi
[ ! -e target/cuda-12.8/include ] || export ORPO_WGPU_NEED_NVRTC=1
cargo test --locked ${cuda:-} -- --skip cuda::
# Mesa's software adapter with subgroups of four lanes, as on processors without AVX. Its cache does not know how wide its vectors are.
MESA_SHADER_CACHE_DISABLE=true LP_NATIVE_VECTOR_WIDTH=128 "$suite" --exact gpu::attention::narrow_heads \
    gpu::product::every_variant_multiplies | tee target/four_lanes.log
grep "test result: ok. 2 passed" target/four_lanes.log >/dev/null
if command -v apt-get >/dev/null; then
    wait $! || { cat target/matrices.log; exit 1; }
    cat target/matrices.log
    grep "test result: ok. 11 passed" target/matrices.log
fi
RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --workspace --document-private-items
