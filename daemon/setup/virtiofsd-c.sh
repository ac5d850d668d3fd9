#!/bin/sh
# Kata's shim and msbd pass the options of the virtiofsd written in Rust. This wrapper, installed as msb-virtiofsd,
# translates them to those of the virtiofsd written in C, which QEMU included up to 7.2, and executes it:
#
#   msb-virtiofsd --daemon=PATH [--syslog] [--cache=MODE] [--log-level=LEVEL] [--sandbox=namespace] [--announce-submounts]
#       --shared-dir=DIR --fd=N
set -eu

daemon=
for argument; do
	shift
	case $argument in
	--fd=*) ;;
	--syslog) [ -S /dev/log ] || continue ;; # without a syslog socket, the seccomp filter of virtiofsd would kill it
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
		echo "msb-virtiofsd: the virtiofsd in C has no option $argument" >&2
		exit 2
		;;
	esac
	case $argument in
	--*) set -- "$@" "$argument" ;;
	*) set -- "$@" -o "$argument" ;;
	esac
done
exec "${daemon:?}" "$@"
