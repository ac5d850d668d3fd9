#!/bin/sh
# Succeeds if the KVM of this host is usable. Checking the device is not enough, because an emulated /dev/kvm may open
# and still be unusable. The flags of the processor show that.
[ -w /dev/kvm ] && [ -e /dev/vhost-vsock ] && grep -qwE 'svm|vmx' /proc/cpuinfo
