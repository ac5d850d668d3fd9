package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// fill writes a file until the disk is full. It is never left half-used: the last page is taken, too.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 1 << 20; size > 0; {
		if _, err := f.Write(make([]byte, size)); err != nil {
			size /= 2
		}
	}
}

func TestFullDisk(t *testing.T) {
	parallel(t)
	disk := t.TempDir()
	if err := syscall.Mount("msb-test", disk, "tmpfs", 0, "size=32m,mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(disk, 0); err != nil {
			t.Error(err)
		}
	})
	s := testServer(t, "--state-dir", disk)
	keys, live := map[string]string{}, map[string]bool{}
	made := func(name, key string) { keys[name], live[name] = key, true }
	made("first", s.newKey(t, "--name", "first"))
	made("second", s.newKey(t, "--name", "second"))

	filler := filepath.Join(disk, "filler")
	fill(t, filler)
	// What is left of the last pages may be enough for a few more; who is told that a key was made has one.
	var refusal string
	for n := 0; refusal == ""; n++ {
		if n == 1000 {
			t.Fatal("keys are made on a full disk")
		}
		key, stderr, err := s.msb("server", "keygen")
		if err == nil {
			made(key[len(key)-10:], strings.TrimSpace(key))
			continue
		}
		if refusal = stderr; key != "" {
			t.Errorf("a key that was not made is printed: %s", key)
		}
	}
	if !strings.Contains(refusal, "no space left") {
		t.Errorf("keygen says %s", refusal)
	}
	st, _ := s.status()
	if st.State != "degraded" || !strings.Contains(strings.Join(st.DegradedReasons, "\n"), "space") {
		t.Errorf("status: %+v\nkeygen said: %s", st, refusal)
	}
	s.wantAccepted(t, "on a full disk", live, keys)
	// Either it is revoked, for good, or the administrator is told that it is not.
	_, stderr, err := s.msb("server", "key", "revoke", "second")
	if live["second"] = err != nil; err != nil && !strings.Contains(stderr, "space") {
		t.Errorf("revoke says %s", stderr)
	}
	s.wantAccepted(t, "after revoke on a full disk", live, keys)

	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	until(t, "the server to be ready again", func() bool {
		st, err := s.status()
		return err == nil && st.State == "ready"
	})
	made("third", s.newKey(t, "--name", "third"))
	s.mustMSB(t, "server", "key", "revoke", "second")
	live["second"] = false
	for _, when := range []string{"with space again", "restarted"} {
		s.wantAccepted(t, when, live, keys)
		s.wantAuditIntact(t)
		s.kill()
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
	}
}
