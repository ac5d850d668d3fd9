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

	"github.com/msbd/msbd/daemon/internal/sys/process"
)

func TestLifecycle(t *testing.T) {
	h, _ := startService(t, newConfig(t))
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
	found := h.processes(t, id)
	if len(found) != 1 {
		t.Fatalf("the VM's processes: %v", found)
	}
	for _, p := range found {
		env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", p.PID))
		if err != nil || strings.Contains(string(env), "secret") {
			t.Errorf("process %d sees the environment %q, %v", p.PID, env, err)
		}
	}
	if _, err := s.call("StartVM"); err == nil {
		t.Error("a second StartVM succeeded")
	}
	if _, err := s.call("CreateVM"); err == nil {
		t.Error("a second CreateVM succeeded")
	}

	s.mustCall(t, "StopVM")
	if !h.isRemoved(t, id) {
		t.Error("StopVM did not remove the VM completely")
	}
	s.mustCall(t, "StopVM")
	if log := h.log.String(); log != "" {
		t.Errorf("log of a normal start and stop: %s, want none", log)
	}
}

func TestStartUnknownVM(t *testing.T) {
	h, _ := startService(t, newConfig(t))
	_, err := startShim(t, h.cfg.Socket, newVM(t, h.cfg)).call("StartVM")
	wantError(t, err, "not created")
}

// If QEMU dies, the service removes the VM and logs that.
func TestProcessKilled(t *testing.T) {
	h, _ := startService(t, newConfig(t))
	id := newVM(t, h.cfg)
	s, _ := h.boot(t, id)
	h.killProcess(t, id, roleQEMU)
	waitUntil(t, "the VM is gone", func() bool { return h.isRemoved(t, id) })
	s.mustCall(t, "StopVM") // as the real shim does
	if !strings.Contains(h.log.String(), "whose process has exited") {
		t.Errorf("the exit of the process is not in the log: %s", h.log)
	}
}

func TestShimKilled(t *testing.T) {
	h, _ := startService(t, newConfig(t))
	id := newVM(t, h.cfg)
	s, _ := h.boot(t, id)
	s.kill()
	waitUntil(t, "the VM is gone", func() bool { return h.isRemoved(t, id) })
}

func TestRemoveRunning(t *testing.T) {
	h, _ := startService(t, newConfig(t))
	id := newVM(t, h.cfg)
	s, _ := h.boot(t, id)
	for range 2 {
		if err := h.Remove(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	if !h.isRemoved(t, id) {
		t.Error("Remove did not remove the VM completely")
	}
	if h.log.String() != "" {
		t.Errorf("log of a requested removal: %s, want none", h.log)
	}
	s.mustCall(t, "StopVM") // as the real shim does when its guest is gone
}

// Remove cancels a boot in progress, even if QEMU hangs.
func TestRemoveWhileBooting(t *testing.T) {
	cfg := newConfig(t)
	cfg.QEMU = filepath.Join(filepath.Dir(cfg.Dir), "qemu")
	if err := os.WriteFile(cfg.QEMU, []byte("#!/bin/sh\nexec /bin/sleep 1000\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	h, _ := startService(t, cfg)
	id := newVM(t, cfg)
	s := h.start(t, id)
	s.mustCall(t, "CreateVM")
	started := make(chan error, 1)
	go func() {
		_, err := s.call("StartVM")
		started <- err
	}()
	m := h.lookup(id)
	waitUntil(t, "QEMU runs", func() bool { return m.process(roleQEMU).PID != 0 })
	waitUntil(t, "the shim waits for it", func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.started
	})
	if err := h.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	wantError(t, <-started, errRemoved.Error())
	if !h.isRemoved(t, id) {
		t.Error("Remove did not remove the VM completely")
	}
}

// Remove also kills a child whose mark is not visible, such as one during its execve.
func TestRemoveKillsUnmarkedChildren(t *testing.T) {
	h, _ := startService(t, newConfig(t))
	id := newVM(t, h.cfg)
	m := h.join(t, id)
	child := exec.Command("/bin/sleep", "1000")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	m.children = append(m.children, child.Process)
	ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
	defer cancel()
	if err := h.Remove(ctx, id); err != nil {
		t.Fatal(err)
	}
	if err := child.Process.Signal(unix.Signal(0)); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("the child still runs: %v", err)
	}
}

// Remove returns when its context ends, even if a boot hangs and cannot be canceled.
func TestRemoveTimesOut(t *testing.T) {
	h, _ := startService(t, newConfig(t))
	id := newVM(t, h.cfg)
	m := h.join(t, id)
	m.busy <- struct{}{}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	wantError(t, h.Remove(ctx, id), "its boot or removal")
	<-m.busy
	if err := h.Remove(t.Context(), id); err != nil || !h.isRemoved(t, id) {
		t.Errorf("Remove after the boot has ended: %v", err)
	}
}

// Serve survives a moment without free file descriptors.
func TestServeWithoutDescriptors(t *testing.T) {
	h, _ := startService(t, newConfig(t))
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
	waitUntil(t, "the error is in the log", func() bool { return strings.Contains(h.log.String(), "trying again") })
	if err := errors.Join(err, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)); err != nil {
		t.Fatal(err)
	}
	if _, err := callHypervisor(h.cfg.Socket, newVM(t, h.cfg), "StopVM"); err != nil {
		t.Errorf("StopVM with descriptors again: %v", err)
	}
}

// Recover adopts a running VM with its data.
func TestRecoverAdopts(t *testing.T) {
	h, _ := startService(t, newConfig(t))
	id := newVM(t, h.cfg)
	s, health := h.boot(t, id)
	before := h.VMs()[0]
	h.stop()
	checkHealth(t, health) // the VM keeps running without the service

	h, recovery := startService(t, h.cfg)
	if len(recovery.Adopted) != 1 || recovery.Adopted[0] != id || len(recovery.Removed) != 0 {
		t.Fatalf("Recover = %+v", recovery)
	}
	after := h.VMs()[0]
	if !after.Since.Equal(before.Since) {
		t.Errorf("Since = %v, want %v", after.Since, before.Since)
	}
	if after.Since = before.Since; after != before {
		t.Errorf("adopted %+v, want %+v", after, before)
	}
	checkHealth(t, health)
	s.mustCall(t, "StopVM")
	if !h.isRemoved(t, id) {
		t.Error("StopVM did not remove the VM completely")
	}
}

// Serve watches an adopted VM.
func TestServeWatchesAdopted(t *testing.T) {
	h, _ := startService(t, newConfig(t))
	id := newVM(t, h.cfg)
	s, _ := h.boot(t, id)
	h.stop()
	h, _ = startService(t, h.cfg)
	s.kill()
	waitUntil(t, "the VM is gone", func() bool { return h.isRemoved(t, id) })
}

// A process of the VM dies while no service is running.
func TestRecoverAfterDeaths(t *testing.T) {
	for _, victim := range []string{"shim", string(roleQEMU)} {
		t.Run(victim, func(t *testing.T) {
			h, _ := startService(t, newConfig(t))
			id := newVM(t, h.cfg)
			s, _ := h.boot(t, id)
			h.stop()
			if victim == "shim" {
				s.kill()
			} else {
				h.killProcess(t, id, role(victim))
			}
			h, recovery := startService(t, h.cfg)
			if removed := len(recovery.Removed) == 1; removed != (victim == "shim") {
				t.Errorf("Recover = %+v", recovery)
			}
			// A VM that lost another process is adopted, so that its shim can report the end, and then removed.
			waitUntil(t, "the VM is gone", func() bool { return h.isRemoved(t, id) })
		})
	}
}

// Recover removes what a crash of msbd can leave at any step, and invalid VM directories.
func TestRecoverRemovesLeftovers(t *testing.T) {
	tests := map[string]func(t *testing.T, dir string){
		"invalid state": func(t *testing.T, dir string) {
			startMarkedProcess(t, 0, "/bin/sleep", roleQEMU, dir)
			writeFile(t, filepath.Join(dir, stateFile), "{")
		},
		"no state": func(t *testing.T, dir string) {
			startMarkedProcess(t, 0, "/bin/sleep", roleVirtiofsd, dir)
			writeFile(t, filepath.Join(dir, stateFile+".new"), "")
		},
		"no directory": func(t *testing.T, dir string) { startMarkedProcess(t, 0, "/bin/sleep", roleQEMU, dir) },
		"state of another VM": func(t *testing.T, dir string) {
			writeFile(t, filepath.Join(dir, stateFile), `{"id":"other","shim":{"pid":1}}`)
		},
		"no shim": func(t *testing.T, dir string) {
			writeFile(t, filepath.Join(dir, stateFile), `{"id":"`+filepath.Base(dir)+`","shim":{"pid":0}}`)
		},
		// The pid exists, but belongs to a process that started later.
		"reused pid": func(t *testing.T, dir string) {
			writeFile(t, filepath.Join(dir, stateFile), `{"id":"`+filepath.Base(dir)+`","shim":{"pid":1,"start":1}}`)
		},
	}
	for name, prepare := range tests {
		t.Run(name, func(t *testing.T) {
			cfg := newConfig(t)
			id := newVM(t, cfg)
			prepare(t, filepath.Join(cfg.Dir, id))
			h, recovery := startService(t, cfg)
			if len(recovery.Removed) != 1 || recovery.Removed[0] != id || len(recovery.Adopted) != 0 {
				t.Errorf("Recover = %+v", recovery)
			}
			if !h.isRemoved(t, id) {
				t.Error("Recover did not remove the VM completely")
			}
			if !strings.Contains(h.log.String(), id) {
				t.Errorf("the log does not mention VM %s: %s", id, h.log)
			}
		})
	}
}

// A local user can start a process with the mark of a VM. It is neither adopted nor ended, and the VM's processes are
// found all the same, whether they are recorded or an earlier msbd, which recorded none, started them. The VM is one of an
// earlier version, which has a virtiofsd and no disks.
func TestPlantedProcesses(t *testing.T) {
	roles := []role{roleQEMU, roleVirtiofsd}
	for name, recorded := range map[string]bool{"recorded": true, "not recorded": false} {
		t.Run(name, func(t *testing.T) {
			h, _ := startService(t, newConfig(t))
			id := newVM(t, h.cfg)
			dir := h.dir(id)
			bin, err := os.MkdirTemp("/tmp", "vmm-bin") // another user must reach it
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(bin) })
			sleep, err := os.ReadFile("/bin/sleep")
			if err != nil {
				t.Fatal(err)
			}
			foreign, setuid := filepath.Join(bin, "foreign"), filepath.Join(bin, "setuid")
			for program, mode := range map[string]os.FileMode{bin: 0o755, foreign: 0o755, setuid: 0o755 | os.ModeSetuid} {
				if program != bin {
					writeFile(t, program, string(sleep))
				}
				if err := os.Chmod(program, mode); err != nil {
					t.Fatal(err)
				}
			}
			h.cfg.Programs = append(h.cfg.Programs, setuid)
			const nobody = 65534
			var planted []*exec.Cmd
			plant := func() {
				for _, r := range roles {
					planted = append(planted,
						startMarkedProcess(t, nobody, "/bin/sleep", r, dir),
						startMarkedProcess(t, nobody, setuid, r, dir),
						startMarkedProcess(t, 0, foreign, r, dir))
				}
			}
			plant() // with smaller pids than the VM's processes
			m := h.join(t, id)
			real := map[role]*exec.Cmd{}
			m.Disks, m.UID = nil, 0
			if err := writeState(m.dir, m.state); err != nil {
				t.Fatal(err)
			}
			for _, r := range roles {
				real[r] = startMarkedProcess(t, 0, "/bin/sleep", r, dir)
				if recorded {
					if err := m.adoptChild(r, real[r].Process); err != nil {
						t.Fatal(err)
					}
				}
			}
			plant()                                                                   // and with greater ones
			startMarkedProcess(t, nobody, "/bin/sleep", roleQEMU, h.dir("sb-absent")) // of a VM that does not exist
			h.stop()

			h, recovery := startService(t, h.cfg)
			if len(recovery.Adopted) != 1 || len(recovery.Removed) != 0 {
				t.Fatalf("Recover = %+v", recovery)
			}
			for _, r := range roles {
				if got, want := h.lookup(id).process(r).PID, real[r].Process.Pid; got != want {
					t.Errorf("adopted process %d as %s, want %d", got, r, want)
				}
			}
			planted[0].Process.Kill() // its end is not the end of the VM
			planted[0].Wait()
			// The end of a real process is.
			victim, other := roleQEMU, roleVirtiofsd
			if recorded {
				victim, other = other, victim
			}
			if err := real[victim].Process.Kill(); err != nil {
				t.Fatal(err)
			}
			waitUntil(t, "the VM is gone", func() bool { return h.isRemoved(t, id) })
			waitUntil(t, "its other process ends", func() bool {
				p, err := process.Open(real[other].Process.Pid)
				if p == nil || err != nil {
					return true
				}
				defer p.Close()
				return p.Dead()
			})
			if log := h.log.String(); strings.Count(log, "whose process has exited") != 1 {
				t.Errorf("log: %s", log)
			}
			for i, p := range planted[1:] {
				if err := p.Process.Signal(unix.Signal(0)); err != nil {
					t.Errorf("planted process %d (%s): %v", i+1, p.Path, err)
				}
			}
		})
	}
}

func TestBootFailures(t *testing.T) {
	t.Run("QEMU exits", func(t *testing.T) {
		cfg := newConfig(t)
		cfg.Kernel = cfg.Initrd // not a kernel
		err := failBoot(t, cfg)
		wantError(t, err, "QEMU exited", "qemu.log: ", "kernel")
	})
	t.Run("guest panics", func(t *testing.T) {
		cfg := newConfig(t)
		cfg.Initrd = filepath.Join(filepath.Dir(cfg.Dir), "initrd")
		writeFile(t, cfg.Initrd, "no archive")
		err := failBoot(t, cfg)
		wantError(t, err, "Kernel panic", "the complete console log is in")
		kept, err := filepath.Glob(filepath.Join(cfg.Dir, FailedDir, "*.log"))
		if err != nil || len(kept) != 1 {
			t.Errorf("kept consoles: %v, %v", kept, err)
		}
	})
}

// A guest that floods its console fills neither the disk nor the memory, also while no Service copies the console. It
// keeps running.
func TestConsoleIsBounded(t *testing.T) {
	cfg := newConfig(t)
	// The guest's firmware writes x to the serial port in a loop. It starts in the last 16 bytes:
	// mov dx, 0x3f8; mov al, 'x'; loop: out dx, al; jmp loop
	rom := make([]byte, 64<<10)
	copy(rom[len(rom)-16:], []byte{0xba, 0xf8, 0x03, 0xb0, 'x', 0xee, 0xeb, 0xfd})
	firmware := filepath.Join(filepath.Dir(cfg.Dir), "rom")
	writeFile(t, firmware, string(rom))
	qemu := filepath.Join(filepath.Dir(cfg.Dir), "qemu")
	if err := os.WriteFile(qemu, []byte("#!/bin/sh\nexec "+cfg.QEMU+" \"$@\" -bios "+firmware+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	cfg.QEMU = qemu
	h, _ := startService(t, cfg)
	id := newVM(t, cfg)
	m := h.join(t, id)
	if err := h.launch(m, memory{}); err != nil {
		t.Fatal(err)
	}
	console := filepath.Join(h.dir(id), consoleLog)
	size := func() int64 {
		info, err := os.Stat(console)
		if err != nil {
			return 0
		}
		return info.Size()
	}
	// biggest waits until the log has begun again, and returns its biggest size until then.
	biggest := func() (most int64) {
		waitUntil(t, "the console log begins again", func() bool {
			n := size()
			most = max(most, n)
			return n < most
		})
		return most
	}
	if n := biggest(); n > MaxLogSize {
		t.Errorf("the console log had %d bytes, want at most %d", n, MaxLogSize)
	}
	ticks := func() (n int) { // of processor time
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", h.VMs()[0].QEMU))
		if err != nil {
			t.Fatalf("QEMU has ended: %v", err)
		}
		fields := strings.Fields(string(stat[strings.LastIndex(string(stat), ")"):]))
		fmt.Sscan(fields[12], &n)
		return n
	}
	h.stop()
	last, first := size(), ticks()
	waitUntil(t, "the guest has tried to write more", func() bool { return ticks() > first+10 })
	if n := size(); n != last {
		t.Errorf("without a Service, the console log grew from %d to %d bytes", last, n)
	}
	h, _ = startService(t, cfg)
	if n := biggest(); n > MaxLogSize {
		t.Errorf("after a restart the console log had %d bytes, want at most %d", n, MaxLogSize)
	}
	if err := h.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
}

// A Service without programs manages the VMs of an earlier Service, and starts none.
func TestServiceWithoutPrograms(t *testing.T) {
	cfg := newConfig(t)
	h, _ := startService(t, cfg)
	id := newVM(t, cfg)
	s, health := h.boot(t, id)
	h.stop()

	h, recovery := startService(t, Config{Socket: cfg.Socket, Dir: cfg.Dir})
	if len(recovery.Adopted) != 1 {
		t.Fatalf("Recover = %+v", recovery)
	}
	checkHealth(t, health)
	wantError(t, h.Start(t.Context(), testSpec(cfg, "other")), "not configured to run VMs")
	s.mustCall(t, "StopVM")
	if !h.isRemoved(t, id) {
		t.Error("StopVM did not remove the VM completely")
	}
}

// failBoot starts a VM whose boot fails, and returns the error of StartVM.
func failBoot(t *testing.T, cfg Config) error {
	t.Helper()
	h, _ := startService(t, cfg)
	id := newVM(t, cfg)
	s := h.start(t, id)
	s.mustCall(t, "CreateVM")
	_, err := s.call("StartVM")
	if !h.isRemoved(t, id) {
		t.Error("the VM was not removed completely after the failed boot")
	}
	return err
}

func TestNewRefuses(t *testing.T) {
	tests := map[string]struct {
		change func(t *testing.T, c *Config)
		class  error
		want   string
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
			wantError(t, err, tt.want)
			if !errors.Is(err, tt.class) {
				t.Errorf("error %v, want class %v", err, tt.class)
			}
		})
	}
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
