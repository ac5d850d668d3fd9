#!/bin/bash
# From built programs to Python's answer out of a microVM: starts the server detached, imports the
# images, makes a key, starts the sandbox "quickstart" and runs Python in it. What is done already is
# left as it is, so it can be run again at any time. `make quickstart` builds first.
set -euo pipefail

cd -- "$(dirname -- "$0")/../.."
msb=bin/msb

if [ "$(id -u)" != 0 ]; then
	echo "quickstart.sh: run as root: microVMs need mounts, namespaces and cgroups of their own" >&2
	exit 1
fi

step() { printf '\n==> %s\n' "$*"; }

# field NAME prints the first string of that name in JSON on stdin.
field() { grep -o "\"$1\": *\"[^\"]*\"" | head -n 1 | sed 's/^[^:]*: *"//; s/"$//'; }

step "The server"
# Leaves one that runs already as it is.
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
		echo "microsandbox/$image is there already."
	else
		$msb image import "bin/images/$image.tar"
	fi
done

step "A key, a sandbox, Python"
# For this run alone. It reaches curl on stdin, since arguments can be read by every user.
key=$($msb server keygen --expire 1h 2>/dev/null)

rpc() {
	curl --silent --show-error --fail-with-body --max-time 180 "http://$address/api/v1/rpc" \
		--header "Content-Type: application/json" --header @- --data "$1" <<<"Authorization: Bearer $key" || {
		echo >&2
		echo "quickstart.sh: the server refused this: $1" >&2
		exit 1
	}
}

echo "Starting the sandbox \"quickstart\" (some seconds where microVMs are emulated)"
began=$SECONDS
rpc '{"jsonrpc":"2.0","id":1,"method":"sandbox.start","params":{"sandbox":"quickstart"}}' | field result
answer=$(rpc '{"jsonrpc":"2.0","id":2,"method":"sandbox.repl.run","params":{"sandbox":"quickstart","language":"python","code":"import platform; print(platform.release())"}}')
guest=$(field text <<<"$answer")
if [ -z "$guest" ]; then
	echo "quickstart.sh: Python did not answer: $answer" >&2
	exit 1
fi
cat <<END
Python's answer, $((SECONDS - began)) s after the request to start:

  the sandbox's kernel  $guest
  this host's kernel    $(uname -r)

The server runs on at http://$address. Try next:

  export PATH="$PWD/bin:\$PATH"
  export MSB_API_KEY="\$(msb server keygen --expire 1d)"

  curl -X POST http://$address/api/v1/rpc \\
    -H "Content-Type: application/json" \\
    -H "Authorization: Bearer \$MSB_API_KEY" \\
    -d '{"jsonrpc": "2.0", "id": "1", "method": "sandbox.repl.run",
         "params": {"sandbox": "quickstart", "language": "python", "code": "6 * 7"}}'

  msb server status
  msb server list
  msb server stop               # sandboxes run on; --sandboxes stops them, too
  make clean-host               # undoes all of this
END
