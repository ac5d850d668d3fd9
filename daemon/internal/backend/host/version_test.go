package host

import (
	"strings"
	"testing"
)

func TestOlder(t *testing.T) {
	// From old to new. Equal versions are on one line.
	order := [][]string{
		{"v0.0.0-20250828155603-754f07cff239"},
		{"1.6.20~ds1-1+deb12u1", "1.6.20"},
		{"1.7.33", "v1.7.33"},
		{"2.0.0-rc.1"},
		{"2.0.0"},
		{"3.9"},
		{"3.20.0", "3.20"},
		{"3.31.0-rc0", "3.31.0-alpha1", "3.31.0~rc0"},
		{"3.31.0", "3.31.0-1.el9", "3.31.0+dirty"},
		{"3.31.1"},
		{"10.0.0"},
	}
	for i, row := range order {
		for j, other := range order {
			for _, a := range row {
				for _, b := range other {
					v, err := parseVersion(a)
					if err != nil {
						t.Fatal(err)
					}
					w, err := parseVersion(b)
					if err != nil {
						t.Fatal(err)
					}
					if v.less(w) != (i < j) {
						t.Errorf("%s less than %s: %t", a, b, v.less(w))
					}
				}
			}
		}
	}
	for _, bad := range []string{"", "unknown", "three.one", "1", "1.x", "99999999999.1.1"} {
		if !older(bad, "1.0.0") {
			t.Errorf("invalid version %q is not older than 1.0.0", bad)
		}
	}
}

func TestKataWarning(t *testing.T) {
	const (
		images, annotations, rust = "CVE-2026-24054", "CVE-2026-44210", "CVE-2026-47243"
	)
	builtin, own := Route{Accelerator: KVM}, Route{Accelerator: KVM, hostShim: true, hostConfig: true}
	for _, tt := range []struct {
		route   Route
		version string
		with    []string
		without []string
	}{
		{builtin, "v0.0.0-20250828155603-754f07cff239", []string{"Kata of 2025-08-28", images, annotations, "clients cannot reach them", "kata-shim"}, []string{rust, "emulated"}},
		{Route{Accelerator: TCG}, "3.20.0", []string{"Kata 3.20.0", "emulated guests are not isolated by hardware"}, nil},
		{own, "3.9.0", []string{images, annotations, rust}, []string{"clients cannot reach"}},
		{own, "3.26.0", []string{annotations, rust}, []string{images}},
		{own, "3.31.0-rc0", []string{annotations, rust}, nil},
		{Route{hostShim: true, dragonball: true}, "3.32.0", []string{"Dragonball", "4.0.0"}, nil},
	} {
		text := tt.route.KataWarning(tt.version)
		for _, with := range tt.with {
			if !strings.Contains(text, with) {
				t.Errorf("%s: %q, want %q in it", tt.version, text, with)
			}
		}
		for _, without := range tt.without {
			if strings.Contains(text, without) {
				t.Errorf("%s: %q, do not want %q in it", tt.version, text, without)
			}
		}
	}
	for _, good := range []string{"3.31.0", "3.32.1", "4.0.0"} {
		if text := own.KataWarning(good); text != "" {
			t.Errorf("%s: %s", good, text)
		}
	}
}

// Each release series of containerd has its own fixed version.
func TestContainerdWarning(t *testing.T) {
	for version, fixedIn := range map[string]string{
		"1.6.20~ds1": "1.7.33", "1.7.32": "1.7.33", "2.0.9": "2.0.10", "2.2.4": "2.2.5", "2.3.0-beta.1": "2.3.2", "unknown": "1.7.33",
	} {
		if text := ContainerdWarning(version); !strings.Contains(text, version+" has known vulnerabilities that "+fixedIn+" fixes") {
			t.Errorf("%s: %q", version, text)
		}
	}
	for _, good := range []string{"1.7.33", "v1.7.35", "2.0.10", "2.1.9", "2.3.2", "2.4.0", "3.0.0"} {
		if text := ContainerdWarning(good); text != "" {
			t.Errorf("%s: %s", good, text)
		}
	}
}
