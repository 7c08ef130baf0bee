#!/usr/bin/env bash
# Installs tinychat on a Raspberry Pi: demo/install_light.sh, with swap for as long as it compiles where memory is short.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
model=${MODEL_FILE:-/proc/device-tree/model}
meminfo=${MEMINFO:-/proc/meminfo}
swap=/var/tmp/tinychat.swap
enough_kb=2500000 # of free memory and swap: one job, and the system at ease

board=$(tr -d '\0' 2>/dev/null <"$model" || true)
case $board in
    "Raspberry Pi"*) echo "$board" ;;
    *) echo "setup.sh: this is no Raspberry Pi (${board:-no device tree}); demo/install_light.sh serves other machines" >&2 && exit 1 ;;
esac

dry=false compiles=true
for word in "$@"; do
    case $word in
        --dry-run) dry=true ;;
        *.whl) compiles=false ;;
    esac
done

run() {
    echo "+ $*"
    if ! $dry; then "$@"; fi
}

remove_swap() {
    run sudo swapoff "$swap"
    run sudo rm -f "$swap"
}

if $compiles && [ "$(awk '/^(MemAvailable|SwapFree):/ { sum += $2 } END { printf "%d", sum }' "$meminfo")" -lt $enough_kb ]; then
    echo "little memory is free: 1.5 GB of swap while it compiles"
    trap remove_swap EXIT
    run sudo fallocate -l 1536M "$swap"
    run sudo chmod 600 "$swap"
    run sudo mkswap "$swap"
    run sudo swapon "$swap"
fi
"$here/../install_light.sh" "$@"
