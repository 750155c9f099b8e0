#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Makes sure that there is a Go for the tests against Go programs.  Go 1.21 and newer fetch the
# version that a module asks for by themselves; an older one (Debian 12 has 1.19) can still
# download the module golang.org/toolchain, which is a whole newer Go, into the cache.
# usage: tools/go.sh CACHE      (puts CACHE/go/toolchain/bin/go there if it is needed)
set -euo pipefail

cache=$1
version=1.26.0
toolchain=$cache/go/toolchain

new_enough() {
  local found
  found=$("$1" env GOVERSION 2>/dev/null) || return 1
  found=${found#go1.}
  [ "${found%%[!0-9]*}" -ge 21 ]
}

for go in "$toolchain/bin/go" "$(command -v go || true)" /usr/local/go/bin/go; do
  if [ -n "$go" ] && new_enough "$go"; then exit 0; fi
done

if ! command -v go >/dev/null; then
  echo "go: installing golang-go"
  if [ "$(id -u)" != 0 ]; then
    echo "go: missing; run this as root, or put Go 1.21 or newer on PATH" >&2
    exit 1
  fi
  export DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends golang-go >/dev/null
fi
if new_enough go; then exit 0; fi

echo "go: $(go env GOVERSION) is too old; downloading Go $version"
scratch=$(mktemp -d)
trap 'chmod -R u+w "$scratch" && rm -rf "$scratch"' EXIT
module=golang.org/toolchain@v0.0.1-go$version.linux-amd64
(
  cd "$scratch"
  printf 'module none\n' >go.mod
  GOFLAGS=-mod=mod GOMODCACHE=$scratch/mod go mod download "$module"
)
mkdir -p "$cache/go"
rm -rf "$toolchain.new"
cp -r "$scratch/mod/$module" "$toolchain.new"
chmod -R u+w "$toolchain.new"
# A module has no executable files; a Go installation needs some.
chmod +x "$toolchain.new"/bin/* "$toolchain.new"/pkg/tool/*/*
rm -rf "$toolchain"
mv "$toolchain.new" "$toolchain"
"$toolchain/bin/go" version
