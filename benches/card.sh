#!/usr/bin/env bash
# Most of what README tells of an NVIDIA card, measured on the one that is here: all parts, or those named. Kernels that README tells of
# alone are in none.
#
#     cargo build --release --features cuda && bash benches/card.sh [bench] [products] [tests] [parity] [peers] …
#
# BINARY and SUITE name the program and the tests where they were built elsewhere, PYTHON what runs a script with its packages, FOLDER
# where 15 GiB of random weights go, LENGTHS and PAIRS what is trained on, ENGINES by which of the peers.
set -uo pipefail
root=$(realpath "$(dirname "$0")/..")
binary=${BINARY:-$root/target/release/orpo-wgpu} python=${PYTHON:-uv run --with liger-kernel} folder=${FOLDER:-$root/target/8b}
shape=llama3-8b-instruct
failed=()

# Runs a command; one that fails is told of at the end, and the others go on.
try() {
    printf '\n## %s\n\n' "$*"
    "$@" || failed+=("$*")
}

bench() {
    local device length
    for device in cuda wgpu; do
        for length in ${LENGTHS:-1024 2048}; do
            try "$binary" bench --model_type $shape --device $device --dtype AUTO --max_length "$length" --max_steps 25
        done
    done
    try "$binary" bench --model_type $shape --device wgpu --dtype AUTO --max_length 2048 --max_memory 24GB
}

products() {
    local dtype tokens
    for dtype in bf16 fp16; do
        for tokens in 1534 3070; do
            try $python "$root/benches/vendor_product.py" --dtype $dtype --tokens $tokens
        done
    done
}

tests() {
    # Through CUDA, and through Vulkan.
    if [ -n "${SUITE:-}" ]; then
        try "$SUITE" cuda:: gpu:: --test-threads 4
    else
        try cargo test --manifest-path "$root/Cargo.toml" --release --features cuda --test suite -- cuda:: gpu::
    fi
}

parity() {
    try $python "$root/benches/peers.py" --make "$folder-tiny" --shape tiny-128-2
    try $python "$root/benches/peers.py" --parity "$folder-tiny" --binary "$binary"
}

peers() {
    local length pairs
    for length in ${LENGTHS:-1024 2048}; do
        try $python "$root/benches/peers.py" --make "$folder" --shape $shape --max_length "$length"
        for pairs in ${PAIRS:-1 4}; do
            try $python "$root/benches/peers.py" --run "$folder" --device cuda --batch_size "$pairs" --binary "$binary" \
                ${ENGINES:+--engines "$ENGINES"}
        done
    done
}

[ $# -gt 0 ] || set -- bench products tests parity peers
for part; do
    case $part in
        bench | products | tests | parity | peers) "$part" ;;
        *) failed+=("there is no part $part") ;;
    esac
done
[ ${#failed[@]} = 0 ] || { printf '\nfailed: %s\n' "${failed[@]}" >&2; exit 1; }
