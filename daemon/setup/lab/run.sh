#!/bin/bash
# Runs a command with KVM. If KVM is usable on this host, run.sh runs the command here. Otherwise it runs the command in
# the lab. The lab is a VM that QEMU emulates. Its processor supports AMD virtualization, so it has KVM.
#
#   run.sh COMMAND [ARG...]
#
# The lab mounts this host's root read-only, with a tmpfs overlay. The command runs there as root, in the same
# directory and with the same environment. run.sh prints its output and exits with its exit code, except for
#
#   124  the lab reached its time limit
#   125  the lab crashed
#
# In both cases it prints the end of the lab's console.
#
# LAB_SYSTEMD     1: always use the lab, with the host's systemd as PID 1, and run the command as a service
# LAB_TIMEOUT     time limit of the lab in seconds (default 1800)
# LAB_MEMORY_MIB  memory of the lab (default 4096), including the memory of its guests
set -euo pipefail

if [ $# = 0 ]; then
	echo "usage: [LAB_TIMEOUT=SECONDS] [LAB_MEMORY_MIB=MIB] run.sh COMMAND [ARG...]" >&2
	exit 2
fi
here=$(cd -- "$(dirname -- "$0")" && pwd)
if [ "${LAB_SYSTEMD:-}" != 1 ] && "$here/kvm.sh"; then
	exec "$@"
fi

root=${here%/*/*/*}
time_limit=${LAB_TIMEOUT:-1800}
memory=${LAB_MEMORY_MIB:-4096}
dir=$(mktemp -d /tmp/msblab.XXXXXX)
# shellcheck disable=SC2317,SC2046 # the trap calls it; a list of pids
finish() {
	trap - EXIT
	trap '' HUP INT TERM
	kill $(jobs -pr) 2>/dev/null || true
	wait
	rm -rf -- "$dir"
}
trap finish EXIT
trap 'exit 130' HUP INT TERM

mkdir "$dir/results"
pwd >"$dir/results/directory"
{
	export -p
	echo unset TMPDIR # the lab has its own /tmp
	printf 'cd %q\n' "$PWD"
	printf '%q ' exec "$@"
} >"$dir/results/command"
: >"$dir/results/log"

# serve TAG SOURCE CACHE shares a directory until QEMU exits. virtiofsd runs in its own mount namespace, where the
# host's root is read-only and /run is a tmpfs, because virtiofsd leaves files with its pid in /run.
serve() {
	# shellcheck disable=SC2016 # the inner shell expands it
	unshare --mount bash -c 'mount --bind "$0" "$0"; mount -t tmpfs run /run; mount -o remount,bind,ro /; exec "$@"' "$dir" \
		/usr/lib/qemu/virtiofsd --socket-path="$dir/$1.sock" -o "source=$2,cache=$3,sandbox=chroot,log_level=err" >"$dir/$1.log" 2>&1 &
}

serve hostroot / always
serve results "$dir/results" none
for _ in {1..200}; do
	[ -S "$dir/hostroot.sock" ] && [ -S "$dir/results.sock" ] && break
	sleep 0.05
done

# The options make the emulation faster and reliable:
#  - -erms: with erms, emulated copies are byte by byte instead of eight bytes at a time. Linux does not boot
#    with fsrm but without erms;
#  - no_timer_check, tsc=reliable: emulated timers are too slow for the kernel's checks of them;
#  - tsc_early_khz: otherwise the kernel measures how fast its time stamp counter counts. On a busy host the result is
#    wrong by a factor of up to 50, and then every guest hangs;
#  - pci=lastbus=0: otherwise the kernel probes 8192 places on PCI buses for devices, and each probe is slow;
#  - one processor: with two, the lab or a microVM in it sometimes hangs. Kernels patch their own code while they run,
#    also when VMs start and stop, and QEMU 7.2 may continue to execute code that the other processor was translating
#    at that moment. Emulated sandboxes have one processor for the same reason.
# The lab has a session of its own, which gets three times the share of others: the kernel shares the processors between
# sessions (sched_autogroup), and each microVM of another test also has one. Otherwise the lab's microVMs can miss their time
# limits, because the lab emulates the machine that they run on. With a larger share, the microVMs of the others can miss theirs.
setsid bash -c 'echo -5 >/proc/self/autogroup; exec "$0" "$@"' timeout -k 5 "$time_limit" qemu-system-x86_64 -name lab -nodefaults -no-user-config -display none -no-reboot \
	-machine q35,memory-backend=mem -bios qboot.rom \
	-accel tcg,tb-size=512 -cpu max,+svm,-erms,-fsrm -m "$memory" \
	-object memory-backend-memfd,id=mem,size="${memory}M",share=on \
	-kernel "$root/bin/guest/vmlinux" -initrd "$root/bin/lab/initrd.img" \
	-append "console=ttyS0 loglevel=5 panic=-1 mitigations=off cryptomgr.notests pci=lastbus=0 no_timer_check tsc=reliable tsc_early_khz=$("$root/bin/lab/tsc") random.trust_cpu=on LAB_ROOT=$root LAB_SYSTEMD=${LAB_SYSTEMD:-}" \
	-serial file:"$dir/console" \
	-chardev socket,id=hostroot,path="$dir/hostroot.sock" -device vhost-user-fs-pci,chardev=hostroot,tag=hostroot \
	-chardev socket,id=results,path="$dir/results.sock" -device vhost-user-fs-pci,chardev=results,tag=results \
	>"$dir/qemu.log" 2>&1 &
lab=$!
tail -n +1 -s 0.2 --pid="$lab" -f "$dir/results/log" &
output=$!

# tail exits when the lab exits. If it fails because its reader is gone, kill the lab.
code=0
wait "$output" || kill "$lab" 2>/dev/null || true
wait "$lab" || code=$?
if [ -s "$dir/results/exit" ]; then
	exit "$(cat "$dir/results/exit")"
fi
if [ "$code" = 124 ]; then
	echo "run.sh: the lab did not finish within $time_limit s (LAB_TIMEOUT). The end of its console:" >&2
else
	echo "run.sh: the lab crashed (QEMU exited with $code). The end of its console:" >&2
	code=125
fi
tail -n 40 "$dir"/console "$dir"/*.log >&2
exit "$code"
