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

// DefaultFile is the configuration file that is read if it is there and no other is named.
const DefaultFile = "/etc/msb/msbd.toml"

// Setting is one thing that can be set: as flag --name, as variable MSBD_NAME, and in the file as
// name, with underscores: kata_config, or config in a table [kata].
type Setting struct {
	Name  string
	Usage string
	// Bool settings are flags without a value.
	Bool bool
	set  func(c *Config, value string) error
}

// Env is the setting's environment variable.
func (s Setting) Env() string { return "MSBD_" + strings.ToUpper(s.fileKey()) }

func (s Setting) fileKey() string { return strings.ReplaceAll(s.Name, "-", "_") }

// Settings is every setting, in the order of the help text. A later one goes over an earlier one of
// the same source where they touch the same field.
var Settings = []Setting{
	text("state-dir", "`DIR` for what outlives a reboot: keys, records, images", func(c *Config) *string { return &c.StateDir }),
	text("run-dir", "`DIR` for sockets and running microVMs", func(c *Config) *string { return &c.RunDir }),
	text("lib-dir", "`DIR` of the shim and the guest's files (default: found beside msbd)", func(c *Config) *string { return &c.LibDir }),
	text("listen", "`HOST:PORT` of the HTTP gateway", func(c *Config) *string { return &c.Listen }),
	{Name: "host", Usage: "`HOST` of the HTTP gateway, over that of listen", set: setHost},
	{Name: "port", Usage: "`PORT` of the HTTP gateway, over that of listen", set: setPort},
	flag("dev", "take requests without an API key; loopback only", func(c *Config) *bool { return &c.Dev }),
	flag("insecure-behind-proxy", "allow plaintext HTTP off loopback, where a proxy adds TLS", func(c *Config) *bool { return &c.InsecureBehindProxy }),
	{Name: "trusted-proxies", Usage: "take from the proxies at these `ADDRESSES`, separated by commas, whom they ask for (X-Forwarded-For)", set: setTrustedProxies},
	flag("reset-key", "replace the signing key first: every API key made before is refused", func(c *Config) *bool { return &c.ResetKey }),
	text("tls-cert", "`FILE` of the gateway's certificate chain (PEM); a changed one is taken without a restart", func(c *Config) *string { return &c.TLSCert }),
	text("tls-key", "`FILE` of its key (PEM)", func(c *Config) *string { return &c.TLSKey }),
	text("tls-client-ca", "`FILE` of the CAs (PEM) of which clients must show a certificate, too", func(c *Config) *string { return &c.TLSClientCA }),
	text("acme-domains", "fetch certificates for these `NAMES`, separated by commas, with ACME", func(c *Config) *string { return &c.ACMEDomains }),
	text("acme-email", "`ADDRESS` that the ACME server may write to", func(c *Config) *string { return &c.ACMEEmail }),
	text("acme-directory", "`URL` of the ACME server's directory (default: Let's Encrypt's)", func(c *Config) *string { return &c.ACMEDirectory }),
	text("acme-directory-ca", "`FILE` of the CAs (PEM) that vouch for that server (default: the host's)", func(c *Config) *string { return &c.ACMEDirectoryCA }),
	integer("max-connections", "the most connections, `N`, to the gateway", func(c *Config) *int { return &c.MaxConnections }),
	number("requests-per-second", "the most calls, `N`, of one API key; 0 is no bound", func(c *Config) *float64 { return &c.RequestsPerSecond }),
	integer("quota-sandboxes", "the most sandboxes, `N`, of a tenant namespace; 0 is no bound", func(c *Config) *int { return &c.Quota.Sandboxes }),
	integer("quota-cpus", "the most virtual processors, `N`, of its sandboxes together", func(c *Config) *int { return &c.Quota.CPUs }),
	integer("quota-memory-mib", "the most memory, `MIB`, of its sandboxes together", func(c *Config) *int { return &c.Quota.MemoryMiB }),
	integer("quota-runs", "the most runs in progress, `N`, in its sandboxes together", func(c *Config) *int { return &c.Quota.Runs }),
	text("default-image", "`IMAGE` of a sandbox that names none", func(c *Config) *string { return &c.DefaultImage }),
	integer("default-cpus", "`N` virtual processors of a sandbox that does not say", func(c *Config) *int { return &c.DefaultCPUs }),
	integer("default-memory-mib", "`MIB` of memory of a sandbox that does not say", func(c *Config) *int { return &c.DefaultMemoryMiB }),
	integer("max-cpus", "the most virtual processors, `N`, of one sandbox", func(c *Config) *int { return &c.MaxCPUs }),
	integer("max-memory-mib", "the most memory, `MIB`, of one sandbox", func(c *Config) *int { return &c.MaxMemoryMiB }),
	duration("max-run-time", "the longest time limit of a run, such as 1h30m", func(c *Config) *time.Duration { return &c.MaxRunTime }),
	text("hypervisor", "`NAME` of what drives QEMU: auto, kata (Kata's own driver; needs KVM) or builtin (msbd itself)", func(c *Config) *string { return &c.Hypervisor }),
	text("kata-config", "`FILE` of the host's own Kata configuration, with a guest of its own", func(c *Config) *string { return &c.KataConfig }),
	text("kata-shim", "`PATH` of the host's own containerd-shim-kata-v2", func(c *Config) *string { return &c.KataShim }),
	text("accelerator", "`NAME` of what runs the guests: auto, kvm or tcg", func(c *Config) *string { return &c.Accelerator }),
	text("qemu", "`PATH` of QEMU", func(c *Config) *string { return &c.QEMU }),
	text("virtiofsd", "`PATH` of virtiofsd", func(c *Config) *string { return &c.Virtiofsd }),
	text("containerd", "`SOCKET` of a containerd to use in place of a private one", func(c *Config) *string { return &c.Containerd }),
	text("log-level", "`LEVEL` from which on to log: debug, info, warn or error", func(c *Config) *string { return &c.LogLevel }),
	text("log-format", "`FORMAT` of the log: text or json", func(c *Config) *string { return &c.LogFormat }),
}

func text(name, usage string, field func(*Config) *string) Setting {
	return Setting{Name: name, Usage: usage, set: func(c *Config, v string) error {
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
	return Setting{Name: name, Usage: usage, set: func(c *Config, v string) error {
		n, err := strconv.ParseInt(v, 10, 32)
		if err != nil {
			return errors.New("must be a whole number")
		}
		*field(c) = int(n)
		return nil
	}}
}

func number(name, usage string, field func(*Config) *float64) Setting {
	return Setting{Name: name, Usage: usage, set: func(c *Config, v string) error {
		n, err := strconv.ParseFloat(v, 64)
		if err != nil {
			return errors.New("must be a number")
		}
		*field(c) = n
		return nil
	}}
}

func duration(name, usage string, field func(*Config) *time.Duration) Setting {
	return Setting{Name: name, Usage: usage, set: func(c *Config, v string) error {
		d, err := time.ParseDuration(v)
		if err != nil {
			return errors.New("must be a duration such as 30s or 1h30m")
		}
		*field(c) = d
		return nil
	}}
}

func setHost(c *Config, host string) error {
	_, port, err := net.SplitHostPort(c.Listen)
	if err != nil {
		return nil // validate has more to say about it
	}
	c.Listen = net.JoinHostPort(host, port)
	return nil
}

func setPort(c *Config, port string) error {
	host, _, err := net.SplitHostPort(c.Listen)
	if err != nil {
		return nil
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

// fields are the parts of a list that commas separate.
func fields(list string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' })
}

// Load reads all sources. file is the file that --config names; if empty, DefaultFile is read if it
// is there. getenv is os.LookupEnv. flags returns the value of a flag and whether it was given. namespace
// returns an error for a name that no tenant namespace may have. Every problem of every source is reported at
// once, each as errdefs.ErrInvalidArgument.
func Load(file string, getenv, flags func(name string) (string, bool), namespace func(name string) error) (Config, error) {
	c := Default()
	problems := c.applyFile(file)
	for _, source := range []struct {
		what func(Setting) string
		get  func(string) (string, bool)
	}{
		{Setting.Env, getenv},
		{func(s Setting) string { return s.Name }, flags},
	} {
		for _, s := range Settings {
			value, ok := source.get(source.what(s))
			if !ok {
				continue
			}
			if err := s.set(&c, value); err != nil {
				problems = append(problems, invalid("%s %q: %s", source.what(s), value, err))
			}
		}
	}
	c.fillQuotas()
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
	if err != nil {
		return []error{invalid("read configuration: %s", err)}
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
	problems := flatten(path, values)
	for _, s := range Settings {
		value, ok := values[s.fileKey()]
		if !ok {
			continue
		}
		delete(values, s.fileKey())
		// A string, an integer or a boolean prints as the other sources write it; a table or a list
		// is refused by what parses it, or by this.
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

// flatten makes kata_config of config in a table [kata], and so with every setting of several words.
func flatten(path string, values map[string]any) (problems []error) {
	for _, name := range slices.Sorted(maps.Keys(values)) {
		prefix := name + "_"
		table, ok := values[name].(map[string]any)
		if !ok || !slices.ContainsFunc(Settings, func(s Setting) bool { return strings.HasPrefix(s.fileKey(), prefix) }) {
			continue
		}
		delete(values, name)
		for _, key := range slices.Sorted(maps.Keys(table)) {
			if _, twice := values[prefix+key]; twice {
				problems = append(problems, invalid("%s: %s and %s.%s are the same: give one of them", path, prefix+key, name, key))
			}
			values[prefix+key] = table[key]
		}
	}
	return problems
}
