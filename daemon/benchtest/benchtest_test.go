package benchtest

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"
)

// What Put records can be read again: a later record of the same name and number replaces the earlier one, and the first one
// of this process replaces the results of earlier processes.
func TestPut(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(Dir, dir)
	if err := os.WriteFile(filepath.Join(dir, "a.jsonl"), []byte("of an earlier process"), 0o644); err != nil {
		t.Fatal(err)
	}
	first, second := Value("memory", "MiB", 1), Value("memory", "MiB", 2)
	second.At = 10
	Put(t, "a", Value("memory", "MiB", 3))
	Put(t, "a", second)
	Put(t, "a", first)
	Put(t, "b", Record{Name: "x", Missing: "no <b>"})
	all, err := Read(dir)
	if err != nil {
		t.Fatal(err)
	}
	for benchmark, want := range map[string][]Record{"a": {first, second}, "b": {{Name: "x", Missing: "no <b>"}}} {
		if got := all[benchmark]; got == nil || !reflect.DeepEqual(got.Records, want) {
			t.Errorf("the results of %s are %+v, want %v", benchmark, got, want)
		}
	}
	run := all["a"].Run
	if run.Commit == "" || run.Cores < 1 || run.MemoryMiB < 1 || run.Processor == "" || run.Kernel == "" || run.QEMU == "" ||
		run.Accelerator == "" || !run.Date.Equal(started) {
		t.Errorf("the run is %+v", run)
	}
}

func TestTimes(t *testing.T) {
	var d []time.Duration
	for ms := 200; ms > 0; ms-- {
		d = append(d, time.Duration(ms)*time.Millisecond)
	}
	want := Record{Name: "x", Unit: "s", N: 200, P50: 0.101, P99: 0.199}
	if got := Times("x", "s", d); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}
