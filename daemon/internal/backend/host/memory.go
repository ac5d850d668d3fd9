package host

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Memory returns the memory that new sandboxes can have on this host, and the memory that sandboxes could have if nothing used
// any, in bytes. If a cgroup limits the memory of all sandboxes, as in a container, what it leaves is the most that they can have.
// Memory does not block.
func (r Route) Memory() (available, total uint64, err error) { return machine{}.memory(r) }

var totalRE = regexp.MustCompile(`(?m)^MemTotal:\s*(\d+) kB$`)

func (m machine) memory(r Route) (available, total uint64, err error) {
	info := m.read("/proc/meminfo")
	a, t := availableRE.FindStringSubmatch(info), totalRE.FindStringSubmatch(info)
	if a == nil || t == nil {
		return 0, 0, errors.New("/proc/meminfo does not show the memory of the host")
	}
	available, total = kib(a[1]), kib(t[1])
	for _, g := range []memoryCgroup{
		// The root of the tree has a limit if it is the cgroup of a container. The cgroups of all sandboxes are below msb.
		{"/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"},
		{"/sys/fs/cgroup/msb", "memory.max", "memory.current", "inactive_file"},
		{"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"},
		{"/sys/fs/cgroup/memory/msb", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"},
	} {
		if free, limit, ok := m.limitOf(g); ok {
			available, total = min(available, free), min(total, limit)
		}
	}
	if r.guestsInShm() {
		var shm unix.Statfs_t
		if err := unix.Statfs(m.root+"/dev/shm", &shm); err != nil {
			return 0, 0, fmt.Errorf("measure /dev/shm, which holds the memory of guests: %w", err)
		}
		size := uint64(shm.Bsize)
		available, total = min(available, shm.Bavail*size), min(total, shm.Blocks*size)
	}
	return available, total, nil
}

// guestsInShm reports whether the memory of guests is in /dev/shm. Kata's own driver keeps it there.
func (r Route) guestsInShm() bool { return r.Hypervisor == Kata && !r.hostConfig }

func kib(digits string) uint64 {
	n, _ := strconv.ParseUint(digits, 10, 64) // the regular expression matches only digits
	return n << 10
}

// memoryCgroup is a cgroup with the names of its files, and of the line of memory.stat with the cache that the kernel drops first.
type memoryCgroup struct{ dir, limit, usage, cache string }

// limitOf returns what a cgroup leaves of its limit, and the limit, or false if there is no limit.
func (m machine) limitOf(g memoryCgroup) (free, limit uint64, ok bool) {
	number := func(file string) (uint64, error) {
		return strconv.ParseUint(strings.TrimSpace(m.read(filepath.Join(g.dir, file))), 10, 64)
	}
	limit, limitErr := number(g.limit) // "max" and a missing file mean that there is none
	used, usedErr := number(g.usage)
	if limitErr != nil || usedErr != nil {
		return 0, 0, false
	}
	for line := range strings.Lines(m.read(filepath.Join(g.dir, "memory.stat"))) {
		if name, value, _ := strings.Cut(strings.TrimSpace(line), " "); name == g.cache {
			cache, _ := strconv.ParseUint(value, 10, 64)
			used -= min(used, cache)
		}
	}
	return limit - min(limit, used), limit, true
}
