package agent

import (
	"testing"
)

func TestParseMeminfo(t *testing.T) {
	if name, size, ok := parseMeminfo("MemFree:      123 kB"); name != "MemFree" || size != 123<<10 || !ok {
		t.Errorf("parseMeminfo = %q, %d, %v; want MemFree, %d, true", name, size, ok, 123<<10)
	}
	if _, size, ok := parseMeminfo("HugePages_Free:     4"); size != 4 || !ok {
		t.Errorf("parseMeminfo of a count = %d, %v; want 4, true", size, ok)
	}
	for _, bad := range []string{"", "x", "x:", "x: y"} {
		if _, _, ok := parseMeminfo(bad); ok {
			t.Errorf("parseMeminfo accepted %q", bad)
		}
	}
}

func TestMetricItem(t *testing.T) {
	for name, want := range map[string]string{
		"MemTotal": "mem_total", "Active(anon)": "active_anon", "HugePages_Total": "hugepages_total",
		"SReclaimable": "sreclaimable", "Cached": "cached", "DirectMap4k": "direct_map4k",
	} {
		if got := metricItem(name); got != want {
			t.Errorf("metricItem(%q) = %q, want %q", name, got, want)
		}
	}
}
