// Package config reads the settings of msbd from four sources: flags override the environment, which overrides a file,
// which overrides the defaults. Package daemon uses the result. No other package knows which source a value came from.
package config

import (
	"cmp"
	"errors"
	"fmt"
	"hash/fnv"
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
	// Version is the version of the program, for its status. It is not a setting.
	Version string

	// StateDir is the directory for data that must survive a reboot: the store, the keyring, containerd's root.
	StateDir string
	// RunDir is the directory for data that need not survive a reboot: sockets and the files of running microVMs.
	RunDir string
	// LibDir has the programs and guest files that msbd needs. If it is empty, they are beside the executable.
	LibDir string

	// Listen is the HTTP gateway's host:port.
	Listen string
	// Dev accepts requests without a key, on loopback only.
	Dev bool
	// InsecureBehindProxy allows plaintext HTTP on an address that is not loopback.
	InsecureBehindProxy bool
	// TrustedProxies are the networks of the proxies whose X-Forwarded-For header is trusted.
	TrustedProxies []netip.Prefix
	// ResetKey replaces the signing key at startup.
	ResetKey bool

	// TLSCert and TLSKey are the files with the gateway's certificate chain and its private key.
	TLSCert, TLSKey string
	// TLSClientCA is a file with the CAs that must have signed a client's certificate. If it is empty, clients need no
	// certificate.
	TLSClientCA string
	// ACMEDomains are the domain names to get a certificate for, separated by commas.
	ACMEDomains string
	// ACMEEmail is the contact address that is given to the ACME server.
	ACMEEmail string
	// ACMEDirectory is the URL of the ACME server's directory. If it is empty, Let's Encrypt is used.
	ACMEDirectory string
	// ACMEDirectoryCA is a file with the CAs that are trusted to sign the ACME server's certificate. If it is empty,
	// the host's CAs are trusted.
	ACMEDirectoryCA string

	// MaxConnections is the maximum number of connections to the gateway.
	MaxConnections int
	// RequestsPerSecond is the maximum rate of calls with one API key; 0 means unlimited.
	RequestsPerSecond float64
	// Quota applies to each tenant namespace that is not in Quotas.
	Quota Quota
	// Quotas are the quotas of single tenant namespaces. Only the file can set them, in its tables [namespace.NAME]. A
	// limit that a table omits has the value of Quota.
	Quotas map[string]Quota

	// TotalSandboxes and TotalMemoryMiB limit the sandboxes of all tenant namespaces together. TotalMemoryMiB limits the sum of the
	// configured sizes; 0 means unlimited.
	TotalSandboxes, TotalMemoryMiB int

	// The image and size of a sandbox that is started without them, and the maximum size that a start may ask for.
	DefaultImage     string
	DefaultCPUs      int
	DefaultMemoryMiB int
	DefaultDiskMiB   int
	MaxCPUs          int
	MaxMemoryMiB     int
	MaxDiskMiB       int
	// DiskMiBPerSecond and DiskOpsPerSecond limit what one sandbox reads from its disks and writes to them, on average; 0 means
	// unlimited.
	DiskMiBPerSecond, DiskOpsPerSecond int
	// PoolMin and PoolMax are the least and the largest number of microVMs of the default image and size that are started in
	// advance. If PoolMin is 0, none are. PoolMemoryMiB limits the memory of all microVMs that are started in advance; 0 means a part
	// of the host's memory.
	PoolMin, PoolMax, PoolMemoryMiB int
	// MaxRunTime is the maximum time limit of a run.
	MaxRunTime time.Duration

	// AuditSegmentMiB is the size, in MiB, at which the file of the audit log is sealed; 0 means never.
	AuditSegmentMiB int

	// Hypervisor is "auto", "kata" (Kata's own driver) or "builtin" (msbd's hypervisor service).
	Hypervisor string
	// Accelerator is "auto", "kvm" or "tcg" (emulation).
	Accelerator string
	// KataConfig is the file of the host's Kata configuration, which also names the guest. If it is empty, msbd writes
	// a configuration for the built-in guest.
	KataConfig string
	// KataShim is the path of the host's Kata shim. If it is empty, the built-in shim is used.
	KataShim string
	// QEMUUsers is the range of the user ids that QEMU runs as, FIRST-LAST. If it is empty, the range is derived from
	// RunDir. Use QEMUUIDs.
	QEMUUsers string
	// MaxTemplates is how many templates of microVMs are kept; 0 means none.
	MaxTemplates int
	// QEMU and Virtiofsd are the paths of these programs. If empty, msbd searches for the distribution's programs.
	QEMU      string
	Virtiofsd string
	// Containerd is the address of a containerd to use. If it is empty, msbd runs a private one.
	Containerd string

	// LogLevel is "debug", "info", "warn" or "error".
	LogLevel string
	// LogFormat is "text" or "json".
	LogFormat string
}

// TLS reports whether the gateway serves HTTPS.
func (c Config) TLS() bool { return c.TLSCert != "" || c.ACMEDomains != "" }

// Domains returns the domain names in ACMEDomains.
func (c Config) Domains() []string {
	return fields(c.ACMEDomains)
}

// SocketPath returns the path of the admin socket.
func (c Config) SocketPath() string { return filepath.Join(c.RunDir, "msbd.sock") }

// The user ids of the ranges that are derived from the run directory. systemd leaves these ids free:
// https://systemd.io/UIDS-GIDS/
const (
	firstQEMUUID  = 0x70000000
	qemuUIDRanges = 4096
	qemuUIDCount  = 0x10000000 / qemuUIDRanges
)

// QEMUUIDs returns the user ids that QEMU runs as: the first one, and how many there are. Two servers with different run
// directories have different ids, unless a hash of the directories is equal by chance.
func (c Config) QEMUUIDs() (first, count uint32, err error) {
	if c.QEMUUsers == "" {
		hash := fnv.New32a()
		hash.Write([]byte(c.RunDir))
		return firstQEMUUID + hash.Sum32()%qemuUIDRanges*qemuUIDCount, qemuUIDCount, nil
	}
	from, to, _ := strings.Cut(c.QEMUUsers, "-")
	low, lowErr := strconv.ParseUint(from, 10, 31)
	high, highErr := strconv.ParseUint(to, 10, 31)
	if lowErr != nil || highErr != nil || low == 0 || high < low {
		return 0, 0, invalid("qemu-users %q: must be two user ids FIRST-LAST, greater than 0, such as 1879048192-1879113727", c.QEMUUsers)
	}
	return uint32(low), uint32(high-low) + 1, nil
}

// Default returns the default configuration. Load derives the limits that are 0 in it from the host. For users other than
// root, the directories are below their home and runtime directories. Package client looks for the admin socket in the same
// place.
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
		DefaultDiskMiB:   4096,
		MaxDiskMiB:       64 << 10,
		DiskMiBPerSecond: 200,
		DiskOpsPerSecond: 20_000,
		MaxTemplates:     4,
		PoolMin:          1,
		PoolMax:          4,
		MaxRunTime:       time.Hour,
		MaxConnections:   10_000,
		AuditSegmentMiB:  64,
		Hypervisor:       "auto",
		Accelerator:      "auto",
		LogLevel:         "info",
		LogFormat:        "text",
	}
}

// MinMemoryMiB is the minimum memory with which a guest and an interpreter start.
const MinMemoryMiB = 128

// MinDiskMiB is the minimum size of the disk of a sandbox, on which its file system and a few files fit.
const MinDiskMiB = 64

const (
	// maxDiskMiBPerSecond is more than any disk has. QEMU accepts no arbitrarily large limit.
	maxDiskMiBPerSecond = 1 << 20
	// minDiskOpsPerSecond is enough for a sandbox to start within its time limit.
	minDiskOpsPerSecond = 100
)

// maxPool is the largest number of microVMs of one image and size that are started in advance.
const maxPool = 100

// validate returns an error that joins all problems. Each of them is an errdefs.ErrInvalidArgument.
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
	check(c.TLSCert == "" || c.ACMEDomains == "", "tls-cert and acme-domains: give only one of them")
	check(c.TLSClientCA == "" || c.TLS(), "tls-client-ca: requires tls-cert and tls-key, or acme-domains")
	check(c.ACMEDomains != "" || c.ACMEEmail == "" && c.ACMEDirectory == "" && c.ACMEDirectoryCA == "", "acme-email, acme-directory and acme-directory-ca: require acme-domains")
	for _, domain := range c.Domains() {
		check(strings.Contains(strings.Trim(domain, "."), "."), "acme-domains %q: must be fully qualified host names, such as msb.example.org", domain)
	}
	check(c.ACMEDirectory == "" || strings.HasPrefix(c.ACMEDirectory, "https://"), "acme-directory %q: must begin with https://", c.ACMEDirectory)
	check(c.MaxConnections >= 1, "max-connections %d: must be at least 1", c.MaxConnections)
	check(c.RequestsPerSecond >= 0 && !math.IsInf(c.RequestsPerSecond, 0), "requests-per-second %g: must be finite and not negative; 0 means unlimited", c.RequestsPerSecond)
	problems = append(problems, validateQuota("quota-", c.Quota)...)
	for _, name := range slices.Sorted(maps.Keys(c.Quotas)) {
		if err := namespace(name); err != nil {
			problems = append(problems, err)
		}
		problems = append(problems, validateQuota("namespace."+name+": ", c.Quotas[name])...)
	}
	check(c.DefaultImage != "", "default-image: must not be empty")
	check(c.TotalSandboxes >= 1, "total-sandboxes %d: must be at least 1, or 0 for the default", c.TotalSandboxes)
	check(c.TotalMemoryMiB == 0 || c.TotalMemoryMiB >= c.DefaultMemoryMiB,
		"total-memory-mib %d: must be at least default-memory-mib, %d, or 0 for no limit", c.TotalMemoryMiB, c.DefaultMemoryMiB)
	check(c.MaxCPUs >= 1, "max-cpus %d: must be at least 1, or 0 for the default", c.MaxCPUs)
	check(c.MaxMemoryMiB >= MinMemoryMiB, "max-memory-mib %d: must be at least %d, or 0 for the default", c.MaxMemoryMiB, MinMemoryMiB)
	check(c.DefaultCPUs >= 1 && c.DefaultCPUs <= max(1, c.MaxCPUs),
		"default-cpus %d: must be from 1 to max-cpus, %d", c.DefaultCPUs, c.MaxCPUs)
	check(c.DefaultMemoryMiB >= MinMemoryMiB && c.DefaultMemoryMiB <= max(MinMemoryMiB, c.MaxMemoryMiB),
		"default-memory-mib %d: must be from %d to max-memory-mib, %d", c.DefaultMemoryMiB, MinMemoryMiB, c.MaxMemoryMiB)
	check(c.MaxTemplates >= 0, "max-templates %d: must not be negative", c.MaxTemplates)
	check(c.MaxDiskMiB >= MinDiskMiB, "max-disk-mib %d: must be at least %d", c.MaxDiskMiB, MinDiskMiB)
	check(c.DefaultDiskMiB >= MinDiskMiB && c.DefaultDiskMiB <= max(MinDiskMiB, c.MaxDiskMiB),
		"default-disk-mib %d: must be from %d to max-disk-mib, %d", c.DefaultDiskMiB, MinDiskMiB, c.MaxDiskMiB)
	check(c.DiskMiBPerSecond >= 0 && c.DiskMiBPerSecond <= maxDiskMiBPerSecond,
		"disk-mib-per-second %d: must be from 1 to %d, or 0 for no limit", c.DiskMiBPerSecond, maxDiskMiBPerSecond)
	check(c.DiskOpsPerSecond == 0 || c.DiskOpsPerSecond >= minDiskOpsPerSecond,
		"disk-ops-per-second %d: must be at least %d, or 0 for no limit", c.DiskOpsPerSecond, minDiskOpsPerSecond)
	if _, _, err := c.QEMUUIDs(); err != nil {
		problems = append(problems, err)
	}
	check(c.PoolMin >= 0 && c.PoolMin <= maxPool, "pool-min %d: must be from 0 to %d; 0 means that there is no pool", c.PoolMin, maxPool)
	check(c.PoolMax >= 0 && c.PoolMax <= maxPool, "pool-max %d: must be from 0 to %d", c.PoolMax, maxPool)
	check(c.PoolMemoryMiB >= 0, "pool-memory-mib %d: must not be negative; 0 means an eighth of the host's memory", c.PoolMemoryMiB)
	check(c.MaxRunTime >= time.Second, "max-run-time %s: must be at least 1s", c.MaxRunTime)
	check(c.AuditSegmentMiB >= 0, "audit-segment-mib %d: must not be negative; 0 means that the file is never sealed by itself", c.AuditSegmentMiB)
	choice := func(name, value string, choices ...string) {
		for _, c := range choices {
			if value == c {
				return
			}
		}
		last := len(choices) - 1
		check(false, "%s %q: must be %s or %s", name, value, strings.Join(choices[:last], ", "), choices[last])
	}
	choice("hypervisor", c.Hypervisor, "auto", "kata", "builtin")
	check(c.Hypervisor != "builtin" || c.KataConfig == "", "kata-config: requires hypervisor kata or auto, because the Kata configuration names the hypervisor")
	check(c.Hypervisor != "kata" || c.Accelerator != "tcg" || c.KataConfig != "",
		"accelerator tcg: hypervisor kata requires KVM; use hypervisor builtin for emulation")
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
		problems = append(problems, invalid("listen %q: port must be a number from 0 (any free port) to 65535", c.Listen))
	}
	switch {
	case IsLoopback(host):
	case c.Dev:
		problems = append(problems, invalid("listen %q: dev mode accepts requests without a key, so it is allowed on loopback only: "+
			"use 127.0.0.1, or leave out --dev", c.Listen))
	case !c.TLS() && !c.InsecureBehindProxy:
		problems = append(problems, invalid("listen %q: API keys would cross the network in plain text: give --tls-cert and --tls-key, or "+
			"--acme-domains; or listen on 127.0.0.1 behind a proxy with TLS; or add --insecure-behind-proxy if only such a proxy can reach this address", c.Listen))
	}
	return problems
}

// IsLoopback reports whether host, without a port or brackets, can only be this machine. That is the name localhost or
// a numeric loopback address. IsLoopback returns false for any other name, because it can resolve to another machine.
func IsLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return strings.EqualFold(host, "localhost") || err == nil && ip.Unmap().IsLoopback()
}

// invalid returns an errdefs.ErrInvalidArgument with this message.
func invalid(format string, a ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
}
