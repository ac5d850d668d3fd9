#!/bin/bash
# Runs a command on a host with KVM: on this one, if its KVM is usable, else in the lab, a VM that QEMU emulates
# with a processor that has AMD's virtualization.
#
#   run.sh COMMAND [ARG...]
#
# The lab sees this host's root, read-only below a tmpfs. The command runs there as root, in the same directory
# and with the same environment. Its output and its exit code are those of run.sh, but for
#
#   124  the time was over
#   125  the lab crashed: the end of its console follows
#
# LAB_SYSTEMD     1: always in the lab, and as a service of the host's systemd, which is PID 1 there
# LAB_TIMEOUT     seconds that the lab may take (900)
# LAB_MEMORY_MIB  its memory (4096); guests' memory comes out of it
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
time_limit=${LAB_TIMEOUT:-900}
memory=${LAB_MEMORY_MIB:-4096}
dir=$(mktemp -d /tmp/msblab.XXXXXX)
# shellcheck disable=SC2317,SC2046 # the trap reaches it; a list of pids
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
	echo unset TMPDIR # the lab has a /tmp of its own
	printf 'cd %q\n' "$PWD"
	printf '%q ' exec "$@"
} >"$dir/results/command"
: >"$dir/results/log"

# serve TAG SOURCE CACHE shares a directory until QEMU ends. To virtiofsd this host's root is read-only, too, and
# the files with its pid, which it would leave behind in /run, are its own.
serve() {
	# shellcheck disable=SC2016 # that shell's
	unshare --mount bash -c 'mount --bind "$0" "$0"; mount -t tmpfs run /run; mount -o remount,bind,ro /; exec "$@"' "$dir" \
		/usr/lib/qemu/virtiofsd --socket-path="$dir/$1.sock" -o "source=$2,cache=$3,sandbox=chroot,log_level=err" >"$dir/$1.log" 2>&1 &
}

serve hostroot / always
serve results "$dir/results" none
for _ in {1..200}; do
	[ -S "$dir/hostroot.sock" ] && [ -S "$dir/results.sock" ] && break
	sleep 0.05
done

# Emulated, erms copies byte by byte (without it, by eight), timers are too late for the kernel's checks of them, and
# each of the 8192 places on PCI buses where the kernel looks for a device takes its time. With a second processor, the
# lab or a microVM in it hangs now and then: kernels patch themselves as they run, with VMs as they come and go, and QEMU
# 7.2 may go on with what the other processor was translating in that moment.
#
# Told how fast its processor's counter counts, it does not measure that itself. On a busy host it would get it wrong
# by a factor of up to 50, and then every guest in it would hang.
timeout -k 5 "$time_limit" qemu-system-x86_64 -name lab -nodefaults -no-user-config -display none -no-reboot \
	-machine q35,memory-backend=mem -bios qboot.rom \
	-accel tcg,tb-size=512 -cpu max,+svm,-erms -m "$memory" \
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

# The output ends with the lab, or because nobody reads it any more.
code=0
wait "$output" || kill "$lab" 2>/dev/null || true
wait "$lab" || code=$?
if [ -s "$dir/results/exit" ]; then
	exit "$(cat "$dir/results/exit")"
fi
if [ "$code" = 124 ]; then
	echo "run.sh: the lab had not finished after $time_limit s (LAB_TIMEOUT)" >&2
	exit 124
fi
echo "run.sh: the lab crashed (QEMU's exit code is $code). The end of its console:" >&2
tail -n 40 "$dir"/console "$dir"/*.log >&2
exit 125
