#!/bin/sh
# Generates api/ from proto/, by the tools on PATH (bin/tools, see Makefile).
#
#   generated.sh write   writes it
#   generated.sh check   fails if what is there differs from what would be written
set -eu

cd -- "$(dirname -- "$0")/../.."
case ${1-} in
write)
	buf generate --template proto/buf.gen.yaml
	;;
check)
	out=$(mktemp -d)
	trap 'rm -rf -- "$out"' EXIT
	buf generate --template proto/buf.gen.yaml --output "$out"
	if ! diff -r "$out/api/msb" api/msb; then
		echo "generated.sh: api/ is not what proto/ says: run make generate" >&2
		exit 1
	fi
	echo "generated code is fresh"
	;;
*)
	echo "usage: generated.sh write | check" >&2
	exit 2
	;;
esac
