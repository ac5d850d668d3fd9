package e2e

import (
	"bytes"
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

func TestKeyExpiryAndNamespaces(t *testing.T) {
	s, key := sharedSandbox(t)
	run := params{"sandbox": "box", "command": "true"}
	s.wantError(t, "", "sandbox.command.run", run, 401, -32002, "")
	s.wantError(t, "msb_v2.public.nonsense", "sandbox.command.run", run, 401, -32002, "")
	tampered := []byte(key)
	if at := len(key) - 10; tampered[at] == 'A' { // a character of the signature
		tampered[at] = 'B'
	} else {
		tampered[at] = 'A'
	}
	s.wantError(t, string(tampered), "sandbox.command.run", run, 401, -32002, "")
	s.mustCall(t, s.newKey(t, "--expire", "1w"), "sandbox.command.run", run, nil)

	short := s.newKey(t, "--expire", "1s")
	until(t, "the expiry of a key after one second", func() bool {
		a, err := s.call(short, "sandbox.command.run", run)
		if err != nil {
			t.Fatal(err)
		}
		if a.Error != nil && (a.Status != 401 || a.Error.Code != -32002) {
			t.Errorf("call with an expired key: got %v, want HTTP 401, error -32002", a)
		}
		return a.Error != nil
	})

	web := s.newKey(t, "--expire", "1w", "--namespace", "project-web")
	s.wantError(t, web, "sandbox.command.run", params{"sandbox": "box", "namespace": "default", "command": "true"}, 403, -32004, "project-web")
	// Without a namespace in the request, the namespace of the key applies. It has no sandbox "box".
	s.wantError(t, web, "sandbox.command.run", run, 404, -32003, "project-web/box")
	s.mustCall(t, web, "sandbox.start", params{"sandbox": "site"}, nil)
	defer s.call(web, "sandbox.stop", params{"sandbox": "site"})
	var m struct{ Sandboxes []metrics }
	s.mustCall(t, web, "sandbox.metrics.get", params{"namespace": "*"}, &m)
	if len(m.Sandboxes) != 1 || m.Sandboxes[0].Namespace != "project-web" {
		t.Errorf("a key of namespace project-web lists %+v, want one sandbox of that namespace", m)
	}
}

func TestKeygenPrintsOnlyTheKey(t *testing.T) {
	s, _ := sharedServer(t)
	out, info, err := s.msb("server", "keygen", "--expire", "3mo", "--namespace", "team-alpha")
	if err != nil || strings.Count(out, "\n") != 1 || !strings.HasPrefix(out, "msb_v2.public.") {
		t.Errorf("keygen: stdout %q, error %v, want only the key on one line", out, err)
	}
	if !strings.Contains(info, "team-alpha") || strings.Contains(info, strings.TrimSpace(out)) {
		t.Errorf("keygen: stderr %q, want the namespace team-alpha and not the key", info)
	}
	var j struct {
		Key       string
		Namespace string
		ExpiresAt time.Time `json:"expires_at"`
	}
	if err := json.Unmarshal([]byte(s.mustMSB(t, "server", "keygen", "--expire", "1w", "--json")), &j); err != nil {
		t.Fatal(err)
	}
	if d := time.Until(j.ExpiresAt); !strings.HasPrefix(j.Key, "msb_") || d < 6*24*time.Hour || d > 7*24*time.Hour {
		t.Errorf("keygen --json: %+v, want a key that expires in a week", j)
	}
	for _, bad := range [][]string{{"--expire", "5"}, {"--expire", "0s"}, {"--expire", "3fortnights"}, {"--expire", "99999999999999999999y"}, {"--expire", "9999y"}, {"--namespace", "../etc"}, {"--key", "secret"}} {
		out, info, err := s.msb(append([]string{"server", "keygen"}, bad...)...)
		if err == nil || out != "" || info == "" {
			t.Errorf("keygen %v: stdout %q, stderr %q, error %v, want only an error on stderr", bad, out, info, err)
		}
	}
}

func TestResetInvalidatesEarlierKeys(t *testing.T) {
	parallel(t)
	s := testServer(t)
	refused := func(key string) bool {
		t.Helper()
		a, err := s.call(key, "sandbox.metrics.get", params{})
		if err != nil {
			t.Fatal(err)
		}
		if a.Status == 401 && a.Error != nil && a.Error.Code == -32002 {
			return true
		}
		if a.Error != nil {
			t.Fatalf("the key is neither accepted nor refused: %v", a)
		}
		return false
	}
	first := s.newKey(t)
	if refused(first) {
		t.Fatal("a new key is refused")
	}
	// Reset a running server.
	s.mustMSB(t, "server", "start", "--reset-key", "--run-dir", s.runDir, "--yes")
	if !refused(first) {
		t.Error("a key from before the reset is accepted")
	}
	second := s.newKey(t)
	if refused(second) {
		t.Error("a key from after the reset is refused")
	}
	// Reset a stopped server.
	s.mustMSB(t, "server", "stop")
	<-s.done
	if err := s.start("--reset-key", "--yes"); err != nil {
		t.Fatal(err)
	}
	if !refused(first) || !refused(second) {
		t.Error("a key from before the second reset is accepted")
	}
	if refused(s.newKey(t)) {
		t.Error("a key from after the second reset is refused")
	}
	// The resets survive a crash.
	s.kill()
	if err := s.start(); err != nil {
		t.Fatal(err)
	}
	if !refused(first) || !refused(second) {
		t.Error("a key from before a reset is accepted after a crash")
	}
}

func TestDevMode(t *testing.T) {
	parallel(t)
	s := testServer(t, "--dev")
	if st, err := s.status(); err != nil || st.AuthRequired || st.Containerd == "" || st.Kata == "" {
		t.Errorf("status: %+v, error %v, want no authentication and the versions of containerd and Kata", st, err)
	}
	for _, key := range []string{"", "not-a-key"} {
		s.mustCall(t, key, "sandbox.metrics.get", params{}, nil)
	}
	out := s.mustMSB(t, "server", "status")
	if !regexp.MustCompile(`(?m)^authentication\s+no API key required\b`).MatchString(out) {
		t.Errorf("status of a server in dev mode does not say that no API key is required:\n%s", out)
	}
}

func TestKeyIsNotInLogsFilesOrProcesses(t *testing.T) {
	parallel(t)
	s := testServer(t)
	key := s.newKey(t)
	s.mustCall(t, key, "sandbox.metrics.get", params{}, nil)
	s.wantError(t, key+"x", "sandbox.metrics.get", params{}, 401, -32002, "")
	// The signature at the end is the secret part. Every form in which a key might be stored contains this piece of it.
	secret := key[len(key)-60 : len(key)-20]
	if strings.Contains(s.log.String(), secret) {
		t.Error("the log contains the key")
	}
	for pid, text := range processTexts() {
		if strings.Contains(text, secret) {
			t.Errorf("process %d has the key in its arguments or environment", pid)
		}
	}
	files := 0
	err := filepath.WalkDir(s.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		files++
		text, err := os.ReadFile(path)
		if bytes.Contains(text, []byte(secret)) {
			t.Errorf("%s contains the key", path)
		}
		return err
	})
	if err != nil || files < 3 {
		t.Errorf("read %d files, want at least 3: error %v", files, err)
	}
}
