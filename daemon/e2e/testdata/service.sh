#!/bin/bash
# Tests msbd as a systemd service on a dedicated host, with the steps of an administrator from installation to removal.
# The commands that docs/operations.md documents are taken from that file.
#
#   service.sh CHECKOUT
set -euo pipefail
trap 'echo "line $LINENO: $BASH_COMMAND"; systemctl status --no-pager -l msbd.service msbd.socket; journalctl --no-pager -u msbd | tail -n 30' ERR

checkout=${1:?usage: service.sh CHECKOUT}
step() { printf '%s  %s\n' "$(cut -d ' ' -f 1 /proc/uptime)" "$*"; }

# documented prints the code block of docs/operations.md that contains a line.
documented() {
	awk -v want="$1" '
		/^```sh$/ { text = ""; inside = 1; next }
		/^```$/ { if (inside && found) printf "%s", text; inside = found = 0 }
		inside { text = text $0 "\n"; if ($0 == want) found = 1 }' "$checkout/docs/operations.md" | grep .
}

# fails runs a command that must fail.
fails() {
	if "$@"; then return 1; fi
}

# wait_ready waits until the daemon is ready. systemd has to start it without being asked.
wait_ready() {
	until msb server status >/tmp/status; do
		[ $? = 1 ] && return 1
		sleep 0.2
	done
}

step "install"
# The images need overlayfs, which cannot use a directory on another overlayfs.
mkdir -p /var/lib/msb
mount -t tmpfs state /var/lib/msb
cd "$checkout"
install -d /etc/msb
printf 'hypervisor = "kata"\naccelerator = "kvm"\n' >/etc/msb/msbd.toml
documented 'systemctl enable --now msbd' | grep -v 'make deps' >/tmp/install # it is already built
. /tmp/install
systemd-analyze verify msbd.service msbd.socket
systemctl is-active msbd
msb server status | grep -i isolation
[ "$(stat -c '%a %G' /run/msb/msbd.sock)" = "660 root" ]

step "start a sandbox"
documented 'msb image import /usr/local/libexec/msb/images/python.tar' | head -n 1 >/tmp/import # only the first of the images
. /tmp/import
MSB_API_KEY=$(msb server keygen --expire 1h --quiet)
export MSB_API_KEY
msb sandbox start box >/dev/null
msb sandbox run box 'x = 40'
# When memory runs out, the kernel kills sandboxes before the daemon.
[ "$(cat "/proc/$(systemctl show -P MainPID msbd)/oom_score_adj")" = -500 ]
for pid in $(pgrep -f /usr/bin/qemu-system-x86_64); do
	[ "$(cat "/proc/$pid/oom_score_adj")" -ge 0 ]
done

step "upgrade"
documented 'git pull' | grep -vE 'git pull|make deps|msb image import' >/tmp/upgrade # the programs and images are the same
. /tmp/upgrade
[ "$(msb sandbox run box 'x')" = 40 ]

step "create the group"
useradd alice
documented 'groupadd --system msb' >/tmp/group
. /tmp/group
[ "$(msb sandbox run box 'x += 1; x')" = 41 ]
[ "$(stat -c '%a %G' /run/msb /run/msb/msbd.sock | paste -sd ' ')" = "750 msb 660 msb" ]

step "kill the daemon"
pid=$(systemctl show -P MainPID msbd)
kill -KILL "$pid"
until [ "$(systemctl show -P MainPID msbd)" != "$pid" ] && systemctl is-active --quiet msbd; do sleep 0.2; done
wait_ready
[ "$(msb sandbox run box 'x += 1; x')" = 42 ]

step "socket activation"
systemctl stop msbd
documented 'systemctl enable --now msbd.socket' >/tmp/socket
. /tmp/socket
[ "$(stat -c '%a %G' /run/msb/msbd.sock)" = "600 root" ]
fails systemctl is-active --quiet msbd
wait_ready # the first call starts the daemon
[ "$(msb sandbox run box 'x += 1; x')" = 43 ]
[ "$(stat -c '%a %G' /run/msb /run/msb/msbd.sock | paste -sd ' ')" = "750 msb 660 msb" ]
su alice -c 'msb server status' >/dev/null
setpriv --reuid nobody --regid nogroup --groups msb msb server status >/dev/null
refusal=$(! setpriv --reuid nobody --regid nogroup --clear-groups msb server status 2>&1)
grep -q 'usermod -aG msb' <<<"$refusal"

step "a restart loses no call"
systemctl restart --no-block msbd
until msb server status >/tmp/status; do
	[ $? = 4 ] # 4 means running, but not ready; the status must never be "not running"
done
systemctl is-active --quiet msbd.socket

step "stop with all sandboxes"
systemctl disable --now --quiet msbd.socket
msb server stop --sandboxes
while [ "$(systemctl is-active msbd)" = deactivating ]; do sleep 0.2; done
[ "$(systemctl is-active msbd)" = inactive ] # a clean exit, after which systemd does not restart it
fails pgrep -f /usr/bin/qemu-system-x86_64
group=/sys/fs/cgroup$(systemctl show -P ControlGroup msbd)
[ "$group" = /sys/fs/cgroup ] || [ ! -e "$group" ] || fails grep . "$group/cgroup.procs"

step "uninstall"
systemctl disable --quiet msbd
make uninstall
systemctl daemon-reload
fails systemctl cat msbd
step "done"
