package microvm

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"text/template"
	"time"

	"golang.org/x/sys/unix"
)

// kataOptions is the type URL under which Kata's shim accepts its options.
const kataOptions = "io.containerd.kata.v2.options"

// kataConfig is the configuration of Kata's shim on the remote-hypervisor route. The shim reads it
// at each start of a sandbox.
var kataConfig = template.Must(template.New("kata").Parse(`# Written by msbd at each start; changes are lost.
[hypervisor.remote]
remote_hypervisor_socket = "{{.HypervisorSocket}}"
remote_hypervisor_timeout = 60
enable_annotations = ["machine_type", "default_memory", "default_vcpus", "image"]
default_bridges = 1
disable_guest_selinux = true

[agent.kata]
dial_timeout = 60

# No network yet: a sandbox has no interface, and nothing of one is left to remove.
[runtime]
internetworking_model = "none"
disable_new_netns = true
disable_guest_seccomp = true
sandbox_cgroup_only = true
static_sandbox_resource_mgmt = true
create_container_timeout = 60
`))

// writeKataConfig writes the shim's configuration and returns its path.
func writeKataConfig(dir, hypervisorSocket string) (string, error) {
	var b bytes.Buffer
	if err := kataConfig.Execute(&b, struct{ HypervisorSocket string }{hypervisorSocket}); err != nil {
		return "", err
	}
	path := filepath.Join(dir, "kata.toml")
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		return "", fmt.Errorf("write the shim's configuration: %w", err)
	}
	return path, nil
}

var versionRE = regexp.MustCompile(`version: ([^,\s]+)`)

// KataVersion asks the shim for its version, as built.
func (r *Runtime) KataVersion(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, r.Shim, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("ask %s for its version: %w", r.Shim, err)
	}
	m := versionRE.FindSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("ask %s for its version: it says %q", r.Shim, out)
	}
	return string(m[1]), nil
}

// syslogSockets are where Go's log/syslog, and so Kata's shim, looks for a system log.
var syslogSockets = []string{"/dev/log", "/var/run/syslog", "/var/run/log"}

// syslogSink stands in for the system log on hosts that have none: Kata's shim refuses to start
// without one. What the shim says goes to the daemon's log at debug level.
type syslogSink struct {
	log *slog.Logger

	mu   sync.Mutex
	conn *net.UnixConn
	done sync.WaitGroup
}

// ensure makes sure that a system log answers. It is called before each start, because another
// server's sink may have ended.
func (s *syslogSink) ensure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, path := range syslogSockets {
		if c, err := net.Dial("unixgram", path); err == nil {
			c.Close()
			return nil
		}
	}
	path := syslogSockets[1]
	// Nothing answers there: what is left is a dead one's socket.
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() == os.ModeSocket {
		os.Remove(path)
	}
	old := unix.Umask(0o177)
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	unix.Umask(old)
	if err != nil {
		return fmt.Errorf("this host has no system log, which Kata's shim needs, and msbd could not stand in for it: %w", err)
	}
	s.closeLocked()
	s.conn = conn
	s.done.Go(func() {
		buf := make([]byte, 8<<10)
		for {
			n, err := conn.Read(buf)
			if err != nil {
				return
			}
			s.log.Debug("kata shim", "line", strings.TrimSpace(string(buf[:n])))
		}
	})
	return nil
}

func (s *syslogSink) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closeLocked()
}

func (s *syslogSink) closeLocked() {
	if s.conn != nil {
		s.conn.Close() // removes the socket's file
		s.conn = nil
		s.done.Wait()
	}
}

// copyTail returns the end of a file, at most n bytes, for error messages.
func copyTail(path string, n int64) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > n {
		f.Seek(-n, io.SeekEnd)
	}
	b, _ := io.ReadAll(io.LimitReader(f, n))
	return strings.TrimSpace(string(b))
}

// poll calls f every few milliseconds until it returns true or ctx ends.
func poll(ctx context.Context, every time.Duration, f func() bool) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		if f() {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
