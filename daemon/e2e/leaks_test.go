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

// sandboxLeaks returns an error that lists everything that the sandboxes with these ids left in the server's containerd
// and on this host.
func (s *server) sandboxLeaks(ids []string) error {
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
		err = errors.Join(err, fmt.Errorf("leaked in containerd: %v", found))
	}
	return errors.Join(err, s.leaks("", ids))
}

// leaks returns an error that lists everything that a server or its sandboxes left on this host: processes, mounts, and
// files in the directories that Kata and containerd use on every host. It finds them by the ids of the sandboxes, and
// by the directory of the server if dir is not empty.
func (s *server) leaks(dir string, ids []string) error {
	names := slices.Clone(ids)
	if dir != "" {
		names = append(names, dir+"/")
	}
	for _, id := range ids { // containerd derives the name of a shim's socket from this hash
		names = append(names, fmt.Sprintf("%x", sha256.Sum256([]byte(filepath.Join(s.containerd, "msb", id)))))
	}
	belongs := func(text string) bool {
		return slices.ContainsFunc(names, func(name string) bool { return strings.Contains(text, name) })
	}
	var found []string
	// A process may end a moment after the sandbox that it served.
	poll(patience*30*time.Second, func() bool {
		found = found[:0]
		for pid, text := range processTexts() {
			if belongs(text) && pid != os.Getpid() {
				found = append(found, fmt.Sprintf("process %d: %s", pid, strings.ReplaceAll(text, "\x00", " ")))
			}
		}
		return len(found) == 0
	})
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if belongs(line) {
			found = append(found, "mount "+line)
		}
	}
	tasks := filepath.Join("containerd", "io.containerd.runtime.v2.task")
	for _, place := range []string{"/run", "/dev/shm", "/sys/fs/cgroup", s.runDir, filepath.Join(s.state(), tasks), filepath.Join(s.state(), "disks")} {
		for _, path := range findPaths(place, belongs) {
			found = append(found, "path "+path)
		}
	}
	for _, path := range unnamedLeaks() {
		if !slices.Contains(preexistingLeaks, path) {
			found = append(found, "path "+path)
		}
	}
	if len(found) > 0 {
		return fmt.Errorf("leaked on this host:\n  %s", strings.Join(found, "\n  "))
	}
	return nil
}

// findPaths returns the paths at or below place for which belongs reports true. It does not enter other file systems,
// such as the root of another container, except in /sys/fs/cgroup, where each hierarchy is a file system.
func findPaths(place string, belongs func(string) bool) (found []string) {
	device := func(path string) (dev uint64) {
		if info, err := os.Lstat(path); err == nil {
			dev = info.Sys().(*syscall.Stat_t).Dev
		}
		return dev
	}
	top := device(place)
	filepath.WalkDir(place, func(path string, d fs.DirEntry, err error) error {
		switch rest := strings.TrimPrefix(path, place); {
		case err != nil: // it was removed meanwhile
		case d.Name() == ".failed": // the consoles of microVMs that did not boot are kept
			return fs.SkipDir
		case belongs(rest + "/"):
			found = append(found, path)
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

// unnamedLeaks returns the resources on this host that a microVM may leave and that do not carry its id: tap devices,
// network namespaces that Kata created, and files with the memory of guests.
func unnamedLeaks() (found []string) {
	for _, pattern := range []string{"/sys/class/net/*kata*", "/run/netns/cnitest-*", "/dev/shm/qemu_back_mem*"} {
		paths, _ := filepath.Glob(pattern)
		found = append(found, paths...)
	}
	return found
}

// preexistingLeaks are the resources that were there before the tests.
var preexistingLeaks = unnamedLeaks()

// processTexts returns the arguments and the environment of each process on this host, by its pid. A NUL follows each
// argument and variable.
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

// The programs that run a sandbox's microVM.
const (
	qemu = "qemu-system-x86_64"
	shim = "containerd-shim-kata-v2"
)

// processes returns the pids of the processes of program whose arguments or environment contain word, such as the id of
// a sandbox.
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

// microVMs returns the pids of the QEMU processes of this server's sandboxes: of those that it lists, and any other whose
// arguments or environment name the server's directory. It leaves out builds of templates, which begin and end at any time.
func (s *server) microVMs() []int {
	pids := processes(qemu, s.dir+"/")
	for _, id := range s.sandboxIDs() {
		pids = append(pids, processes(qemu, id)...)
	}
	slices.Sort(pids)
	builds := processes(qemu, templateBuild)
	return slices.DeleteFunc(slices.Compact(pids), func(pid int) bool { return slices.Contains(builds, pid) })
}

// templateBuild is in the arguments of a QEMU process that builds a template, and in no other.
const templateBuild = "\x00-name\x00template-"

// signalAll sends a signal to processes. It fails the test if pids is empty.
func signalAll(t *testing.T, pids []int, signal syscall.Signal) {
	t.Helper()
	if len(pids) == 0 {
		t.Fatalf("found no process to send %s to", signal)
	}
	for _, pid := range pids {
		if err := syscall.Kill(pid, signal); err != nil && !errors.Is(err, syscall.ESRCH) { // it may have ended with another
			t.Fatal(err)
		}
	}
}

// TestLeaksFindsEveryTrace tests that leaks finds every kind of resource that a sandbox can leave, and none of another
// sandbox.
func TestLeaksFindsEveryTrace(t *testing.T) {
	s, err := newServer()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(s.dir) })
	id := fmt.Sprintf("leaktest%x", time.Now().UnixNano()) // on no path but those below
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

	traces := append(paths, fmt.Sprintf("process %d:", child.Process.Pid), " "+mounted+" ")
	found := fmt.Sprint(s.leaks("", []string{id}))
	for _, trace := range traces {
		if !strings.Contains(found, trace) {
			t.Errorf("leaks did not report %s:\n%s", trace, found)
		}
	}
	found = fmt.Sprint(s.leaks("", []string{id + "x"}))
	for _, trace := range traces {
		if !slices.Contains(unnamedLeaks(), trace) && strings.Contains(found, trace) {
			t.Errorf("leaks reported %s, which belongs to another sandbox:\n%s", trace, found)
		}
	}
}
