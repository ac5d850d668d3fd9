# The Bash REPL of msb-portal. The portal starts "bash --norc --noprofile --noediting -i" without a terminal and writes to its
# descriptor 0, as if it typed: first this file, then "__msb_ready" with the token of the session, then these lines for each run:
#
#	if __msb_go;then \. /proc/self/fd/506 <&500 >&501 2>&502;else \. /proc/self/fd/506 <&500 >&501 2>&502;fi;__msb_end
#	__msb_int
#	__msb_int
#
# Only an interactive shell returns to its top level from any code at SIGINT, with all its state. It then reads the second line,
# which ends an interrupted run. The third is for a signal that arrives while Bash reads the second.
#
# The code runs at the top level and not in a function, where the effects of declare and set -- would not last. It is sourced from
# a file and not evaluated, so that return works, LINENO counts from the first line of the code, and Bash prints no job numbers.
# The condition of "if" returns the exit code of the previous run, so that $? has this value in the code. Both branches are equal.
# At the end of the code Bash restores its descriptors 0 to 2, even if the code has changed them with exec.
#
# The descriptors at the start:
#	0	a socket with the lines
#	1, 2	/dev/null, for prompts and for the newline that Bash prints after an interrupt
#	3	a SOCK_SEQPACKET socket for messages: the token of the run or session, a byte for the type, data
#	4	a memfd with the options of the run: token, working directory or nothing, NAME=value…; a NUL follows each
#	5	a memfd with the code of the run
#	6, 7, 8	the standard descriptors of the code
#
# A token is letters and digits. The messages are "r": the session is ready, "b": the run has begun and SIGINT interrupts it,
# and ".": the run has ended with the exit code that follows as a byte. The portal sends SIGINT only after "b" and until it has
# received ".", because Bash would not survive a signal just before "b".
#
# The code of the runs shares this shell. So this file calls builtins with "builtin", which functions and aliases do not replace,
# and quotes every expansion. Except in conditions, no command here fails, because with set -e that would end the shell.

# An interactive shell would record lines in a history and replace ! in them.
set +H +o history
shopt -u checkwinsize
unset -v MAILCHECK

# Move the descriptors out of the reach of code that closes all descriptors that programs usually have. Programs must not
# inherit them, but Bash has no command that sets FD_CLOEXEC. While a redirection is in effect, Bash keeps the original
# descriptor as number 10 with this flag, and a copy of 10 has the same flag.
{ exec 504>&10; } 3>&-
{ exec 505<&10; } 4<&-
{ exec 506<&10; } 5<&-
{ exec 500<&10; } 6<&-
{ exec 501>&10; } 7>&-
{ exec 502>&10; } 8>&-
exec 3>&- 4<&- 5<&- 6<&- 7>&- 8>&-

# The state is in arrays, because Bash does not export them, even after set -a.
declare -A __msb=([token]= [last]=0 [exit]= [undo]= [directory]=)
__msb_options=()

# Sends the message that the session is ready.
__msb_ready() {
	builtin trap '' INT
	builtin printf %sr "$1" >&504
}

# Prepares a run and returns the exit code of the previous one.
__msb_go() {
	builtin local __msb_entry __msb_name
	builtin mapfile -d '' -t -u 505 __msb_options
	__msb[token]=${__msb_options[0]}
	# After set -e, a command that fails ends the shell. Before that, Bash runs this trap, which ends the run.
	builtin set -E
	builtin trap __msb_error ERR
	builtin trap - INT
	builtin printf %sb "${__msb[token]}" >&504
	if [[ ${__msb_options[1]} ]]; then
		__msb[directory]=$PWD
		builtin cd -- "${__msb_options[1]}" 2>&502 || __msb_abort 1
	fi
	for __msb_entry in "${__msb_options[@]:2}"; do
		__msb_name=${__msb_entry%%=*}
		if [[ $__msb_name == *[!a-zA-Z0-9_]* ]]; then
			: # export reports an error
		elif [[ ! -v $__msb_name ]]; then
			__msb[undo]="builtin unset -v $__msb_name;${__msb[undo]}"
		elif [[ ${!__msb_name@a} == *x* ]]; then
			__msb[undo]="builtin export $__msb_name=${!__msb_name@Q};${__msb[undo]}"
		else
			__msb[undo]="builtin export -n $__msb_name=${!__msb_name@Q};${__msb[undo]}"
		fi
		builtin export "$__msb_entry" 2>&502 || __msb_abort 1
	done
	builtin return "${__msb[last]}"
}

# Ends the run with the exit code of the code.
__msb_end() {
	__msb[last]=$?
	__msb_finish
}

# Ends the run if it has not ended, because it was interrupted or aborted.
__msb_int() {
	builtin trap '' INT
	if [[ ${__msb[token]} ]]; then
		__msb[last]=${__msb[exit]:-130}
		__msb_finish
	fi
}

__msb_finish() {
	builtin trap '' INT
	builtin trap - ERR
	builtin set +e # or a syntax error in a later run would end the shell
	# The code may have disabled these.
	builtin enable cd eval export kill local mapfile printf return set trap unset
	builtin eval "${__msb[undo]}" || :
	if [[ ${__msb[directory]} ]]; then
		builtin cd -- "${__msb[directory]}" 2>&502 || :
	fi
	builtin unset -v TMOUT || : # it would end the shell while it waits for a run
	builtin local __msb_message
	builtin printf -v __msb_message '%s.\\x%x' "${__msb[token]}" "${__msb[last]}"
	__msb[token]= __msb[exit]= __msb[undo]= __msb[directory]=
	builtin printf "$__msb_message" >&504
}

# Ends the run with an exit code from anywhere in it, as an interrupt does.
__msb_abort() {
	__msb[exit]=$1
	# The code may have set a trap. In Bash 4, SIGINT would end the shell after this command.
	[[ $BASH_VERSION == 4.* ]] || builtin trap - INT
	builtin kill -INT "$$"
}

__msb_error() {
	builtin local __msb_status=$?
	if [[ $- == *e* && $BASHPID == "$$" ]]; then
		__msb_abort "$__msb_status"
	fi
}

__msb_number() {
	builtin return "$@"
}

# Ends a run, or a subshell, but not the session.
exit() {
	builtin set -- "${@-$?}"
	if [[ $BASHPID != "$$" || ! ${__msb[token]} ]]; then
		builtin exit "$@"
	fi
	if __msb_number "$@"; then
		__msb_abort 0
	else
		__msb_abort "$?"
	fi
}

if [[ $BASH_VERSION == 5.3.* ]]; then
	# Waits for background jobs. In Bash 5.3, SIGINT during the builtin ends a shell that sources a file, unless it is trapped.
	wait() {
		builtin local __msb_status=0
		if [[ $BASHPID != "$$" || ! ${__msb[token]} ]]; then
			builtin wait "$@"
			builtin return
		fi
		builtin trap '__msb[exit]=130' INT
		builtin wait "$@" || __msb_status=$?
		builtin trap - INT
		if [[ ${__msb[exit]} ]]; then
			__msb_abort 130
		fi
		builtin return "$__msb_status"
	}
fi
