package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestLifecycle(t *testing.T) {
	h, _ := startHost(t, newConfig(t))
	id := newVM(t, h.cfg)
	t.Setenv("OF_THE_DAEMON", "secret")
	s, _ := h.boot(t, id)

	vms := h.VMs()
	if len(vms) != 1 || vms[0].ID != id || vms[0].Shim != s.cmd.Process.Pid || vms[0].MemoryMiB != 128 || vms[0].VCPUs != 1 {
		t.Errorf("VMs() = %+v", vms)
	}
	if r, dir := readMark(vms[0].QEMU); r != roleQEMU || dir != h.dir(id) {
		t.Errorf("process %d is not the VM's QEMU", vms[0].QEMU)
	}
	found, err := markedProcesses()
	if err != nil || len(found[h.dir(id)]) < len(parts) {
		t.Fatalf("the VM's processes: %v, %v", found, err)
	}
	for _, p := range found[h.dir(id)] {
		env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", p.pid))
		if err != nil || strings.Contains(string(env), "secret") {
			t.Errorf("%s sees the environment %q, %v", p.role, env, err)
		}
	}
	if _, err := s.call("StartVM"); err == nil {
		t.Error("a second StartVM succeeded")
	}
	if _, err := s.call("CreateVM"); err == nil {
		t.Error("a second CreateVM succeeded")
	}

	s.mustCall(t, "StopVM")
	if !h.gone(t, id) {
		t.Error("StopVM left something")
	}
	s.mustCall(t, "StopVM")
	if log := h.log.String(); log != "" {
		t.Errorf("an ordinary life is no matter for the log: %s", log)
	}
}

func TestStartOfUnknownVM(t *testing.T) {
	h, _ := startHost(t, newConfig(t))
	_, err := startShim(t, h.cfg.Socket, newVM(t, h.cfg)).call("StartVM")
	wantError(t, err, "never created")
}

func TestPartKilled(t *testing.T) {
	for _, part := range parts {
		t.Run(string(part), func(t *testing.T) {
			h, _ := startHost(t, newConfig(t))
			id := newVM(t, h.cfg)
			s, _ := h.boot(t, id)
			h.killPart(t, id, part)
			eventually(t, "the VM is gone", func() bool { return h.gone(t, id) })
			s.mustCall(t, "StopVM") // as the real shim does
			if !strings.Contains(h.log.String(), "lost a process") {
				t.Errorf("the log does not say so: %s", h.log)
			}
		})
	}
}

func TestShimKilled(t *testing.T) {
	h, _ := startHost(t, newConfig(t))
	id := newVM(t, h.cfg)
	s, _ := h.boot(t, id)
	s.kill()
	eventually(t, "the VM is gone", func() bool { return h.gone(t, id) })
}

func TestRemoveRunning(t *testing.T) {
	h, _ := startHost(t, newConfig(t))
	id := newVM(t, h.cfg)
	s, _ := h.boot(t, id)
	for range 2 {
		if err := h.Remove(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	if !h.gone(t, id) {
		t.Error("Remove left something")
	}
	if h.log.String() != "" {
		t.Errorf("what was asked for is no matter for the log: %s", h.log)
	}
	s.mustCall(t, "StopVM") // as the real shim does when its guest is gone
}

// A hanging QEMU must not make Remove wait for the boot's limit.
func TestRemoveWhileBooting(t *testing.T) {
	cfg := newConfig(t)
	cfg.QEMU = filepath.Join(filepath.Dir(cfg.Dir), "qemu")
	if err := os.WriteFile(cfg.QEMU, []byte("#!/bin/sh\nexec /bin/sleep 1000\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	h, _ := startHost(t, cfg)
	id := newVM(t, cfg)
	s := startShim(t, cfg.Socket, id)
	s.mustCall(t, "CreateVM")
	started := make(chan error, 1)
	go func() {
		_, err := s.call("StartVM")
		started <- err
	}()
	eventually(t, "QEMU runs", func() bool { return h.VMs()[0].QEMU != 0 })
	if err := h.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	wantError(t, <-started, "removed meanwhile")
	if !h.gone(t, id) {
		t.Error("something is left")
	}
}

// A process amid its execve shows no mark, and is ended nonetheless.
func TestRemoveEndsUnmarkedChildren(t *testing.T) {
	h, _ := startHost(t, newConfig(t))
	id := newVM(t, h.cfg)
	startShim(t, h.cfg.Socket, id).mustCall(t, "CreateVM")
	m := h.lookup(id)
	child := exec.Command("/bin/sleep", "1000")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	m.children = append(m.children, child.Process)
	ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
	defer cancel()
	if err := h.Remove(ctx, id); err != nil {
		t.Fatal(err)
	}
	if err := child.Process.Signal(unix.Signal(0)); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("the child lives on: %v", err)
	}
}

// A boot that hangs where nothing can end it does not hold who wants the VM removed.
func TestRemoveGivesUpInTime(t *testing.T) {
	h, _ := startHost(t, newConfig(t))
	id := newVM(t, h.cfg)
	startShim(t, h.cfg.Socket, id).mustCall(t, "CreateVM")
	m := h.lookup(id)
	m.work <- struct{}{}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	wantError(t, h.Remove(ctx, id), "its boot or removal")
	<-m.work
	if err := h.Remove(t.Context(), id); err != nil || !h.gone(t, id) {
		t.Errorf("later: %v", err)
	}
}

// A moment without descriptors is no end of the service.
func TestServeWithoutDescriptors(t *testing.T) {
	h, _ := startHost(t, newConfig(t))
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conn := os.NewFile(uintptr(fd), "socket")
	defer conn.Close()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	none := limit
	none.Cur = 0
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	err = unix.Connect(fd, &unix.SockaddrUnix{Name: h.cfg.Socket})
	eventually(t, "the log tells", func() bool { return strings.Contains(h.log.String(), "trying again") })
	if err := errors.Join(err, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)); err != nil {
		t.Fatal(err)
	}
	if _, err := callHypervisor(h.cfg.Socket, newVM(t, h.cfg), "StopVM"); err != nil {
		t.Errorf("after that: %v", err)
	}
}

func TestRecoverAdopts(t *testing.T) {
	h, _ := startHost(t, newConfig(t))
	id := newVM(t, h.cfg)
	s, health := h.boot(t, id)
	before := h.VMs()[0]
	h.stop()
	checkHealth(t, health) // nobody needs msbd for that

	h, recovery := startHost(t, h.cfg)
	if len(recovery.Adopted) != 1 || recovery.Adopted[0] != id || len(recovery.Removed) != 0 {
		t.Fatalf("Recover = %+v", recovery)
	}
	after := h.VMs()[0]
	if !after.Since.Equal(before.Since) {
		t.Errorf("Since = %v, not %v", after.Since, before.Since)
	}
	if after.Since = before.Since; after != before {
		t.Errorf("adopted %+v, not %+v", after, before)
	}
	checkHealth(t, health)
	s.mustCall(t, "StopVM")
	if !h.gone(t, id) {
		t.Error("StopVM left something")
	}
}

func TestRecoverWatches(t *testing.T) {
	h, _ := startHost(t, newConfig(t))
	id := newVM(t, h.cfg)
	s, _ := h.boot(t, id)
	h.stop()
	h, _ = startHost(t, h.cfg)
	s.kill()
	eventually(t, "the VM is gone", func() bool { return h.gone(t, id) })
}

func TestRecoverAfterDeaths(t *testing.T) {
	for _, victim := range []string{"shim", string(roleQEMU), string(roleVirtiofsd)} {
		t.Run(victim, func(t *testing.T) {
			h, _ := startHost(t, newConfig(t))
			id := newVM(t, h.cfg)
			s, _ := h.boot(t, id)
			h.stop()
			if victim == "shim" {
				s.kill()
			} else {
				h.killPart(t, id, role(victim))
			}
			h, recovery := startHost(t, h.cfg)
			if removed := len(recovery.Removed) == 1; removed != (victim == "shim") {
				t.Errorf("Recover = %+v", recovery)
			}
			// A VM that lost another part is left to its shim to report, and taken down.
			eventually(t, "the VM is gone", func() bool { return h.gone(t, id) })
		})
	}
}

// What a crash of msbd can leave at any step, and what never was a VM.
func TestRecoverRemovesDebris(t *testing.T) {
	tests := map[string]func(t *testing.T, dir string){
		"garbage": func(t *testing.T, dir string) {
			markedSleep(t, roleQEMU, dir)
			writeFile(t, filepath.Join(dir, stateFile), "{")
		},
		"no state": func(t *testing.T, dir string) {
			markedSleep(t, roleVirtiofsd, dir)
			writeFile(t, filepath.Join(dir, stateFile+".new"), "")
		},
		"no directory": func(t *testing.T, dir string) { markedSleep(t, roleQEMU, dir) },
		"another's state": func(t *testing.T, dir string) {
			writeFile(t, filepath.Join(dir, stateFile), `{"id":"other","shim":{"pid":1}}`)
		},
		// The pid lives, but it belongs to a process that began later.
		"reused pid": func(t *testing.T, dir string) {
			writeFile(t, filepath.Join(dir, stateFile), `{"id":"`+filepath.Base(dir)+`","shim":{"pid":1,"start":1}}`)
		},
	}
	for name, leave := range tests {
		t.Run(name, func(t *testing.T) {
			cfg := newConfig(t)
			id := newVM(t, cfg)
			leave(t, filepath.Join(cfg.Dir, id))
			h, recovery := startHost(t, cfg)
			if len(recovery.Removed) != 1 || recovery.Removed[0] != id || len(recovery.Adopted) != 0 {
				t.Errorf("Recover = %+v", recovery)
			}
			if !h.gone(t, id) {
				t.Error("something is left")
			}
			if !strings.Contains(h.log.String(), id) {
				t.Error("the log does not mention it")
			}
		})
	}
}

func TestBootFailures(t *testing.T) {
	t.Run("QEMU refuses", func(t *testing.T) {
		cfg := newConfig(t)
		cfg.Kernel = cfg.Initrd // no kernel at all
		err := failBoot(t, cfg)
		wantError(t, err, "QEMU ended", "qemu.log: ", "kernel")
	})
	t.Run("the guest panics", func(t *testing.T) {
		cfg := newConfig(t)
		cfg.Initrd = filepath.Join(filepath.Dir(cfg.Dir), "initrd")
		writeFile(t, cfg.Initrd, "no archive")
		err := failBoot(t, cfg)
		wantError(t, err, "Kernel panic", "the whole console is in")
		kept, err := filepath.Glob(filepath.Join(cfg.Dir, FailedDir, "*.log"))
		if err != nil || len(kept) != 1 {
			t.Errorf("kept consoles: %v, %v", kept, err)
		}
	})
}

// A Service without programs looks after the VMs of an earlier one, and starts none.
func TestServiceWithoutPrograms(t *testing.T) {
	cfg := newConfig(t)
	h, _ := startHost(t, cfg)
	id := newVM(t, cfg)
	s, health := h.boot(t, id)
	h.stop()

	bare := Config{Socket: cfg.Socket, Dir: cfg.Dir}
	h, recovery := startHost(t, bare)
	if len(recovery.Adopted) != 1 {
		t.Fatalf("Recover = %+v", recovery)
	}
	checkHealth(t, health)
	_, err := startShim(t, cfg.Socket, "other").call("CreateVM")
	wantError(t, err, "another hypervisor")
	s.mustCall(t, "StopVM")
	if !h.gone(t, id) {
		t.Error("StopVM left something")
	}
}

func failBoot(t *testing.T, cfg Config) error {
	t.Helper()
	h, _ := startHost(t, cfg)
	id := newVM(t, cfg)
	s := startShim(t, cfg.Socket, id)
	s.mustCall(t, "CreateVM")
	_, err := s.call("StartVM")
	if !h.gone(t, id) {
		t.Error("the failed boot left something")
	}
	return err
}

func TestNewRefuses(t *testing.T) {
	tests := map[string]struct {
		change func(t *testing.T, c *Config)
		class  error
		says   string
	}{
		"no kernel":      {func(_ *testing.T, c *Config) { c.Kernel = "/nowhere/vmlinux" }, errdefs.ErrFailedPrecondition, "/nowhere/vmlinux"},
		"no initramfs":   {func(_ *testing.T, c *Config) { c.Initrd = "" }, errdefs.ErrFailedPrecondition, "initramfs"},
		"long directory": {func(_ *testing.T, c *Config) { c.Dir = "/tmp/" + strings.Repeat("x", 60) }, errdefs.ErrInvalidArgument, "longer than"},
		"relative":       {func(_ *testing.T, c *Config) { c.Dir = "vm" }, errdefs.ErrInvalidArgument, "absolute"},
		"colon in path":  {func(_ *testing.T, c *Config) { c.Dir = "/tmp/a:b" }, errdefs.ErrInvalidArgument, "letters"},
		"accelerator":    {func(_ *testing.T, c *Config) { c.Accelerator = "hvf" }, errdefs.ErrInvalidArgument, "kvm or tcg"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			cfg := newConfig(t)
			tt.change(t, &cfg)
			_, err := New(cfg)
			wantError(t, err, tt.says)
			if !errors.Is(err, tt.class) {
				t.Errorf("%v is no %v", err, tt.class)
			}
		})
	}
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
