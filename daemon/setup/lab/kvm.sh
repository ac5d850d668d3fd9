#!/bin/sh
# Succeeds where this host's own KVM is usable. Not by the device alone: an emulated /dev/kvm may open, and be of no
# use; a processor's flag tells.
[ -w /dev/kvm ] && [ -e /dev/vhost-vsock ] && grep -qwE 'svm|vmx' /proc/cpuinfo
