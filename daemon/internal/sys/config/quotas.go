package config

import (
	"fmt"
	"maps"
	"math"
	"slices"
)

// Quota bounds what the sandboxes of one tenant namespace may hold at a time. A field that is 0 bounds nothing.
type Quota struct {
	Sandboxes, CPUs, MemoryMiB int
	// Runs bounds the code and command runs in progress, including those that wait for their turn.
	Runs int
}

// QuotaOf bounds one tenant namespace.
func (c Config) QuotaOf(namespace string) Quota {
	if q, ok := c.Quotas[namespace]; ok {
		return q
	}
	return c.Quota
}

// quotaBounds are the bounds of a quota, as a table [namespace.NAME] of the file names them.
var quotaBounds = []struct {
	name  string
	field func(*Quota) *int
}{
	{"sandboxes", func(q *Quota) *int { return &q.Sandboxes }},
	{"cpus", func(q *Quota) *int { return &q.CPUs }},
	{"memory_mib", func(q *Quota) *int { return &q.MemoryMiB }},
	{"runs", func(q *Quota) *int { return &q.Runs }},
}

// applyQuotas takes the tables [namespace.NAME] out of values. What a table leaves out is filled in by
// Load, which knows the other sources.
func (c *Config) applyQuotas(path string, values map[string]any) (problems []error) {
	tables, ok := values["namespace"].(map[string]any)
	if !ok {
		return nil // there is none, or it is unknown as it is
	}
	delete(values, "namespace")
	c.Quotas = map[string]Quota{}
	for _, namespace := range slices.Sorted(maps.Keys(tables)) {
		bad := func(format string, a ...any) {
			problems = append(problems, invalid("%s: namespace.%s: %s", path, namespace, fmt.Sprintf(format, a...)))
		}
		bounds, ok := tables[namespace].(map[string]any)
		if !ok {
			bad("must be a table: [namespace.%s]", namespace)
			continue
		}
		var q Quota
		for _, b := range quotaBounds {
			*b.field(&q) = unset
			if value, ok := bounds[b.name]; ok {
				delete(bounds, b.name)
				if n, ok := value.(int64); !ok || n < 0 || n > math.MaxInt32 {
					bad("%s = %v: must be a whole number, and not negative", b.name, value)
				} else {
					*b.field(&q) = int(n)
				}
			}
		}
		for _, key := range slices.Sorted(maps.Keys(bounds)) {
			bad("unknown key %q: use sandboxes, cpus, memory_mib or runs", key)
		}
		c.Quotas[namespace] = q
	}
	return problems
}

// unset is a bound that a table [namespace.NAME] leaves out.
const unset = -1

// fillQuotas gives each quota of a tenant namespace what its table left out.
func (c *Config) fillQuotas() {
	for namespace, q := range c.Quotas {
		for _, b := range quotaBounds {
			if *b.field(&q) == unset {
				*b.field(&q) = *b.field(&c.Quota)
			}
		}
		c.Quotas[namespace] = q
	}
}

func validateQuota(prefix string, q Quota) (problems []error) {
	for _, b := range quotaBounds {
		if n := *b.field(&q); n < 0 {
			problems = append(problems, invalid("%s%s %d: must not be negative; 0 is no bound", prefix, b.name, n))
		}
	}
	return problems
}
