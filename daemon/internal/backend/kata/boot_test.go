package kata

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/msbd/msbd/daemon/internal/backend/hypervisor"
)

// A boot is one that Kata's own driver makes: its QEMU is a stand-in, with a console that is real.
type boot struct {
	*Runtime
	id      string
	console net.Listener
}

func newBoot(t *testing.T) *boot {
	t.Helper()
	r, _ := testRuntime(t)
	b := &boot{Runtime: r, id: newID(t)}
	vm := filepath.Join(vmRoot, b.id)
	for _, dir := range []string{vm, r.dir(b.id)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { os.RemoveAll(vm) })
	// As of a QEMU that has begun; it may end before anybody sees it.
	writeFile(t, filepath.Join(vm, "qmp.sock"), "")
	var err error
	if b.console, err = net.Listen("unix", filepath.Join(vm, "console.sock")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.console.Close() })
	return b
}

// say writes to the console when it has a reader, and hangs up as a dying QEMU does.
func (b *boot) say(t *testing.T, text string) {
	t.Helper()
	conn, err := b.console.Accept()
	if err != nil {
		t.Error(err)
		return
	}
	conn.Write([]byte(text))
	conn.Close()
}

// hang is a shim that calls a dead guest.
func hang(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

func TestBootOfDyingHypervisor(t *testing.T) {
	b := newBoot(t)
	qemu := play(t, makeCgroup(t, cgroupParent+"/kata_"+b.id), "-name", "sandbox-"+b.id)
	writeFile(t, b.Containerd.LogFile(), `time="x" level=warning msg="nothing to see" sandbox=`+b.id+"\n"+
		`time="x" level=error msg="another's" sandbox=sb-other`+"\n"+
		`time="x" level=error msg="qemu: \"x\" is no machine" error=EOF qemuPid=7 sandbox=`+b.id+" source=v\n")
	go func() {
		b.say(t, "Kernel panic\r\n\x1b[2J\u009b2Jat \xff all")
		qemu.Process.Kill()
	}()
	err := b.watchBoot(t.Context(), b.id, hang)
	wantError(t, err, errHypervisorEnded.Error(), "\nshim: qemu: \"x\" is no machine: EOF\n", "\nconsole: Kernel panic\n\t[2J2Jat  all\n", "the whole console is in")
	if strings.Contains(err.Error(), "nothing to see") || strings.Contains(err.Error(), "another") {
		t.Errorf("the error tells too much: %v", err)
	}
	kept, err := os.ReadFile(filepath.Join(b.dir(hypervisor.FailedDir), b.id+".log"))
	if err != nil || !strings.HasPrefix(string(kept), "Kernel panic") {
		t.Errorf("kept %q, %v", kept, err)
	}
}

// One that ends before anybody can have seen it, as when it does not take an argument.
func TestBootOfUnseenHypervisor(t *testing.T) {
	defer func(limit time.Duration) { launchLimit = limit }(launchLimit)
	launchLimit = 500 * time.Millisecond
	b := newBoot(t)
	err := b.watchBoot(t.Context(), b.id, hang)
	wantError(t, err, errHypervisorEnded.Error())
}

// The shim ends the hypervisor when it fails, and knows better why.
func TestBootErrorOfShim(t *testing.T) {
	b := newBoot(t)
	qemu := play(t, makeCgroup(t, cgroupParent+"/kata_"+b.id), "-name", "sandbox-"+b.id)
	why := errors.New("no such user")
	err := b.watchBoot(t.Context(), b.id, func(ctx context.Context) error {
		b.say(t, "hello")
		qemu.Process.Kill()
		qemu.Wait()
		return why
	})
	wantError(t, err, "no such user", "console: hello")
	if !errors.Is(err, why) || errors.Is(err, errHypervisorEnded) {
		t.Errorf("the error is %v", err)
	}
}

func TestBootCancelled(t *testing.T) {
	b := newBoot(t)
	why := errors.New("the client left")
	ctx, cancel := context.WithCancelCause(t.Context())
	err := b.watchBoot(ctx, b.id, func(ctx context.Context) error {
		cancel(why)
		return hang(ctx)
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("the error is %v", err)
	}
}

func TestBoot(t *testing.T) {
	b := newBoot(t)
	play(t, makeCgroup(t, cgroupParent+"/kata_"+b.id), "-name", "sandbox-"+b.id)
	if err := b.watchBoot(t.Context(), b.id, func(context.Context) error { return nil }); err != nil {
		t.Error(err)
	}
	// The service of msbd's own watches its boots itself, and there is nothing to see of them here.
	b.Settings = Settings{HypervisorSocket: "/run/x.sock"}
	why := errors.New("no such user")
	if err := b.watchBoot(t.Context(), b.id, func(context.Context) error { return why }); err != why {
		t.Error(err)
	}
}

// What the guest says last may come a moment after the boot is given up. Nobody waits for it after one that went well.
func TestLastWords(t *testing.T) {
	defer func(limit time.Duration) { lastWords = limit }(lastWords)
	lastWords = time.Hour
	for cause, want := range map[error]string{nil: "the end", errReady: ""} {
		b := newBoot(t)
		ctx, cancel := context.WithCancelCause(t.Context())
		followed := make(chan struct{})
		go func() {
			b.followConsole(ctx, b.id, false)
			close(followed)
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
		<-followed
		conn.Close()
		if text, _ := os.ReadFile(b.consoleLog(b.id)); string(text) != want {
			t.Errorf("ended by %v, the log has %q", cause, text)
		}
	}
}

func TestConsoleIsBounded(t *testing.T) {
	b := newBoot(t)
	go b.say(t, strings.Repeat("x", 3*consoleLimit)+"end")
	b.followConsole(t.Context(), b.id, false)
	log, err := os.ReadFile(b.consoleLog(b.id))
	if err != nil || len(log) > consoleLimit || !strings.HasSuffix(string(log), "end") {
		t.Errorf("the log has %d bytes, %v", len(log), err)
	}
}

func TestConsoleOfRunningMicroVM(t *testing.T) {
	for meant, say := range map[bool]string{false: "Kernel panic", true: "Bye"} {
		r, log := testRuntime(t)
		b := newBoot(t)
		r.RunDir = b.RunDir
		if meant {
			defer r.markRemoving(b.id)()
		}
		done := r.watchConsole(t.Context(), b.id)
		b.say(t, say)
		eventually(t, "the console is read", func() bool {
			text, _ := os.ReadFile(r.consoleLog(b.id))
			return string(text) == say
		})
		done()
		if told := strings.Contains(log.String(), say); told == meant {
			t.Errorf("meant to end: %v; the log says %q", meant, log)
		}
		if kept := !missing(filepath.Join(r.dir(hypervisor.FailedDir), b.id+".log")); kept == meant {
			t.Errorf("meant to end: %v; the console is kept: %v", meant, kept)
		}
	}
}
