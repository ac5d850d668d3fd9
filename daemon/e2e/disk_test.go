package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// fillDisk writes a file until the disk is full to its last byte.
func fillDisk(t *testing.T, path string) {
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
	created := func(name, key string) { keys[name], live[name] = key, true }
	created("first", s.newKey(t, "--name", "first"))
	created("second", s.newKey(t, "--name", "second"))

	filler := filepath.Join(disk, "filler")
	fillDisk(t, filler)
	// The last pages of msbd's own files may have room for a few more keys. Each key that is printed must be valid.
	var refusal string
	for n := 0; refusal == ""; n++ {
		if n == 1000 {
			t.Fatal("created 1000 keys on a full disk")
		}
		key, stderr, err := s.msb("server", "keygen")
		if err == nil {
			created(key[len(key)-10:], strings.TrimSpace(key))
			continue
		}
		if refusal = stderr; key != "" {
			t.Errorf("keygen failed, but printed a key: %s", key)
		}
	}
	if !strings.Contains(refusal, "no space left") {
		t.Errorf("keygen on a full disk: %s, want \"no space left\"", refusal)
	}
	st, _ := s.status()
	if st.State != "degraded" || !strings.Contains(strings.Join(st.DegradedReasons, "\n"), "space") {
		t.Errorf("status on a full disk: %+v, want degraded for lack of space\nkeygen printed: %s", st, refusal)
	}
	s.wantAccepted(t, "on a full disk", live, keys)
	// The command must either revoke the key for good or report that it did not.
	_, stderr, err := s.msb("server", "key", "revoke", "--yes", "second")
	if live["second"] = err != nil; err != nil && !strings.Contains(stderr, "space") {
		t.Errorf("revoke on a full disk: %s, want an error about space", stderr)
	}
	s.wantAccepted(t, "after the revoke command on a full disk", live, keys)

	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	until(t, "the server to be ready again", func() bool {
		st, err := s.status()
		return err == nil && st.State == "ready"
	})
	created("third", s.newKey(t, "--name", "third"))
	s.mustMSB(t, "server", "key", "revoke", "--yes", "second")
	live["second"] = false
	for _, when := range []string{"after space was freed", "restarted"} {
		s.wantAccepted(t, when, live, keys)
		s.wantAuditIntact(t)
		s.kill()
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
	}
}
