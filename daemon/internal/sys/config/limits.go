package config

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Host is what Load derives limits from.
type Host struct {
	Processors int
	MemoryMiB  int // the memory of the host, without swap; 0 if unknown
}

// ThisHost returns the resources of this host.
func ThisHost() Host {
	h := Host{Processors: runtime.NumCPU()}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		h.MemoryMiB = int(info.Totalram * uint64(info.Unit) >> 20)
	}
	return h
}

const (
	// largestCPUs and largestMemoryMiB are the largest limits of one sandbox that are derived from a host.
	largestCPUs, largestMemoryMiB = 8, 16 << 10
	// sandboxesPerProcessor bounds the processes, mounts and sockets of sandboxes that do nothing.
	sandboxesPerProcessor = 64
)

// deriveLimits sets the limits that are 0 to values that suit the host, except for TotalMemoryMiB: starts need available memory
// of the host anyway. No limit that is derived contradicts one that is set: one sandbox of the default size can always start, as
// far as the limits are concerned.
func (c *Config) deriveLimits(h Host) {
	if c.TotalSandboxes == 0 {
		c.TotalSandboxes = sandboxesPerProcessor * h.Processors
	}
	if c.MaxCPUs == 0 {
		c.MaxCPUs = max(c.DefaultCPUs, min(largestCPUs, 2*h.Processors))
	}
	if c.MaxMemoryMiB == 0 {
		largest := largestMemoryMiB
		if h.MemoryMiB > 0 {
			largest = min(largest, h.MemoryMiB*8/10)
		}
		if c.TotalMemoryMiB > 0 {
			largest = min(largest, c.TotalMemoryMiB)
		}
		c.MaxMemoryMiB = max(c.DefaultMemoryMiB, largest)
	}
}
