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

// readSignature asks the processor of whom it is a virtual one. Only machine code can.
const readSignature = `
import ctypes, mmap
# push rbx; mov eax, 0x40000000; cpuid; mov [rdi], ebx; mov [rdi+4], ecx; mov [rdi+8], edx; pop rbx; ret
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex('53b8000000400fa2891f894f048957085bc3'))
signature = ctypes.create_string_buffer(12)
ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ctypes.addressof(ctypes.c_char.from_buffer(code)))(signature)
print(signature.value.decode())
`

// TestStatusNamesHypervisor compares what the server tells its administrators with what is: on the host
// and in the guest.
func TestStatusNamesHypervisor(t *testing.T) {
	s, key := sharedSandbox(t)
	st, err := s.status()
	if err != nil {
		t.Fatal(err)
	}
	said := map[string]string{"hypervisor": st.Isolation.Hypervisor, "accelerator": st.Isolation.Accelerator}
	t.Logf("status says %v", said)
	for name, want := range hypervisorSettings {
		if said[name] != want {
			t.Errorf("%s is %s, want %s", name, said[name], want)
		}
	}
	pids := processes(qemu, s.sandboxID("box"))
	if len(pids) != 1 {
		t.Fatalf("the sandbox has the QEMUs %v", pids)
	}
	text := processTexts()[pids[0]]
	accelerated := strings.Contains(text, "accel=kvm") || strings.Contains(text, "-accel\x00kvm\x00")
	if accelerated != (st.Isolation.Accelerator == "kvm") {
		t.Errorf("QEMU runs as %q", text)
	}
	// msbd marks what it starts; Kata's driver has the guest's agent behind a socket of the host's kernel.
	marked, vsock := strings.Contains(text, "\x00MSB_VM="), strings.Contains(text, "vhost-vsock")
	if ours := st.Isolation.Hypervisor == "builtin"; marked != ours || vsock == ours {
		t.Errorf("QEMU is marked: %t, has a vsock: %t: %q", marked, vsock, text)
	}
	want := map[string]string{"kvm": "KVMKVMKVM\n", "tcg": "TCGTCGTCGTCG\n"}[st.Isolation.Accelerator]
	if got := s.python(t, key, "box", readSignature); got.text("stdout") != want {
		t.Errorf("the guest's processor is one of %+v, want %q", got, want)
	}
}

// TestHypervisorChangeKeepsSandboxes restarts the server with each other way to run sandboxes and back. Each
// serves those that the others have started, and cleans up after them.
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
					t.Errorf("%s: %s: %+v", when, sandbox, r)
				}
			}
			t.Cleanup(func() { s.call(key, "sandbox.stop", params{"sandbox": "guest"}) })
			there := t.Run("there", func(t *testing.T) { // and back at its end
				s.reconfigure(t, settings)
				works("adopted there", "box")
				s.mustCall(t, key, "sandbox.start", params{"sandbox": "guest"}, nil)
				s.python(t, key, "guest", "x = 41")
				works("started there", "guest")
				// A program of the host's comes as any bind mount does, one of our guest's out of that.
				mounts := s.command(t, key, "guest", "cat", "/proc/self/mountinfo").text("stdout")
				if ours := strings.Contains(mounts, " /msb-portal /.msb/portal "); ours == (name == "the host's Kata") {
					t.Errorf("the portal is our guest's: %t, in\n%s", ours, mounts)
				}
			})
			if !there {
				return
			}
			works("back again", "box")
			works("adopted back", "guest")
			guest := s.sandboxID("guest")
			signalAll(t, processes(shim, guest), syscall.SIGKILL)
			until(t, "the end of guest to be noticed", func() bool {
				a, err := s.call(key, "sandbox.command.run", params{"sandbox": "guest", "command": "true", "timeout": 5})
				return err == nil && a.Error != nil && a.Error.Code == -32005
			})
			until(t, "its remains to be removed", func() bool { return s.sandboxLeaks([]string{guest}) == nil })
			works("after another's end", "box")
			if s.sandboxID("box") != box {
				t.Error("box is not the same")
			}
		})
	}
}

// hostsKata makes a Kata installation of the host's own, from the server's, and the settings that name it.
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
		settings["hypervisor"] = "kata" // also where its configuration names msbd's hypervisor service
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
