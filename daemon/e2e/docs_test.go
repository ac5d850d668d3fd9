package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// docsBlock matches a code block that TestDocs runs.
var docsBlock = regexp.MustCompile("(?ms)^```(bash|go|python|typescript)\n(.*?)^```")

// TestDocs runs every code block of the docs and the README: each program in Go, Python and TypeScript by itself, then all
// blocks in bash in order, as one script. All pages use one server. At the start of each page the server is running,
// without sandboxes and with only the page's own API key. Blocks that cannot run like that are marked sh: TestService
// runs those that need systemd, and CI runs the two in the README that need a fresh host.
func TestDocs(t *testing.T) {
	parallel(t)
	files, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	s, _ := pythonServer(t)
	if err := s.importImages("node"); err != nil {
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
		t.Errorf("found only %d code blocks; check the pattern docsBlock", blocks)
	}
}

// runBlocks runs the code blocks of one page.
func (s *server) runBlocks(t *testing.T, blocks [][]string) {
	t.Helper()
	if _, err := s.adminStatus(t.Context()); err != nil { // the previous page stopped the server
		<-s.done
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
	}
	for _, b := range s.list() {
		if err := s.admin(t).StopSandbox(t.Context(), b.GetNamespace(), b.GetName()); err != nil {
			t.Fatal(err)
		}
	}
	s.mustMSB(t, "server", "reset", "--yes")
	key := s.newKey(t)
	// The docs use the default address and a placeholder for the key.
	substitutes := strings.NewReplacer("127.0.0.1:5555", s.address, "your-api-key-here", key)
	env := []string{"MSB_API_KEY=" + key, "MSB_SERVER_URL=http://" + s.address}
	script := "set -euo pipefail\n"
	for _, block := range blocks {
		language, text := block[1], substitutes.Replace(block[2])
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
		t.Errorf("the blocks in bash: %v\n%s", err, out)
	}
	// curl without -f exits with 0 even if the response is an error.
	for _, sign := range []string{`"error":{"code":`, `"isError":true`} {
		if i := strings.Index(string(out), sign); i >= 0 {
			t.Errorf("a request in the blocks in bash failed: %s", out[i:])
		}
	}
}

// program is a code block in the language of an SDK.
type program struct{ language, text string }

// run runs the program with the SDK of this checkout.
func (p program) run(t *testing.T, env []string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "program")
	if p.language == "go" {
		file += ".go"
	}
	if err := os.WriteFile(file, []byte(p.text), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"run", file}
	if p.language == "python" {
		args = []string{"run", filepath.Join(root, "daemon", "e2e", "testdata", "docs", "run.py"), file}
	}
	cmd := exec.Command(filepath.Join(root, "client", p.language, "check.sh"), args...)
	cmd.Dir = t.TempDir()
	if p.language == "go" {
		cmd = exec.Command("go", "run", file)
		cmd.Dir = root // whose module has the client
	}
	cmd.Env = append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("a block in %s: %v\n%s\n%s", p.language, err, p.text, out)
	}
}
