package config

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
)

// DefaultFile is the configuration file that is read if it exists and no other file is named.
const DefaultFile = "/etc/msb/msbd.toml"

// Setting is a value that an administrator can set with a flag, an environment variable or a key in the file. For
// example, the setting kata-config has the flag --kata-config, the variable MSBD_KATA_CONFIG and the key kata_config.
// In the file, it can also be written as the key config in the table [kata].
type Setting struct {
	// Name is the name of the flag, without the dashes.
	Name string
	// Usage is the help text, with the placeholder of the value in backquotes.
	Usage string
	// Bool is set if the flag takes no value.
	Bool bool
	// Default is the default value for the help text. It is empty if there is none, or if Usage describes it.
	Default string
	set     func(c *Config, value string) error
}

// Env returns the name of the setting's environment variable.
func (s Setting) Env() string { return "MSBD_" + strings.ToUpper(s.fileKey()) }

func (s Setting) fileKey() string { return strings.ReplaceAll(s.Name, "-", "_") }

// Settings are all settings, in the order of the help text. If two settings of one source set the same field, the later
// one in this list overrides the earlier one.
var Settings = []Setting{
	text("state-dir", "`DIR` for data that must survive a reboot: keys, records, images (default: /var/lib/msb; for users other than root, ~/.local/state/msb)", func(c *Config) *string { return &c.StateDir }),
	text("run-dir", "`DIR` for sockets and the files of running microVMs (default: /run/msb; for users other than root, $XDG_RUNTIME_DIR/msb)", func(c *Config) *string { return &c.RunDir }),
	text("lib-dir", "`DIR` with containerd, Kata's shim and the guest's files (default: the directory of msbd, or ../libexec/msb relative to it)", func(c *Config) *string { return &c.LibDir }),
	text("listen", "`HOST:PORT` of the HTTP API", func(c *Config) *string { return &c.Listen }),
	{Name: "host", Usage: "`HOST` of the HTTP API; overrides the one in the setting listen (default: 127.0.0.1)", set: setHost},
	{Name: "port", Usage: "`PORT` of the HTTP API; overrides the one in the setting listen (default: 5555)", set: setPort},
	flag("dev", "accept requests without an API key; on loopback only, never in production", func(c *Config) *bool { return &c.Dev }),
	flag("insecure-behind-proxy", "allow plaintext HTTP on addresses other than loopback, for use behind a proxy that adds TLS", func(c *Config) *bool { return &c.InsecureBehindProxy }),
	{Name: "trusted-proxies", Usage: "`ADDRESSES` or networks of the proxies whose X-Forwarded-For is trusted, separated by commas", set: setTrustedProxies},
	flag("reset-key", "replace the signing key, which invalidates all existing API keys", func(c *Config) *bool { return &c.ResetKey }),
	text("tls-cert", "`FILE` with the server's certificate chain (PEM); reloaded when it changes", func(c *Config) *string { return &c.TLSCert }),
	text("tls-key", "`FILE` with the private key of that certificate (PEM)", func(c *Config) *string { return &c.TLSKey }),
	text("tls-client-ca", "`FILE` with the CAs (PEM) for client certificates, which are then required", func(c *Config) *string { return &c.TLSClientCA }),
	text("acme-domains", "domain `NAMES` to get certificates for with ACME, separated by commas", func(c *Config) *string { return &c.ACMEDomains }),
	text("acme-email", "contact `ADDRESS` that is given to the ACME server", func(c *Config) *string { return &c.ACMEEmail }),
	text("acme-directory", "`URL` of the ACME server's directory (default: Let's Encrypt)", func(c *Config) *string { return &c.ACMEDirectory }),
	text("acme-directory-ca", "`FILE` with the CAs (PEM) that are trusted to sign the ACME server's certificate (default: the host's)", func(c *Config) *string { return &c.ACMEDirectoryCA }),
	integer("max-connections", "maximum number `N` of connections to the HTTP API", func(c *Config) *int { return &c.MaxConnections }),
	number("requests-per-second", "maximum number `N` of requests per second with one API key; 0, the default, means unlimited", func(c *Config) *float64 { return &c.RequestsPerSecond }),
	integer("quota-sandboxes", "maximum number `N` of sandboxes in each namespace; 0, the default, means unlimited", func(c *Config) *int { return &c.Quota.Sandboxes }),
	integer("quota-cpus", "maximum total number `N` of virtual CPUs of the sandboxes in each namespace; 0, the default, means unlimited", func(c *Config) *int { return &c.Quota.CPUs }),
	integer("quota-memory-mib", "maximum total memory, in `MIB`, of the sandboxes in each namespace; 0, the default, means unlimited", func(c *Config) *int { return &c.Quota.MemoryMiB }),
	integer("quota-disk-mib", "maximum total size, in `MIB`, of the writable disks of the sandboxes in each namespace; 0, the default, means unlimited; not with Kata's own driver", func(c *Config) *int { return &c.Quota.DiskMiB }),
	integer("quota-runs", "maximum number `N` of runs in progress in each namespace; 0, the default, means unlimited", func(c *Config) *int { return &c.Quota.Runs }),
	integer("total-sandboxes", "maximum number `N` of sandboxes in all namespaces together; 0 means the default (default: 64 for each processor of the host)", func(c *Config) *int { return &c.TotalSandboxes }),
	integer("total-memory-mib", "maximum total memory, in `MIB`, of the sandboxes in all namespaces together, whether or not they use it; 0, the default, means unlimited", func(c *Config) *int { return &c.TotalMemoryMiB }),
	text("default-image", "default `IMAGE` of a sandbox", func(c *Config) *string { return &c.DefaultImage }),
	integer("default-cpus", "default number `N` of virtual CPUs of a sandbox", func(c *Config) *int { return &c.DefaultCPUs }),
	integer("default-memory-mib", "default memory, in `MIB`, of a sandbox, at least 128", func(c *Config) *int { return &c.DefaultMemoryMiB }),
	integer("default-disk-mib", "default size, in `MIB`, of the writable disk of a sandbox, at least 64; not with Kata's own driver", func(c *Config) *int { return &c.DefaultDiskMiB }),
	integer("max-cpus", "maximum number `N` of virtual CPUs of one sandbox; 0 means the default (default: twice the host's processors, at most 8)", func(c *Config) *int { return &c.MaxCPUs }),
	integer("max-memory-mib", "maximum memory, in `MIB`, of one sandbox; 0 means the default (default: 80 % of the host's memory, at most total-memory-mib and 16384)", func(c *Config) *int { return &c.MaxMemoryMiB }),
	integer("max-disk-mib", "maximum size, in `MIB`, of the writable disk of one sandbox", func(c *Config) *int { return &c.MaxDiskMiB }),
	integer("disk-mib-per-second", "how much, in `MIB`, one sandbox may read from and write to its disks per second, on average; 0 means unlimited; not with Kata's own driver", func(c *Config) *int { return &c.DiskMiBPerSecond }),
	integer("disk-ops-per-second", "how many reads and writes, `N`, one sandbox may do on its disks per second, on average; at least 100, or 0 for unlimited; not with Kata's own driver", func(c *Config) *int { return &c.DiskOpsPerSecond }),
	integer("pool-min", "least number `N` of microVMs of the default image and size that are started in advance, for the next starts; 0 means no pool; not with Kata's own driver", func(c *Config) *int { return &c.PoolMin }),
	integer("pool-max", "largest number `N` of microVMs of the default image and size that are started in advance while many sandboxes are started; at least pool-min", func(c *Config) *int { return &c.PoolMax }),
	integer("pool-memory-mib", "maximum total memory, in `MIB`, of the microVMs that are started in advance; 0 means the default (default: an eighth of the host's memory)", func(c *Config) *int { return &c.PoolMemoryMiB }),
	duration("max-run-time", "maximum `TIME` of a run, in d, h, m and s, such as 1h30m", func(c *Config) *time.Duration { return &c.MaxRunTime }),
	integer("audit-segment-mib", "size, in `MIB`, at which the audit log continues in a new file; 0 means only with 'msb server audit seal'", func(c *Config) *int { return &c.AuditSegmentMiB }),
	text("hypervisor", "`NAME` of the driver for QEMU: auto, kata (Kata's driver, which needs KVM) or builtin (msbd's)", func(c *Config) *string { return &c.Hypervisor }),
	text("kata-config", "`FILE` with the host's Kata configuration, whose guest is used instead of the built-in one", func(c *Config) *string { return &c.KataConfig }),
	text("kata-shim", "`PATH` of the host's containerd-shim-kata-v2 (default: the built-in one)", func(c *Config) *string { return &c.KataShim }),
	text("accelerator", "`NAME` of the accelerator of the guests: auto, kvm or tcg (emulation)", func(c *Config) *string { return &c.Accelerator }),
	text("qemu", "`PATH` of QEMU (default: found on the host)", func(c *Config) *string { return &c.QEMU }),
	text("qemu-users", "user ids `FIRST-LAST` that QEMU runs as, one for each sandbox, which nothing else on the host uses (default: 65536 ids derived from run-dir)", func(c *Config) *string { return &c.QEMUUsers }),
	integer("max-templates", "maximum number `N` of saved microVMs from which sandboxes start in less time than from a boot, one for each image and size of a sandbox, each with 100 to 200 MiB of memory and disk; 0 means none; not with Kata's own driver", func(c *Config) *int { return &c.MaxTemplates }),
	text("virtiofsd", "`PATH` of virtiofsd, which only Kata's own driver needs (default: found on the host)", func(c *Config) *string { return &c.Virtiofsd }),
	text("containerd", "`SOCKET` of a containerd to use instead of a private one", func(c *Config) *string { return &c.Containerd }),
	text("log-level", "minimum `LEVEL` to log: debug, info, warn or error", func(c *Config) *string { return &c.LogLevel }),
	text("log-format", "`FORMAT` of the log: text or json", func(c *Config) *string { return &c.LogFormat }),
}

// defaultOf formats the default value of a field for Setting.Default. A zero value is not shown, because it means that
// the setting is not used or that its usage describes what happens instead.
func defaultOf[T comparable](usage string, field func(*Config) *T) string {
	var zero T
	c := Default()
	value := *field(&c)
	if value == zero || strings.Contains(usage, "(default: ") {
		return ""
	}
	text := fmt.Sprint(value)
	if _, ok := any(value).(time.Duration); ok {
		text = strings.TrimSuffix(strings.TrimSuffix(text, "0s"), "0m") // 1h0m0s
	}
	return text
}

func text(name, usage string, field func(*Config) *string) Setting {
	return Setting{Name: name, Usage: usage, Default: defaultOf(usage, field), set: func(c *Config, v string) error {
		*field(c) = v
		return nil
	}}
}

func flag(name, usage string, field func(*Config) *bool) Setting {
	return Setting{Name: name, Usage: usage, Bool: true, set: func(c *Config, v string) error {
		b, err := strconv.ParseBool(v)
		if err != nil {
			return errors.New("must be true or false")
		}
		*field(c) = b
		return nil
	}}
}

func integer(name, usage string, field func(*Config) *int) Setting {
	return Setting{Name: name, Usage: usage, Default: defaultOf(usage, field), set: func(c *Config, v string) error {
		n, err := strconv.ParseInt(v, 10, 32)
		if err != nil {
			return errors.New("must be an integer")
		}
		*field(c) = int(n)
		return nil
	}}
}

func number(name, usage string, field func(*Config) *float64) Setting {
	return Setting{Name: name, Usage: usage, Default: defaultOf(usage, field), set: func(c *Config, v string) error {
		n, err := strconv.ParseFloat(v, 64)
		if err != nil {
			return errors.New("must be a number")
		}
		*field(c) = n
		return nil
	}}
}

// parseDuration is like time.ParseDuration, but text may begin with a number of days, such as 1d or 1d12h, as in msb's
// --timeout.
func parseDuration(text string) (time.Duration, error) {
	days, rest, ok := strings.Cut(text, "d")
	n, err := strconv.ParseUint(days, 10, 16)
	if !ok || err != nil {
		return time.ParseDuration(text)
	}
	var d time.Duration
	if rest != "" {
		if d, err = time.ParseDuration(rest); d < 0 {
			err = errors.New("negative")
		}
	}
	return time.Duration(n)*24*time.Hour + d, err
}

func duration(name, usage string, field func(*Config) *time.Duration) Setting {
	return Setting{Name: name, Usage: usage, Default: defaultOf(usage, field), set: func(c *Config, v string) error {
		d, err := parseDuration(v)
		if err != nil {
			return errors.New("must be a number with a unit, s, m, h or d, such as 30s, 1h30m or 1d")
		}
		*field(c) = d
		return nil
	}}
}

func setHost(c *Config, host string) error {
	_, port, err := net.SplitHostPort(c.Listen)
	if err != nil {
		return nil // validate reports the invalid listen address
	}
	c.Listen = net.JoinHostPort(host, port)
	return nil
}

func setPort(c *Config, port string) error {
	host, _, err := net.SplitHostPort(c.Listen)
	if err != nil {
		return nil // validate reports the invalid listen address
	}
	c.Listen = net.JoinHostPort(host, port)
	return nil
}

func setTrustedProxies(c *Config, list string) error {
	c.TrustedProxies = nil
	for _, text := range fields(list) {
		network, err := netip.ParsePrefix(text)
		if err != nil {
			addr, err := netip.ParseAddr(text)
			if err != nil {
				return errors.New("must be addresses or networks, such as 127.0.0.1 or 10.1.0.0/24")
			}
			network = netip.PrefixFrom(addr, addr.BitLen())
		}
		c.TrustedProxies = append(c.TrustedProxies, network)
	}
	return nil
}

// fields returns the elements of a list that is separated by commas or spaces.
func fields(list string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' })
}

// Load reads the configuration from all sources. file is the argument of --config. If it is empty, Load reads
// DefaultFile if that exists. getenv is os.LookupEnv. flags returns the value of the flag name, and whether it was
// given. namespace returns an error if name is not valid for a tenant namespace. The returned error joins all problems
// of all sources. Each of them is an errdefs.ErrInvalidArgument.
func Load(file string, getenv, flags func(name string) (string, bool), namespace func(name string) error) (Config, error) {
	c := Default()
	problems := c.applyFile(file)
	for _, source := range []struct {
		name func(Setting) string
		get  func(string) (string, bool)
	}{
		{Setting.Env, getenv},
		{func(s Setting) string { return s.Name }, flags},
	} {
		for _, s := range Settings {
			value, ok := source.get(source.name(s))
			if !ok {
				continue
			}
			if err := s.set(&c, value); err != nil {
				problems = append(problems, invalid("%s %q: %s", source.name(s), value, err))
			}
		}
	}
	c.fillQuotas()
	c.deriveLimits(ThisHost())
	if err := c.validate(namespace); err != nil {
		problems = append(problems, err)
	}
	return c, errors.Join(problems...)
}

func (c *Config) applyFile(path string) []error {
	optional := path == ""
	if optional {
		path = DefaultFile
	}
	data, err := os.ReadFile(path)
	if optional && errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		return []error{invalid("the configuration file %s does not exist", path)}
	}
	if err != nil {
		return []error{invalid("could not read the configuration file: %s", err)}
	}
	values := map[string]any{}
	if err := toml.Unmarshal(data, &values); err != nil {
		var at *toml.DecodeError
		if errors.As(err, &at) {
			line, column := at.Position()
			return []error{invalid("%s:%d:%d: %s", path, line, column, at)}
		}
		return []error{invalid("%s: %s", path, err)}
	}
	problems := flattenTables(path, values)
	for _, s := range Settings {
		value, ok := values[s.fileKey()]
		if !ok {
			continue
		}
		delete(values, s.fileKey())
		// fmt.Sprint formats these types as the other sources write them.
		switch value.(type) {
		case string, int64, float64, bool:
			err = s.set(c, fmt.Sprint(value))
		default:
			err = errors.New("must be a single value")
		}
		if err != nil {
			problems = append(problems, invalid("%s: %s = %v: %s", path, s.fileKey(), value, err))
		}
	}
	problems = append(problems, c.applyQuotas(path, values)...)
	unknown := make([]string, 0, len(values))
	for key := range values {
		unknown = append(unknown, key)
	}
	slices.Sort(unknown)
	for _, key := range unknown {
		problems = append(problems, invalid("%s: unknown key %q: see 'msbd --help' for the settings", path, key))
	}
	return problems
}

// flattenTables replaces the key config in a table [kata] by the key kata_config, and likewise for every setting whose
// name has several words.
func flattenTables(path string, values map[string]any) (problems []error) {
	for _, name := range slices.Sorted(maps.Keys(values)) {
		prefix := name + "_"
		table, ok := values[name].(map[string]any)
		if !ok || !slices.ContainsFunc(Settings, func(s Setting) bool { return strings.HasPrefix(s.fileKey(), prefix) }) {
			continue
		}
		delete(values, name)
		for _, key := range slices.Sorted(maps.Keys(table)) {
			if _, twice := values[prefix+key]; twice {
				problems = append(problems, invalid("%s: %s and %s.%s are the same setting: give only one of them", path, prefix+key, name, key))
			}
			values[prefix+key] = table[key]
		}
	}
	return problems
}
