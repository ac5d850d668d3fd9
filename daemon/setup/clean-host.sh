#!/bin/bash
# Reverts quickstart.sh: stops the server and its sandboxes, and removes their state.
#
#   clean-host.sh [--packages]
#
# --packages also removes the Debian packages that host-packages.sh installed. The build results in bin/ are
# kept; `make clean` removes them. If the systemd unit msbd is active, the script changes nothing and fails.
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
	echo "clean-host.sh: the systemd unit msbd is active, and its state would be removed; run 'systemctl stop msbd' first if you want that" >&2
	exit 1
fi

# The sandboxes of a server that crashed are still running. Starting the server again adopts them, so that they can be
# stopped.
if [ -x bin/msb ] && [ -e "$run" ]; then
	if ! bin/msb server status >/dev/null 2>&1; then
		echo "Starting the server again, to stop the sandboxes that it left running"
		bin/msb server start --detach >/dev/null || true
	fi
	echo "Stopping the server and its sandboxes"
	bin/msb server stop --sandboxes || true
fi

# Clean up what the server has not: end its remaining processes, then unmount everything in its directories.
# server_pids prints the ids of the processes that belong to this server.
server_pids() {
	local p exe
	for p in /proc/[0-9]*; do
		[ -O "$p" ] || continue # another user can start a process that looks like one of the server
		exe=$(readlink "$p/exe" 2>/dev/null) || continue
		exe=${exe% (deleted)}
		case ${exe##*/} in
		msbd | containerd | containerd-shim-kata-v2 | qemu-system-* | virtiofsd)
			# For QEMU and virtiofsd, the directory is in the environment.
			if cat "$p/cmdline" "$p/environ" 2>/dev/null | tr '\0' '\n' | grep -qE "(^|=|:)$run(/|$)"; then
				echo "${p#/proc/}"
			fi
			;;
		esac
	done
}
for signal in TERM KILL; do
	for _ in {1..25}; do
		pids=$(server_pids)
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
rm -f /var/lib/msb-ci.pid # which says that the state was that of .ci/run
# Remove the directories that all sandboxes share, unless another server still uses them.
find /run/kata-containers /run/vc -depth -type d -empty -delete 2>/dev/null || true
rmdir /sys/fs/cgroup/msb /sys/fs/cgroup/*/msb 2>/dev/null || true

if [ "${1-}" = --packages ] && [ -s "$record" ]; then
	echo "Removing the Debian packages that make deps installed"
	xargs -a "$record" apt-get remove --purge --yes -qq >/dev/null </dev/null
	rm -f -- "$record"
elif [ -s "$record" ]; then
	echo "Kept: $(wc -l <"$record") Debian packages that make deps installed (make clean-host PACKAGES=1 removes them)"
fi
if [ -e bin ]; then
	echo "Kept: the build results in bin/ (make clean removes them), and Go's caches ($(go env GOCACHE GOMODCACHE 2>/dev/null | paste -sd ' '))"
fi
