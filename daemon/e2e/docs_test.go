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

// TestDocs runs every block of the docs and the README: each program in Python and TypeScript by itself, then those in
// bash in order, as one script. All pages use one server; each finds it running, without a sandbox and without a live
// key but its own. Blocks that cannot run like that, such as those that need systemd or a fresh host, are marked sh:
// TestService runs the former, CI the two of the README.
func TestDocs(t *testing.T) {
	parallel(t)
	files, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	s := testServer(t)
	if err := s.importImages("python", "node"); err != nil {
		t.Fatal(err)
	}
	blocks := 0
	for _, file := range append(files, filepath.Join(root, "README.md")) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		found := docsBlock.FindAllStringSubmatch(string(text), -1)
		if blocks += len(found); len(found) > 0 {
			t.Run(filepath.Base(file), func(t *testing.T) { s.runBlocks(t, found) })
		}
	}
	if blocks < 10 {
		t.Errorf("found %d blocks only: is the pattern right?", blocks)
	}
}

// runBlocks runs the blocks of one page.
func (s *server) runBlocks(t *testing.T, blocks [][]string) {
	t.Helper()
	select {
	case <-s.done: // the page before stopped the server
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
	default:
	}
	for _, b := range s.list() {
		if err := s.admin(t).StopSandbox(t.Context(), b.GetNamespace(), b.GetName()); err != nil {
			t.Fatal(err)
		}
	}
	s.mustMSB(t, "server", "reset", "--yes")
	key := s.newKey(t)
	// The docs use the default address and a placeholder for the key.
	fill := strings.NewReplacer("127.0.0.1:5555", s.address, "your-api-key-here", key)
	env := []string{"MSB_API_KEY=" + key, "MSB_SERVER_URL=http://" + s.address}
	script := "set -euo pipefail\n"
	for _, block := range blocks {
		language, text := block[1], fill.Replace(block[2])
		if language == "bash" {
			script += text
		} else {
			program{language, text}.run(t, env)
		}
	}
	cmd := exec.Command("bash", "-c", script)
	cmd.Dir = t.TempDir()
	cmd.Env = append(append(s.env(), env...), "MSBD_STATE_DIR="+s.state(), "MSBD_RUN_DIR="+s.runDir)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	// curl without -f exits with 0 when the server answers with an error.
	for _, sign := range []string{`"error":`, `"isError":true`} {
		if i := strings.Index(string(out), sign); i >= 0 {
			t.Errorf("a request failed: %s", out[i:])
		}
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
