#!/bin/sh
# Kata's shim and msbd speak to the virtiofsd in Rust. This one, installed as msb-virtiofsd, says the same to the one in
# C that came with QEMU up to 7.2, and gives way to it:
#
#   msb-virtiofsd --daemon=PATH [--syslog] [--cache=MODE] [--log-level=LEVEL] [--sandbox=namespace] [--announce-submounts]
#       --shared-dir=DIR --fd=N
set -eu

daemon=
for argument; do
	shift
	case $argument in
	--fd=*) ;;
	--syslog) [ -S /dev/log ] || continue ;; # its seccomp filter would end it when it found none to speak to
	--daemon=*) daemon=${argument#*=} && continue ;;
	--shared-dir=*) argument=source=${argument#*=} ;;
	--cache=never) argument=cache=none ;;
	--cache=auto | --cache=metadata) argument=cache=auto ;;
	--cache=always) argument=cache=always ;;
	--sandbox=namespace) argument=sandbox=namespace ;;
	--announce-submounts) argument=announce_submounts ;;
	--log-level=error) argument=log_level=err ;;
	--log-level=warn | --log-level=info | --log-level=debug) argument=log_level=${argument#*=} ;;
	*)
		echo "msb-virtiofsd: no such option of the virtiofsd in C: $argument" >&2
		exit 2
		;;
	esac
	case $argument in
	--*) set -- "$@" "$argument" ;;
	*) set -- "$@" -o "$argument" ;;
	esac
done
exec "${daemon:?}" "$@"
