package hypervisor

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// QEMU has no rights on the host, sees no files and no network, and has only the descriptors of its own VM.
func TestJail(t *testing.T) {
	h, _ := startService(t, newConfig(t))
	id := newVM(t, h.cfg)
	h.boot(t, id)
	pid := h.VMs()[0].QEMU
	proc := func(name string) string { return fmt.Sprintf("/proc/%d/%s", pid, name) }
	read := func(name string) string {
		t.Helper()
		data, err := os.ReadFile(proc(name))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	uid := strconv.Itoa(int(h.cfg.UIDs.First))
	status := read("status")
	for name, want := range map[string]string{
		"Uid": strings.Join([]string{uid, uid, uid, uid}, " "), "Gid": strings.Join([]string{uid, uid, uid, uid}, " "), "Groups": "",
		"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000", "CapBnd": "0000000000000000",
		"CapAmb": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2", "Seccomp_filters": "2", // QEMU's own, and ours for sockets
	} {
		_, rest, ok := strings.Cut(status, "\n"+name+":")
		value, _, _ := strings.Cut(rest, "\n")
		if got := strings.Join(strings.Fields(value), " "); !ok || got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	for _, ns := range []string{"mnt", "net", "ipc", "uts"} {
		its, err := os.Readlink(proc("ns/" + ns))
		own, ownErr := os.Readlink("/proc/self/ns/" + ns)
		if err != nil || ownErr != nil || its == own {
			t.Errorf("its namespace %s is %s, that of the server %s: %v, %v", ns, its, own, err, ownErr)
		}
	}
	// All that it can reach by a path is an empty directory that it cannot write to.
	if mounts := strings.Split(strings.TrimSpace(read("mountinfo")), "\n"); len(mounts) != 1 || !isJailRoot(mounts[0]) {
		t.Errorf("mounts: %q", mounts)
	}
	for _, dir := range []string{"root", "cwd"} {
		entries, err := os.ReadDir(proc(dir))
		info, statErr := os.Stat(proc(dir))
		if err != nil || len(entries) > 0 || statErr != nil || info.Mode().Perm() != 0o755 {
			t.Errorf("its directory %s: %v, %v, %v, %v", dir, entries, err, info, statErr)
		}
	}
	devices := 0
	for line := range strings.Lines(read("net/dev")) {
		if name, _, ok := strings.Cut(line, ":"); ok {
			if devices++; strings.TrimSpace(name) != "lo" {
				t.Errorf("it has the network interface %s", name)
			}
		}
	}
	if devices != 1 {
		t.Errorf("it has %d network interfaces, want lo", devices)
	}
	// Its files are those of its VM.
	image, upper := imagePath(h.cfg), upperPath(h.cfg)
	allowed := []string{image, upper, h.cfg.Kernel, h.cfg.Initrd, filepath.Join(h.dir(id), consoleLog+pipeSuffix), filepath.Join(h.dir(id), qemuLog+pipeSuffix)}
	sockets, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		t.Fatal(err)
	}
	fds, err := os.ReadDir(proc("fd"))
	if err != nil || len(fds) == 0 {
		t.Fatal(fds, err)
	}
	for _, fd := range fds {
		link := filepath.Join(proc("fd"), fd.Name())
		target, err := os.Readlink(link)
		var st unix.Stat_t
		if err != nil || unix.Stat(link, &st) != nil || strings.HasPrefix(target, "anon_inode:") {
			continue
		}
		if inode, ok := strings.CutPrefix(target, "socket:["); ok {
			// /proc/net/unix has a line for each socket: its inode, and its path.
			if !regexp.MustCompile(`(?m) ` + strings.TrimSuffix(inode, "]") + ` ` + h.dir(id) + `/[a-z]*\.sock$`).Match(sockets) {
				t.Errorf("it has the socket %s open as descriptor %s, which is not one of its VM", target, fd.Name())
			}
			continue
		}
		if target == "/dev/net/tun" && fd.Name() == strconv.Itoa(tapFD) {
			continue // the other end of its network interface
		}
		if !slices.Contains(append(allowed, "/dev/null"), target) {
			t.Errorf("it has the file %s open as descriptor %s", target, fd.Name())
		}
	}
	// It cannot make its disk grow.
	if limit := read("limits"); !regexp.MustCompile(`(?m)^Max file size +4096 +4096 `).MatchString(limit) {
		t.Errorf("its limits: %s", limit)
	}
	// Its cgroup limits it, and is removed with it.
	groups, err := filepath.Glob("/sys/fs/cgroup/*/msb/" + id)
	if err != nil {
		t.Fatal(err)
	}
	if len(groups) == 0 {
		groups = []string{"/sys/fs/cgroup/msb/" + id}
	}
	limits := map[string]string{}
	for _, dir := range groups {
		procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err != nil || strings.TrimSpace(string(procs)) != strconv.Itoa(pid) {
			t.Errorf("processes of %s: %q, %v", dir, procs, err)
		}
		for _, file := range []string{"cpu.cfs_quota_us", "memory.limit_in_bytes", "pids.max", "cpu.max", "memory.max"} {
			if value, err := os.ReadFile(filepath.Join(dir, file)); err == nil {
				limits[file] = strings.TrimSpace(string(value))
			}
		}
	}
	guest := 128 + 128/32 + memoryHeadroomMiB
	memory := strconv.Itoa((guest + guest/128 + qemuMemoryMiB + translationMiB) << 20)
	for _, want := range [][2]string{
		{limits["cpu.cfs_quota_us"] + limits["cpu.max"], "150000"},
		{limits["memory.limit_in_bytes"] + limits["memory.max"], memory},
		{limits["pids.max"], "161"},
	} {
		if got, _, _ := strings.Cut(want[0], " "); got != want[1] {
			t.Errorf("limits %v, want %s among them", limits, want[1])
		}
	}
	if err := h.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	for _, dir := range groups {
		if !missing(dir) {
			t.Errorf("%s was not removed", dir)
		}
	}
}

// msbd may be killed before it has emptied the jail of a QEMU. The next Service does it.
func TestAdoptEmptiesJail(t *testing.T) {
	h, _ := startService(t, newConfig(t))
	id := newVM(t, h.cfg)
	m := h.join(t, id)
	if err := h.launch(m, memory{}); err != nil {
		t.Fatal(err)
	}
	monitor, err := dialMonitor(t.Context(), filepath.Join(m.dir, monitorSocket)) // QEMU has started
	if err != nil {
		t.Fatal(err)
	}
	monitor.close()
	root := fmt.Sprintf("/proc/%d/root", h.VMs()[0].QEMU)
	if entries, err := os.ReadDir(root); err != nil || len(entries) == 0 {
		t.Fatalf("the jail is already empty: %v, %v", entries, err)
	}
	h.stop()
	startService(t, h.cfg)
	waitUntil(t, "the jail is empty", func() bool {
		entries, err := os.ReadDir(root)
		return err == nil && len(entries) == 0
	})
}

// emptyJail never removes files outside of a jail.
func TestEmptyJailRefuses(t *testing.T) {
	other := startMarkedProcess(t, 0, "/bin/sleep", roleQEMU, "/nowhere")
	p := openProcess(t, other.Process.Pid)
	wantError(t, emptyJail(p), "it has none")
	if _, err := os.Stat("/dev/null"); err != nil {
		t.Fatal(err)
	}
}

// Two VMs have different users, and a user can be taken again.
func TestUsers(t *testing.T) {
	cfg := newConfig(t)
	cfg.UIDs.Count = 2
	s := &Service{cfg: cfg, vms: map[string]*machine{}}
	add := func(id string) (uint32, error) {
		m := newMachine(s.dir(id), state{ID: id})
		err := s.add(m)
		return m.UID, err
	}
	a, errA := add("a")
	b, errB := add("b")
	if errA != nil || errB != nil || a == b || !cfg.UIDs.Contains(a) || !cfg.UIDs.Contains(b) {
		t.Errorf("users %d and %d; %v, %v", a, b, errA, errB)
	}
	_, err := add("c")
	wantError(t, err, "all 2 users for QEMU are taken")
	delete(s.vms, "a")
	if c, err := add("c"); c != a || err != nil {
		t.Errorf("the third VM has user %d, %v, want %d", c, err, a)
	}
}
