#!/bin/sh
# Runs every fuzz target of the module with a number of inputs:
#
#   fuzz.sh BUDGET
#
# BUDGET is a value of -fuzztime, such as 20000x. Use a number of inputs instead of a time, because before Go 1.27 a
# run with a time may fail at its end without a finding (golang/go#75804).
set -eu

budget=${1:?usage: fuzz.sh BUDGET}
cd -- "$(dirname -- "$0")/../.."
# Find the targets with grep, as lines "PACKAGE NAME". `go test -list` would have to build every test of the module.
targets=$(grep -roE --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*' api client daemon |
	sed -E 's|^(.*)/[^/]*:func (.*)|./\1 \2|' | sort)
if [ -z "$targets" ]; then
	echo "fuzz.sh: found no fuzz target" >&2
	exit 1
fi
programs=$(mktemp -d)
trap 'rm -rf -- "$programs"' EXIT
cache=$(go env GOCACHE)/fuzz/$(go list -m) # where `go test -fuzz` keeps inputs
echo "$targets" | while read -r package name; do
	inputs=$budget
	case $name:$budget in
	FuzzReadKeys:*x | FuzzProcessService:*x | FuzzExtract:*x) inputs=$((${budget%x} / 10))x ;; # slow: they start processes or write files
	esac
	echo "$name ($package), $inputs"
	# `go test -fuzz` would link the program again for each target of a package.
	program=$programs/$(echo "$package" | tr / _)
	[ -e "$program" ] || go test -c -vet=off -fuzz . -o "$program" "$package"
	(cd "$package" && "$program" -test.run '^$' -test.fuzz "^$name\$" -test.fuzztime "$inputs" -test.fuzzminimizetime 10x \
		-test.fuzzcachedir "$cache/$package" -test.timeout 0)
done
echo "$(echo "$targets" | wc -l) fuzz targets passed, with $budget each (FuzzReadKeys, FuzzProcessService and FuzzExtract with a tenth of that)"
