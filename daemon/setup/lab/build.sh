#!/bin/bash
# Builds the lab's initrd and kernel modules from the Debian package of the guest kernel and Debian's static busybox.
# The lab boots the guest kernel with them:
#
#   build.sh KERNEL_DEB OUT
#
# OUT/lib/modules contains all modules of the kernel; OUT/initrd.img contains those needed to mount the root.
set -euo pipefail

deb=${1:?usage: build.sh KERNEL_DEB OUT}
out=${2:?usage: build.sh KERNEL_DEB OUT}
here=$(cd -- "$(dirname -- "$0")" && pwd)
initrd=$(mktemp -d)
trap 'rm -rf -- "$initrd"' EXIT

rm -rf -- "${out:?}/lib" "$out/initrd.img"
mkdir -p -- "$out"
dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$out" ./lib/modules
modules=$(echo "$out"/lib/modules/*)
busybox depmod -b "$out" "${modules##*/}"

# A line of modules.dep contains a module and all the modules that it needs.
needed=$(grep -E '/(virtio_pci|virtiofs|overlay)\.ko:' "$modules/modules.dep" | tr -d : | tr ' ' '\n' | sort -u)
install -d -- "$initrd/lib/modules/${modules##*/}"
# shellcheck disable=SC2086 # a list of files
(cd -- "$modules" && cp --parents -- modules.dep $needed "$initrd/lib/modules/${modules##*/}")
install -D -t "$initrd/bin" "$(command -v busybox)"
install "$here/init" "$initrd/init"
(cd -- "$initrd" && find . | busybox cpio -o -H newc 2>/dev/null) >"$out/initrd.img.new"
mv -- "$out/initrd.img.new" "$out/initrd.img"
