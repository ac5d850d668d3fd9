package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var docsBlock = regexp.MustCompile("(?ms)^```(bash|python|typescript)\n(.*?)^```")

// TestDocs runs every block of the docs and the README, each file against a server of its own: each program
// in Python and TypeScript by itself, then those in bash in order, as one script. Blocks that cannot run like that, such as those that need systemd or a fresh host, are marked sh:
// TestService runs the former, CI the two of the README.
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
		var programs []program
		found := docsBlock.FindAllStringSubmatch(string(text), -1)
		for _, m := range found {
			if m[1] == "bash" {
				script += m[2]
			} else {
				programs = append(programs, program{m[1], m[2]})
			}
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
			here := strings.NewReplacer("127.0.0.1:5555", s.address, "your-api-key-here", key)
			env := []string{"MSB_API_KEY=" + key, "MSB_SERVER_URL=http://" + s.address}
			for _, p := range programs {
				p.text = here.Replace(p.text)
				p.run(t, env)
			}
			cmd := exec.Command("bash", "-c", here.Replace(script))
			cmd.Dir = t.TempDir()
			cmd.Env = append(append(s.env(), env...), "MSBD_STATE_DIR="+s.state(), "MSBD_RUN_DIR="+s.runDir)
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Errorf("%v\n%s", err, out)
			}
			// To curl without -f, an error is an answer.
			for _, sign := range []string{`"error":`, `"isError":true`} {
				if i := strings.Index(string(out), sign); i >= 0 {
					t.Errorf("a request failed: %s", out[i:])
				}
			}
		})
	}
	if blocks < 10 {
		t.Errorf("found %d blocks only: is the pattern right?", blocks)
	}
}

// program is a block in the language of an SDK.
type program struct{ language, text string }

// run runs it with the SDK of this checkout.
func (p program) run(t *testing.T, env []string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(file, []byte(p.text), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"run", file}
	if p.language == "python" {
		args = []string{"run", filepath.Join(root, "daemon", "e2e", "testdata", "docs", "run.py"), file}
	}
	cmd := exec.Command(filepath.Join(root, "client", p.language, "check.sh"), args...)
	cmd.Dir, cmd.Env = t.TempDir(), append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s\n%s", err, p.text, out)
	}
}
