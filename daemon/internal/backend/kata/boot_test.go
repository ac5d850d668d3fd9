package kata

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/msbd/msbd/daemon/internal/backend/hypervisor"
)

// A boot simulates a boot by Kata's own driver. Its QEMU is a fake process, but its console is a real socket.
type boot struct {
	*Runtime
	id      string
	console net.Listener
}

func newBoot(t *testing.T) *boot {
	t.Helper()
	r, _ := newTestRuntime(t)
	b := &boot{Runtime: r, id: newID(t)}
	vm := filepath.Join(vmRoot, b.id)
	for _, dir := range []string{vm, r.dir(b.id)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { os.RemoveAll(vm) })
	// The file shows that the shim has started QEMU, which may exit before it is seen.
	writeFile(t, filepath.Join(vm, "qmp.sock"), "")
	var err error
	if b.console, err = net.Listen("unix", filepath.Join(vm, "console.sock")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.console.Close() })
	return b
}

// writeConsole waits for a reader of the console, writes text, and closes the connection as a dying QEMU does.
func (b *boot) writeConsole(t *testing.T, text string) {
	t.Helper()
	conn, err := b.console.Accept()
	if err != nil {
		t.Error(err)
		return
	}
	conn.Write([]byte(text))
	conn.Close()
}

// hang blocks until ctx ends, like a shim that tries to reach a dead guest.
func hang(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

// The error of a boot has the last messages of the shim and of the console.
func TestBootWithDyingHypervisor(t *testing.T) {
	b := newBoot(t)
	qemu := startFake(t, newCgroup(t, cgroupParent+"/kata_"+b.id), "-name", "sandbox-"+b.id)
	writeFile(t, b.Containerd.LogFile(), `time="x" level=warning msg="nothing to see" sandbox=`+b.id+"\n"+
		`time="x" level=error msg="other sandbox" sandbox=sb-other`+"\n"+
		`time="x" level=error msg="qemu: \"x\" is no machine" error=EOF qemuPid=7 sandbox=`+b.id+" source=v\n")
	before := pidfds(t, qemu.Process.Pid)
	go func() {
		b.writeConsole(t, "Kernel panic\r\n\x1b[2J\u009b2Jat \xff all")
		// watchBoot has seen the hypervisor once it holds a descriptor of the process. The next test is for one that exits
		// before.
		for pidfds(t, qemu.Process.Pid) == before && t.Context().Err() == nil {
			time.Sleep(time.Millisecond)
		}
		qemu.Process.Kill()
	}()
	err := b.watchBoot(t.Context(), b.id, hang)
	wantError(t, err, errHypervisorExited.Error(), "\nshim: qemu: \"x\" is no machine: EOF\n", "\nconsole: Kernel panic\n\t[2J2Jat  all\n", "the complete console log is in")
	if strings.Contains(err.Error(), "nothing to see") || strings.Contains(err.Error(), "other sandbox") {
		t.Errorf("error %v, do not want a warning or another sandbox's message in it", err)
	}
	kept, err := os.ReadFile(filepath.Join(b.dir(hypervisor.FailedDir), b.id+".log"))
	if err != nil || !strings.HasPrefix(string(kept), "Kernel panic") {
		t.Errorf("kept %q, %v", kept, err)
	}
}

// pidfds returns how many descriptors of a process this process has.
func pidfds(t *testing.T, pid int) (n int) {
	t.Helper()
	infos, err := filepath.Glob("/proc/self/fdinfo/*")
	if err != nil || len(infos) == 0 {
		t.Errorf("this process has %d descriptors: %v", len(infos), err)
	}
	for _, info := range infos {
		text, _ := os.ReadFile(info) // it may be closed by now
		if strings.Contains(string(text), fmt.Sprintf("\nPid:\t%d\n", pid)) {
			n++
		}
	}
	return n
}

// The hypervisor exits before it can be seen, for example because it rejects an argument.
func TestBootWithUnseenHypervisor(t *testing.T) {
	defer func(timeout time.Duration) { launchTimeout = timeout }(launchTimeout)
	launchTimeout = 500 * time.Millisecond
	b := newBoot(t)
	err := b.watchBoot(t.Context(), b.id, hang)
	wantError(t, err, errHypervisorExited.Error())
}

// When the shim fails, it kills the hypervisor. The error is then the shim's, which has the cause.
func TestBootReturnsErrorOfShim(t *testing.T) {
	b := newBoot(t)
	qemu := startFake(t, newCgroup(t, cgroupParent+"/kata_"+b.id), "-name", "sandbox-"+b.id)
	want := errors.New("no such user")
	err := b.watchBoot(t.Context(), b.id, func(ctx context.Context) error {
		b.writeConsole(t, "hello")
		qemu.Process.Kill()
		qemu.Wait()
		return want
	})
	wantError(t, err, "no such user", "console: hello")
	if !errors.Is(err, want) || errors.Is(err, errHypervisorExited) {
		t.Errorf("error %v, want %v", err, want)
	}
}

func TestBootCanceled(t *testing.T) {
	b := newBoot(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	err := b.watchBoot(ctx, b.id, func(ctx context.Context) error {
		cancel(errors.New("the client disconnected"))
		return hang(ctx)
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want %v", err, context.Canceled)
	}
}

func TestBoot(t *testing.T) {
	b := newBoot(t)
	startFake(t, newCgroup(t, cgroupParent+"/kata_"+b.id), "-name", "sandbox-"+b.id)
	if err := b.watchBoot(t.Context(), b.id, func(context.Context) error { return nil }); err != nil {
		t.Error(err)
	}
	// msbd's hypervisor service watches its boots itself, so watchBoot returns the error unchanged.
	b.Settings = Settings{HypervisorSocket: "/run/x.sock"}
	want := errors.New("no such user")
	if err := b.watchBoot(t.Context(), b.id, func(context.Context) error { return want }); err != want {
		t.Errorf("error %v, want %v", err, want)
	}
}

// The last console output may arrive a moment after a boot has failed, so logConsole waits for it. It does not wait
// after a successful boot.
func TestLogConsoleWaitsForLastOutput(t *testing.T) {
	defer func(d time.Duration) { consoleDrain = d }(consoleDrain)
	consoleDrain = time.Hour
	for cause, want := range map[error]string{nil: "the end", errReady: ""} {
		b := newBoot(t)
		ctx, cancel := context.WithCancelCause(t.Context())
		done := make(chan struct{})
		go func() {
			b.logConsole(ctx, b.id, false)
			close(done)
		}()
		conn, err := b.console.Accept()
		if err != nil {
			t.Fatal(err)
		}
		cancel(cause)
		if cause == nil {
			time.Sleep(20 * time.Millisecond)
			conn.Write([]byte("the end"))
			conn.Close()
		}
		<-done
		conn.Close()
		if text, _ := os.ReadFile(b.consoleLog(b.id)); string(text) != want {
			t.Errorf("canceled with cause %v: the log has %q, want %q", cause, text, want)
		}
	}
}

func TestConsoleLogIsBounded(t *testing.T) {
	b := newBoot(t)
	go b.writeConsole(t, strings.Repeat("x", 3*hypervisor.MaxLogSize)+"end")
	b.logConsole(t.Context(), b.id, false)
	log, err := os.ReadFile(b.consoleLog(b.id))
	if err != nil || len(log) > hypervisor.MaxLogSize || !strings.HasSuffix(string(log), "end") {
		t.Errorf("the log has %d bytes, %v", len(log), err)
	}
}

// If a microVM ends, the end of its console is in the server's log unless the microVM was being removed.
func TestConsoleOfRunningMicroVM(t *testing.T) {
	for removing, text := range map[bool]string{false: "Kernel panic", true: "Bye"} {
		r, log := newTestRuntime(t)
		b := newBoot(t)
		r.RunDir = b.RunDir
		if removing {
			defer r.markRemoving(b.id)()
		}
		done := r.watchConsole(t.Context(), b.id)
		b.writeConsole(t, text)
		waitUntil(t, "the console is read", func() bool {
			got, _ := os.ReadFile(r.consoleLog(b.id))
			return string(got) == text
		})
		done()
		if logged := strings.Contains(log.String(), text); logged == removing {
			t.Errorf("removing %v: the server's log is %q", removing, log)
		}
		if kept := !missing(filepath.Join(r.dir(hypervisor.FailedDir), b.id+".log")); kept == removing {
			t.Errorf("removing %v: console log kept %v", removing, kept)
		}
	}
}

// The reason for the end of a microVM says if Kata's shim ended it.
func TestEndReason(t *testing.T) {
	r, _ := newTestRuntime(t)
	const id = "sb-1634ca3220e1ee80"
	// A line of Kata 3.
	pinged := `time="2026-11-30T00:49:36Z" level=warning msg="sandbox stopped unexpectedly" error="failed to ping agent: rpc error: ` +
		`code = DeadlineExceeded desc = CheckRequest timed out" name=containerd-shim-v2 pid=26361 sandbox=` + id + ` source=containerd-kata-shim-v2`
	for name, tt := range map[string]struct {
		log  string
		want string
	}{
		"no log":          {"", "other"},
		"no answer":       {"x\n" + pinged + "\ny\n", "its guest did not answer for 30 s, so Kata's shim ended it"},
		"another sandbox": {strings.Replace(pinged, id, id+"0", 1), "other"},
		"another error":   {strings.Replace(pinged, "DeadlineExceeded", "Unavailable", 1), "other"},
	} {
		t.Run(name, func(t *testing.T) {
			writeFile(t, r.Containerd.LogFile(), tt.log)
			if got := r.endReason(id, "other"); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}
