package daemon

import (
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// poolLabels are the labels of the metrics of the pool, and entryLabels those of the metrics of each entry. An entry has its place
// as a label, not its id, so that the number of time series stays small.
var (
	poolLabels  = []string{"image", "cpus", "memory_mib", "disk_mib"}
	entryLabels = append(slices.Clone(poolLabels), "entry")
)

var (
	buildInfo    = prometheus.NewDesc("msbd_build_info", "Always 1; the label is the version of the server.", []string{"version"}, nil)
	keyCount     = prometheus.NewDesc("msbd_keys", "Number of API keys, by state.", []string{"state"}, nil)
	sandboxCount = prometheus.NewDesc("msbd_sandboxes", "Number of sandboxes, by state.", []string{"state"}, nil)
	sandboxLimit = prometheus.NewDesc("msbd_sandboxes_limit", "Maximum number of sandboxes that have not failed.", nil, nil)
	startCount   = prometheus.NewDesc("msbd_starts", "Number of starts of sandboxes, by state: in progress, or waiting to be admitted.", []string{"state"}, nil)
	memoryFree   = prometheus.NewDesc("msbd_memory_available_bytes", "Largest memory that a sandbox which starts now can have, in bytes; absent if it cannot be measured.", nil, nil)
	poolEntries  = prometheus.NewDesc("msbd_pool_entries", "Number of microVMs that were started in advance, by template.", poolLabels, nil)
	poolHits     = prometheus.NewDesc("msbd_pool_hits_total", "Number of starts of sandboxes that took a microVM of the pool.", poolLabels, nil)
	poolMisses   = prometheus.NewDesc("msbd_pool_misses_total", "Number of starts of sandboxes for which the pool had no microVM.", poolLabels, nil)
	poolFailures = prometheus.NewDesc("msbd_pool_refill_failures_total", "Number of microVMs of the pool that could not be started.", poolLabels, nil)
	poolCreated  = prometheus.NewDesc("msbd_pool_entry_created_timestamp_seconds", "When a microVM in the pool was started, as a Unix timestamp. Entry 1 is the oldest one.", entryLabels, nil)
	poolCPU      = prometheus.NewDesc("msbd_pool_entry_cpu_seconds", "Processor time that a microVM in the pool has used. Entry 1 is the oldest one.", entryLabels, nil)
	poolMemory   = prometheus.NewDesc("msbd_pool_entry_memory_bytes", "Memory that a microVM in the pool uses, in bytes. Entry 1 is the oldest one.", entryLabels, nil)
	degraded     = prometheus.NewDesc("msbd_degraded", "1 if the server is degraded and refuses changes, else 0.", nil, nil)
	auditEntries = prometheus.NewDesc("msbd_audit_entries", "Number of entries in the audit log.", nil, nil)
	diskFree     = prometheus.NewDesc("msbd_disk_free_bytes", "Free space on the disk of the state directory, in bytes, without the reserve.", nil, nil)
	diskInodes   = prometheus.NewDesc("msbd_disk_free_inodes", "Free inodes on the disk of the state directory; absent if its file system has no limit.", nil, nil)
	certExpiry   = prometheus.NewDesc("msbd_tls_certificate_expiry_timestamp_seconds", "When the gateway's certificate expires, as a Unix timestamp.", nil, nil)
)

// newMetrics returns the registry that GET /metrics reports. The gateway and JSON-RPC register their own metrics in it.
func newMetrics(s *status) *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), statusCollector{s})
	return r
}

// statusCollector computes its metrics from the status at each scrape.
type statusCollector struct{ *status }

// Describe implements prometheus.Collector.
func (statusCollector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{buildInfo, keyCount, sandboxCount, sandboxLimit, startCount, memoryFree, poolEntries, poolHits, poolMisses, poolFailures, poolCreated, poolCPU, poolMemory, degraded, auditEntries, diskFree, diskInodes, certExpiry} {
		out <- d
	}
}

// Collect implements prometheus.Collector.
func (c statusCollector) Collect(out chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	gauge(buildInfo, 1, c.cfg.Version)
	keys := c.issuer.Counts()
	gauge(keyCount, float64(keys.Live), "live")
	gauge(keyCount, float64(keys.Expired), "expired")
	gauge(keyCount, float64(keys.Revoked), "revoked")
	counts := map[sandbox.State]int{}
	for _, rec := range c.manager.List("") {
		counts[rec.State]++
	}
	for _, state := range []sandbox.State{sandbox.Starting, sandbox.Running, sandbox.Stopping, sandbox.Failed} {
		gauge(sandboxCount, float64(counts[state]), string(state))
	}
	gauge(sandboxLimit, float64(c.cfg.TotalSandboxes))
	c.collectPool(out)
	room := c.manager.Room()
	gauge(startCount, float64(room.Booting), "in_progress")
	gauge(startCount, float64(room.Waiting), "waiting")
	if room.MemoryBytes != nil {
		gauge(memoryFree, float64(*room.MemoryBytes))
	}
	_, reasons := c.current()
	gauge(degraded, min(1, float64(len(reasons))))
	gauge(auditEntries, float64(c.store.AuditHead().Seq))
	if space := c.store.Space(); space.TotalBytes > 0 { // measured
		gauge(diskFree, float64(space.FreeBytes))
		if space.TotalInodes > 0 {
			gauge(diskInodes, float64(space.FreeInodes))
		}
	}
	if c.certs != nil {
		if expiry := c.certs.Status(time.Now()).NotAfter; !expiry.IsZero() {
			gauge(certExpiry, float64(expiry.Unix()))
		}
	}
}

// collectPool reports the pool.
func (c statusCollector) collectPool(out chan<- prometheus.Metric) {
	for _, t := range c.manager.PoolStatus().Templates {
		labels := []string{t.Image, strconv.Itoa(t.CPUs), strconv.Itoa(t.MemoryMiB), strconv.Itoa(t.DiskMiB)}
		metric := func(d *prometheus.Desc, kind prometheus.ValueType, value float64, more ...string) {
			out <- prometheus.MustNewConstMetric(d, kind, value, append(slices.Clone(labels), more...)...)
		}
		metric(poolEntries, prometheus.GaugeValue, float64(t.Ready))
		metric(poolHits, prometheus.CounterValue, float64(t.Hits))
		metric(poolMisses, prometheus.CounterValue, float64(t.Misses))
		metric(poolFailures, prometheus.CounterValue, float64(t.Failures))
		for i, e := range t.Entries {
			place := strconv.Itoa(i + 1)
			metric(poolCreated, prometheus.GaugeValue, float64(e.CreatedAt.Unix()), place)
			metric(poolCPU, prometheus.GaugeValue, e.CPU.Seconds(), place)
			metric(poolMemory, prometheus.GaugeValue, float64(e.MemoryBytes), place)
		}
	}
}
