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

// guestView is what a guest holds. The fields but the last are what testdata/conformance prints.
type guestView struct {
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
	// What the agent may hold beyond what it held at first: connections that are not yet closed,
	// buffers, the threads that Go keeps.
	spareFiles, spareGoroutines, spareThreads, spareKiB = 3, 5, 40, 64 << 10
)

// watchSpec returns the spec of a container that sees the guest as PID 1 does.
func watchSpec() *pb.Spec {
	spec := buildSpec(boxID)
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

// look asks the watching container what the guest holds.
func (c *conformance) look(t *testing.T) *guestView {
	t.Helper()
	p := own("view")
	p.Capabilities = watchSpec().Process.Capabilities
	r := c.run(t, watchID, c.nextExec(), p)
	v := &guestView{}
	if err := json.Unmarshal([]byte(r.stdout), v); err != nil {
		t.Fatalf("look at the guest: %v: %v", err, r)
	}
	ctx, cancel := context.WithTimeout(t.Context(), callLimit)
	defer cancel()
	metrics, err := c.GetMetrics(ctx, &pb.GetMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if n := goroutines.FindStringSubmatch(metrics.Metrics); n != nil { // an agent in Rust has none
		v.Goroutines, _ = strconv.Atoi(n[1])
	}
	return v
}

func (v *guestView) files() int {
	n := 0
	for _, m := range v.Files {
		n += m
	}
	return n
}

// since returns what is wrong with v, where first was right.
func (v *guestView) since(first *guestView) string {
	var wrong []string
	if v.Start != first.Start {
		wrong = append(wrong, fmt.Sprintf("PID 1 started at %s, then at %s", first.Start, v.Start))
	}
	if v.Tainted != first.Tainted {
		wrong = append(wrong, fmt.Sprintf("the kernel's taint is %s, was %s", v.Tainted, first.Tainted))
	}
	for what, lists := range map[string][2][]string{
		"processes": {first.Processes, v.Processes}, "mounts": {first.Mounts, v.Mounts}, "groups": {first.Groups, v.Groups},
	} {
		if was, is := lists[0], lists[1]; !slices.Equal(was, is) {
			wrong = append(wrong, fmt.Sprintf("%s are %q, were %q", what, is, was))
		}
	}
	if v.files() > first.files()+spareFiles {
		wrong = append(wrong, fmt.Sprintf("PID 1 has the files %v, had %v", v.Files, first.Files))
	}
	for what, n := range map[string][3]int{
		"threads": {first.Threads, v.Threads, spareThreads}, "goroutines": {first.Goroutines, v.Goroutines, spareGoroutines},
		"KiB of memory": {first.KiB, v.KiB, spareKiB},
	} {
		if n[1] > n[0]+n[2] {
			wrong = append(wrong, fmt.Sprintf("PID 1 has %d %s, had %d", n[1], what, n[0]))
		}
	}
	return strings.Join(wrong, "; ")
}
