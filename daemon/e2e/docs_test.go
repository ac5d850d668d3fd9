package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var bashBlock = regexp.MustCompile("(?ms)^```bash\n(.*?)^```")

// TestDocs runs every bash block of the docs and the README in order, each file against a server of
// its own. Blocks that a test cannot run, such as those that need systemd or a fresh host, are marked sh;
// CI runs the two of the README by itself.
func TestDocs(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	blocks := 0
	for _, file := range append(files, filepath.Join(root, "README.md")) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		script := "set -euo pipefail\n"
		found := bashBlock.FindAllStringSubmatch(string(text), -1)
		for _, m := range found {
			script += m[1]
		}
		if blocks += len(found); len(found) == 0 {
			continue
		}
		t.Run(filepath.Base(file), func(t *testing.T) {
			s := testServer(t)
			if err := s.importImages("python", "node"); err != nil {
				t.Fatal(err)
			}
			key := s.key(t)
			// The docs speak of the default address and of your key.
			script := strings.NewReplacer("127.0.0.1:5555", s.address, "your-api-key-here", key).Replace(script)
			cmd := exec.Command("bash", "-c", script)
			cmd.Dir = t.TempDir()
			cmd.Env = append(s.env(), "MSB_API_KEY="+key, "MSB_SERVER_URL=http://"+s.address,
				"MSBD_STATE_DIR="+s.state(), "MSBD_RUN_DIR="+s.runDir)
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Errorf("%v\n%s", err, out)
			}
			// To curl without -f, an error is an answer.
			if i := strings.Index(string(out), `"error":`); i >= 0 {
				t.Errorf("a request failed: %s", out[i:])
			}
		})
	}
	if blocks < 10 {
		t.Errorf("found %d blocks only: is the pattern right?", blocks)
	}
}
