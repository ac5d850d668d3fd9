package e2e

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// readSignature is a Python program that prints the hypervisor signature of the processor it runs on. The CPUID
// instruction, which returns it, can only be executed in machine code.
const readSignature = `
import ctypes, mmap
# push rbx; mov eax, 0x40000000; cpuid; mov [rdi], ebx; mov [rdi+4], ecx; mov [rdi+8], edx; pop rbx; ret
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex('53b8000000400fa2891f894f048957085bc3'))
signature = ctypes.create_string_buffer(12)
ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ctypes.addressof(ctypes.c_char.from_buffer(code)))(signature)
print(signature.value.decode())
`

// TestStatusNamesHypervisor compares the hypervisor and accelerator in the server's status with the QEMU process on the
// host and with the processor in the guest.
func TestStatusNamesHypervisor(t *testing.T) {
	s, key := sharedSandbox(t)
	st, err := s.status()
	if err != nil {
		t.Fatal(err)
	}
	reported := map[string]string{"hypervisor": st.Isolation.Hypervisor, "accelerator": st.Isolation.Accelerator}
	t.Logf("status reports %v", reported)
	for name, want := range hypervisorSettings {
		if reported[name] != want {
			t.Errorf("status reports %s %s, want %s", name, reported[name], want)
		}
	}
	pids := processes(qemu, s.sandboxID("box"))
	if len(pids) != 1 {
		t.Fatalf("the sandbox has the QEMU processes %v, want one", pids)
	}
	text := processTexts()[pids[0]]
	accelerated := strings.Contains(text, "accel=kvm") || strings.Contains(text, "-accel\x00kvm\x00")
	if accelerated != (st.Isolation.Accelerator == "kvm") {
		t.Errorf("status reports the accelerator %s, but QEMU runs as %q", st.Isolation.Accelerator, text)
	}
	// msbd sets MSB_VM for each QEMU that it starts itself. Kata's driver connects to the guest agent through vsock.
	marked, vsock := strings.Contains(text, "\x00MSB_VM="), strings.Contains(text, "vhost-vsock")
	if builtin := st.Isolation.Hypervisor == "builtin"; marked != builtin || vsock == builtin {
		t.Errorf("status reports the hypervisor %s, but QEMU has MSB_VM: %t, has a vsock: %t: %q", st.Isolation.Hypervisor, marked, vsock, text)
	}
	want := map[string]string{"kvm": "KVMKVMKVM\n", "tcg": "TCGTCGTCGTCG\n"}[st.Isolation.Accelerator]
	if got := s.python(t, key, "box", readSignature); want == "" || got.text("stdout") != want {
		t.Errorf("accelerator %q: the guest reads the hypervisor signature %+v, want %q", st.Isolation.Accelerator, got, want)
	}
}

// TestHypervisorChangeKeepsSandboxes restarts the server with each other hypervisor setting, and back. With each
// setting, the server must serve the sandboxes that were started with another one, and clean up after them.
func TestHypervisorChangeKeepsSandboxes(t *testing.T) {
	others := map[string]func(t *testing.T, s *server) map[string]string{"the host's Kata": hostsKata}
	for name, other := range map[string]string{"kata": "builtin", "builtin": "kata"} {
		if hypervisorSettings["hypervisor"] == name {
			others[other] = func(*testing.T, *server) map[string]string { return map[string]string{"hypervisor": other} }
		}
	}
	for name, settings := range others {
		t.Run(name, func(t *testing.T) {
			s, key := statefulSandbox(t)
			box, settings := s.sandboxID("box"), settings(t, s)
			works := func(when, sandbox string) {
				t.Helper()
				s.wantStateKept(t, key, sandbox, when)
				if r := s.command(t, key, sandbox, "sh", "-c", "exit 3"); r.ExitCode != 3 {
					t.Errorf("%s: sandbox %s: exit 3 returned %+v", when, sandbox, r)
				}
			}
			t.Cleanup(func() { s.call(key, "sandbox.stop", params{"sandbox": "guest"}) })
			ok := t.Run("changed", func(t *testing.T) { // the server returns to its own setting at the end of this subtest
				s.reconfigure(t, settings)
				works("adopted with "+name, "box")
				s.mustCall(t, key, "sandbox.start", params{"sandbox": "guest"}, nil)
				s.python(t, key, "guest", "x = 41")
				works("started with "+name, "guest")
				// With the host's Kata, the portal is bind-mounted from the host, because the guest may not contain it. Otherwise,
				// also if the host's configuration names msbd's hypervisor service, it is mounted from the file system of msbd's guest.
				mounts := s.command(t, key, "guest", "cat", "/proc/self/mountinfo").text("stdout")
				if fromGuest := strings.Contains(mounts, " /init /.msb-portal "); fromGuest == (name == "the host's Kata" && hypervisorSettings != nil) {
					t.Errorf("with %s, the portal is the one of msbd's guest: %t:\n%s", name, fromGuest, mounts)
				}
			})
			if !ok {
				return
			}
			works("adopted after the change back", "box")
			works("adopted after the change back", "guest")
			guest := s.sandboxID("guest")
			signalAll(t, processes(shim, guest), syscall.SIGKILL)
			until(t, "the server to report the end of sandbox guest", func() bool {
				a, err := s.call(key, "sandbox.command.run", params{"sandbox": "guest", "command": "true", "timeout": 5})
				return err == nil && a.Error != nil && a.Error.Code == -32005
			})
			until(t, "the removal of what sandbox guest left", func() bool { return s.sandboxLeaks([]string{guest}) == nil })
			works("after the end of sandbox guest", "box")
			if s.sandboxID("box") != box {
				t.Errorf("sandbox box has the id %s, want %s", s.sandboxID("box"), box)
			}
		})
	}
}

// hostsKata copies the server's Kata to a directory, as if the host had its own Kata installation. It returns the
// settings that select the copy.
func hostsKata(t *testing.T, s *server) map[string]string {
	t.Helper()
	dir := t.TempDir()
	settings := map[string]string{"kata-config": filepath.Join(dir, "configuration.toml"), "kata-shim": filepath.Join(dir, shim)}
	for name, from := range map[string]string{"kata-config": filepath.Join(s.runDir, "kata.toml"), "kata-shim": filepath.Join(bin, shim)} {
		if err := copyFile(settings[name], from); err != nil {
			t.Fatal(err)
		}
	}
	if hypervisorSettings != nil {
		settings["hypervisor"] = "kata" // even if the copied configuration names msbd's hypervisor service
	}
	return settings
}

func copyFile(to, from string) error {
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	target, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o700)
	if err != nil {
		return err
	}
	defer target.Close()
	if _, err := io.Copy(target, source); err != nil {
		return fmt.Errorf("copy %s: %w", from, err)
	}
	return nil
}
