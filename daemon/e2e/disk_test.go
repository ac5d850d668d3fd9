package e2e

import (
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Sandboxes fill the disk that also holds the keys and the audit log, and keep writing to it. The server says so, starts
// no further sandbox, and still revokes keys and stops sandboxes, over HTTP and on the admin socket, also after it was
// killed.
func TestFullDisk(t *testing.T) {
	parallel(t)
	disk := t.TempDir()
	if err := syscall.Mount("msb-test", disk, "tmpfs", 0, "size=300m,mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(disk, 0); err != nil {
			t.Error(err)
		}
	})
	s := testServer(t, "--state-dir", disk)
	if err := s.importImages("python"); err != nil {
		t.Fatal(err)
	}
	key := s.newKey(t, "--name", "first")
	keys := map[string]string{"first": key, "second": s.newKey(t, "--name", "second"), "third": s.newKey(t, "--name", "third")}
	live := map[string]bool{"first": true, "second": true, "third": true}

	// Each sandbox writes whenever there is room.
	const fill = "while :; do cat /dev/zero >>/fill; done"
	for _, name := range []string{"one", "two"} {
		s.mustCall(t, key, "sandbox.start", params{"sandbox": name}, nil)
		s.command(t, key, name, "sh", "-c", "("+fill+") >/dev/null 2>&1 </dev/null &")
	}
	full := func() {
		t.Helper()
		until(t, "the sandboxes to fill the disk", func() bool {
			var st unix.Statfs_t
			if err := unix.Statfs(disk, &st); err != nil {
				t.Fatal(err)
			}
			return st.Bavail == 0
		})
		until(t, "the server to notice that", func() bool {
			st, _ := s.status()
			return st.State == "degraded" && strings.Contains(strings.Join(st.DegradedReasons, "\n"), "the disk of "+disk+" is almost full: ")
		})
	}
	full()
	s.wantError(t, key, "sandbox.start", params{"sandbox": "three"}, 429, -32006, "the server's disk is almost full")
	if _, stderr, err := s.msb("server", "keygen"); err == nil || !strings.Contains(stderr, "almost full") {
		t.Errorf("keygen on a full disk: %v, %s, want it refused", err, stderr)
	}
	s.mustMSB(t, "server", "key", "revoke", "second", "--yes")
	live["second"] = false
	s.mustCall(t, key, "sandbox.stop", params{"sandbox": "one"}, nil)

	full() // by the other sandbox
	s.kill()
	if err := s.launch(); err != nil {
		t.Fatal(err)
	}
	full()
	st, err := s.adminStatus(t.Context())
	if err != nil || st.GetRecovery().GetAdopted() != 1 {
		t.Errorf("after a kill: %v, %v, want one adopted sandbox", st, err)
	}
	s.address = st.GetListenAddress()
	s.mustMSB(t, "server", "key", "revoke", "third", "--yes")
	s.mustMSB(t, "server", "reset", "--yes")
	clear(live)
	s.wantAccepted(t, "on a full disk", live, keys)
	ids := s.sandboxIDs()
	s.mustMSB(t, "server", "stop", "--sandboxes")
	<-s.done
	if err := s.leaks(s.dir, ids); err != nil {
		t.Error(err)
	}

	// containerd deletes the layers of removed sandboxes only later, and not at all on a full disk.
	layers, err := filepath.Glob(filepath.Join(disk, "containerd", "*", "snapshots", "*", "fs", "fill"))
	if err != nil || len(layers) > 0 {
		t.Errorf("what the sandboxes wrote is still on the disk: %v, %v", layers, err)
	}

	if err := s.start(); err != nil {
		t.Fatal(err)
	}
	keys["fourth"], live["fourth"] = s.newKey(t), true
	s.wantAccepted(t, "after the sandboxes were stopped", live, keys)
	s.wantAuditIntact(t)
	if list := s.list(); len(list) != 0 {
		t.Errorf("the sandboxes %v are left", list)
	}
}
