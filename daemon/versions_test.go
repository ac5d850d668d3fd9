package daemon

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/msbd/msbd/api/version"
)

// Every place that has the version of an SDK has the version of the release.
func TestSDKVersions(t *testing.T) {
	for file, pattern := range map[string]string{
		"python/src/microsandbox/__init__.py": `(?m)^__version__ = "(.*)"$`,
		"typescript/src/version.ts":           `(?m)^export const version = "(.*)";$`,
		"typescript/package.json":             `(?m)^  "version": "(.*)",$`,
		"typescript/package-lock.json":        `"name": "microsandbox",\n +"version": "(.*)",`,
		"typescript/README.md":                `microsandbox-(.*)\.tgz`,
	} {
		content, err := os.ReadFile(filepath.Join("../client", file))
		if err != nil {
			t.Fatal(err)
		}
		found := regexp.MustCompile(pattern).FindAllSubmatch(content, -1)
		if len(found) == 0 {
			t.Errorf("client/%s has no version that matches %s", file, pattern)
		}
		for _, match := range found {
			if got := string(match[1]); got != version.Number {
				t.Errorf("client/%s has version %s, and api/version has %s", file, got, version.Number)
			}
		}
	}
}

// Libraries must be at least as new as the first versions without known vulnerabilities that would affect msbd.
func TestLibraryVersions(t *testing.T) {
	for module, oldest := range map[string]string{
		"google.golang.org/grpc":                 "v1.79.3",
		"github.com/modelcontextprotocol/go-sdk": "v1.4.1",
		"github.com/containerd/containerd":       "v1.7.33",
	} {
		out, err := exec.Command("go", "list", "-m", "-f", "{{.Version}}", module).Output()
		if err != nil {
			t.Fatalf("go list -m %s: %v", module, err)
		}
		version := strings.TrimSpace(string(out))
		if parse(t, version) < parse(t, oldest) {
			t.Errorf("%s is %s; use %s or newer", module, version, oldest)
		}
	}
}

// parse converts a released version to a number that compares like the version.
func parse(t *testing.T, version string) (n int) {
	t.Helper()
	var major, minor, patch int
	if _, err := fmt.Sscanf(version, "v%d.%d.%d", &major, &minor, &patch); err != nil || strings.Contains(version, "-") {
		t.Fatalf("%s is not a released version", version)
	}
	return (major*10000+minor)*10000 + patch
}
