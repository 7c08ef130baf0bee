#!/usr/bin/env bash
# Installs tinychat on a Jetson: says which power mode is on and what takes memory, then demo/install_light.sh.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
release=${TEGRA_RELEASE:-/etc/nv_tegra_release}

if [ ! -r "$release" ]; then
    echo "setup.sh: this is no Jetson (no $release); demo/install_light.sh serves other machines" >&2
    exit 1
fi
head -n 1 "$release"
if command -v nvpmodel >/dev/null; then
    nvpmodel -q || echo "nvpmodel does not tell the power mode"
fi
if command -v systemctl >/dev/null && [ "$(systemctl get-default 2>/dev/null || true)" = graphical.target ]; then
    echo "the desktop takes 0.5 to 1 GB: 'sudo systemctl set-default multi-user.target' and a restart give it back"
fi
"$here/../install_light.sh" "$@"
