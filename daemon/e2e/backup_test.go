package e2e

import (
	"archive/tar"
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/msbd/msbd/daemon/internal/sys/randtest"
)

// wantAccepted checks that the server accepts exactly those keys that want has as true. keys are by name.
func (s *server) wantAccepted(t *testing.T, when string, want map[string]bool, keys map[string]string) {
	t.Helper()
	for name, key := range keys {
		if got, err := s.accepts(key); err != nil || got != want[name] {
			t.Errorf("%s: key %q accepted: %t, error %v; want %t", when, name, got, err, want[name])
		}
	}
}

// wantAuditIntact checks that the audit log is intact.
func (s *server) wantAuditIntact(t *testing.T) {
	t.Helper()
	if v, err := s.admin(t).VerifyAudit(t.Context()); err != nil || v.GetProblem() != "" {
		t.Errorf("audit log is not intact: %v, error %v", v, err)
	}
}

func TestBackupAndRestore(t *testing.T) {
	parallel(t)
	rnd := randtest.New(t)
	file := filepath.Join(t.TempDir(), "msb.backup")
	keys := map[string]string{}
	s := testServer(t)
	keys["kept"] = s.newKey(t, "--name", "kept")
	keys["limited"] = s.newKey(t, "--namespace", "team-alpha", "--expire", "1y")
	keys["revoked before"] = s.newKey(t, "--name", "revoked-before")
	keys["revoked after"] = s.newKey(t, "--name", "revoked-after")
	s.mustMSB(t, "server", "key", "revoke", "--yes", "revoked-before")

	s.mustMSB(t, "server", "backup", file)
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("backup file: %v, error %v, want mode 0600", info, err)
	}
	keys["created after"] = s.newKey(t)
	s.mustMSB(t, "server", "key", "revoke", "--yes", "revoked-after")

	// A restore on the same server, which has the same signing key, keeps valid keys valid and invalid keys invalid.
	accepted := map[string]bool{"kept": true, "limited": true, "created after": true}
	s.wantAccepted(t, "before the restore", accepted, keys)
	s.mustMSB(t, "server", "restore", "--yes", file)
	s.wantAccepted(t, "restored on the same server", accepted, keys)
	s.wantAuditIntact(t)

	// A restore of a damaged backup changes nothing.
	intact, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	summary := func(s *server) string {
		t.Helper()
		st, err := s.admin(t).Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(st.GetInstanceId(), st.GetSigningKeyId(), st.GetKeys(), st.GetState(), st.GetDegradedReasons())
	}
	other := testServer(t)
	local := map[string]string{"local": other.newKey(t)}
	before := summary(other)
	damage := map[string][]byte{"empty": nil, "garbage": bytes.Repeat([]byte("x"), 4096)}
	for len(damage) < 2+20 { // a loop over the count, because the same offset can be drawn twice
		at := rnd.IntN(len(intact) - 2048) // without only its trailing zeros, the archive would still be valid
		damage[fmt.Sprintf("truncated at %d", at)] = intact[:at]
	}
	in := bytes.NewReader(intact)
	members := tar.NewReader(in)
	for {
		member, err := members.Next()
		if err != nil {
			break
		}
		at := len(intact) - in.Len() // offset of the member's content
		damage["truncated in "+member.Name] = intact[:at+int(member.Size)/2]
		if member.Name != "manifest.json" { // the checksums of the other members are in the manifest
			damaged := bytes.Clone(intact)
			damaged[at+rnd.IntN(int(member.Size))] ^= 1 << rnd.IntN(8)
			damage["bit flipped in "+member.Name] = damaged
		}
	}
	if len(damage) < 2+20+4+3 {
		t.Errorf("the backup has fewer than 4 members: damaged archives %q", slices.Sorted(maps.Keys(damage)))
	}
	for what, archive := range damage {
		bad := filepath.Join(t.TempDir(), "bad")
		if err := os.WriteFile(bad, archive, 0o600); err != nil {
			t.Fatal(err)
		}
		if out, stderr, err := other.msb("server", "restore", "--yes", bad); err == nil || stderr == "" {
			t.Errorf("a backup %s was restored: %s%s", what, out, stderr)
		}
		if now := summary(other); now != before {
			t.Errorf("the restore of a backup %s changed the server from %s to %s", what, before, now)
		}
	}
	other.wantAccepted(t, "after restores of damaged backups", map[string]bool{"local": true}, local)

	// After a restore on another server, that server has only the keys of the backup. Its own keys are gone, and keys
	// that were revoked after the backup are valid again, because this server does not know of the revocations.
	other.mustMSB(t, "server", "restore", "--yes", file)
	moved := map[string]bool{"kept": true, "limited": true, "revoked after": true}
	for _, when := range []string{"restored on another server", "restarted"} {
		other.wantAccepted(t, when, moved, keys)
		other.wantAccepted(t, when, nil, local)
		other.wantError(t, keys["limited"], "sandbox.metrics.get", params{"namespace": "default"}, 403, -32004, "team-alpha")
		other.wantAuditIntact(t)
		other.kill()
		if err := other.start(); err != nil {
			t.Fatal(err)
		}
	}
	if ok, err := other.accepts(other.newKey(t)); !ok || err != nil {
		t.Errorf("key created after the restore: accepted: %t, error %v", ok, err)
	}
}

// TestKillsDuringRestore tests that a restore is atomic: after the server is killed during a restore, its keys are
// either all those of the backup or all those from before.
func TestKillsDuringRestore(t *testing.T) {
	parallel(t)
	file := filepath.Join(t.TempDir(), "msb.backup")
	source := testServer(t)
	keys := map[string]string{"restored": source.newKey(t)}
	for range 200 { // make the restore write more data
		source.newKey(t)
	}
	source.mustMSB(t, "server", "backup", file)

	s := testServer(t)
	keys["local"] = s.newKey(t)
	s.kill()
	before := t.TempDir()
	replaceFiles(t, before, s.state())
	outcomes := map[bool]int{}
	// The delays of the kills converge on the moment of the change, whatever this machine's speed: a kill after the
	// change makes the next one earlier, and a kill before it makes the next one later. The steps shrink at each
	// crossing.
	delay, step, crossed := time.Duration(0), 20*time.Millisecond, false
	aim := func(restored bool) {
		switch {
		case restored && !crossed:
			crossed, step = true, step/2
			delay -= step
		case restored:
			step = max(step*3/4, time.Millisecond)
			delay = max(delay-step, 0)
		case crossed:
			delay += step
		default: // no kill has come after the change yet
			delay += step
			step *= 2
		}
	}
	for kill := range 20 {
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() {
			_, _, err := s.msb("server", "restore", "--yes", file)
			done <- err
		}()
		var acknowledged bool
		if kill == 0 { // kill after the acknowledgement
			acknowledged = <-done == nil
			s.kill()
		} else {
			time.Sleep(delay)
			s.kill()
			acknowledged = <-done == nil
		}
		if err := s.start(); err != nil {
			t.Fatalf("kill %d: %v", kill, err)
		}
		got, err := s.accepts(keys["restored"])
		if err != nil {
			t.Fatal(err)
		}
		if acknowledged && !got {
			t.Errorf("kill %d: an acknowledged restore is lost", kill)
		}
		s.wantAccepted(t, "after a kill", map[string]bool{"restored": got, "local": !got}, keys)
		s.wantAuditIntact(t)
		outcomes[got]++
		if kill > 0 {
			aim(got)
		}
		s.kill()
		// The restore leaves no file that was not there before it.
		if got, want := fileNames(t, s.state()), fileNames(t, before); !slices.Equal(got, want) {
			t.Errorf("kill %d: the state directory has the files %q, want %q", kill, got, want)
		}
		replaceFiles(t, s.state(), before)
	}
	// outcomes[true] always includes the first kill, which waits for the acknowledgement.
	if outcomes[true] < 2 || outcomes[false] == 0 {
		t.Errorf("all kills came before the change or all came after it: %v", outcomes)
	}
	t.Logf("%d kills before the change, %d after it", outcomes[false], outcomes[true])
}

// fileNames returns the names of msbd's files in a state directory. It omits the directories of containerd, of disks and of
// templates.
func fileNames(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !slices.Contains([]string{"containerd", "disks", "templates", "ballast"}, e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names
}

// replaceFiles replaces msbd's files in directory to with those in directory from.
func replaceFiles(t *testing.T, to, from string) {
	t.Helper()
	for _, name := range fileNames(t, to) {
		if err := os.RemoveAll(filepath.Join(to, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range fileNames(t, from) {
		text, err := os.ReadFile(filepath.Join(from, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(to, name), text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}
