package host

import (
	"os"
	"path/filepath"
	"testing"
)

func TestMemory(t *testing.T) {
	const mib = 1 << 20
	const meminfo = "MemTotal:        8388608 kB\nMemFree:          1024 kB\nMemAvailable:    4194304 kB\n"
	for name, tt := range map[string]struct {
		files            map[string]string
		available, total uint64
	}{
		"no limit": {map[string]string{"/proc/meminfo": meminfo}, 4096 * mib, 8192 * mib},
		"cgroup v2 without a limit": {map[string]string{
			"/proc/meminfo": meminfo, "/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory.current": "1\n",
		}, 4096 * mib, 8192 * mib},
		"container, cgroup v2": {map[string]string{
			"/proc/meminfo": meminfo, "/sys/fs/cgroup/memory.max": "2147483648\n", "/sys/fs/cgroup/memory.current": "1073741824\n",
			"/sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 536870912\nactive_file 7\n",
		}, 1536 * mib, 2048 * mib},
		"limit that is larger than the host": {map[string]string{
			"/proc/meminfo": meminfo, "/sys/fs/cgroup/memory.max": "17179869184\n", "/sys/fs/cgroup/memory.current": "1073741824\n",
		}, 4096 * mib, 8192 * mib},
		"more in use than the limit": {map[string]string{
			"/proc/meminfo": meminfo, "/sys/fs/cgroup/msb/memory.max": "1073741824\n", "/sys/fs/cgroup/msb/memory.current": "1073745920\n",
		}, 0, 1024 * mib},
		"container, cgroup v1": {map[string]string{
			"/proc/meminfo": meminfo, "/sys/fs/cgroup/memory/memory.limit_in_bytes": "2147483648\n",
			"/sys/fs/cgroup/memory/memory.usage_in_bytes": "1073741824\n", "/sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 536870912\n",
			"/sys/fs/cgroup/memory/msb/memory.limit_in_bytes": "9223372036854771712\n", "/sys/fs/cgroup/memory/msb/memory.usage_in_bytes": "0\n",
		}, 1536 * mib, 2048 * mib},
	} {
		m := machine{root: t.TempDir()}
		for path, content := range tt.files {
			if err := os.MkdirAll(filepath.Dir(m.root+path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(m.root+path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		available, total, err := m.memory(Route{Hypervisor: Builtin})
		if err != nil || available != tt.available || total != tt.total {
			t.Errorf("%s: %d of %d MiB, error %v; want %d of %d", name, available/mib, total/mib, err, tt.available/mib, tt.total/mib)
		}
	}
	if _, _, err := (machine{root: t.TempDir()}).memory(Route{}); err == nil {
		t.Error("a host without /proc/meminfo has memory")
	}
	if available, total, err := (Route{Hypervisor: Builtin}).Memory(); err != nil || available == 0 || available > total {
		t.Errorf("this host: %d of %d bytes, error %v", available, total, err)
	}
}
