package daemon

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// The check.sh of an SDK that gets no mode, or an unknown one, prints how to use it. It installs nothing.
func TestCheckScriptsPrintUsage(t *testing.T) {
	for _, sdk := range []string{"python", "typescript"} {
		for _, arguments := range []string{"", "nonsense"} {
			dir := filepath.Join(t.TempDir(), "client", sdk)
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			// In this directory, there is nothing that could be installed.
			if err := os.WriteFile(filepath.Join(dir, "check.sh"), []byte(readFile(t, filepath.Join("..", "client", sdk, "check.sh"))), 0o700); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command("bash", append([]string{filepath.Join(sdk, "check.sh")}, strings.Fields(arguments)...)...)
			cmd.Dir = filepath.Dir(dir) // the path of the script is relative, as in the documentation
			cmd.Env = []string{"PATH=/usr/bin:/bin", "HOME=" + dir}
			out, err := cmd.CombinedOutput()
			if cmd.ProcessState.ExitCode() != 2 || !strings.Contains(string(out), "check.sh unit") {
				t.Errorf("client/%s/check.sh %s: error %v, want exit code 2 and how to use it:\n%s", sdk, arguments, err, out)
			}
			if installed, _ := filepath.Glob(filepath.Join(dir, "..", "..", "*", "*")); len(installed) != 1 {
				t.Errorf("client/%s/check.sh %s left %q", sdk, arguments, installed)
			}
		}
	}
}
