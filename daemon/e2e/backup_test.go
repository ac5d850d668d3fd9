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

// wantAccepted compares which keys a server accepts with which it should.
func (s *server) wantAccepted(t *testing.T, when string, want map[string]bool, keys map[string]string) {
	t.Helper()
	for name, key := range keys {
		if got, err := s.accepts(key); err != nil || got != want[name] {
			t.Errorf("%s: key %s accepted: %t, %v; want %t", when, name, got, err, want[name])
		}
	}
}

// wantWhole proves that the audit log is.
func (s *server) wantWhole(t *testing.T) {
	t.Helper()
	if v, err := s.admin(t).VerifyAudit(t.Context()); err != nil || v.GetProblem() != "" {
		t.Errorf("audit log: %v, %v", v, err)
	}
}

func TestBackupAndRestore(t *testing.T) {
	parallel(t)
	rnd := randtest.New(t)
	file := filepath.Join(t.TempDir(), "msb.backup")
	keys := map[string]string{}
	s := testServer(t)
	keys["kept"] = s.key(t, "--name", "kept")
	keys["limited"] = s.key(t, "--namespace", "team-alpha", "--expire", "1y")
	keys["dead"] = s.key(t, "--name", "dead")
	keys["revoked since"] = s.key(t, "--name", "doomed")
	s.mustMSB(t, "server", "key", "revoke", "dead")

	s.mustMSB(t, "server", "backup", file)
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the backup: %v, %v", info, err)
	}
	keys["made since"] = s.key(t)
	s.mustMSB(t, "server", "key", "revoke", "doomed")

	// On the same server, whose signing key is the same, nothing that was good or bad changes.
	before := map[string]bool{"kept": true, "limited": true, "made since": true}
	s.wantAccepted(t, "before", before, keys)
	s.mustMSB(t, "server", "restore", file)
	s.wantAccepted(t, "restored on the same server", before, keys)
	s.wantWhole(t)

	// Damaged in any way, it changes nothing.
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	id := func(s *server) string {
		t.Helper()
		st, err := s.admin(t).Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(st.GetInstanceId(), st.GetSigningKeyId(), st.GetKeys(), st.GetState(), st.GetDegradedReasons())
	}
	other := testServer(t)
	local := map[string]string{"local": other.key(t)}
	was := id(other)
	damage := map[string][]byte{"empty": nil, "garbage": bytes.Repeat([]byte("x"), 4096)}
	for len(damage) < 2+20 { // the same place can come twice
		at := rnd.IntN(len(whole) - 2048) // without the zeros at its end it is whole, too
		damage[fmt.Sprintf("cut at %d", at)] = whole[:at]
	}
	in := bytes.NewReader(whole)
	members := tar.NewReader(in)
	for {
		member, err := members.Next()
		if err != nil {
			break
		}
		at := len(whole) - in.Len() // the member's content begins here
		damage["cut in "+member.Name] = whole[:at+int(member.Size)/2]
		if member.Name != "manifest.json" { // which vouches for the others
			damaged := bytes.Clone(whole)
			damaged[at+rnd.IntN(int(member.Size))] ^= 1 << rnd.IntN(8)
			damage["changed in "+member.Name] = damaged
		}
	}
	if len(damage) < 2+20+4+3 {
		t.Errorf("the backup has too few members: %q", slices.Sorted(maps.Keys(damage)))
	}
	for what, archive := range damage {
		bad := filepath.Join(t.TempDir(), "bad")
		if err := os.WriteFile(bad, archive, 0o600); err != nil {
			t.Fatal(err)
		}
		if out, stderr, err := other.msb("server", "restore", bad); err == nil || stderr == "" {
			t.Errorf("%s was restored: %s%s", what, out, stderr)
		}
		if now := id(other); now != was {
			t.Errorf("%s changed the server from %s to %s", what, was, now)
		}
	}
	other.wantAccepted(t, "after damaged archives", map[string]bool{"local": true}, local)

	// On another server its keys are the backup's: those of its own are lost, and the ones that were revoked
	// after the backup are back, since nobody told this server.
	other.mustMSB(t, "server", "restore", file)
	moved := map[string]bool{"kept": true, "limited": true, "revoked since": true}
	for _, when := range []string{"restored elsewhere", "restarted"} {
		other.wantAccepted(t, when, moved, keys)
		other.wantAccepted(t, when, nil, local)
		other.wantError(t, keys["limited"], "sandbox.metrics.get", params{"namespace": "default"}, 403, -32004, "team-alpha")
		other.wantWhole(t)
		other.kill()
		if err := other.start(); err != nil {
			t.Fatal(err)
		}
	}
	if ok, err := other.accepts(other.key(t)); !ok || err != nil {
		t.Errorf("a key made after the restore: accepted: %t, %v", ok, err)
	}
}

// A restore that is cut off by the server's death has happened wholly or not at all.
func TestKillsDuringRestore(t *testing.T) {
	parallel(t)
	file := filepath.Join(t.TempDir(), "msb.backup")
	source := testServer(t)
	keys := map[string]string{"restored": source.key(t)}
	for range 200 { // to have more to write
		source.key(t)
	}
	source.mustMSB(t, "server", "backup", file)

	s := testServer(t)
	keys["local"] = s.key(t)
	s.kill()
	before := t.TempDir()
	replaceFiles(t, before, s.state())
	outcomes := map[bool]int{}
	// Whatever this machine's speed, the kills close in on the moment of the change: a kill after the change makes the
	// next one come earlier, a kill before it makes the next one come later, by steps that shrink at each crossing.
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
		default: // it was far too early
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
			_, _, err := s.msb("server", "restore", file)
			done <- err
		}()
		var acknowledged bool
		if kill == 0 { // after the acknowledgement
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
		s.wantWhole(t)
		outcomes[got]++
		if kill > 0 {
			aim(got)
		}
		s.kill()
		// Of the restore nothing is left beside what was there before it.
		if now, was := fileNames(t, s.state()), fileNames(t, before); !slices.Equal(now, was) {
			t.Errorf("kill %d: the state directory has %q, and had %q", kill, now, was)
		}
		replaceFiles(t, s.state(), before)
	}
	if outcomes[true] < 2 || outcomes[false] == 0 { // the first kill counts for nothing: it waits for the end
		t.Errorf("all kills came on one side of the change: %v", outcomes)
	}
	t.Logf("%d kills before the change, %d after it", outcomes[false], outcomes[true])
}

// fileNames lists what a state directory has of msbd's own; containerd has a directory there, too.
func fileNames(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != "containerd" {
			names = append(names, e.Name())
		}
	}
	return names
}

// replaceFiles makes the files of one directory those of another.
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
