package e2e

import (
	"slices"
	"testing"
	"time"

	"github.com/msbd/msbd/daemon/benchtest"
)

// expectation is a ratio of two medians.
type expectation struct {
	name, beside string
	ratio        float64
}

// expected are the ratios that msbd should have at most, on two quiet processors without KVM. KVM makes them smaller.
var expected = []expectation{
	{"pool: " + startToCode, "runc: " + startToCode, 0.5},
	{"pool: " + startToCommand, "runc: " + startToCommand, 1.1},
	{"template: " + startToCommand, "runc: " + startToCommand, 12},
	{"cold: " + startToCommand, bareBoot, 1.6},
	{"sandbox.command.run true", "runc exec true", 2},
	{"sandbox.repl.run 1+1", "runc exec true", 0.8},
}

// farOff is how many times a ratio may be the expected one. Other load makes ratios larger, because a microVM uses more
// processes than runc.
const farOff = 3

// TestBenchSmoke measures starts and runs a few times, and fails if one takes far longer than it should. It compares only
// with what ran at the same time: runc, and the mere boot of a microVM. `make bench` measures precisely.
func TestBenchSmoke(t *testing.T) {
	s, key := startSandbox(t, "warm", "microsandbox/python")
	st, err := s.status()
	if err != nil {
		t.Fatal(err)
	}
	bundle := ociBundle(t, "python", "sleep", "3600")
	running := newContainer()
	if err := runc.do("run", "--detach", "--bundle", bundle, running); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := runc.do("delete", "--force", running); err != nil {
			t.Error(err)
		}
	})
	all := append(runc.starts("runc", "runc", bundle), routeStarts(t)...)
	all = append(all, bareStarts(st.Isolation.Accelerator),
		measurement{name: "runc exec true", run: func() error { return runc.do("exec", running, "true") }},
		measurement{name: "sandbox.command.run true", run: s.must(key, "sandbox.command.run", params{"sandbox": "warm", "command": "true"})},
		measurement{name: "sandbox.repl.run 1+1", run: s.must(key, "sandbox.repl.run", params{"sandbox": "warm", "language": "python", "code": "1+1"})})
	all = slices.DeleteFunc(all, func(m measurement) bool {
		return !slices.ContainsFunc(expected, func(e expectation) bool { return m.name == e.name || m.name == e.beside })
	})
	medians := map[string]time.Duration{}
	for i, times := range measure(t, rounds(5), all...) {
		medians[all[i].name] = benchtest.Percentile(times, 50)
	}
	for _, e := range expected {
		median, beside := medians[e.name], medians[e.beside]
		ratio := float64(median) / float64(beside)
		t.Logf("%-40s %8s, %6.2f times the %8s of %s; expected %g", e.name, median.Round(time.Millisecond), ratio, beside.Round(time.Millisecond), e.beside, e.ratio)
		if ratio > farOff*e.ratio {
			t.Errorf("%s takes %s, %.2f times the %s of %s. It should take %g times as long at most", e.name, median, ratio, beside, e.beside, e.ratio)
		}
	}
}
