#!/usr/bin/env bash
# Runs a program on a software Vulkan adapter with cooperative matrices, which Mesa has from version 26 on and Debian's stable releases
# do not: bash tests/newer_mesa.sh PROGRAM [ARGUMENT…]
#
# The driver and the libraries that it needs come from Debian's testing release, into target/mesa; the program is started with that
# release's loader, so that nothing on the system changes. Needs Debian or Ubuntu, and root or sudo, for debootstrap.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)/target/mesa
release=forky
as_root=$([ "$(id -u)" = 0 ] || echo sudo)

if [ ! -e "$root/complete" ]; then
    if ! command -v debootstrap >/dev/null; then
        $as_root apt-get update -qq
        $as_root apt-get install -y -qq --no-install-recommends debootstrap debian-archive-keyring
    fi
    $as_root rm -rf "$root"
    mkdir -p "$(dirname "$root")"
    # An older debootstrap has no script of the release's name; all releases since have shared one.
    $as_root debootstrap --variant=minbase --include=libvulkan1,mesa-vulkan-drivers "$release" "$root" "" \
        /usr/share/debootstrap/scripts/sid >"$root.log" 2>&1 || { tail -n 20 "$root.log" >&2; exit 1; }
    $as_root touch "$root/complete"
fi

loader=$(compgen -G "$root/usr/lib/*/ld-linux-*.so.*" | head -n 1 || true)
drivers=$(compgen -G "$root/usr/share/vulkan/icd.d/lvp_icd*.json" | head -n 1 || true)
if [ -z "$loader" ] || [ -z "$drivers" ]; then
    echo "$root has no loader or no lavapipe: remove it, and see $root.log" >&2
    exit 1
fi
export VK_DRIVER_FILES="$drivers"
exec "$loader" --library-path "$(dirname "$loader")" "$@"
