#!/bin/bash
# Prints wheels.txt with the newest versions of the packages: wheels.sh >wheels.new && mv wheels.new wheels.txt
# It needs pip 23.2 or later, of any Python.
set -euo pipefail

packages=(numpy pandas matplotlib scipy requests pillow)

# Debian 12 has Python 3.11 and glibc 2.36.
resolve() {
	local args=(--platform "manylinux2014_$1") minor
	for minor in {17..36}; do
		args+=(--platform "manylinux_2_${minor}_$1")
	done
	python3 -m pip install --quiet --dry-run --ignore-installed --target unused --only-binary=:all: \
		--implementation cp --python-version 3.11 --abi cp311 --abi abi3 --abi none "${args[@]}" \
		--index-url https://pypi.org/simple --report - "${packages[@]}" |
		python3 -c '
import json, sys
for package in json.load(sys.stdin)["install"]:
    info = package["download_info"]
    print(info["url"] + "#sha256=" + info["archive_info"]["hashes"]["sha256"])'
}

echo '# Wheels of Python packages for each architecture, with their dependencies, from PyPI. wheels.sh writes this file.'
{
	resolve x86_64
	resolve aarch64
} | LC_ALL=C sort --unique --field-separator / --key 8
