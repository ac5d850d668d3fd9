#!/bin/sh
# Finds or downloads a Go toolchain that can build this module.
#
#   go.sh find        prints the path of an installed Go, 1.21 or later; fails if there is none
#   go.sh fetch DIR   installs the toolchain that go.mod names into DIR, using an older Go
#
# Go 1.21 and later download the toolchain that go.mod names automatically. The toolchain is a Go module, so an
# older Go, such as 1.19 in Debian 12, can also download it and check it against the public checksum database.
set -eu

find_go() {
	for go in "$(command -v go || true)" /usr/local/go/bin/go; do
		[ -x "$go" ] || continue
		# Run it outside of the module and without switching toolchains, to get the version of this installation.
		version=$(cd / && GOTOOLCHAIN=local "$go" version) || continue
		version=${version#go version go}
		minor=${version#1.}
		minor=${minor%%[!0-9]*}
		if [ "${minor:-0}" -ge 21 ]; then
			echo "$go"
			return
		fi
	done
	return 1
}

fetch() {
	dir=$1
	root=$(cd -- "$(dirname -- "$0")/../.." && pwd)
	version=$(sed -n 's/^toolchain //p' "$root/go.mod")
	: "${version:=go$(sed -n 's/^go //p' "$root/go.mod")}"
	module=golang.org/toolchain@v0.0.1-$version.linux-$(go env GOARCH)

	echo "Downloading $version with $(go version | cut -d' ' -f3) (70 MB)"
	# Run it in another directory, because an old Go cannot read this go.mod.
	source=$(cd / && GO111MODULE=on GOFLAGS=-mod=mod go mod download -json "$module" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
	if [ ! -d "$source" ]; then
		echo "go.sh: downloading $module failed" >&2
		exit 1
	fi
	mkdir -p -- "$(dirname -- "$dir")"
	rm -rf -- "$dir.new" "$dir"
	# Files in the module cache are read-only and not executable.
	cp -r -- "$source" "$dir.new"
	chmod -R u+w -- "$dir.new"
	chmod +x -- "$dir.new"/bin/* "$dir.new"/pkg/tool/*/*
	mv -- "$dir.new" "$dir"
}

case ${1-} in
find) find_go ;;
fetch) fetch "${2:?usage: go.sh fetch DIR}" ;;
*)
	echo "usage: go.sh find | fetch DIR" >&2
	exit 2
	;;
esac
