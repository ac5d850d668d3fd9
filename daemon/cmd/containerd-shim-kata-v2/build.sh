#!/bin/sh
# Builds Kata's shim: build.sh OUT
#
# The Go module of Kata does not contain the file pkg/katautils/config-settings.go, because Kata's Makefile generates
# it. This script generates it from the template in the module. Files cannot be added to the module cache, so the
# script builds in a vendored copy of this module, outside of the checkout.
set -eu

out=$(realpath -m -- "${1:?usage: build.sh OUT}")
cd -- "$(dirname -- "$0")"

if [ -x "$out" ] && [ -z "$(find build.sh go.mod go.sum main.go -newer "$out")" ]; then
	exit 0
fi

export CGO_ENABLED=0 GOWORK=off GOFLAGS=-buildvcs=false
build=$(mktemp -d)
trap 'rm -rf -- "$build"' EXIT
trap 'exit 1' HUP INT TERM
cp go.mod go.sum main.go "$build"
cd -- "$build"
go mod vendor

kata=github.com/kata-containers/kata-containers/src/runtime
version=$(go list -mod=vendor -m -f '{{.Version}}' $kata)
# CONFIG_PATH and SYSCONFIG are the configuration files of Kata's own packages. msbd passes its own file with every
# request.
sed -e 's|@RUNTIME_NAME@|containerd-shim-kata-v2|' \
	-e 's|@PROJECT_NAME@|Kata Containers|' \
	-e 's|@PROJECT_TYPE@|kata|' \
	-e 's|@PROJECT_URL@|https://github.com/kata-containers|' \
	-e 's|@PROJECT_ORG@|kata-containers|' \
	-e 's|@PKGRUNDIR@|/var/run/kata-containers|' \
	-e "s|@VERSION@|$version|" \
	-e "s|@COMMIT@|${version##*-}|" \
	-e 's|@CONFIG_PATH@|/usr/share/defaults/kata-containers/configuration.toml|' \
	-e 's|@SYSCONFIG@|/etc/kata-containers/configuration.toml|' \
	vendor/$kata/pkg/katautils/config-settings.go.in >vendor/$kata/pkg/katautils/config-settings.go

go build -mod=vendor -trimpath -ldflags='-s -w' -o shim .
mkdir -p -- "$(dirname -- "$out")"
# Renaming does not change the file of a running shim, and never leaves an incomplete file.
cp shim "$out.new"
mv -f -- "$out.new" "$out"
