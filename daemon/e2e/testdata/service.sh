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

# busybox_image prints an image named microsandbox/python that has only busybox, because the lab needs a minute to import the
# real one.
busybox_image() {
	local dir blobs layer config manifest
	dir=$(mktemp -d)
	blobs=$dir/blobs/sha256
	mkdir -p "$blobs" "$dir/root/bin" "$dir/root/root"
	cp /bin/busybox "$dir/root/bin"
	ln -s busybox "$dir/root/bin/sh"
	# blob stores standard input under its digest, and prints the JSON that refers to it: blob TYPE.
	blob() {
		cat >"$dir/blob"
		set -- "$1" "$(sha256sum "$dir/blob" | cut -d ' ' -f 1)" "$(stat -c %s "$dir/blob")"
		mv "$dir/blob" "$blobs/$2"
		printf '{"mediaType":"application/vnd.oci.image.%s","digest":"sha256:%s","size":%d}' "$1" "$2" "$3"
	}
	layer=$(tar -C "$dir/root" -c . | blob layer.v1.tar)
	config=$(printf '{"architecture":"amd64","os":"linux","config":{"Env":["PATH=/bin"]},"rootfs":{"type":"layers","diff_ids":["%s"]}}' \
		"$(grep -o 'sha256:[0-9a-f]*' <<<"$layer")" | blob config.v1+json)
	manifest=$(printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":%s,"layers":[%s]}' "$config" "$layer" |
		blob manifest.v1+json)
	printf '{"imageLayoutVersion":"1.0.0"}' >"$dir/oci-layout"
	printf '{"schemaVersion":2,"manifests":[%s]}' "${manifest%\}},\"annotations\":{\"io.containerd.image.name\":\"docker.io/microsandbox/python:latest\"}}" \
		>"$dir/index.json"
	tar -C "$dir" -c oci-layout index.json blobs
	rm -r "$dir"
}

step "install"
# The images need overlayfs, which cannot use a directory on another overlayfs.
mkdir -p /var/lib/msb
mount -t tmpfs state /var/lib/msb
cd "$checkout"
install -d /etc/msb
printf 'hypervisor = "kata"\naccelerator = "kvm"\npool_min = 0\n' >/etc/msb/msbd.toml
busybox_image >/tmp/python.tar
export MAKEFLAGS=IMAGES=/tmp/python.tar # install this image instead of the real ones
documented 'systemctl enable --now msbd' | grep -v 'make deps' >/tmp/install # it is already built
. /tmp/install
systemd-analyze verify msbd.service msbd.socket
systemctl is-active msbd
msb server status | grep -i isolation
[ "$(stat -c '%a %G' /run/msb/msbd.sock)" = "660 root" ]

step "import an image"
documented 'msb image import /usr/local/libexec/msb/images/python.tar' | head -n 1 >/tmp/import # only the first of the images
. /tmp/import

step "start a sandbox"
MSB_API_KEY=$(msb server keygen --expire 1h --quiet)
export MSB_API_KEY
msb sandbox start box >/dev/null
uses=0
# used fails unless this is the sandbox that was started, and it remembers how often it was used.
used() {
	uses=$((uses + 1))
	[ "$(msb exec box -- sh -c 'echo >>/dev/shm/uses; wc -l </dev/shm/uses')" = "$uses" ]
}
used
# When memory runs out, the kernel kills sandboxes before the daemon.
[ "$(cat "/proc/$(systemctl show -P MainPID msbd)/oom_score_adj")" = -500 ]
for pid in $(pgrep -f /usr/bin/qemu-system-x86_64); do
	[ "$(cat "/proc/$pid/oom_score_adj")" -ge 0 ]
done

step "upgrade"
documented 'git pull' | grep -vE 'git pull|make deps|msb image import' >/tmp/upgrade # the programs and images are the same
. /tmp/upgrade
used

step "create the group"
useradd alice
documented 'groupadd --system msb' >/tmp/group
. /tmp/group
used
[ "$(stat -c '%a %G' /run/msb /run/msb/msbd.sock | paste -sd ' ')" = "750 msb 660 msb" ]

step "kill the daemon"
pid=$(systemctl show -P MainPID msbd)
kill -KILL "$pid"
until [ "$(systemctl show -P MainPID msbd)" != "$pid" ] && systemctl is-active --quiet msbd; do sleep 0.2; done
wait_ready
used

step "socket activation"
systemctl stop msbd
documented 'systemctl enable --now msbd.socket' >/tmp/socket
. /tmp/socket
[ "$(stat -c '%a %G' /run/msb/msbd.sock)" = "600 root" ]
fails systemctl is-active --quiet msbd
wait_ready # the first call starts the daemon
used
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
