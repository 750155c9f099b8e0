#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Installs the Debian packages that building, running and testing need, and only those missing.
# usage: tools/deps.sh [build|debian] [test]     (which guest kernel; for the tests too)
set -euo pipefail
cd "$(dirname "$0")/.."

kernel=${1:-build}
python=${PYTHON:-/usr/bin/python3}

packages=(
  python3 python3-venv python3-pip python3-yaml
  qemu-system-x86       # the VMM
  containerd runc       # for make run and the tests
  busybox-static        # the container image of make run
  iproute2 mount procps ca-certificates
)

if [ "${2:-}" = test ]; then
  packages+=(
    crun            # the agent's tests run it on the host
    e2fsprogs xfsprogs  # disks of the tests and of the KVM lab
    fdisk cpio      # to look into the guest's images
    gcc libc6-dev   # small programs that the tests run in containers
    containernetworking-plugins iptables  # networks of the pods in the tests
  )
fi

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

if ! command -v dpkg-query >/dev/null; then
  echo "deps: this is no Debian system; needed are the equivalents of: ${packages[*]}" >&2
  exit 0
fi

# QEMU 7 brings a virtiofsd; with newer ones it is a package of its own.
if [ ! -x /usr/lib/qemu/virtiofsd ] && [ ! -x /usr/libexec/virtiofsd ] \
  && apt-cache show virtiofsd >/dev/null 2>&1; then
  packages+=(virtiofsd)
fi

missing=()
for package in "${packages[@]}"; do
  installed "$package" || missing+=("$package")
done

updated=
update() {
  [ -n "$updated" ] && return
  echo "deps: apt-get update"
  apt-get update -qq
  updated=yes
}
export DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes

if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" != 0 ]; then
    echo "deps: missing: ${missing[*]}; run this as root" >&2
    exit 1
  fi
  update
  echo "deps: installing ${missing[*]}"
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "deps: $python is older than 3.11" >&2
  exit 1
fi

# What the guest is built with.
if ! guest=$("$python" rootfs-builder/deps.py --kernel "$kernel"); then
  echo "deps: ${guest%%$'\n'*}"
  update
  "$python" rootfs-builder/deps.py --kernel "$kernel" --install >/dev/null
fi
