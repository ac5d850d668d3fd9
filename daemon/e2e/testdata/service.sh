#!/bin/bash
# What an administrator does with msbd as a service of systemd, on a host of its own, and what has to come of it.
# Commands that docs/operations.md gives are taken from there.
#
#   service.sh CHECKOUT
set -euo pipefail
trap 'echo "line $LINENO: $BASH_COMMAND"; systemctl status --no-pager -l msbd.service msbd.socket; journalctl --no-pager -u msbd | tail -n 30' ERR

checkout=${1:?usage: service.sh CHECKOUT}
step() { printf '%s  %s\n' "$(cut -d ' ' -f 1 /proc/uptime)" "$*"; }

# documented prints the block of docs/operations.md that has the line.
documented() {
	awk -v want="$1" '
		/^```sh$/ { text = ""; inside = 1; next }
		/^```$/ { if (inside && found) printf "%s", text; inside = found = 0 }
		inside { text = text $0 "\n"; if ($0 == want) found = 1 }' "$checkout/docs/operations.md" | grep .
}

# never runs what has to fail.
never() {
	if "$@"; then return 1; fi
}

# wait_ready waits for the daemon that systemd starts by itself.
wait_ready() {
	until msb server status >/tmp/status; do
		[ $? = 1 ] && return 1
		sleep 0.2
	done
}

step "install"
# Overlayfs, for the images, takes no directory of another overlayfs.
mkdir -p /var/lib/msb
mount -t tmpfs state /var/lib/msb
cd "$checkout"
install -d /etc/msb
printf 'hypervisor = "kata"\naccelerator = "kvm"\n' >/etc/msb/msbd.toml
documented 'systemctl enable --now msbd' | grep -v 'make deps' >/tmp/install # it is built
. /tmp/install
systemd-analyze verify msbd.service msbd.socket
systemctl is-active msbd
msb server status | grep -i isolation
[ "$(stat -c '%a %G' /run/msb/msbd.sock)" = "660 root" ]

step "a sandbox"
documented 'msb image import /usr/local/libexec/msb/images/python.tar' | head -n 1 >/tmp/import # of two
. /tmp/import
MSB_API_KEY=$(msb server keygen --expire 1h --quiet)
export MSB_API_KEY
msb sandbox start box >/dev/null
msb sandbox run box 'x = 40'

step "an upgrade"
documented 'make build guest images' | grep -v 'make build' >/tmp/upgrade
. /tmp/upgrade
[ "$(msb sandbox run box 'x')" = 40 ]

step "the making of the group"
useradd alice
documented 'groupadd --system msb' >/tmp/group
. /tmp/group
[ "$(msb sandbox run box 'x += 1; x')" = 41 ]
[ "$(stat -c '%a %G' /run/msb /run/msb/msbd.sock | paste -sd ' ')" = "750 msb 660 msb" ]

step "death"
pid=$(systemctl show -P MainPID msbd)
kill -KILL "$pid"
until [ "$(systemctl show -P MainPID msbd)" != "$pid" ] && systemctl is-active --quiet msbd; do sleep 0.2; done
wait_ready
[ "$(msb sandbox run box 'x += 1; x')" = 42 ]

step "activation by the socket"
systemctl stop msbd
documented 'systemctl enable --now msbd.socket' >/tmp/socket
. /tmp/socket
[ "$(stat -c '%a %G' /run/msb/msbd.sock)" = "600 root" ]
never systemctl is-active --quiet msbd
wait_ready # the first call starts it
[ "$(msb sandbox run box 'x += 1; x')" = 43 ]
[ "$(stat -c '%a %G' /run/msb /run/msb/msbd.sock | paste -sd ' ')" = "750 msb 660 msb" ]
su alice -c 'msb server status' >/dev/null
setpriv --reuid nobody --regid nogroup --groups msb msb server status >/dev/null
refusal=$(! setpriv --reuid nobody --regid nogroup --clear-groups msb server status 2>&1)
grep -q 'usermod -aG msb' <<<"$refusal"

step "a restart loses no call of msb"
systemctl restart --no-block msbd
until msb server status >/tmp/status; do
	[ $? = 4 ] # running, but not ready; never not running
done
systemctl is-active --quiet msbd.socket

step "stop, with all sandboxes"
systemctl disable --now --quiet msbd.socket
msb server stop --sandboxes
while [ "$(systemctl is-active msbd)" = deactivating ]; do sleep 0.2; done
[ "$(systemctl is-active msbd)" = inactive ] # it ended as it should: no reason to start it again
never pgrep -f /usr/bin/qemu-system-x86_64
group=/sys/fs/cgroup$(systemctl show -P ControlGroup msbd)
[ "$group" = /sys/fs/cgroup ] || [ ! -e "$group" ] || never grep . "$group/cgroup.procs"

step "uninstall"
systemctl disable --quiet msbd
make uninstall
systemctl daemon-reload
never systemctl cat msbd
step "done"
