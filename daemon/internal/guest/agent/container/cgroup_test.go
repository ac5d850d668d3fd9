package container

import (
	"slices"
	"testing"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
)

func TestParseIOStat(t *testing.T) {
	got := parseIOStat("254:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n\n8:0 \n")
	entry := func(op string, value uint64) *pb.BlkioStatsEntry {
		return &pb.BlkioStatsEntry{Major: 254, Minor: 16, Op: op, Value: value}
	}
	want := []*pb.BlkioStatsEntry{entry("read", 1), entry("write", 2), entry("rios", 3), entry("wios", 4)}
	if !slices.EqualFunc(got.IoServiceBytesRecursive, want, sameEntry) {
		t.Errorf("bytes: %v", got.IoServiceBytesRecursive)
	}
	want = []*pb.BlkioStatsEntry{entry("Read", 3), entry("Write", 4)}
	if !slices.EqualFunc(got.IoServicedRecursive, want, sameEntry) {
		t.Errorf("requests: %v", got.IoServicedRecursive)
	}
}

func sameEntry(a, b *pb.BlkioStatsEntry) bool { return a.String() == b.String() }

func TestHandlesSignal(t *testing.T) {
	const status = "Name:\tx\nSigPnd:\t0000000000004000\nSigBlk:\t0000000000000001\nSigIgn:\t0000000000000002\nSigCgt:\t0000000000004000\n"
	for sig, want := range map[unix.Signal]bool{unix.SIGHUP: true, unix.SIGINT: true, unix.SIGTERM: true, unix.SIGQUIT: false} {
		if got := handlesSignal(status, sig); got != want {
			t.Errorf("%v: %v", sig, got)
		}
	}
}
