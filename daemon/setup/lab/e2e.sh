#!/bin/bash
# Runs the end-to-end tests whose names match PATTERN on KVM, once with each HYPERVISOR (kata, builtin), and prints their
# events in the format that gotestsum reads. The output is also written to bin/lab/HYPERVISOR.log as it arrives.
#
#   e2e.sh PATTERN HYPERVISOR…
set -euo pipefail

pattern=${1:?usage: e2e.sh PATTERN HYPERVISOR…}
shift
hypervisors=("${@:?usage: e2e.sh PATTERN HYPERVISOR…}")
# Seconds for each hypervisor. The time limit of go test is shorter, because its message shows where a test hangs.
export LAB_TIMEOUT=${LAB_TIMEOUT:-14400}

cd -- "$(dirname -- "$0")/../../e2e"
# On a signal, kill run.sh; the other commands of its pipe then end by themselves.
trap 'kill $(jobs -p); wait; exit 130' HUP INT TERM
events=$(mktemp -d)
trap 'rm -rf -- "$events"' EXIT
# Run the labs in parallel, because each has one processor. Tests on the host itself cannot run in parallel. The events
# of the first hypervisor are printed before those of the second.
declare -A pids
for hypervisor in "${hypervisors[@]}"; do
	MSB_E2E_HYPERVISOR=$hypervisor ../setup/lab/run.sh ../../bin/lab/e2e.test -test.v=test2json -test.run "$pattern" \
		-test.timeout "$((LAB_TIMEOUT - 60))s" 2>&1 |
		tee "../../bin/lab/$hypervisor.log" |
		go tool test2json -t -p "daemon/e2e/$hypervisor" >"$events/$hypervisor" &
	pids[$hypervisor]=$!
	if ../setup/lab/kvm.sh; then
		tail --pid="$!" -f /dev/null &
		wait $!
	fi
done
code=0
for hypervisor in "${hypervisors[@]}"; do
	tail -n +1 -s 0.5 --pid="${pids[$hypervisor]}" -f "$events/$hypervisor" &
	wait $!
	wait "${pids[$hypervisor]}" || code=$?
done
exit "$code"
