package e2e

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestIndependentJSONRPCClients calls a real sandbox with JSON-RPC clients of other projects, at the versions in
// testdata/jsonrpc. Each script exits with an error at the first wrong response.
func TestIndependentJSONRPCClients(t *testing.T) {
	parallel(t)
	s, key := startSandbox(t, "conform", "microsandbox/python")
	dir, python, node := clientTools(t, "jsonrpc")
	env := []string{"MSB_SERVER_URL=http://" + s.address, "MSB_API_KEY=" + key, "LIMITED_KEY=" + s.newKey(t, "--namespace", "project-web"), "SANDBOX=conform"}
	for _, client := range [][]string{
		{python, "pjrpc_client.py"},
		{python, "jsonrpcclient_client.py"},
		{node, "jayson_client.js"},
		{node, "openrpc_document.js"},
	} {
		cmd := exec.Command(client[0], client[1:]...)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), env...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", client[1], err, out)
		}
		t.Log(strings.TrimSpace(string(out)))
	}
}
