#!/bin/sh
# Finds or makes a Go that can build this module.
#
#   go.sh find        prints the path of an installed Go, 1.21 or later; fails if there is none
#   go.sh fetch DIR   makes the toolchain that go.mod names in DIR, by means of an older Go
#
# From 1.21 on Go fetches, by itself, the toolchain that go.mod names. It comes as a module, which an
# older Go, such as Debian 12's 1.19, can fetch as well, and checks against the public checksum database.
set -eu

find_go() {
	for go in "$(command -v go || true)" /usr/local/go/bin/go; do
		[ -x "$go" ] || continue
		# From elsewhere and without switching: the version of this very Go.
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

	echo "Fetching $version with $(go version | cut -d' ' -f3) (70 MB)"
	# Elsewhere, since an old Go cannot read this go.mod.
	source=$(cd / && GO111MODULE=on GOFLAGS=-mod=mod go mod download -json "$module" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
	if [ ! -d "$source" ]; then
		echo "go.sh: $module could not be fetched" >&2
		exit 1
	fi
	mkdir -p -- "$(dirname -- "$dir")"
	rm -rf -- "$dir.new" "$dir"
	# Modules are read-only, and hold no executables.
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
