// Package config is what an administrator can set of msbd, from four sources that go over each
// other: defaults, a file, the environment, flags. The wiring reads the result; no other room knows
// where a value came from.
package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
)

// Config is a validated configuration.
type Config struct {
	// Version of the program, for status; not a setting.
	Version string

	// StateDir outlives a reboot: store, keyring, containerd's root.
	StateDir string
	// RunDir does not: sockets and what belongs to running microVMs.
	RunDir string
	// LibDir holds the programs and guest files that msbd needs; empty: found beside the executable.
	LibDir string

	// Listen is the HTTP gateway's host:port.
	Listen string
	// Dev takes requests without a key; on loopback only.
	Dev bool
	// InsecureBehindProxy allows plaintext HTTP on an address that is not loopback.
	InsecureBehindProxy bool
	// ResetKey replaces the signing key at the start.
	ResetKey bool

	// The size and image of a sandbox whose start names none, and the most that one may ask for.
	DefaultImage     string
	DefaultCPUs      int
	DefaultMemoryMiB int
	MaxCPUs          int
	MaxMemoryMiB     int
	// MaxRunTime is the longest time limit of a run.
	MaxRunTime time.Duration

	// Accelerator is "auto", "kvm" or "tcg" (emulation).
	Accelerator string
	// QEMU and Virtiofsd are paths of programs; empty: found where distributions put them.
	QEMU      string
	Virtiofsd string
	// Containerd is the address of a containerd to use; empty: msbd runs a private one.
	Containerd string

	// LogLevel is "debug", "info", "warn" or "error".
	LogLevel string
	// LogFormat is "text" or "json".
	LogFormat string
}

// SocketPath is where the admin socket is.
func (c Config) SocketPath() string { return filepath.Join(c.RunDir, "msbd.sock") }

// Default is the configuration of a server that was told nothing.
func Default() Config {
	return Config{
		StateDir:         "/var/lib/msb",
		RunDir:           "/run/msb",
		Listen:           "127.0.0.1:5555",
		DefaultImage:     "microsandbox/python",
		DefaultCPUs:      1,
		DefaultMemoryMiB: 512,
		MaxCPUs:          8,
		MaxMemoryMiB:     16 << 10,
		MaxRunTime:       time.Hour,
		Accelerator:      "auto",
		LogLevel:         "info",
		LogFormat:        "text",
	}
}

// minMemoryMiB is what the guest's kernel and agent need to boot.
const minMemoryMiB = 128

// validate reports every problem, each as errdefs.ErrInvalidArgument.
func (c Config) validate() error {
	var problems []error
	check := func(ok bool, format string, a ...any) {
		if !ok {
			problems = append(problems, invalid(format, a...))
		}
	}
	check(filepath.IsAbs(c.StateDir), "state-dir %q: must be an absolute path", c.StateDir)
	check(filepath.IsAbs(c.RunDir), "run-dir %q: must be an absolute path", c.RunDir)
	for _, p := range []struct{ name, path string }{
		{"lib-dir", c.LibDir}, {"qemu", c.QEMU}, {"virtiofsd", c.Virtiofsd}, {"containerd", c.Containerd},
	} {
		check(p.path == "" || filepath.IsAbs(p.path), "%s %q: must be an absolute path", p.name, p.path)
	}
	problems = append(problems, c.validateListen()...)
	check(c.DefaultImage != "", "default-image: must not be empty")
	check(c.MaxCPUs >= 1, "max-cpus %d: must be at least 1", c.MaxCPUs)
	check(c.MaxMemoryMiB >= minMemoryMiB, "max-memory-mib %d: must be at least %d", c.MaxMemoryMiB, minMemoryMiB)
	check(c.DefaultCPUs >= 1 && c.DefaultCPUs <= max(1, c.MaxCPUs),
		"default-cpus %d: must be from 1 to max-cpus, %d", c.DefaultCPUs, c.MaxCPUs)
	check(c.DefaultMemoryMiB >= minMemoryMiB && c.DefaultMemoryMiB <= max(minMemoryMiB, c.MaxMemoryMiB),
		"default-memory-mib %d: must be from %d to max-memory-mib, %d", c.DefaultMemoryMiB, minMemoryMiB, c.MaxMemoryMiB)
	check(c.MaxRunTime >= time.Second, "max-run-time %s: must be at least 1s", c.MaxRunTime)
	choice := func(name, value string, choices ...string) {
		for _, c := range choices {
			if value == c {
				return
			}
		}
		check(false, "%s %q: must be one of %q", name, value, choices)
	}
	choice("accelerator", c.Accelerator, "auto", "kvm", "tcg")
	choice("log-level", c.LogLevel, "debug", "info", "warn", "error")
	choice("log-format", c.LogFormat, "text", "json")
	return errors.Join(problems...)
}

func (c Config) validateListen() []error {
	host, port, err := net.SplitHostPort(c.Listen)
	if err != nil {
		return []error{invalid("listen %q: must be HOST:PORT, such as 127.0.0.1:5555 or [::1]:5555", c.Listen)}
	}
	var problems []error
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		problems = append(problems, invalid("listen %q: port must be a number from 0 (any free one) to 65535", c.Listen))
	}
	switch {
	case isLoopback(host):
	case c.Dev:
		problems = append(problems, invalid("listen %q: dev mode takes requests without a key, so it listens on loopback only: "+
			"use 127.0.0.1, or leave out --dev", c.Listen))
	case !c.InsecureBehindProxy:
		problems = append(problems, invalid("listen %q: API keys would cross the network in plain text: listen on 127.0.0.1 "+
			"behind a proxy with TLS, or add --insecure-behind-proxy if such a proxy is what reaches this address", c.Listen))
	}
	return problems
}

// isLoopback goes by the name localhost or a numeric address: what else a name means can change.
func isLoopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback()
}

func invalid(format string, a ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
}
