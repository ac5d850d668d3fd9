package container

import (
	"testing"

	"golang.org/x/sys/unix"
)

func TestHandlesSignal(t *testing.T) {
	const status = "Name:\tx\nSigPnd:\t0000000000004000\nSigBlk:\t0000000000000001\nSigIgn:\t0000000000000002\nSigCgt:\t0000000000004000\n"
	for sig, want := range map[unix.Signal]bool{unix.SIGHUP: true, unix.SIGINT: true, unix.SIGTERM: true, unix.SIGQUIT: false} {
		if got := handlesSignal(status, sig); got != want {
			t.Errorf("handlesSignal(%v) = %v, want %v", sig, got, want)
		}
	}
}
