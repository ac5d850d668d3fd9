package host

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/backend/disk"
)

// newInstall creates a directory with a guest and with programs that report versions as the real ones do.
func newInstall(t *testing.T) (Options, Server) {
	t.Helper()
	dir := t.TempDir()
	for name, output := range map[string]string{
		"qemu": "QEMU emulator version 8.2.1 (Debian 1:8.2.1)", "virtiofsd": "virtiofsd 1.13.0",
		"containerd":              "containerd github.com/containerd/containerd 1.7.35 ",
		"containerd-shim-kata-v2": `Kata Containers containerd shim (Golang): id: "io.containerd.kata.v2", version: 3.31.0, commit: abc`,
		"rust-shim":               "Kata Containers containerd shim (Rust): id: io.containerd.kata.v2, version: 3.29.0, commit: abc",
	} {
		script := "#!/bin/sh\n[ \"$*\" = --version ] && cat <<'END'\n" + output + "\nEND\n"
		if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "guest"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"vmlinux", "initrd.img"} {
		if err := os.WriteFile(filepath.Join(dir, "guest", name), []byte("guest"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return Options{LibDir: dir, QEMU: filepath.Join(dir, "qemu"), Virtiofsd: filepath.Join(dir, "virtiofsd"), CacheDir: dir}, Server{
		StateDir: filepath.Join(dir, "not", "made", "yet"), Socket: filepath.Join(dir, "msbd.sock"), Listen: "127.0.0.1:0",
		DefaultMemoryMiB: 512, MaxMemoryMiB: 1024, Group: "root",
	}
}

// goodHost is a host that has everything except KVM.
var goodHost = map[string]string{
	"/proc/cpuinfo": amd, "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    4194304 kB\n", "/proc/filesystems": "nodev\toverlay\n",
	"/etc/os-release": "PRETTY_NAME=\"Debian GNU/Linux 12\"\n", "/sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids\n", "/dev/vhost-vsock": "",
	"/dev/net/tun": "-> /dev/net/tun",
}

// goodHostWith returns goodHost with one file added or replaced.
func goodHostWith(path, content string) map[string]string {
	files := map[string]string{path: content}
	for p, c := range goodHost {
		if p != path {
			files[p] = c
		}
	}
	return files
}

func TestExamine(t *testing.T) {
	kataConfig := filepath.Join(t.TempDir(), "kata.toml")
	if err := os.WriteFile(kataConfig, []byte("[hypervisor.clh]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	type change = func(*Options, *Server)
	for name, tt := range map[string]struct {
		files  map[string]string
		change change
		check  string
		want   Status
		text   []string // parts of its detail or remedy
	}{
		"system":        {check: "system", want: OK, text: []string{"Debian GNU/Linux 12, Linux 6.1.0-9-amd64"}},
		"old kernel":    {files: goodHostWith("/proc/sys/kernel/osrelease", "4.19.0-27-amd64"), check: "system", want: Problem, text: []string{"5.10"}},
		"container":     {files: goodHostWith("/proc/self/ns/pid", inDocker), check: "system", want: OK, text: []string{"in a container"}},
		"cgroup v2":     {check: "cgroups", want: OK, text: []string{"v2: cpu, memory"}},
		"cgroup, few":   {files: goodHostWith("/sys/fs/cgroup/cgroup.controllers", "cpu pids"), check: "cgroups", want: Problem, text: []string{"v2 without memory, cpuset"}},
		"no KVM":        {check: "KVM", want: Warning, text: []string{"there is no /dev/kvm", "modprobe kvm_amd"}},
		"no KVM, kata":  {change: func(o *Options, _ *Server) { o.Hypervisor = Kata }, check: "KVM", want: Problem, text: []string{"modprobe kvm_amd"}},
		"no KVM, kvm":   {change: func(o *Options, _ *Server) { o.Accelerator = KVM }, check: "KVM", want: Problem, text: []string{"modprobe kvm_amd"}},
		"no KVM, tcg":   {change: func(o *Options, _ *Server) { o.Accelerator = TCG }, check: "KVM", want: OK, text: []string{"not used, because accelerator tcg is configured"}},
		"no KVM at all": {files: goodHostWith("/proc/cpuinfo", virtual(bare)), check: "KVM", want: Warning, text: []string{enableNesting}},
		"vsock":         {change: func(o *Options, _ *Server) { o.Hypervisor = Kata }, check: "vhost-vsock", want: OK, text: []string{"usable"}},
		"QEMU":          {check: "QEMU", want: OK, text: []string{"8.2.1"}},
		"no QEMU":       {change: func(o *Options, _ *Server) { o.QEMU = "/none" }, check: "QEMU", want: Problem, text: []string{"/none is not an executable file", "apt install"}},
		"other QEMU":    {change: func(o *Options, _ *Server) { o.QEMU = "/bin/true" }, check: "QEMU", want: Problem, text: []string{"for its version"}},
		"virtiofsd":     {change: func(o *Options, _ *Server) { o.Hypervisor = Kata }, check: "virtiofsd", want: OK, text: []string{"1.13.0 (Rust)"}},
		"mkfs.erofs":    {check: "mkfs.erofs", want: OK, text: []string{"/mkfs.erofs"}},
		"mkfs.ext4":     {check: "mkfs.ext4", want: OK, text: []string{"/mkfs.ext4"}},
		"Kata":          {check: "Kata", want: OK, text: []string{"3.31.0, built in"}},
		"old Kata": {change: func(o *Options, _ *Server) { o.KataShim = filepath.Join(o.LibDir, "rust-shim") }, check: "Kata", want: Warning,
			text: []string{"3.29.0, from the host, Rust runtime", "CVE-2026-47243", "kata-shim"}},
		"Kata's configuration": {change: func(o *Options, _ *Server) { o.KataConfig = kataConfig }, check: "Kata", want: OK, text: []string{kataConfig + " configures clh"}},
		"no configuration":     {change: func(o *Options, _ *Server) { o.KataConfig = "/none.toml" }, check: "Kata", want: Problem, text: []string{"/none.toml"}},
		"no shim":              {change: func(o *Options, _ *Server) { o.KataShim = "/none" }, check: "Kata", want: Problem, text: []string{"/none"}},
		"containerd":           {check: "containerd", want: OK, text: []string{"1.7.35, built in"}},
		"no containerd":        {change: func(_ *Options, s *Server) { s.Containerd = "/none.sock" }, check: "containerd", want: Problem, text: []string{"/none.sock"}},
		"guest":                {check: "guest", want: OK},
		"no guest":             {change: func(o *Options, _ *Server) { os.Remove(filepath.Join(o.LibDir, "guest/vmlinux")) }, check: "guest", want: Problem, text: []string{"vmlinux", "make build guest"}},
		"portal":               {change: func(o *Options, _ *Server) { o.KataConfig = kataConfig }, check: "guest", want: Problem, text: []string{"msb-portal"}},
		"memory":               {check: "memory", want: OK, text: []string{"4.0 GiB available, enough for 6 sandboxes"}},
		"little memory":        {change: func(_ *Options, s *Server) { s.MaxMemoryMiB = 16 << 10 }, check: "memory", want: Warning, text: []string{"16.0 GiB", "max-memory-mib"}},
		"no memory":            {change: func(_ *Options, s *Server) { s.DefaultMemoryMiB = 4000 }, check: "memory", want: Problem, text: []string{"enough for 0"}},
		"disk":                 {check: "disk", want: OK, text: []string{"free in"}},
		"overlayfs":            {check: "overlayfs", want: OK},
		"overlayfs, a module":  {files: goodHostWith("/proc/filesystems", "ext4"), check: "overlayfs", want: OK, text: []string{"module"}},
		"clock":                {check: "clock"},
		"system log":           {check: "system log", want: OK},
		"few open files":       {change: func(_ *Options, s *Server) { s.MaxConnections = 1 << 40 }, check: "open files", want: Warning, text: []string{"LimitNOFILE="}},
		"group":                {check: "group", want: OK, text: []string{"members of root"}},
		"no group":             {change: func(_ *Options, s *Server) { s.Group = "nobodys" }, check: "group", want: OK, text: []string{"groupadd --system nobodys"}},
		"free address":         {check: "address", want: OK, text: []string{"is free"}},
		"address in use":       {change: func(_ *Options, s *Server) { s.Listen = busy.Addr().String() }, check: "address", want: Problem, text: []string{"in use", "--port"}},
	} {
		t.Run(name, func(t *testing.T) {
			files := tt.files
			if files == nil {
				files = goodHost
			}
			m := newMachine(t, files)
			o, s := newInstall(t)
			if tt.change != nil {
				tt.change(&o, &s)
			}
			r := m.examine(t.Context(), o, s)
			for _, c := range r.Checks {
				if c.Name != tt.check {
					continue
				}
				if tt.want != "" && c.Status != tt.want {
					t.Errorf("%+v, want %s", c, tt.want)
				}
				if (c.Status == OK) != (c.Remedy == "") {
					t.Errorf("%+v: a check must have a remedy unless it is OK", c)
				}
				for _, text := range tt.text {
					if !strings.Contains(c.Detail+"\n"+c.Remedy, text) {
						t.Errorf("%+v, want %q in it", c, text)
					}
				}
				return
			}
			t.Errorf("no check %q: %+v", tt.check, r)
		})
	}
}

// The report's status is that of its worst check. The report has the route that sandboxes would take.
func TestReport(t *testing.T) {
	m := newMachine(t, goodHostWith("/proc/cpuinfo", amd))
	o, s := newInstall(t)
	r := m.examine(t.Context(), o, s, Check{Name: "settings", Status: OK})
	if r.Status != Warning || r.Isolation == nil || r.Isolation.Advice == nil || r.Isolation.Hypervisor != Builtin || r.Checks[0].Name != "settings" {
		t.Errorf("%+v", r)
	}
	o.Hypervisor, o.Accelerator = Builtin, TCG
	if r := m.examine(t.Context(), o, s); r.Isolation == nil || r.Isolation.Advice == nil { // scripts get [] instead of null
		t.Errorf("%+v", r)
	}
	if r := m.examine(t.Context(), o, s, Check{Name: "settings", Status: Problem}); r.Status != Problem {
		t.Errorf("%+v", r)
	}
	o.Hypervisor = "xen"
	if r := m.examine(t.Context(), o, s); r.Status != Problem || r.Isolation != nil || r.Checks[len(r.Checks)-1].Name != "isolation" {
		t.Errorf("%+v", r)
	}
}

// The programs that make disks are needed, unless Kata's own driver runs the microVMs.
func TestExamineWithoutMkfs(t *testing.T) {
	m := newMachine(t, goodHost)
	o, s := newInstall(t)
	t.Setenv("PATH", t.TempDir())
	if path, err := disk.MkfsErofs.Find(); err == nil {
		t.Skipf("%s is found without PATH", path)
	}
	erofs := func() (found []Check) {
		for _, c := range m.examine(t.Context(), o, s).Checks {
			if c.Name == "mkfs.erofs" {
				found = append(found, c)
			}
		}
		return found
	}
	if c := erofs(); len(c) != 1 || c[0].Status != Problem || !strings.Contains(c[0].Detail, "not installed") || c[0].Remedy != "apt install erofs-utils" {
		t.Errorf("%+v", c)
	}
	o.KataConfig = filepath.Join(t.TempDir(), "kata.toml")
	if c := erofs(); len(c) != 0 {
		t.Errorf("with Kata's own driver: %+v", c)
	}
}

// The host must be able to make networks, unless Kata's own driver runs the microVMs.
func TestExamineNetwork(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	o, _ := newInstall(t)
	e := examination{machine: newMachine(t, goodHostWith("/dev/net/tun", "-> /none")), Options: o}
	if c := e.network(t.Context()); c.Status != Problem || c.Detail != "there is no /dev/net/tun" || !strings.Contains(c.Remedy, "modprobe tun") {
		t.Errorf("without tun: %+v", c)
	}
	e.machine = newMachine(t, goodHost)
	if c := e.network(t.Context()); c.Status != OK {
		t.Errorf("%+v", c)
	}
	asNobody(func() {
		if c := e.network(t.Context()); c.Status != Warning || c.Remedy != asRoot || !strings.Contains(c.Detail, "not checked") {
			t.Errorf("as nobody: %+v", c)
		}
	})
	e.Hypervisor = Kata
	if c := e.network(t.Context()); c.Name != "" {
		t.Errorf("with Kata's own driver: %+v", c)
	}
}

// Examine changes nothing, neither on this host nor on a simulated one.
func TestExamineChangesNothing(t *testing.T) {
	o, s := newInstall(t)
	before := run(t, "find", o.LibDir, "-printf", "%p %T@ %s\n")
	Examine(t.Context(), o, s)
	newMachine(t, goodHostWith("/dev/kvm", "-> /dev/kvm")).examine(t.Context(), o, s) // tests KVM's speed if this host has the device
	if after := run(t, "find", o.LibDir, "-printf", "%p %T@ %s\n"); after != before {
		t.Errorf("before:\n%safter:\n%s", before, after)
	}
}

// An address in use by the running server is no problem. If this user may not open the server's socket, it is a
// warning.
func TestExamineRunningServer(t *testing.T) {
	o, s := newInstall(t)
	socket, err := net.Listen("unix", s.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	e := examination{Options: o, Server: s}
	if c := e.port(t.Context()); c.Status != OK || !strings.Contains(c.Detail, "a server is running") {
		t.Errorf("%+v", c)
	}
	if err := os.Chmod(s.Socket, 0); err != nil {
		t.Fatal(err)
	}
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	e.Listen = busy.Addr().String()
	for _, dir := range []string{o.LibDir, filepath.Dir(o.LibDir)} { // so that another user can reach the socket
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	asNobody(func() {
		if c := e.port(t.Context()); c.Status != Warning || c.Remedy != asRoot {
			t.Errorf("%+v", c)
		}
	})
}

// A user who is not root gets warnings about what could not be checked.
func TestExamineAsNobody(t *testing.T) {
	m := newMachine(t, goodHostWith("/dev/kvm", ""))
	o, s := newInstall(t)
	for _, path := range []string{m.root, filepath.Dir(m.root)} { // so that another user can read the files
		if err := os.Chmod(path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(m.root, "dev/kvm"), 0); err != nil {
		t.Fatal(err)
	}
	o.Accelerator = KVM
	asNobody(func() {
		r := m.examine(t.Context(), o, s)
		if r.Isolation != nil {
			t.Errorf("%+v", r.Isolation)
		}
		for _, c := range r.Checks {
			if c.Name == "KVM" && (c.Status != Warning || !strings.Contains(c.Detail, "not checked")) || c.Name == "isolation" {
				t.Errorf("%+v", c)
			}
		}
		r = Examine(t.Context(), o, s)
		for _, c := range r.Checks {
			if c.Name == "user" && (c.Status != Warning || c.Remedy != asRoot || !strings.Contains(c.Detail, "uid "+strconv.Itoa(os.Geteuid()))) {
				t.Errorf("%+v", c)
			}
		}
	})
}

// combinedOutput returns when ctx ends, even if the program or a child process of it hangs.
func TestCombinedOutputTimesOut(t *testing.T) {
	path := filepath.Join(t.TempDir(), "hangs")
	pipe := path + ".pipe"
	if err := errors.Join(os.WriteFile(path, []byte("#!/bin/sh\ncat "+pipe+"\n"), 0o700), unix.Mkfifo(pipe, 0o600)); err != nil {
		t.Fatal(err)
	}
	writer, err := os.OpenFile(pipe, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close() // ends cat
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := combinedOutput(ctx, path); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

// The state directory must not be on an overlayfs, as in most containers, or on a read-only or full file system. With
// Kata's own driver, /dev/shm must have room for the memory of guests.
func TestFileSystems(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"lower", "upper", "work", "merged", "tmpfs"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mount := func(source, target, kind string, flags uintptr, data string) {
		t.Helper()
		if err := unix.Mount(source, target, kind, flags, data); err != nil {
			t.Skipf("mount %s: %v", kind, err)
		}
		t.Cleanup(func() { _ = unix.Unmount(target, unix.MNT_DETACH) })
	}
	merged, tmpfs := filepath.Join(dir, "merged"), filepath.Join(dir, "tmpfs")
	mount("overlay", merged, "overlay", 0, "lowerdir="+dir+"/lower,upperdir="+dir+"/upper,workdir="+dir+"/work")
	mount("tmpfs", tmpfs, "tmpfs", unix.MS_RDONLY, "size=1m")
	for path, want := range map[string]string{merged: "on an overlayfs", tmpfs: "read-only"} {
		e := examination{Server: Server{StateDir: filepath.Join(path, "state")}}
		if c := e.disk(t.Context()); c.Status != Problem || !strings.Contains(c.Detail, want) {
			t.Errorf("%+v", c)
		}
	}
	if err := unix.Mount("", tmpfs, "", unix.MS_REMOUNT, "size=1m"); err != nil {
		t.Fatal(err)
	}
	e := examination{Server: Server{StateDir: tmpfs}}
	if c := e.disk(t.Context()); c.Status != Problem || !strings.Contains(c.Detail, "1 MiB free") {
		t.Errorf("%+v", c)
	}

	// Kata's own driver keeps guests' memory in /dev/shm.
	m := newMachine(t, goodHost)
	mountpoint := filepath.Join(m.root, "dev/shm")
	if err := os.Mkdir(mountpoint, 0o755); err != nil {
		t.Fatal(err)
	}
	mount("tmpfs", mountpoint, "tmpfs", 0, "size=1g")
	for memory, want := range map[int]Status{256: OK, 1000: Problem} {
		e := examination{machine: m, Server: Server{DefaultMemoryMiB: memory, MaxMemoryMiB: memory}, route: Route{Hypervisor: Kata}}
		if c := e.memory(t.Context()); c.Status != want || !strings.Contains(c.Detail, "/dev/shm") {
			t.Errorf("%+v, want %s", c, want)
		}
	}
	if err := os.WriteFile(m.root+"/proc/meminfo", []byte("MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if available, total, err := m.memory(Route{Hypervisor: Kata}); err != nil || available != 1<<30 || total != 1<<30 {
		t.Errorf("memory for guests in /dev/shm: %d of %d bytes, error %v", available, total, err)
	}
}
