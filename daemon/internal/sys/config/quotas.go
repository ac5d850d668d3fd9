package config

import (
	"fmt"
	"maps"
	"math"
	"slices"
)

// Quota limits the resources that the sandboxes of one tenant namespace may use at a time. A field that is 0 means
// unlimited.
type Quota struct {
	Sandboxes, CPUs, MemoryMiB int
	// DiskMiB limits the sum of the sizes of the writable disks.
	DiskMiB int
	// Runs limits the code and command runs in progress, including queued ones.
	Runs int
}

// QuotaOf returns the quota of a tenant namespace.
func (c Config) QuotaOf(namespace string) Quota {
	if q, ok := c.Quotas[namespace]; ok {
		return q
	}
	return c.Quota
}

// quotaLimits are the limits of a quota with their keys in a table [namespace.NAME] of the file.
var quotaLimits = []struct {
	name  string
	field func(*Quota) *int
}{
	{"sandboxes", func(q *Quota) *int { return &q.Sandboxes }},
	{"cpus", func(q *Quota) *int { return &q.CPUs }},
	{"memory_mib", func(q *Quota) *int { return &q.MemoryMiB }},
	{"disk_mib", func(q *Quota) *int { return &q.DiskMiB }},
	{"runs", func(q *Quota) *int { return &q.Runs }},
}

// applyQuotas removes the tables [namespace.NAME] from values and stores them in c.Quotas. Limits that a table omits are
// unset: Load fills them in once it has read the other sources.
func (c *Config) applyQuotas(path string, values map[string]any) (problems []error) {
	tables, ok := values["namespace"].(map[string]any)
	if !ok {
		return nil // missing, or not a table: applyFile reports it as an unknown key
	}
	delete(values, "namespace")
	c.Quotas = map[string]Quota{}
	for _, namespace := range slices.Sorted(maps.Keys(tables)) {
		bad := func(format string, a ...any) {
			problems = append(problems, invalid("%s: namespace.%s: %s", path, namespace, fmt.Sprintf(format, a...)))
		}
		limits, ok := tables[namespace].(map[string]any)
		if !ok {
			bad("must be a table: [namespace.%s]", namespace)
			continue
		}
		var q Quota
		for _, l := range quotaLimits {
			*l.field(&q) = unset
			if value, ok := limits[l.name]; ok {
				delete(limits, l.name)
				if n, ok := value.(int64); !ok || n < 0 || n > math.MaxInt32 {
					bad("%s = %v: must be an integer and not negative", l.name, value)
				} else {
					*l.field(&q) = int(n)
				}
			}
		}
		for _, key := range slices.Sorted(maps.Keys(limits)) {
			bad("unknown key %q: use sandboxes, cpus, memory_mib, disk_mib or runs", key)
		}
		c.Quotas[namespace] = q
	}
	return problems
}

// unset is the value of a limit that a table [namespace.NAME] omits.
const unset = -1

// fillQuotas sets each limit that a table [namespace.NAME] omits to the same limit of c.Quota.
func (c *Config) fillQuotas() {
	for namespace, q := range c.Quotas {
		for _, l := range quotaLimits {
			if *l.field(&q) == unset {
				*l.field(&q) = *l.field(&c.Quota)
			}
		}
		c.Quotas[namespace] = q
	}
}

func validateQuota(prefix string, q Quota) (problems []error) {
	for _, l := range quotaLimits {
		if n := *l.field(&q); n < 0 {
			problems = append(problems, invalid("%s%s %d: must not be negative; 0 means unlimited", prefix, l.name, n))
		}
	}
	return problems
}
