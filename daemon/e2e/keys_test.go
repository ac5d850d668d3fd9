package e2e

import (
	"bytes"
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestKeysOfEveryKind(t *testing.T) {
	s, key := sharedBox(t)
	run := params{"sandbox": "box", "command": "true"}
	s.wantError(t, "", "sandbox.command.run", run, 401, -32002, "")
	s.wantError(t, "msb_v2.public.nonsense", "sandbox.command.run", run, 401, -32002, "")
	s.wantError(t, key[:len(key)-2]+"zz", "sandbox.command.run", run, 401, -32002, "")
	s.mustCall(t, s.key(t, "--expire", "1w"), "sandbox.command.run", run, nil)

	short := s.key(t, "--expire", "1s")
	until(t, "a key of one second to expire", func() bool {
		a, err := s.call(short, "sandbox.command.run", run)
		if err != nil {
			t.Fatal(err)
		}
		if a.Error != nil && (a.Status != 401 || a.Error.Code != -32002) {
			t.Errorf("an expired key: %v", a)
		}
		return a.Error != nil
	})

	web := s.key(t, "--expire", "1w", "--namespace", "project-web")
	s.wantError(t, web, "sandbox.command.run", params{"sandbox": "box", "namespace": "default", "command": "true"}, 403, -32004, "project-web")
	// Without a namespace the key's own is meant, and there this sandbox does not exist.
	s.wantError(t, web, "sandbox.command.run", run, 404, -32003, "project-web/box")
	s.mustCall(t, web, "sandbox.start", params{"sandbox": "site"}, nil)
	defer s.call(web, "sandbox.stop", params{"sandbox": "site"})
	var m struct{ Sandboxes []metrics }
	s.mustCall(t, web, "sandbox.metrics.get", params{"namespace": "*"}, &m)
	if len(m.Sandboxes) != 1 || m.Sandboxes[0].Namespace != "project-web" {
		t.Errorf("a limited key sees %+v", m)
	}
}

func TestKeygenPrintsTheKeyAlone(t *testing.T) {
	s, _ := sharedServer(t)
	out, info, err := s.msb("server", "keygen", "--expire", "3mo", "--namespace", "team-alpha")
	if err != nil || strings.Count(out, "\n") != 1 || !strings.HasPrefix(out, "msb_v2.public.") {
		t.Errorf("stdout %q, %v", out, err)
	}
	if !strings.Contains(info, "team-alpha") || strings.Contains(info, strings.TrimSpace(out)) {
		t.Errorf("stderr %q", info)
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
		t.Errorf("json: %+v", j)
	}
	for _, bad := range [][]string{{"--expire", "5"}, {"--expire", "0s"}, {"--expire", "3fortnights"}, {"--expire", "99999999999999999999y"}, {"--expire", "9999y"}, {"--namespace", "../etc"}, {"--key", "secret"}} {
		out, info, err := s.msb(append([]string{"server", "keygen"}, bad...)...)
		if err == nil || out != "" || info == "" {
			t.Errorf("keygen %v: %q %q %v", bad, out, info, err)
		}
	}
}

func TestResetRefusesEveryEarlierKey(t *testing.T) {
	parallel(t)
	s := testServer(t)
	health := params{}
	refused := func(key string) bool {
		t.Helper()
		a, err := s.call(key, "sandbox.metrics.get", health)
		if err != nil {
			t.Fatal(err)
		}
		if a.Status == 401 && a.Error != nil && a.Error.Code == -32002 {
			return true
		}
		if a.Error != nil {
			t.Fatalf("neither accepted nor refused: %v", a)
		}
		return false
	}
	first := s.key(t)
	if refused(first) {
		t.Fatal("a fresh key is refused")
	}
	// On a running server.
	s.mustMSB(t, "server", "start", "--reset-key", "--run-dir", s.runDir, "--yes")
	if !refused(first) {
		t.Error("a key from before the reset is accepted")
	}
	second := s.key(t)
	if refused(second) {
		t.Error("a key from after the reset is refused")
	}
	// On a stopped one.
	s.mustMSB(t, "server", "stop")
	<-s.done
	if err := s.start("--reset-key", "--yes"); err != nil {
		t.Fatal(err)
	}
	if !refused(first) || !refused(second) {
		t.Error("a key from before the second reset is accepted")
	}
	if refused(s.key(t)) {
		t.Error("a key from after the second reset is refused")
	}
	// And it lasts.
	s.kill()
	if err := s.start(); err != nil {
		t.Fatal(err)
	}
	if !refused(first) || !refused(second) {
		t.Error("a restart revived a key")
	}
}

func TestDevMode(t *testing.T) {
	parallel(t)
	s := testServer(t, "--dev")
	if st, err := s.status(); err != nil || st.AuthRequired || st.Containerd == "" || st.Kata == "" {
		t.Errorf("status: %+v %v", st, err)
	}
	for _, key := range []string{"", "anything"} {
		s.mustCall(t, key, "sandbox.metrics.get", params{}, nil)
	}
	if out := s.mustMSB(t, "server", "status"); !strings.Contains(out, "no") {
		t.Errorf("status says %s", out)
	}
}

func TestNoKeyIsLeftAnywhere(t *testing.T) {
	parallel(t)
	s := testServer(t)
	key := s.key(t)
	s.mustCall(t, key, "sandbox.metrics.get", params{}, nil)
	s.wantError(t, key+"x", "sandbox.metrics.get", params{}, 401, -32002, "")
	// The signature is the secret part; the end of it is in every form of the key.
	secret := key[len(key)-60 : len(key)-20]
	if strings.Contains(s.log.String(), secret) {
		t.Error("the log holds the key")
	}
	for pid, text := range processTexts() {
		if strings.Contains(text, secret) {
			t.Errorf("process %d holds the key in its arguments or environment", pid)
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
			t.Errorf("%s holds the key", path)
		}
		return err
	})
	if err != nil || files < 3 {
		t.Errorf("read %d files: %v", files, err)
	}
}
