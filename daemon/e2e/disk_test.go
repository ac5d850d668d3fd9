package e2e

import (
	"fmt"
	"os"
	"os/exec"
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
	disk := smallDisk(t, "700M")
	s := testServer(t, "--state-dir", disk)
	if err := s.importImages("python"); err != nil {
		t.Fatal(err)
	}
	key := s.newKey(t, "--name", "first")
	keys := map[string]string{"first": key, "second": s.newKey(t, "--name", "second"), "third": s.newKey(t, "--name", "third")}
	live := map[string]bool{"first": true, "second": true, "third": true}

	templates := hypervisorSettings["hypervisor"] != "kata" // Kata's own driver has none
	if templates {
		s.failTemplateBuild(t, disk)
	}

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

	disks, err := filepath.Glob(filepath.Join(disk, "disks", "sandboxes", "*"))
	if err != nil || len(disks) > 0 {
		t.Errorf("what the sandboxes wrote is still on the disk: %v, %v", disks, err)
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
	if templates {
		until(t, "the template", func() bool { return storedTemplates(disk) == 1 })
	}
}

// failTemplateBuild fills most of the disk of the state directory while the template of the Python image is built, so that there
// is no room for it, and frees the space when the build has failed.
func (s *server) failTemplateBuild(t *testing.T, disk string) {
	t.Helper()
	s.waitForTemplateBuild(t)
	other, err := os.Create(filepath.Join(disk, "other"))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	var st unix.Statfs_t
	if err := unix.Statfs(disk, &st); err != nil {
		t.Fatal(err)
	}
	const left = 40 << 20
	if err := unix.Fallocate(int(other.Fd()), 0, 0, int64(st.Bavail)*st.Bsize-left); err != nil {
		t.Fatal(err)
	}
	until(t, "the build to fail", func() bool { return strings.Contains(s.log.String(), "could not build a template") })
	for line := range strings.Lines(s.log.String()) {
		if strings.Contains(line, "could not build a template") && !strings.Contains(line, "no space left on device") {
			t.Errorf("the log does not say why the build has failed: %s", line)
		}
	}
	if storedTemplates(disk) != 0 {
		t.Error("a template was stored on a disk that has no room for it")
	}
	if err := os.Remove(other.Name()); err != nil {
		t.Fatal(err)
	}
}

// smallDisk mounts a file system of a size, as for mkfs.ext4, and returns its directory. A file system in memory does not
// suit: what a sandbox writes to it counts as memory of the sandbox's QEMU.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	file, dir := filepath.Join(t.TempDir(), "disk"), t.TempDir()
	for _, command := range [][]string{
		{"mkfs.ext4", "-q", "-m", "0", file, size}, {"mount", "-o", "loop", file, dir}, {"chmod", "700", dir},
	} {
		if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", command[0], err, out)
		}
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// A sandbox has a disk of the size that it asks for. A full one is an error in the sandbox, which keeps working. Files that
// are removed free space on the host.
func TestSandboxDisk(t *testing.T) {
	parallel(t)
	s, key := sharedServer(t)
	const size = 128 << 20
	s.mustCall(t, key, "sandbox.start", params{"sandbox": "disk", "config": params{"disk": 128}}, nil)
	defer s.mustCall(t, key, "sandbox.stop", params{"sandbox": "disk"}, nil)
	run := func(code string) string {
		t.Helper()
		r := s.python(t, key, "disk", code)
		if r.Status != "success" {
			t.Errorf("%s\n%+v", code, r)
		}
		return r.text("stdout")
	}
	if total := run("import os, shutil; print(0.8 * " + fmt.Sprint(size) + " < shutil.disk_usage('/').total <= " + fmt.Sprint(size) + ")"); total != "True\n" {
		t.Errorf("the size of the file system is right: %s", total)
	}
	// Extended attributes, on a new file and on one of the image.
	if got := run(`
open("/new", "w").close()
for path in "/new", "/etc/passwd":
    os.setxattr(path, "user.origin", b"here")
    print(os.getxattr(path, "user.origin"))
`); got != "b'here'\nb'here'\n" {
		t.Errorf("extended attributes: %s", got)
	}
	usage := func() int64 {
		var m struct{ Sandboxes []metrics }
		s.mustCall(t, key, "sandbox.metrics.get", params{"sandbox": "disk"}, &m)
		if len(m.Sandboxes) != 1 || m.Sandboxes[0].Disk == nil {
			t.Fatalf("metrics: %+v", m)
		}
		return *m.Sandboxes[0].Disk
	}
	const fill = `
import errno
try:
    with open("/fill", "wb") as f:
        while True:
            f.write(bytes(1 << 20))
            f.flush()
            os.fsync(f.fileno())
except OSError as e:
    print(errno.errorcode[e.errno])
`
	if got := run(fill); got != "ENOSPC\n" {
		t.Errorf("an endless file ends with %s", got)
	}
	if used := usage(); used < size/2 || used > size+size/8 {
		t.Errorf("a full disk uses %d bytes", used)
	}
	if r := s.command(t, key, "disk", "sh", "-c", "echo still here; exit 3"); r.ExitCode != 3 || r.text("stdout") != "still here\n" {
		t.Errorf("a command on a full disk: %+v", r)
	}
	run(`os.remove("/fill"); os.sync()`)
	until(t, "the host to get the space back", func() bool { return usage() < size/8 })
	if got := run(fill); got != "ENOSPC\n" { // the sandbox can use the space again
		t.Errorf("a second endless file ends with %s", got)
	}
	s.wantError(t, key, "sandbox.start", params{"sandbox": "huge", "config": params{"disk": 1 << 20}}, 400, -32602, "disk")
}
