#!/bin/sh
# Generates api/ from proto/ with the tools on PATH (bin/tools, see Makefile).
#
#   generated.sh write   writes the generated code
#   generated.sh check   fails if the generated code is not up to date
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
		echo "generated.sh: api/ is out of date with proto/: run 'make generate'" >&2
		exit 1
	fi
	echo "the generated code is up to date"
	;;
*)
	echo "usage: generated.sh write | check" >&2
	exit 2
	;;
esac
