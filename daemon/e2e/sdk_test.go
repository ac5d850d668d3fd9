package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestPythonSDK runs the Python SDK's own tests against a real server. It also runs a program that was written for the
// original SDK, first with the original and then with this SDK in its place.
func TestPythonSDK(t *testing.T) {
	parallel(t)
	s, key := sharedServer(t)
	checkSDK(t, s, key, "python", "live", "original")
}

// TestTypeScriptSDK runs the TypeScript SDK's own tests against a real server. It does not share the server with
// TestPythonSDK, because both run the examples of a README, which use the same names of sandboxes.
func TestTypeScriptSDK(t *testing.T) {
	parallel(t)
	s, key := pythonServer(t)
	checkSDK(t, s, key, "typescript", "live")
}

// checkSDK runs suites of an SDK's check.sh against a server.
func checkSDK(t *testing.T, s *server, key, language string, suites ...string) {
	t.Helper()
	if err := s.importImages("python", "node"); err != nil {
		t.Fatal(err)
	}
	for _, suite := range suites {
		cmd := exec.Command(filepath.Join(root, "client", language, "check.sh"), suite)
		cmd.Env = append(os.Environ(), "MSB_SERVER_URL=http://"+s.address, "MSB_API_KEY="+key)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", suite, err, out)
		}
		t.Log(strings.TrimSpace(string(out)))
	}
}
