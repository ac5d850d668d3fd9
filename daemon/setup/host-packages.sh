#!/bin/sh
# Installs the missing Debian packages that the build and the server need, and additional ones:
#
#   host-packages.sh RECORD [WHY PACKAGE[:FILE]…]
#
# FILE is a file or a command of the package. If it exists, the package is not missing. The default is a command
# with the name of the package.
#
# The script appends the names of the packages that it installed to the file RECORD, for clean-host.sh.
set -eu

record=${1:?usage: host-packages.sh RECORD [WHY PACKAGE[:FILE]…]}
shift
why=${1-}
[ $# = 0 ] || shift

# package | a file of the package | why it is needed
wanted='
ca-certificates    | /etc/ssl/certs/ca-certificates.crt | to fetch Go modules over HTTPS
curl               | /usr/bin/curl                      | to download Node.js, and to call the server
mmdebstrap         | /usr/bin/mmdebstrap                | to build the images from Debian packages
qemu-system-x86    | /usr/bin/qemu-system-x86_64        | to run the microVMs
qemu-system-common | /usr/lib/qemu/virtiofsd            | virtiofsd: for sandboxes with the driver of Kata
erofs-utils        | mkfs.erofs                         | to make the disks of images
e2fsprogs          | /sbin/mkfs.ext4                    | to make the disks of sandboxes
'
# Go 1.21 and later download the version that go.mod names. Debian 12 has Go 1.19, with which go.sh downloads it.
if ! "$(dirname "$0")"/go.sh find >/dev/null; then
	wanted="$wanted
golang-go          | /usr/bin/go                        | to fetch the Go toolchain that go.mod names
"
fi
for package; do
	wanted="$wanted
${package%%:*} | ${package#*:} | $why
"
done

missing=$(echo "$wanted" | sed 's/ *| */|/g' | while IFS='|' read -r package file why; do
	if [ -n "$file" ] && [ ! -e "$file" ] && ! command -v "$file" >/dev/null; then
		echo "$package: $why"
	fi
done)
if [ -z "$missing" ]; then
	echo "Debian packages: nothing is missing."
	exit 0
fi
if ! command -v apt-get >/dev/null; then
	echo "host-packages.sh: apt-get not found; this script needs Debian. Missing:" >&2
	echo "$missing" >&2
	exit 1
fi
if [ "$(id -u)" != 0 ]; then
	echo "host-packages.sh: run as root, or install these yourself:" >&2
	echo "$missing" >&2
	exit 1
fi

echo "Installing from Debian's packages (about 1 minute):"
echo "$missing" | sed 's/^/  /'

installed() {
	dpkg-query --show --showformat '${db:Status-Abbrev}${Package}\n' | sed -n 's/^ii //p' | sort
}
before=$(mktemp)
log=$(mktemp)
trap 'rm -f -- "$before" "$log"' EXIT
installed >"$before"

export DEBIAN_FRONTEND=noninteractive
packages=$(echo "$missing" | cut -d: -f1)
# shellcheck disable=SC2086 # a list of names
if ! { apt-get update && apt-get install --yes --no-install-recommends $packages; } >"$log" 2>&1 </dev/null; then
	cat "$log" >&2
	exit 1
fi
mkdir -p -- "$(dirname -- "$record")"
installed | comm -13 "$before" - >>"$record"
