#!/bin/sh
# Runs every fuzz target of the module for a while: fuzz.sh TIME
set -eu

time=${1:?usage: fuzz.sh TIME}
# Lines of names, then one "ok" line with their package.
targets=$(go test -list '^Fuzz' ./... | awk '
	/^Fuzz/ { names[n++] = $1 }
	/^ok/   { for (i = 0; i < n; i++) print $2, names[i]; n = 0 }')
if [ -z "$targets" ]; then
	echo "fuzz.sh: there is no fuzz target" >&2
	exit 1
fi
echo "$targets" | while read -r package name; do
	echo "$name ($package), $time"
	go test -run '^$' -fuzz "^$name\$" -fuzztime "$time" "$package"
done
echo "$(echo "$targets" | wc -l) fuzz targets, $time each: no failure"
