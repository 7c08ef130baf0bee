#!/usr/bin/env bash
# Installs tinychat into a virtual environment without torch, which chat, generate, eval, info, bench
# and doctor do not need: about 0.2 GB instead of 1.3. From a wheel where one is given, else from the sources around it.
set -euo pipefail

usage='usage: demo/install_light.sh [--dry-run] [--venv DIR] [WHEEL]   (DIR: ~/tinychat-venv)'
sources=$(cd "$(dirname "$0")/.." && pwd)
meminfo=${MEMINFO:-/proc/meminfo}
job_kb=1000000 # of memory: what the largest of the C++ files takes to compile
dry=false venv=$HOME/tinychat-venv wheel=

while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry=true ;;
        --venv) venv=${2:?$usage} && shift ;;
        -h | --help) echo "$usage" && exit 0 ;;
        -*) echo "no option $1; $usage" >&2 && exit 2 ;;
        *) wheel=$1 ;;
    esac
    shift
done
case $venv in
    /*) ;;
    *) venv=$PWD/$venv ;; # the end of this script leaves the folder
esac

run() {
    echo "+ $*"
    if ! $dry; then "$@"; fi
}

fail() {
    echo "install_light.sh: $*" >&2
    exit 1
}

kilobytes() { # of memory and swap that are free
    awk '/^(MemAvailable|SwapFree):/ { sum += $2 } END { printf "%d", sum }' "$meminfo"
}

case $(uname -m) in
    aarch64 | arm64 | x86_64) ;;
    *) fail "this system is $(uname -m); tinychat needs a 64-bit one (Raspberry Pi OS comes in both kinds)" ;;
esac
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$(python3 --version) is too old; 3.10 or newer is needed"

packages=()
python3 -c 'import ensurepip' 2>/dev/null || packages+=(python3-venv)
if [ -z "$wheel" ]; then
    command -v g++ >/dev/null || packages+=(g++)
    python3 -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' ||
        packages+=(python3-dev)
    free_kb=$(kilobytes)
    [ "$free_kb" -ge $job_kb ] ||
        fail "$((free_kb / 1000)) MB of memory and swap are free, compiling needs $((job_kb / 1000)): add swap, or give a wheel"
    jobs=$((free_kb / job_kb)) cores=$(getconf _NPROCESSORS_ONLN)
    export CMAKE_BUILD_PARALLEL_LEVEL=$((jobs < cores ? jobs : cores))
    export CMAKE_ARGS="-DTINYCHAT_CUDA=OFF ${CMAKE_ARGS:-}" # the GPU's backend needs torch, which is left out
fi
if [ ${#packages[@]} -gt 0 ]; then
    run sudo apt-get update # a new card has no lists of packages yet
    run sudo apt-get install -y "${packages[@]}"
fi

run python3 -m venv "$venv"
run "$venv/bin/pip" install --requirement "$sources/demo/light_requirements.txt"
if [ -z "$wheel" ]; then
    echo "compiling with $CMAKE_BUILD_PARALLEL_LEVEL at a time"
    run "$venv/bin/pip" install --no-deps "$sources"
else
    run "$venv/bin/pip" install --no-deps --force-reinstall "$wheel" # else pip keeps a build of the same version
fi
run cd "$HOME" # away from the sources: what was installed is what runs
run "$venv/bin/tinychat" doctor
echo "talk to it: $venv/bin/tinychat chat"
