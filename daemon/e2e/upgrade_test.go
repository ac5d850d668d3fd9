package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// TestUpgradeKeepsKeys starts a server on a state directory of each released schema. tokens.txt in it lists the API
// keys and their states.
func TestUpgradeKeepsKeys(t *testing.T) {
	parallel(t)
	fixtures, err := filepath.Glob(filepath.Join(root, "daemon", "internal", "data", "store", "testdata", "schema*"))
	if err != nil || len(fixtures) == 0 {
		t.Fatalf("found no state directories of released schemas: error %v", err)
	}
	for _, fixture := range fixtures {
		t.Run(filepath.Base(fixture), func(t *testing.T) {
			s, err := newServer()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := s.close(); err != nil {
					t.Error(err)
				}
			})
			if err := os.Mkdir(s.state(), 0o700); err != nil {
				t.Fatal(err)
			}
			replaceFiles(t, s.state(), fixture)
			if err := os.Remove(filepath.Join(s.state(), "tokens.txt")); err != nil {
				t.Fatal(err)
			}
			if err := s.start(); err != nil {
				t.Fatal(err)
			}
			tokens, err := os.Open(filepath.Join(fixture, "tokens.txt"))
			if err != nil {
				t.Fatal(err)
			}
			defer tokens.Close()
			keys, live := map[string]string{}, map[string]bool{}
			for lines := bufio.NewScanner(tokens); lines.Scan(); {
				name, key, _ := strings.Cut(lines.Text(), " ")
				keys[name], live[name] = key, strings.HasPrefix(name, "live")
			}
			if len(keys) < 5 {
				t.Fatalf("tokens.txt has %d keys, want at least 5", len(keys))
			}
			for _, when := range []string{"upgraded", "restarted"} {
				s.wantAccepted(t, when, live, keys)
				s.wantAuditIntact(t)
				s.kill()
				if err := s.start(); err != nil {
					t.Fatal(err)
				}
			}
			limited, namespace := keys["live-limited"], "team-alpha"
			if limited == "" { // the fixture of schema 1 has another key
				limited = keys["live-namespace"]
				namespace = keyClaims(t, limited).Namespace
			}
			s.mustCall(t, limited, "sandbox.metrics.get", params{"namespace": namespace}, nil)
			s.wantError(t, limited, "sandbox.metrics.get", params{"namespace": "elsewhere"}, 403, -32004, namespace)
			if ok, err := s.accepts(s.newKey(t)); !ok || err != nil {
				t.Errorf("new key: accepted: %t, error %v", ok, err)
			}
		})
	}
}

// oldCommit is the commit that TestUpgradeKeepsSandboxes upgrades from.
const oldCommit = "8f31572"

// TestUpgradeKeepsSandboxes upgrades a server of oldCommit that has a running sandbox. The sandbox keeps its old guest
// and portal, so the new server must be compatible with them.
func TestUpgradeKeepsSandboxes(t *testing.T) {
	parallel(t)
	old := buildOldVersion(t)
	s, err := newServer()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			s.logDiagnostics(t)
		}
		if err := s.close(); err != nil {
			t.Errorf("%v\nthe server's log:\n%s", err, s.log)
		}
	})
	s.launchOldVersion(t, old)
	oldMSB := func(args ...string) string {
		t.Helper()
		cmd := exec.Command(filepath.Join(old, "msb"), args...)
		cmd.Env = s.env()
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("msb %s of %s: %v\n%s", strings.Join(args, " "), oldCommit, err, &stderr)
		}
		return strings.TrimSpace(string(out))
	}
	keys := map[string]string{}
	for name, flags := range map[string][]string{
		"live":    {"--namespace", "project-web"},
		"revoked": nil,
		"week":    {"--expire", "1w"},
		"expired": {"--expire", "1s"},
	} {
		keys[name] = oldMSB(append([]string{"server", "keygen", "--name", name}, flags...)...)
	}
	oldMSB("server", "key", "revoke", "revoked")
	oldMSB("image", "import", filepath.Join(bin, "images", "python.tar"))
	s.imported["python"] = true

	live, box := keys["live"], params{"sandbox": "box"}
	s.mustCall(t, live, "sandbox.start", box, nil)
	s.python(t, live, "box", "import subprocess\nx = 41\nchild = subprocess.Popen(['sleep', '9999'])")
	s.command(t, live, "box", "sh", "-c", "echo kept > /root/file")
	id := s.sandboxID("box")
	if guest := guestDir(id); guest != filepath.Join(old, "guest") {
		t.Fatalf("the sandbox of %s runs the guest in %q, want the one in %s", oldCommit, guest, filepath.Join(old, "guest"))
	}
	until(t, "the expiry of a key after one second", func() bool {
		ok, err := s.accepts(keys["expired"])
		return err == nil && !ok
	})
	records := s.keyRecords(t)
	accepted := map[string]bool{"live": true, "week": true, "revoked": false, "expired": false}
	s.wantAccepted(t, "before the upgrade", accepted, keys)

	verify := func(when string) {
		t.Helper()
		if err := s.start(); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		st, err := s.status()
		if err != nil || st.State != "ready" || st.Recovery != (struct{ Adopted, Lost, Removed int }{Adopted: 1}) || len(st.DegradedReasons) > 0 {
			t.Errorf("%s: status %+v, error %v, want it ready, with 1 sandbox adopted and not degraded", when, st, err)
		}
		if program, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", st.PID)); err != nil || filepath.Dir(program) != filepath.Clean(bin) {
			t.Errorf("%s: the server runs %s, want the one in %s: error %v", when, program, filepath.Clean(bin), err)
		}
		if s.sandboxID("box") != id {
			t.Errorf("%s: the sandbox has the id %s, want %s", when, s.sandboxID("box"), id)
		}
		s.wantAccepted(t, when, accepted, keys)
		if got := s.keyRecords(t); !reflect.DeepEqual(got, records) {
			t.Errorf("%s: the keys are\n%v\nwant\n%v", when, got, records)
		}
		s.wantError(t, live, "sandbox.metrics.get", params{"namespace": "elsewhere"}, 403, -32004, "project-web")
		s.wantAuditIntact(t)

		s.wantStateKept(t, live, "box", when)
		if r := s.python(t, live, "box", "child.poll()"); r.Status != "success" || r.text("stdout") != "" {
			t.Errorf("%s: poll of the background process: got %+v, want None, because it still runs", when, r)
		}
		if r := s.command(t, live, "box", "sh", "-c", "cat /root/file; echo error >&2; exit 3"); r.ExitCode != 3 || r.text("stdout") != "kept\n" || r.text("stderr") != "error\n" {
			t.Errorf("%s: command: got %+v, want exit code 3 and its output on both streams", when, r)
		}
		s.wantError(t, live, "sandbox.command.run", params{"sandbox": "box", "command": "sleep", "args": []string{"60"}, "timeout": 1}, 504, -32007, "")
		s.wantError(t, live, "sandbox.command.run", params{"sandbox": "box", "command": "no-such-program"}, 422, -32008, "no-such-program")
		// What the old portal does not have is refused with advice.
		for method, p := range map[string]params{
			"sandbox.command.run":   {"sandbox": "box", "command": "true", "cwd": "/"},
			"sandbox.process.start": {"sandbox": "box", "command": "true"},
			"sandbox.fs.stat":       {"sandbox": "box", "path": "/"},
		} {
			s.wantError(t, live, method, p, 409, -32005, "Stop it and start it again")
		}
		var m struct{ Sandboxes []metrics }
		s.mustCall(t, live, "sandbox.metrics.get", params{}, &m)
		if len(m.Sandboxes) != 1 || !m.Sandboxes[0].Running || m.Sandboxes[0].Namespace != "project-web" || m.Sandboxes[0].Memory == nil {
			t.Errorf("%s: metrics: %+v, want the running sandbox", when, m)
		}
	}
	s.kill()
	verify("upgraded after a crash")
	s.mustMSB(t, "server", "stop")
	<-s.done
	verify("restarted after a stop")

	// A sandbox of the new version can run at the same time.
	s.mustCall(t, live, "sandbox.start", params{"sandbox": "new"}, nil)
	if guest := guestDir(s.sandboxID("new")); guest != filepath.Join(bin, "guest") {
		t.Errorf("a new sandbox runs the guest in %q, want the one in %s", guest, filepath.Join(bin, "guest"))
	}
	if got := s.python(t, live, "new", "6 * 7").text("stdout"); got != "42\n" {
		t.Errorf("6 * 7 in a new sandbox: got %q, want 42", got)
	}
	s.mustCall(t, live, "sandbox.stop", box, nil)
	if err := s.sandboxLeaks([]string{id}); err != nil {
		t.Error(err)
	}
	s.wantError(t, live, "sandbox.command.run", params{"sandbox": "box", "command": "true"}, 404, -32003, "project-web/box")
	if ok, err := s.accepts(s.newKey(t)); !ok || err != nil {
		t.Errorf("new key: accepted: %t, error %v", ok, err)
	}
}

// buildOldVersion builds the programs and the guest of oldCommit from the repository's history, and returns their
// directory. containerd, Kata's shim and the guest's kernel are the same in both versions and come from this checkout.
func buildOldVersion(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	run := func(name string, args ...string) ([]byte, error) {
		cmd := exec.Command(name, args...)
		cmd.Dir = root
		cmd.Env = append(os.Environ(), "MAKEFLAGS=") // the flags of a make that runs this test do not apply
		return cmd.CombinedOutput()
	}
	if out, err := run("git", "cat-file", "-e", oldCommit+"^{commit}"); err != nil {
		t.Fatalf("commit %s, from which this test upgrades, is not in the repository's history; run the test in a complete clone "+
			"(`git fetch --unshallow` completes a shallow one): %v\n%s", oldCommit, err, out)
	}
	source := filepath.Join(dir, "source.tar")
	built := filepath.Join(dir, "bin")
	if err := os.MkdirAll(filepath.Join(built, "cache"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"containerd", shim, "cache/kernel.deb"} {
		from, err := filepath.Abs(filepath.Join(bin, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(from, filepath.Join(built, name)); err != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	for _, command := range [][]string{
		{"git", "archive", "--output", source, oldCommit},
		{"tar", "-xf", source, "-C", dir},
		{"make", "-C", dir, "VERSION=" + oldCommit, "bin/msb", "bin/msbd", "bin/msb-virtiofsd", "guest"},
	} {
		if out, err := run(command[0], command[1:]...); err != nil {
			t.Fatalf("%s: %v\n%s", strings.Join(command, " "), err, out)
		}
	}
	t.Logf("built %s in %s", oldCommit, time.Since(began).Round(time.Millisecond))
	return built
}

// launchOldVersion starts the server of oldCommit, whose programs are in a directory, and waits until it is ready.
func (s *server) launchOldVersion(t *testing.T, programs string) {
	t.Helper()
	s.log = &output{}
	cmd := exec.Command(filepath.Join(programs, "msb"), s.args()...)
	cmd.Stdout, cmd.Stderr, cmd.Env = s.log, s.log, s.env()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	s.cmd, s.done = cmd, done
	go func() {
		cmd.Wait()
		close(done)
	}()
	var st status
	until(t, "the server of "+oldCommit, func() bool {
		select {
		case <-done:
			t.Fatalf("the server of %s exited during its start:\n%s", oldCommit, s.log)
		default:
		}
		st, _ = s.status()
		return st.State == "ready"
	})
	s.address = st.ListenAddress
	if program, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", st.PID)); err != nil || program != filepath.Join(programs, "msbd") {
		t.Fatalf("the server runs %s, want msbd in %s: error %v", program, programs, err)
	}
}

// guestDir returns the directory of the guest kernel that the QEMU of a sandbox booted, or "" if no QEMU is found.
func guestDir(id string) string {
	for _, pid := range processes(qemu, id) {
		if _, rest, ok := strings.Cut(processTexts()[pid], "\x00-kernel\x00"); ok {
			kernel, _, _ := strings.Cut(rest, "\x00")
			if fd, ok := strings.CutPrefix(kernel, "/proc/self"); ok {
				kernel, _ = os.Readlink(fmt.Sprintf("/proc/%d%s", pid, fd))
			}
			return filepath.Dir(kernel)
		}
	}
	return ""
}

// keyRecords returns all key records of the server, without the fields that change with each use of a key.
func (s *server) keyRecords(t *testing.T) []map[string]any {
	t.Helper()
	var keys []map[string]any
	if err := json.Unmarshal([]byte(s.mustMSB(t, "server", "key", "list", "--all", "--json")), &keys); err != nil {
		t.Fatal(err)
	}
	for _, key := range keys {
		for _, field := range []string{"requests", "last_used_at", "last_used_from"} {
			delete(key, field)
		}
	}
	return keys
}
