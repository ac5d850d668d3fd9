package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"

	"github.com/msbd/msbd/daemon/internal/guest/agent/container"
)

// guestResources are the resources that a guest holds. testdata/conformance prints all fields but Goroutines.
type guestResources struct {
	Start        string
	Files        map[string]int
	Threads, KiB int
	Processes    []string
	Mounts       []string
	Groups       []string
	Tainted      string
	Goroutines   int
}

const (
	// What the agent may hold in addition to the baseline: connections that are not closed yet, buffers, and threads that
	// the Go runtime keeps.
	spareFiles, spareGoroutines, spareThreads, spareKiB = 3, 5, 40, 64 << 10
)

// watchSpec returns the spec of a container that sees the guest's /proc and cgroups.
func watchSpec() *pb.Spec {
	spec := buildSpec(containerID)
	caps := []string{"CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_SYS_PTRACE", "CAP_SYS_ADMIN"}
	spec.Process.Capabilities = &pb.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
	spec.Linux.Resources = nil
	spec.Mounts = append(spec.Mounts,
		&pb.Mount{Destination: "/guest/proc", Type: "bind", Source: "/proc", Options: []string{"rbind", "ro"}},
		&pb.Mount{Destination: "/guest/cgroup", Type: "bind", Source: container.CgroupRoot, Options: []string{"rbind", "ro"}},
	)
	return spec
}

var goroutines = regexp.MustCompile(`(?m)^go_goroutines (\d+)$`)

// readResources returns what the guest holds. It runs a tool in the watching container and reads the agent's metrics.
func (c *conformance) readResources(t *testing.T) *guestResources {
	t.Helper()
	p := conformanceTool("view")
	p.Capabilities = watchSpec().Process.Capabilities
	r := c.run(t, watchID, c.nextExec(), p)
	v := &guestResources{}
	if err := json.Unmarshal([]byte(r.stdout), v); err != nil {
		t.Fatalf("read the guest's resources: %v: %v", err, r)
	}
	ctx, cancel := context.WithTimeout(t.Context(), callTimeout)
	defer cancel()
	metrics, err := c.GetMetrics(ctx, &pb.GetMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if n := goroutines.FindStringSubmatch(metrics.Metrics); n != nil { // Kata's own agent is in Rust and has no goroutines
		v.Goroutines, _ = strconv.Atoi(n[1])
	}
	return v
}

// files returns the number of PID 1's open files.
func (v *guestResources) files() int {
	n := 0
	for _, m := range v.Files {
		n += m
	}
	return n
}

// changesFrom describes how v differs from the baseline, apart from the permitted growth. It returns "" if it does not.
func (v *guestResources) changesFrom(baseline *guestResources) string {
	var changes []string
	if v.Start != baseline.Start {
		changes = append(changes, fmt.Sprintf("PID 1 started at %s, then at %s", baseline.Start, v.Start))
	}
	if v.Tainted != baseline.Tainted {
		changes = append(changes, fmt.Sprintf("the kernel's taint is %s, was %s", v.Tainted, baseline.Tainted))
	}
	for what, lists := range map[string][2][]string{
		"processes": {baseline.Processes, v.Processes}, "mounts": {baseline.Mounts, v.Mounts}, "cgroups": {baseline.Groups, v.Groups},
	} {
		if was, is := lists[0], lists[1]; !slices.Equal(was, is) {
			changes = append(changes, fmt.Sprintf("the %s are %q, were %q", what, is, was))
		}
	}
	if v.files() > baseline.files()+spareFiles {
		changes = append(changes, fmt.Sprintf("PID 1 has the open files %v, had %v", v.Files, baseline.Files))
	}
	for what, n := range map[string][3]int{
		"threads": {baseline.Threads, v.Threads, spareThreads}, "goroutines": {baseline.Goroutines, v.Goroutines, spareGoroutines},
		"KiB of memory": {baseline.KiB, v.KiB, spareKiB},
	} {
		if n[1] > n[0]+n[2] {
			changes = append(changes, fmt.Sprintf("PID 1 has %d %s, had %d", n[1], what, n[0]))
		}
	}
	return strings.Join(changes, "; ")
}
