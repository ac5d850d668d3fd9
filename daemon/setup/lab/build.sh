#!/bin/bash
# Makes what the lab boots beside the guest's kernel, from that kernel's Debian package and Debian's static
# busybox:
#
#   build.sh KERNEL_DEB OUT
#
# OUT/lib/modules are the kernel's modules; OUT/initrd.img holds those that it takes to mount the root.
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

# A line of modules.dep names a module and all that it needs.
needed=$(grep -E '/(virtio_pci|virtiofs|overlay)\.ko:' "$modules/modules.dep" | tr -d : | tr ' ' '\n' | sort -u)
install -d -- "$initrd/lib/modules/${modules##*/}"
# shellcheck disable=SC2086 # a list of files
(cd -- "$modules" && cp --parents -- modules.dep $needed "$initrd/lib/modules/${modules##*/}")
install -D -t "$initrd/bin" "$(command -v busybox)"
install "$here/init" "$initrd/init"
(cd -- "$initrd" && find . | busybox cpio -o -H newc 2>/dev/null) >"$out/initrd.img.new"
mv -- "$out/initrd.img.new" "$out/initrd.img"
