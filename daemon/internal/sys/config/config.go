// Package config is what an administrator can set of msbd, from four sources: flags override the environment, which
// overrides a file, which overrides the defaults. Package daemon reads the result; nothing else knows where a value came
// from.
package config

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
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
	// TrustedProxies are the networks of proxies that say whom they ask for.
	TrustedProxies []netip.Prefix
	// ResetKey replaces the signing key at the start.
	ResetKey bool

	// TLSCert and TLSKey are files of the gateway's certificate chain and its key.
	TLSCert, TLSKey string
	// TLSClientCA is a file of the CAs of which clients must show a certificate; empty: they need none.
	TLSClientCA string
	// ACMEDomains are the names that a certificate is fetched for, separated by commas.
	ACMEDomains string
	// ACMEEmail is where the CA writes to; ACMEDirectory its address, if not Let's Encrypt's, and
	// ACMEDirectoryCA a file of the CAs that vouch for that address, if not the host's.
	ACMEEmail, ACMEDirectory, ACMEDirectoryCA string

	// MaxConnections bounds the gateway's connections.
	MaxConnections int
	// RequestsPerSecond bounds the calls of one API key; 0: nothing does.
	RequestsPerSecond float64
	// Quota bounds each tenant namespace that Quotas does not name.
	Quota Quota
	// Quotas is of the file alone: its tables [namespace.NAME]. Where one leaves out a bound, that of
	// Quota holds.
	Quotas map[string]Quota

	// The size and image of a sandbox whose start names none, and the most that one may ask for.
	DefaultImage     string
	DefaultCPUs      int
	DefaultMemoryMiB int
	MaxCPUs          int
	MaxMemoryMiB     int
	// MaxRunTime is the longest time limit of a run.
	MaxRunTime time.Duration

	// Hypervisor is "auto", "kata" (Kata's own driver) or "builtin" (msbd's hypervisor service).
	Hypervisor string
	// Accelerator is "auto", "kvm" or "tcg" (emulation).
	Accelerator string
	// KataConfig is a file of a Kata configuration of the host's own, with its guest; empty: msbd
	// writes one for the built-in guest. KataShim is the path of a shim of the host's own; empty: the built-in one.
	KataConfig, KataShim string
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

// TLS says whether the gateway speaks HTTPS.
func (c Config) TLS() bool { return c.TLSCert != "" || c.ACMEDomains != "" }

// Domains are the names of ACMEDomains.
func (c Config) Domains() []string {
	return fields(c.ACMEDomains)
}

// SocketPath is where the admin socket is.
func (c Config) SocketPath() string { return filepath.Join(c.RunDir, "msbd.sock") }

// Default is the configuration of a server that was told nothing. Users other than root have
// directories of their own; package client looks for the socket in the same place.
func Default() Config {
	stateDir, runDir := "/var/lib/msb", "/run/msb"
	if home, err := os.UserHomeDir(); os.Geteuid() != 0 && err == nil {
		stateDir = filepath.Join(cmp.Or(os.Getenv("XDG_STATE_HOME"), filepath.Join(home, ".local", "state")), "msb")
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); os.Geteuid() != 0 && dir != "" {
		runDir = filepath.Join(dir, "msb")
	}
	return Config{
		StateDir:         stateDir,
		RunDir:           runDir,
		Listen:           "127.0.0.1:5555",
		DefaultImage:     "microsandbox/python",
		DefaultCPUs:      1,
		DefaultMemoryMiB: 512,
		MaxCPUs:          8,
		MaxMemoryMiB:     16 << 10,
		MaxRunTime:       time.Hour,
		MaxConnections:   10_000,
		Hypervisor:       "auto",
		Accelerator:      "auto",
		LogLevel:         "info",
		LogFormat:        "text",
	}
}

// MinMemoryMiB is the least memory with which a guest and an interpreter start.
const MinMemoryMiB = 128

// validate reports every problem, each as errdefs.ErrInvalidArgument.
func (c Config) validate(namespace func(string) error) error {
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
		{"kata-config", c.KataConfig}, {"kata-shim", c.KataShim},
		{"tls-cert", c.TLSCert}, {"tls-key", c.TLSKey}, {"tls-client-ca", c.TLSClientCA}, {"acme-directory-ca", c.ACMEDirectoryCA},
	} {
		check(p.path == "" || filepath.IsAbs(p.path), "%s %q: must be an absolute path", p.name, p.path)
	}
	problems = append(problems, c.validateListen()...)
	check((c.TLSCert == "") == (c.TLSKey == ""), "tls-cert and tls-key: give both or neither")
	check(c.TLSCert == "" || c.ACMEDomains == "", "tls-cert and acme-domains: give one of them: a certificate is in a file, or is fetched")
	check(c.TLSClientCA == "" || c.TLS(), "tls-client-ca: needs tls-cert and tls-key, or acme-domains")
	check(c.ACMEDomains != "" || c.ACMEEmail == "" && c.ACMEDirectory == "" && c.ACMEDirectoryCA == "", "acme-email, acme-directory and acme-directory-ca: need acme-domains")
	for _, domain := range c.Domains() {
		check(strings.Contains(strings.Trim(domain, "."), "."), "acme-domains %q: must be whole host names, such as msb.example.org", domain)
	}
	check(c.ACMEDirectory == "" || strings.HasPrefix(c.ACMEDirectory, "https://"), "acme-directory %q: must begin with https://", c.ACMEDirectory)
	check(c.MaxConnections >= 1, "max-connections %d: must be at least 1", c.MaxConnections)
	check(c.RequestsPerSecond >= 0 && !math.IsInf(c.RequestsPerSecond, 0), "requests-per-second %g: must not be negative; 0 is no bound", c.RequestsPerSecond)
	problems = append(problems, validateQuota("quota-", c.Quota)...)
	for _, name := range slices.Sorted(maps.Keys(c.Quotas)) {
		if err := namespace(name); err != nil {
			problems = append(problems, err)
		}
		problems = append(problems, validateQuota("namespace."+name+": ", c.Quotas[name])...)
	}
	check(c.DefaultImage != "", "default-image: must not be empty")
	check(c.MaxCPUs >= 1, "max-cpus %d: must be at least 1", c.MaxCPUs)
	check(c.MaxMemoryMiB >= MinMemoryMiB, "max-memory-mib %d: must be at least %d", c.MaxMemoryMiB, MinMemoryMiB)
	check(c.DefaultCPUs >= 1 && c.DefaultCPUs <= max(1, c.MaxCPUs),
		"default-cpus %d: must be from 1 to max-cpus, %d", c.DefaultCPUs, c.MaxCPUs)
	check(c.DefaultMemoryMiB >= MinMemoryMiB && c.DefaultMemoryMiB <= max(MinMemoryMiB, c.MaxMemoryMiB),
		"default-memory-mib %d: must be from %d to max-memory-mib, %d", c.DefaultMemoryMiB, MinMemoryMiB, c.MaxMemoryMiB)
	check(c.MaxRunTime >= time.Second, "max-run-time %s: must be at least 1s", c.MaxRunTime)
	choice := func(name, value string, choices ...string) {
		for _, c := range choices {
			if value == c {
				return
			}
		}
		check(false, "%s %q: must be one of %q", name, value, choices)
	}
	choice("hypervisor", c.Hypervisor, "auto", "kata", "builtin")
	check(c.Hypervisor != "builtin" || c.KataConfig == "", "kata-config: needs hypervisor kata or auto: the configuration names its own hypervisor")
	check(c.Hypervisor != "kata" || c.Accelerator != "tcg" || c.KataConfig != "",
		"accelerator tcg: Kata's own driver needs KVM: use hypervisor builtin to emulate")
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
	case IsLoopback(host):
	case c.Dev:
		problems = append(problems, invalid("listen %q: dev mode takes requests without a key, so it listens on loopback only: "+
			"use 127.0.0.1, or leave out --dev", c.Listen))
	case !c.TLS() && !c.InsecureBehindProxy:
		problems = append(problems, invalid("listen %q: API keys would cross the network in plain text: give --tls-cert and --tls-key, "+
			"or --acme-domains; or listen on 127.0.0.1 behind a proxy with TLS, or add --insecure-behind-proxy if such a proxy is what reaches this address", c.Listen))
	}
	return problems
}

// IsLoopback reports whether a host, without a port or brackets, can only mean this machine: the name localhost or a
// numeric loopback address. What any other name means can change.
func IsLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return strings.EqualFold(host, "localhost") || err == nil && ip.Unmap().IsLoopback()
}

func invalid(format string, a ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
}
