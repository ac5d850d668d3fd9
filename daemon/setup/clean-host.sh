#!/bin/bash
# Undoes quickstart.sh: stops the server and its sandboxes, and removes their state.
#
#   clean-host.sh [--packages]
#
# --packages also removes the Debian packages that host-packages.sh installed. What was built in bin/
# stays; `make clean` removes that. A server that an installed unit runs is left alone.
set -euo pipefail

cd -- "$(dirname -- "$0")/../.."
state=/var/lib/msb
run=/run/msb
record=bin/host-packages

case $*$(id -u) in
0 | --packages0) ;;
*)
	echo "usage (as root): clean-host.sh [--packages]" >&2
	exit 2
	;;
esac

if systemctl is-active --quiet msbd 2>/dev/null; then
	echo "clean-host.sh: the unit msbd runs here, and its state is not quickstart's: stop it first if you mean it (systemctl stop msbd)" >&2
	exit 1
fi

# A server that died has left its sandboxes running; one more start adopts them, so that all can be stopped.
if [ -x bin/msb ] && [ -e "$run" ]; then
	if ! bin/msb server status >/dev/null 2>&1; then
		echo "Starting the server once more, to stop what it left behind"
		bin/msb server start --detach >/dev/null || true
	fi
	echo "Stopping the server and its sandboxes"
	bin/msb server stop --sandboxes || true
fi

# What is left now belongs to nobody: this server's processes, then mounts in its directories.
own() {
	local p exe
	for p in /proc/[0-9]*; do
		exe=$(readlink "$p/exe" 2>/dev/null) || continue
		exe=${exe% (deleted)}
		case ${exe##*/} in
		msbd | containerd | containerd-shim-kata-v2 | qemu-system-* | virtiofsd)
			# QEMU and virtiofsd name their directory in their environment.
			if cat "$p/cmdline" "$p/environ" 2>/dev/null | tr '\0' '\n' | grep -qE "(^|=|:)$run(/|$)"; then
				echo "${p#/proc/}"
			fi
			;;
		esac
	done
}
for signal in TERM KILL; do
	for _ in {1..25}; do
		pids=$(own)
		[ -z "$pids" ] && break 2
		# shellcheck disable=SC2086 # a list of pids
		kill -s "$signal" $pids 2>/dev/null || true
		sleep 0.2
	done
done
awk -v state="$state/" -v run="$run/" 'index($5, state) == 1 || index($5, run) == 1 { print $5 }' /proc/self/mountinfo | tac |
	while read -r mountpoint; do
		umount --lazy "$mountpoint"
	done

for dir in "$state" "$run"; do
	if [ -e "$dir" ]; then
		rm -rf --one-file-system -- "$dir"
		echo "Removed $dir"
	fi
done
# Directories that all sandboxes share; where another server has some, they stay.
find /run/kata-containers /run/vc -depth -type d -empty -delete 2>/dev/null || true
rmdir /sys/fs/cgroup/msb /sys/fs/cgroup/*/msb 2>/dev/null || true

if [ "${1-}" = --packages ] && [ -s "$record" ]; then
	echo "Removing the Debian packages that make deps installed"
	xargs -a "$record" apt-get remove --purge --yes -qq >/dev/null </dev/null
	rm -f -- "$record"
elif [ -s "$record" ]; then
	echo "Left: $(wc -l <"$record") Debian packages that make deps installed (make clean-host PACKAGES=1 removes them)"
fi
if [ -e bin ]; then
	echo "Left: what was built, in bin/ (make clean removes it), and Go's caches ($(go env GOCACHE GOMODCACHE 2>/dev/null | paste -sd ' '))"
fi
