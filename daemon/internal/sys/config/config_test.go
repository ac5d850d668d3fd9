package config

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/daemon/internal/domain/name"
)

func source(values map[string]string) func(string) (string, bool) {
	return func(name string) (string, bool) {
		v, ok := values[name]
		return v, ok
	}
}

func namespace(n string) error { return name.Validate("namespace", n) }

func load(t *testing.T, file string, env, flags map[string]string) (Config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "msbd.toml")
	if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	return Load(path, source(env), source(flags), namespace)
}

func TestDefaultIsValid(t *testing.T) {
	got, err := load(t, "", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.deriveLimits(ThisHost())
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// Limits that are not set suit the host, and do not contradict those that are.
func TestDerivedLimits(t *testing.T) {
	set := func(change func(*Config)) Config {
		c := Default()
		change(&c)
		return c
	}
	limits := func(c Config) [4]int { return [4]int{c.TotalSandboxes, c.TotalMemoryMiB, c.MaxCPUs, c.MaxMemoryMiB} }
	for name, tt := range map[string]struct {
		config Config
		host   Host
		want   [4]int
	}{
		"large host":               {Default(), Host{32, 64 << 10}, [4]int{2048, 0, 8, 16384}},
		"small host":               {Default(), Host{2, 4 << 10}, [4]int{128, 0, 4, 3276}},
		"less than one sandbox":    {Default(), Host{1, 500}, [4]int{64, 0, 2, 512}},
		"unknown memory":           {Default(), Host{4, 0}, [4]int{256, 0, 8, 16384}},
		"large default sandbox":    {set(func(c *Config) { c.DefaultMemoryMiB, c.DefaultCPUs = 4096, 6 }), Host{2, 4 << 10}, [4]int{128, 0, 6, 4096}},
		"maximum beyond the host":  {set(func(c *Config) { c.MaxMemoryMiB = 16 << 10 }), Host{2, 4 << 10}, [4]int{128, 0, 4, 16384}},
		"total beyond the host":    {set(func(c *Config) { c.TotalMemoryMiB = 64 << 10 }), Host{2, 4 << 10}, [4]int{128, 65536, 4, 3276}},
		"total smaller than usual": {set(func(c *Config) { c.TotalMemoryMiB, c.TotalSandboxes = 1024, 3 }), Host{2, 4 << 10}, [4]int{3, 1024, 4, 1024}},
	} {
		c := tt.config
		c.deriveLimits(tt.host)
		if got := limits(c); got != tt.want {
			t.Errorf("%s: got %v, want %v", name, got, tt.want)
		}
		if err := c.validate(namespace); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if h := ThisHost(); h.Processors < 1 || h.MemoryMiB < 64 {
		t.Errorf("this host has %+v", h)
	}
	for _, bad := range []string{"total-memory-mib", "total-sandboxes"} {
		if _, err := load(t, "", nil, map[string]string{bad: "-1"}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), bad) {
			t.Errorf("%s -1: %v", bad, err)
		}
	}
}

func TestPrecedenceOfSources(t *testing.T) {
	got, err := load(t, `
		state_dir = "/file"
		run_dir = "/file"
		qemu = "/file"
		max_cpus = 4
		dev = true
		max_run_time = "30s"
		listen = "127.0.0.1:1"
	`,
		map[string]string{"MSBD_RUN_DIR": "/env", "MSBD_QEMU": "/env", "MSBD_MAX_CPUS": "5", "MSBD_PORT": "2"},
		map[string]string{"qemu": "/flag", "host": "::1", "dev": "false"})
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.StateDir, want.RunDir, want.QEMU = "/file", "/env", "/flag"
	want.MaxCPUs, want.MaxRunTime, want.Listen = 5, 30*time.Second, "[::1]:2"
	want.deriveLimits(ThisHost())
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// Each setting can be set from each source, under the name that the help text gives.
func TestEverySettingInEverySource(t *testing.T) {
	sample := map[string]string{
		"listen": "127.0.0.1:9", "host": "::1", "port": "9", "accelerator": "tcg", "hypervisor": "kata", "log-level": "warn", "log-format": "json",
		"max-run-time": "7s", "max-cpus": "3", "default-cpus": "2", "default-memory-mib": "600", "max-memory-mib": "700",
		"default-disk-mib": "600", "max-disk-mib": "7000", "disk-mib-per-second": "50", "disk-ops-per-second": "500", "pool-min": "2", "pool-max": "7", "pool-memory-mib": "900",
		"default-image": "other", "audit-segment-mib": "3", "max-connections": "9", "requests-per-second": "2.5",
		"total-sandboxes": "3", "total-memory-mib": "700", "max-templates": "3",
		"qemu-users": "7-9", "quota-sandboxes": "3", "quota-cpus": "3", "quota-memory-mib": "3", "quota-disk-mib": "3", "quota-runs": "3",
		"trusted-proxies": "127.0.0.1, 10.1.0.0/24",
		"acme-domains":    "msb.example.org", "acme-email": "a@example.org", "acme-directory": "https://ca.example.org/",
	}
	// The other settings that a setting requires.
	required := map[string]map[string]string{
		"tls-cert": {"MSBD_TLS_KEY": "/k"}, "tls-key": {"MSBD_TLS_CERT": "/c"}, "tls-client-ca": {"MSBD_ACME_DOMAINS": "a.example"},
		"acme-email": {"MSBD_ACME_DOMAINS": "a.example"}, "acme-directory": {"MSBD_ACME_DOMAINS": "a.example"},
		"acme-directory-ca": {"MSBD_ACME_DOMAINS": "a.example"},
	}
	for _, s := range Settings {
		t.Run(s.Name, func(t *testing.T) {
			value, ok := sample[s.Name]
			if !ok {
				value = "/sample"
			}
			if s.Bool {
				value = "true"
			}
			var all []Config
			for _, src := range []struct {
				file       string
				env, flags map[string]string
			}{
				{file: strings.ReplaceAll(s.Name, "-", "_") + " = " + `"` + value + `"`},
				{env: map[string]string{"MSBD_" + strings.ToUpper(strings.ReplaceAll(s.Name, "-", "_")): value}},
				{flags: map[string]string{s.Name: value}},
			} {
				env := maps.Clone(required[s.Name])
				if env == nil {
					env = map[string]string{}
				}
				maps.Copy(env, src.env)
				c, err := load(t, src.file, env, src.flags)
				if err != nil {
					t.Fatal(err)
				}
				if reflect.DeepEqual(c, Default()) {
					t.Errorf("%+v changes nothing", src)
				}
				all = append(all, c)
			}
			if !reflect.DeepEqual(all[0], all[1]) || !reflect.DeepEqual(all[1], all[2]) {
				t.Errorf("sources differ: %+v", all)
			}
		})
	}
}

func TestDiskSizes(t *testing.T) {
	for flags, want := range map[[2]string]string{
		{"4096", "65536"}: "", {"64", "64"}: "", {"65536", "65536"}: "",
		{"63", "65536"}:    "default-disk-mib 63: must be from 64 to max-disk-mib, 65536",
		{"65537", "65536"}: "default-disk-mib 65537: must be from 64 to max-disk-mib, 65536",
		{"4096", "2048"}:   "default-disk-mib 4096: must be from 64 to max-disk-mib, 2048",
		{"64", "63"}:       "max-disk-mib 63: must be at least 64",
		{"64", "-1"}:       "max-disk-mib -1: must be at least 64",
	} {
		_, err := load(t, "", nil, map[string]string{"default-disk-mib": flags[0], "max-disk-mib": flags[1]})
		if (err == nil) != (want == "") || err != nil && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want)) {
			t.Errorf("default %s, maximum %s: got error %v, want %q", flags[0], flags[1], err, want)
		}
	}
	if c := Default(); c.DefaultDiskMiB != 4096 || c.MaxDiskMiB != 65536 {
		t.Errorf("the default disk has %d MiB, and the largest %d", c.DefaultDiskMiB, c.MaxDiskMiB)
	}
}

func TestDiskLimits(t *testing.T) {
	for flags, want := range map[[2]string]string{
		{"200", "20000"}: "", {"0", "0"}: "", {"1", "100"}: "", {"1048576", "2147483647"}: "",
		{"-1", "100"}:      "disk-mib-per-second -1: must be from 1 to 1048576, or 0 for no limit",
		{"1048577", "100"}: "disk-mib-per-second 1048577: must be from 1 to 1048576, or 0 for no limit",
		{"1", "99"}:        "disk-ops-per-second 99: must be at least 100, or 0 for no limit",
		{"1", "-1"}:        "disk-ops-per-second -1: must be at least 100, or 0 for no limit",
		{"1.5", "100"}:     "disk-mib-per-second \"1.5\": must be an integer",
	} {
		_, err := load(t, "", nil, map[string]string{"disk-mib-per-second": flags[0], "disk-ops-per-second": flags[1]})
		if (err == nil) != (want == "") || err != nil && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want)) {
			t.Errorf("%v: got error %v, want %q", flags, err, want)
		}
	}
	if c := Default(); c.DiskMiBPerSecond != 200 || c.DiskOpsPerSecond != 20_000 {
		t.Errorf("by default, a sandbox may use %d MiB and %d operations per second", c.DiskMiBPerSecond, c.DiskOpsPerSecond)
	}
}

func TestAllProblemsAtOnce(t *testing.T) {
	_, err := load(t, "color = 1\nmax_cpus = []\nstate_dir = \"relative\"",
		map[string]string{"MSBD_DEFAULT_CPUS": "many", "MSBD_DEV": "maybe"},
		map[string]string{"max-run-time": "5", "accelerator": "xen", "port": "99999"})
	if !errdefs.IsInvalidArgument(err) {
		t.Fatalf("Load: %v, want invalid argument", err)
	}
	for _, want := range []string{`"color"`, "max_cpus", "relative", "MSBD_DEFAULT_CPUS", "MSBD_DEV", "max-run-time", "xen", "99999"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not mention %s:\n%v", want, err)
		}
	}
}

func TestDuration(t *testing.T) {
	for text, want := range map[string]time.Duration{"1d": 24 * time.Hour, "1d12h": 36 * time.Hour, "90m": 90 * time.Minute} {
		c, err := load(t, fmt.Sprintf("max_run_time = %q", text), nil, nil)
		if err != nil || c.MaxRunTime != want {
			t.Errorf("%q is %s, %v; want %s", text, c.MaxRunTime, err, want)
		}
	}
	for _, text := range []string{"", "5", "1w", "d", "1d-1h", "-1d", "99999999d"} {
		if _, err := load(t, fmt.Sprintf("max_run_time = %q", text), nil, nil); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "s, m, h or d") {
			t.Errorf("%q: %v, want an error that lists the units", text, err)
		}
	}
}

func TestUnreadableFile(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "missing.toml")
	if _, err := Load(missing, source(nil), source(nil), namespace); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), missing) {
		t.Errorf("missing file: %v, want invalid argument naming the file", err)
	}
	if _, err := load(t, "a = 1\nb ==", nil, nil); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), ":2:") {
		t.Errorf("bad TOML: %v, want invalid argument with the line", err)
	}
}

func TestListen(t *testing.T) {
	tests := []struct {
		listen     string
		dev, proxy bool
		ok         bool
	}{
		{"127.0.0.1:5555", false, false, true},
		{"127.0.0.1:5555", true, false, true},
		{"[::1]:0", true, false, true},
		{"localhost:80", true, false, true},
		{"[::ffff:127.0.0.1]:80", true, false, true},
		{"0.0.0.0:5555", false, false, false},
		{":5555", false, false, false},
		{"[::]:5555", false, true, true},
		{"0.0.0.0:5555", true, true, false},
		{"example.org:5555", true, true, false},
		{"127.0.0.1", false, false, false},
		{"127.0.0.1:-1", false, false, false},
	}
	for _, tt := range tests {
		flags := map[string]string{"listen": tt.listen}
		if tt.dev {
			flags["dev"] = "true"
		}
		if tt.proxy {
			flags["insecure-behind-proxy"] = "true"
		}
		if _, err := load(t, "", nil, flags); (err == nil) != tt.ok {
			t.Errorf("listen %s, dev %t, proxy %t: %v, want ok: %t", tt.listen, tt.dev, tt.proxy, err, tt.ok)
		}
	}
}

// 0 means the default for the limits that depend on the host, and no limit for the total memory. An error about such a limit says so.
func TestLimitsAcceptZero(t *testing.T) {
	want, err := load(t, "", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, zero := range map[string]struct{ inError, inHelp string }{
		"total-sandboxes":  {"or 0 for the default", "0 means the default"},
		"total-memory-mib": {"or 0 for no limit", "0, the default, means unlimited"},
		"max-cpus":         {"or 0 for the default", "0 means the default"},
		"max-memory-mib":   {"or 0 for the default", "0 means the default"},
	} {
		got, err := load(t, "", nil, map[string]string{name: "0"})
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Errorf("%s 0: %v, %s", name, err, diff)
		}
		if _, err := load(t, "", nil, map[string]string{name: "-1"}); err == nil || !strings.Contains(err.Error(), name+" -1: must be at least ") ||
			!strings.Contains(err.Error(), ", "+zero.inError) {
			t.Errorf("%s -1: %v, want an error that mentions 0", name, err)
		}
		i := slices.IndexFunc(Settings, func(s Setting) bool { return s.Name == name })
		if !strings.Contains(Settings[i].Usage, zero.inHelp) {
			t.Errorf("the help of %s does not mention 0: %s", name, Settings[i].Usage)
		}
	}
}

func TestTLSSettingsBelongTogether(t *testing.T) {
	for _, tt := range []struct {
		flags map[string]string
		ok    bool
	}{
		{map[string]string{"listen": "0.0.0.0:443", "tls-cert": "/c", "tls-key": "/k"}, true},
		{map[string]string{"listen": "0.0.0.0:443", "acme-domains": "a.example.org,b.example.org"}, true},
		{map[string]string{"tls-cert": "/c"}, false},
		{map[string]string{"tls-cert": "/c", "tls-key": "/k", "acme-domains": "a.example.org"}, false},
		{map[string]string{"tls-client-ca": "/ca"}, false},
		{map[string]string{"acme-email": "a@example.org"}, false},
		{map[string]string{"acme-domains": "localhost"}, false},
		{map[string]string{"acme-domains": "a.example.org", "acme-directory": "http://ca.example.org"}, false},
	} {
		if _, err := load(t, "", nil, tt.flags); (err == nil) != tt.ok {
			t.Errorf("%v: %v, want ok: %t", tt.flags, err, tt.ok)
		}
	}
}

func TestTrustedProxies(t *testing.T) {
	got, err := load(t, "", nil, map[string]string{"trusted-proxies": "::1,127.0.0.1 10.1.0.0/24,"})
	want := []netip.Prefix{netip.MustParsePrefix("::1/128"), netip.MustParsePrefix("127.0.0.1/32"), netip.MustParsePrefix("10.1.0.0/24")}
	if err != nil || !slices.Equal(got.TrustedProxies, want) {
		t.Errorf("TrustedProxies = %v, %v, want %v", got.TrustedProxies, err, want)
	}
	if _, err := load(t, "", nil, map[string]string{"trusted-proxies": "proxy.example.org"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a host name: %v, want invalid argument", err)
	}
}

// The name of a table is a prefix of the names of its settings.
func TestTables(t *testing.T) {
	got, err := load(t, "[kata]\nconfig = \"/k/c.toml\"\nshim = \"/k/shim\"\n[quota]\nmemory_mib = 7\n[tls]\n", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.KataConfig, want.KataShim, want.Quota.MemoryMiB = "/k/c.toml", "/k/shim", 7
	want.deriveLimits(ThisHost())
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for bad, want := range map[string]string{
		"kata_shim = \"/a\"\n[kata]\nshim = \"/b\"": "kata_shim and kata.shim",
		"[kata]\ncolor = 1":                         `"kata_color"`,
		"[kata.config]\npath = \"/c\"":              "kata_config",
		"[dev]\non = true":                          "dev",
		"[color]\nred = 1":                          `"color"`,
	} {
		if _, err := load(t, bad, nil, nil); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want invalid argument mentioning %s", bad, err, want)
		}
	}
}

func TestQuotas(t *testing.T) {
	c, err := load(t, "quota_runs = 7\nquota_disk_mib = 8\n[namespace.team-alpha]\nsandboxes = 3\nruns = 0\n[namespace.team-beta]\ncpus = 4\ndisk_mib = 6", nil,
		map[string]string{"quota-sandboxes": "9"})
	if err != nil {
		t.Fatal(err)
	}
	for namespace, want := range map[string]Quota{
		"team-alpha": {Sandboxes: 3, DiskMiB: 8},
		"team-beta":  {Sandboxes: 9, CPUs: 4, DiskMiB: 6, Runs: 7},
		"other":      {Sandboxes: 9, DiskMiB: 8, Runs: 7},
	} {
		if got := c.QuotaOf(namespace); got != want {
			t.Errorf("%s: %+v, want %+v", namespace, got, want)
		}
	}
	for _, bad := range []string{
		"[namespace.a]\nsandboxes = -1", "[namespace.a]\ndisk_mib = -1", "[namespace.a]\nsandboxes = \"many\"", "[namespace.a]\ncolor = 1", "namespace = 3",
		"[namespace]\na = 1", "[namespace.\"../x\"]\nruns = 1", "quota_cpus = -1",
	} {
		if _, err := load(t, bad, nil, nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v, want invalid argument", bad, err)
		}
	}
}

// FuzzFile checks that Load accepts any file completely, with valid quotas, or returns errdefs.ErrInvalidArgument.
func FuzzFile(f *testing.F) {
	for _, seed := range []string{
		"", "dev = true\nlisten = \"127.0.0.1:1\"", "[namespace.a]\nruns = 1", "max_cpus = 1e9", "a = [[1]]", "state_dir = \"\x00\"",
		"namespace.a.runs = 3\nnamespace.a.cpus = -1", "[kata]\nshim = \"/s\"\n[kata.config]", "requests_per_second = nan", "[[namespace]]\n", "quota_cpus = 99999999999",
	} {
		f.Add(seed)
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, text string) {
		path := filepath.Join(dir, "msbd.toml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := Load(path, source(nil), source(nil), namespace)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("Load: %v, want invalid argument", err)
			}
			return
		}
		for namespace := range c.Quotas {
			if q := c.QuotaOf(namespace); q.Sandboxes < 0 || q.CPUs < 0 || q.MemoryMiB < 0 || q.DiskMiB < 0 || q.Runs < 0 {
				t.Errorf("negative quota of %s: %+v", namespace, q)
			}
		}
	})
}

func TestIsLoopback(t *testing.T) {
	for host, want := range map[string]bool{
		"localhost": true, "LOCALHOST": true, "127.0.0.1": true, "127.9.9.9": true, "::1": true, "::ffff:127.0.0.1": true,
		"": false, "0.0.0.0": false, "::": false, "localhost.": false, "localhost.example": false, "evil.localhost": false,
		"192.168.1.1": false, "[::1]": false, "127.0.0.1:80": false, "127.1": false, "2130706433": false,
	} {
		if got := IsLoopback(host); got != want {
			t.Errorf("IsLoopback(%q) = %t", host, got)
		}
	}
}

func TestQEMUUIDs(t *testing.T) {
	for value, want := range map[string][2]uint32{
		"1900000000-1900000009": {1_900_000_000, 10},
		"7-7":                   {7, 1},
	} {
		first, count, err := Config{QEMUUsers: value}.QEMUUIDs()
		if first != want[0] || count != want[1] || err != nil {
			t.Errorf("%s: %d, %d, %v", value, first, count, err)
		}
	}
	for _, value := range []string{"0-9", "9-8", "7", "-7", "7-", "a-b", "7-4294967296", "1-2-3"} {
		c := Default()
		c.QEMUUsers = value
		if _, _, err := c.QEMUUIDs(); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "qemu-users") {
			t.Errorf("%s: %v, want an error that names the setting", value, err)
		}
	}
	// The default depends on the run directory, and is between the ids that systemd uses and the negative ones.
	seen := map[uint32]bool{}
	for _, dir := range []string{"/run/msb", "/run/other", "/tmp/third"} {
		first, count, err := Config{RunDir: dir}.QEMUUIDs()
		if err != nil || seen[first] || first < 0x70000000 || uint64(first)+uint64(count) > 1<<31 || count < 1000 {
			t.Errorf("%s: %d, %d, %v", dir, first, count, err)
		}
		seen[first] = true
	}
}
