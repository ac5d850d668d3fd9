#!/bin/bash
# Checks the installed Python package in its own virtual environments:
#
#   check.sh lint      check the format, style and types
#   check.sh unit      run the unit tests with each installed Python from 3.9 to 3.13
#   check.sh live      run the tests against the server at MSB_SERVER_URL, with the key MSB_API_KEY
#   check.sh original  run a program for microsandbox 0.1.8 with that package, then with this one; same server
#   check.sh bench     measure the overhead of the package over raw requests; same server
#   check.sh run FILE  run a program with the package
#
# It needs python3 with venv. Creating an environment needs PyPI. The environments are in bin/tools/python, or in VENVS.
set -euo pipefail

cd -- "$(dirname -- "$0")"
venvs=${VENVS:-$(cd ../.. && pwd)/bin/tools/python}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1 PYTHONDONTWRITEBYTECODE=1 PYTHONWARNINGS=

# pythons lists the installed interpreters that the package supports, oldest first.
pythons() {
	local version python
	for version in 3.9 3.10 3.11 3.12 3.13; do
		for python in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
			if "$python" -c '' 2>/dev/null; then
				echo "$python"
				break
			fi
		done
	done
}

# limited ends a command and what it has started after some seconds, so that CI says what hangs: limited SECONDS COMMAND…
limited() {
	local status=0 foreground=
	[ ! -t 0 ] || foreground=--foreground # so that Ctrl-C ends the command
	timeout $foreground --kill-after=10 "$@" || status=$?
	case $status in 124 | 137) echo "check.sh: ended, probably because it took more than $1 s: ${*:2}" >&2 ;; esac
	return "$status"
}

# pip installs packages in up to three attempts, because the network may fail or stall: pip DIR ARGUMENT…
pip() {
	local dir=$1 try
	shift
	for try in 1 2 3; do
		limited 300 "$dir/bin/pip" install "$@" >&2 && return
		echo "check.sh: pip install $*: failed, attempt $try of 3" >&2
		[ "$try" = 3 ] || sleep $((try * 5))
	done
	return 1
}

# venv creates an environment unless an identical one exists, and prints its path: venv NAME PYTHON PACKAGE…
venv() {
	local dir=$venvs/$1 python=$2 kind
	shift 2
	kind="$("$python" -VV) $* $(cksum <pyproject.toml)"
	if [ "$(cat -- "$dir/kind" 2>/dev/null)" != "$kind" ]; then
		rm -rf -- "$dir"
		# set -e has no effect here, because venv runs in $(…).
		"$python" -m venv "$dir" && pip "$dir" hatchling "$@" || return
		echo "$kind" >"$dir/kind"
	fi
	echo "$dir"
}

# install installs the current package into an environment that already has its dependencies.
install() {
	"$1/bin/pip" install --no-deps --no-build-isolation --force-reinstall .
}

lint() {
	local dir
	dir=$(venv lint python3 '.[lint,test]')
	"$dir/bin/ruff" format --check --quiet . || { echo "run $dir/bin/ruff format client/python"; return 1; }
	"$dir/bin/ruff" check --quiet --no-cache .
	"$dir/bin/mypy" --cache-dir "$dir/mypy" --python-executable "$dir/bin/python"
}

# unit_with runs the unit tests with one Python. The oldest Python uses the oldest httpx.
unit_with() {
	local python=$1 version dir
	version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
	local packages=('.[test]')
	if [ "$version" = 3.9 ]; then
		packages+=("$(sed -n 's/.*"httpx>=\([0-9.]*\).*/httpx==\1/p' pyproject.toml)")
	fi
	dir=$(venv "unit-$version" "$python" "${packages[@]}")
	install "$dir"
	# With the time limit of a test, pytest prints where each thread is.
	limited 900 "$dir/bin/python" -m pytest --quiet -o faulthandler_timeout=600
}

# unit runs the unit tests with all Pythons in parallel, because they mostly wait.
unit() {
	local logs python n=0 failed=0 pids=()
	logs=$(mktemp -d)
	for python in $(pythons); do
		unit_with "$python" >"$logs/$n" 2>&1 &
		pids[n++]=$!
	done
	[ "$n" -gt 0 ] || { echo "check.sh: found no Python from 3.9 to 3.13" >&2; failed=1; }
	n=0
	for python in $(pythons); do
		if wait "${pids[n]}"; then
			echo "$("$python" -V): $(tail -n 1 "$logs/$n")"
		else
			cat "$logs/$n"
			echo "$("$python" -V): failed"
			failed=1
		fi
		n=$((n + 1))
	done
	rm -rf -- "$logs"
	return "$failed"
}

live() {
	local dir
	dir=$(venv live python3 '.[test]')
	install "$dir"
	"$dir/bin/python" -m pytest --quiet tests/live
}

original() {
	local dir
	dir=$(venv original python3 microsandbox==0.1.8)
	"$dir/bin/python" tests/original/program.py
	# Use a separate environment, so that the dependencies of 0.1.8 are not installed.
	dir=$(venv moved python3 '.[compat]')
	install "$dir"
	"$dir/bin/python" tests/original/program.py
}

bench() {
	local dir
	dir=$(venv live python3 '.[test]')
	install "$dir"
	"$dir/bin/python" bench/overhead.py
}

run() {
	local dir
	dir=$(venv run python3 .) # not the one of live, which may be in use
	install "$dir"
	cd -- "$OLDPWD"
	"$dir/bin/python" "$@"
}

case ${1-} in
lint | unit) ;;
run) ;;
live | original | bench) : "${MSB_SERVER_URL:?set it to the URL of the server}" "${MSB_API_KEY:?set it to an API key of that server}" ;;
*)
	sed -n '2,/^set/s/^# \{0,1\}//p' "$(basename -- "$0")" >&2
	exit 2
	;;
esac
"$@"
