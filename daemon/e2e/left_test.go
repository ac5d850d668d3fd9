package e2e

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd"
	"github.com/containerd/containerd/namespaces"
	"github.com/containerd/containerd/snapshots"
)

// leftOf looks for what microVMs left in the server's containerd and on this host.
func (s *server) leftOf(ids []string) error {
	client, err := containerd.New(s.containerd, containerd.WithDefaultNamespace("msb"))
	if err != nil {
		return err
	}
	defer client.Close()
	ctx := namespaces.WithNamespace(context.Background(), "msb")
	var found []string
	containers, err := client.Containers(ctx)
	if err != nil {
		return err
	}
	for _, c := range containers {
		if slices.Contains(ids, c.ID()) {
			found = append(found, "container "+c.ID())
		}
	}
	err = client.SnapshotService("overlayfs").Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		if slices.Contains(ids, i.Name) {
			found = append(found, "snapshot "+i.Name)
		}
		return nil
	})
	if len(found) > 0 {
		err = errors.Join(err, fmt.Errorf("left in containerd: %v", found))
	}
	return errors.Join(err, s.left("", ids))
}

// left looks for whatever a server or its microVMs may leave on a host: processes, mounts, and files in the
// places that Kata and containerd use on every host. They are known by the microVMs' ids, and by the server's
// directory if that is given.
func (s *server) left(dir string, ids []string) error {
	names := slices.Clone(ids)
	if dir != "" {
		names = append(names, dir+"/")
	}
	for _, id := range ids { // containerd's socket of a shim is named by this
		names = append(names, fmt.Sprintf("%x", sha256.Sum256([]byte(filepath.Join(s.containerd, "msb", id)))))
	}
	ours := func(text string) bool {
		return slices.ContainsFunc(names, func(name string) bool { return strings.Contains(text, name) })
	}
	var found []string
	// Processes end a moment after what they served.
	for deadline := time.Now().Add(patience * 5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		found = found[:0]
		for pid, text := range processTexts() {
			if ours(text) && pid != os.Getpid() {
				found = append(found, fmt.Sprintf("process %d: %s", pid, strings.ReplaceAll(text, "\x00", " ")))
			}
		}
		if len(found) == 0 || time.Now().After(deadline) {
			break
		}
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if ours(line) {
			found = append(found, "mount "+line)
		}
	}
	tasks := filepath.Join("containerd", "io.containerd.runtime.v2.task")
	for _, place := range []string{"/run", "/dev/shm", "/sys/fs/cgroup", s.runDir, filepath.Join(s.state(), tasks)} {
		found = append(found, named(place, ours)...)
	}
	for _, trace := range traces() {
		if !slices.Contains(earlier, trace) {
			found = append(found, "path "+trace)
		}
	}
	if len(found) > 0 {
		return fmt.Errorf("left behind:\n  %s", strings.Join(found, "\n  "))
	}
	return nil
}

// named finds what has one of our names at place or below, but not in other file systems, such as the root of
// somebody's container. Cgroups are each one of their own.
func named(place string, ours func(string) bool) (found []string) {
	device := func(path string) (dev uint64) {
		if info, err := os.Lstat(path); err == nil {
			dev = info.Sys().(*syscall.Stat_t).Dev
		}
		return dev
	}
	top := device(place)
	filepath.WalkDir(place, func(path string, d fs.DirEntry, err error) error {
		switch rest := strings.TrimPrefix(path, place); {
		case err != nil: // it has gone meanwhile
		case d.Name() == ".failed": // the consoles of microVMs that did not boot are kept
			return fs.SkipDir
		case ours(rest + "/"):
			found = append(found, "path "+path)
			if d.IsDir() {
				return fs.SkipDir
			}
		case d.IsDir() && device(path) != top && place != "/sys/fs/cgroup":
			return fs.SkipDir
		}
		return nil
	})
	return found
}

// traces are what a microVM may leave that does not have its name: taps, network namespaces of Kata's making,
// and guests' memory.
func traces() (found []string) {
	for _, pattern := range []string{"/sys/class/net/*kata*", "/run/netns/cnitest-*", "/dev/shm/qemu_back_mem*"} {
		paths, _ := filepath.Glob(pattern)
		found = append(found, paths...)
	}
	return found
}

// earlier are the traces of others.
var earlier = traces()

// processTexts is what the kernel tells of each process: its arguments and environment.
func processTexts() map[int]string {
	texts := map[int]string{}
	paths, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range paths {
		var pid int
		fmt.Sscanf(p, "/proc/%d/", &pid)
		args, _ := os.ReadFile(p)
		env, _ := os.ReadFile(filepath.Join(filepath.Dir(p), "environ"))
		texts[pid] = string(args) + string(env)
	}
	return texts
}

// The programs that a sandbox's microVM is made of.
const (
	qemu      = "qemu-system-x86_64"
	virtiofsd = "virtiofsd"
	shim      = "containerd-shim-kata-v2"
)

// processes finds those of a program whose arguments or environment hold a word, such as a sandbox's id.
func processes(program, word string) []int {
	var pids []int
	for pid, text := range processTexts() {
		name, _, _ := strings.Cut(text, "\x00")
		if filepath.Base(name) == program && strings.Contains(text, word) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// microVMs finds the QEMUs of this server: those of its sandboxes, and any other that descends from it.
func (s *server) microVMs() []int {
	pids := processes(qemu, s.dir)
	for _, id := range s.sandboxIDs() {
		pids = append(pids, processes(qemu, id)...)
	}
	slices.Sort(pids)
	return slices.Compact(pids)
}

func signalAll(t *testing.T, pids []int, signal syscall.Signal) {
	t.Helper()
	if len(pids) == 0 {
		t.Fatalf("found no process to send %s to", signal)
	}
	for _, pid := range pids {
		if err := syscall.Kill(pid, signal); err != nil && !errors.Is(err, syscall.ESRCH) { // it may end with another
			t.Fatal(err)
		}
	}
}

// TestLeftSeesEverything proves that no trace escapes those who look for what is left.
func TestLeftSeesEverything(t *testing.T) {
	s, err := newServer()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(s.dir) })
	id := filepath.Base(s.dir)
	socket := fmt.Sprintf("%x", sha256.Sum256([]byte(filepath.Join(s.containerd, "msb", id))))
	paths := []string{
		"/run/vc/sbs/" + id, "/run/vc/vm/" + id, "/run/kata-containers/shared/sandboxes/" + id,
		"/run/containerd/s/" + socket, "/run/netns/cnitest-" + id, "/dev/shm/qemu_back_mem." + id,
		filepath.Join(s.runDir, "vm", id), filepath.Join(s.state(), "containerd/io.containerd.runtime.v2.task/msb", id),
	}
	parents, _ := filepath.Glob("/sys/fs/cgroup/*/tasks") // cgroup v1 has a tree for each controller
	if len(parents) == 0 {
		parents = []string{"/sys/fs/cgroup/tasks"}
	}
	for _, p := range parents {
		paths = append(paths, filepath.Join(filepath.Dir(p), "kata_overhead", id), filepath.Join(filepath.Dir(p), "msb", "kata_"+id))
	}
	for _, path := range paths {
		var missing []string
		for above := path; ; above = filepath.Dir(above) {
			if _, err := os.Stat(above); err == nil {
				break
			}
			missing = append(missing, above)
		}
		t.Cleanup(func() {
			for _, dir := range missing {
				os.Remove(dir)
			}
		})
		if err := os.MkdirAll(path, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	mounted := t.TempDir()
	if err := syscall.Mount("msb-"+id, mounted, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(mounted, 0) })
	child := exec.Command("sleep", "9999")
	child.Env = []string{"OF=" + id}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { child.Process.Kill(); child.Wait() })
	// The kernel shows a process's environment a moment after its start.
	until(t, "the child's environment", func() bool { return strings.Contains(processTexts()[child.Process.Pid], id) })

	found := fmt.Sprint(s.left("", []string{id}))
	for _, trace := range append(paths, fmt.Sprintf("process %d:", child.Process.Pid), " "+mounted+" ") {
		if !strings.Contains(found, trace) {
			t.Errorf("%s is overlooked in:\n%s", trace, found)
		}
	}
	if err := s.left("", []string{id + "x"}); err != nil && strings.Contains(err.Error(), id+"x") {
		t.Errorf("what is not there is found: %v", err)
	}
}
