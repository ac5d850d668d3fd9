#!/bin/sh
# Builds Kata's shim: build.sh OUT
#
# Kata's Makefile generates one Go file, pkg/katautils/config-settings.go, which the module therefore
# lacks. It is made here from the template that the module does hold. Go lets nobody add a file to the
# module cache, so the build happens in a vendored copy of this module, outside the checkout.
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
# The two paths are where Kata's own packages keep their configuration. msbd names its own in every
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
# The rename keeps a running shim's file intact, and never leaves half a file.
cp shim "$out.new"
mv -f -- "$out.new" "$out"
