package e2e

import (
	"fmt"
	"regexp"
	"runtime"
	"testing"
)

// TestResourceLimits starts sandboxes of several sizes. It checks the processors and the memory that programs inside
// see and can use, and the server's metrics.
func TestResourceLimits(t *testing.T) {
	sizes := []struct{ cpus, memory int }{{1, 128}, {2, 256}}
	if n := runtime.NumCPU(); n > 3 {
		sizes = append(sizes, struct{ cpus, memory int }{min(n, 8), 1024})
	}
	s, key := sharedServer(t)
	st, err := s.status()
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range sizes {
		name := fmt.Sprintf("sized-%d-%d", size.cpus, size.memory)
		t.Run(name, func(t *testing.T) {
			t.Cleanup(func() { s.call(key, "sandbox.stop", params{"sandbox": name}) })
			s.mustCall(t, key, "sandbox.start", params{"sandbox": name, "config": params{"cpus": size.cpus, "memory": size.memory}}, nil)

			processors := size.cpus
			if st.Isolation.Accelerator == "tcg" {
				processors = 1
			}
			got := s.python(t, key, name, "import os\nprint(os.cpu_count(), len(os.sched_getaffinity(0)))").text("stdout")
			if want := fmt.Sprintln(processors, processors); got != want {
				t.Errorf("Python counts %q processors, want %q", got, want)
			}
			if got := s.command(t, key, name, "nproc").text("stdout"); got != fmt.Sprintln(processors) {
				t.Errorf("nproc prints %q, want %d", got, processors)
			}
			// The guest has more memory than the sandbox may use, for its kernel and its agent.
			total := 0
			meminfo := s.command(t, key, name, "cat", "/proc/meminfo").text("stdout")
			if fmt.Sscanf(meminfo, "MemTotal: %d kB", &total); total>>10 < size.memory || total>>10 > size.memory+256 {
				t.Errorf("the guest has %d MiB of memory for a sandbox of %d MiB, want at most 256 MiB more", total>>10, size.memory)
			}

			// Half of the memory can be shared memory.
			var blocks, blockSize int
			fmt.Sscan(s.command(t, key, name, "stat", "-f", "-c", "%b %S", "/dev/shm").text("stdout"), &blocks, &blockSize)
			if got, want := blocks*blockSize>>20, size.memory/2; got != want {
				t.Errorf("/dev/shm has %d MiB, want %d", got, want)
			}

			// Nearly all of the sandbox's memory can be used, and the metrics count it.
			most := size.memory - 40
			if r := s.python(t, key, name, fmt.Sprintf("b = bytearray(%d << 20)\nlen(b) >> 20", most)); r.text("stdout") != fmt.Sprintln(most) {
				t.Errorf("allocate %d of %d MiB: %+v", most, size.memory, r)
			}
			s.python(t, key, name, "sum(range(1000000))")
			var m struct{ Sandboxes []metrics }
			s.mustCall(t, key, "sandbox.metrics.get", params{"sandbox": name}, &m)
			if len(m.Sandboxes) != 1 || m.Sandboxes[0].Memory == nil {
				t.Fatalf("metrics: %+v, want one sandbox with its memory", m)
			}
			if used := *m.Sandboxes[0].Memory; used < int64(most) || used > int64(size.memory) {
				t.Errorf("the metrics count %d MiB as used, want at least the %d MiB of an array and at most %d", used, most, size.memory)
			}
			if cpu := m.Sandboxes[0].CPU; cpu <= 0 {
				t.Errorf("the metrics report a CPU use of %f percent after work, want more than 0", cpu)
			}

			// More memory than the limit cannot be used. The sandbox survives the attempt.
			r := s.python(t, key, name, fmt.Sprintf("b = None\nb = bytearray(%d << 20)\nlen(b)", size.memory+8))
			outOfMemory := regexp.MustCompile("MemoryError|SIGKILL|out of memory")
			if r.Status != "error" || !outOfMemory.MatchString(r.text("stderr")) {
				t.Errorf("allocate %d MiB in a sandbox of %d MiB: got %+v, want an error because of the memory", size.memory+8, size.memory, r)
			}
			if got := s.python(t, key, name, "1 + 1").text("stdout"); got != "2\n" {
				t.Errorf("1 + 1 after memory ran out: got %q, want 2", got)
			}
		})
	}
}
