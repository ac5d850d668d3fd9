#!/bin/bash
# Runs Python in a microVM with the built programs: starts the server detached, imports two images, creates an API
# key, starts the sandbox "quickstart" and runs Python in it. Steps that are already done are skipped, so the script
# can be run again at any time. `make quickstart` builds the programs first.
set -euo pipefail

cd -- "$(dirname -- "$0")/../.."
msb=bin/msb

if [ "$(id -u)" != 0 ]; then
	echo "quickstart.sh: run as root, because microVMs need their own mounts, namespaces and cgroups" >&2
	exit 1
fi

step() { printf '\n==> %s\n' "$*"; }

# field NAME prints the first string field with that name in the JSON on stdin.
field() { grep -o "\"$1\": *\"[^\"]*\"" | head -n 1 | sed 's/^[^:]*: *"//; s/"$//'; }

step "The server"
# If the server is already running, this has no effect.
$msb server start --detach
for _ in {1..300}; do
	$msb server status >/dev/null && break
	sleep 0.2
done
$msb server status
address=$($msb server status --json | field listen_address)

step "Images"
present=$($msb image list --json)
for image in python node; do
	digest=$(tar -xOf "bin/images/$image.tar" index.json | field digest)
	if grep -q "$digest" <<<"$present"; then
		echo "microsandbox/$image is already imported."
	else
		$msb image import "bin/images/$image.tar"
	fi
done

step "An API key, a sandbox, Python"
# The key is only for this run, at the end of which it is revoked. curl reads it from stdin, because every user can read
# arguments.
created=$($msb server keygen --name quickstart --expire 1h --json 2>/dev/null)
key=$(field key <<<"$created")
id=$(field id <<<"$created")
trap '$msb server key revoke --yes "$id" 2>/dev/null || true' EXIT

rpc() {
	curl --silent --show-error --fail-with-body --max-time 180 "http://$address/api/v1/rpc" \
		--header "Content-Type: application/json" --header @- --data "$1" <<<"Authorization: Bearer $key" || {
		echo >&2
		echo "quickstart.sh: the server refused the request $1" >&2
		exit 1
	}
}

echo "Starting the sandbox \"quickstart\" (takes a few seconds if microVMs are emulated)"
began=$SECONDS
rpc '{"jsonrpc":"2.0","id":1,"method":"sandbox.start","params":{"sandbox":"quickstart"}}' | field result
answer=$(rpc '{"jsonrpc":"2.0","id":2,"method":"sandbox.repl.run","params":{"sandbox":"quickstart","language":"python","code":"import platform; print(platform.release())"}}')
guest=$(field text <<<"$answer")
if [ -z "$guest" ]; then
	echo "quickstart.sh: Python printed nothing; the response is $answer" >&2
	exit 1
fi
cat <<END
Python printed this $((SECONDS - began)) s after the start request:

  kernel of the sandbox  $guest
  kernel of this host    $(uname -r)

The server keeps running at http://$address. Try next:

  export PATH="$PWD/bin:\$PATH"
  export MSB_API_KEY="\$(msb server keygen --expire 1d)"

  curl -X POST http://$address/api/v1/rpc \\
    -H "Content-Type: application/json" \\
    -H "Authorization: Bearer \$MSB_API_KEY" \\
    -d '{"jsonrpc": "2.0", "id": "1", "method": "sandbox.repl.run",
         "params": {"sandbox": "quickstart", "language": "python", "code": "6 * 7"}}'

The image microsandbox/code-interpreter has Python with numpy, pandas and matplotlib, and Node.js. To add it:

  make images                   # takes a few minutes
  msb image import bin/images/code-interpreter.tar

Manage the server:

  msb server status
  msb server list
  msb server stop               # sandboxes keep running; add --sandboxes to stop them
  make clean-host               # reverts all of this
END
