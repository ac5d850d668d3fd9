#!/bin/bash
# Runs the end-to-end tests whose names match PATTERN on KVM, once with each hypervisor, and prints their events,
# as gotestsum reads them. bin/lab/HYPERVISOR.log gets the output as it comes.
#
#   e2e.sh PATTERN
set -euo pipefail

pattern=${1:?usage: e2e.sh PATTERN}
# Seconds for each hypervisor. Go's own limit comes first, and says where the tests hang.
export LAB_TIMEOUT=${LAB_TIMEOUT:-14400}

cd -- "$(dirname -- "$0")/../../e2e"
# With run.sh the whole pipe ends.
trap 'kill $(jobs -p); wait; exit 130' HUP INT TERM
events=$(mktemp -d)
trap 'rm -rf -- "$events"' EXIT
# Labs side by side, for each has one processor, but not tests of one host. The events of one come after those of the other.
declare -A pids
for hypervisor in kata builtin; do
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
for hypervisor in kata builtin; do
	tail -n +1 -s 0.5 --pid="${pids[$hypervisor]}" -f "$events/$hypervisor" &
	wait $!
	wait "${pids[$hypervisor]}" || code=$?
done
exit "$code"
