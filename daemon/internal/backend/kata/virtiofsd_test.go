package kata

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/msbd/msbd/daemon/internal/sys/process"
)

// wrapper is the script that msbd installs as msb-virtiofsd.
var wrapper = filepath.Join("..", "..", "..", "setup", "virtiofsd-c.sh")

// The wrapper translates the options that Kata's shim uses for the Rust virtiofsd, and the C virtiofsd accepts the
// result.
func TestVirtiofsdWrapper(t *testing.T) {
	const daemon = "/usr/lib/qemu/virtiofsd"
	if _, err := os.Stat(daemon); err != nil {
		t.Skipf("this host has no C virtiofsd: %v", err)
	}
	shared := t.TempDir()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	socket, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	cmd := exec.Command(wrapper, "--syslog", "--cache=always", "--shared-dir="+shared, "--fd=3",
		"--daemon="+daemon, "--announce-submounts", "--sandbox=namespace", "--log-level=error")
	cmd.ExtraFiles = []*os.File{socket}
	var output strings.Builder
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	// virtiofsd must have the pid of the wrapper, because the shim kills it by that pid.
	waitUntil(t, "virtiofsd runs", func() bool {
		exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", cmd.Process.Pid))
		// The program becomes visible a moment before its arguments.
		return exe == daemon && len(process.Arguments(cmd.Process.Pid)) > 1
	})
	want := []string{daemon, "--syslog", "-o", "cache=always", "-o", "source=" + shared, "--fd=3",
		"-o", "announce_submounts", "-o", "sandbox=namespace", "-o", "log_level=err"}
	if info, err := os.Stat("/dev/log"); err != nil || info.Mode().Type() != os.ModeSocket {
		want = slices.Delete(want, 1, 2)
	}
	if got := process.Arguments(cmd.Process.Pid); !slices.Equal(got, want) {
		t.Errorf("arguments %q, want %q", got, want)
	}
	// virtiofsd responds, so it has accepted its arguments.
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	// VHOST_USER_GET_FEATURES: request 1, version 1, no payload; answered by 8 bytes.
	if _, err := conn.Write([]byte{1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	if n, err := io.ReadFull(conn, make([]byte, 20)); err != nil {
		t.Errorf("virtiofsd responded with %d bytes, %v: %s", n, err, &output)
	}
}

func TestVirtiofsdWrapperRefuses(t *testing.T) {
	for _, args := range [][]string{
		{"--daemon=/bin/echo", "--sandbox=none"},
		{"--daemon=/bin/echo", "--seccomp=none"},
		{"--daemon=/bin/echo", "--cache=sometimes"},
		{"--daemon=/bin/echo", "-o", "sandbox=chroot"},
		{"--syslog"},
	} {
		if out, err := exec.Command(wrapper, args...).Output(); err == nil || len(out) > 0 {
			t.Errorf("%q: %s, %v", args, out, err)
		}
	}
}
