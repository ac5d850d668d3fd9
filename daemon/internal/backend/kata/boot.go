package kata

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/msbd/msbd/daemon/internal/sys/process"
	"github.com/msbd/msbd/daemon/internal/sys/tail"
)

const (
	// bootPollInterval is how often a boot is checked for its hypervisor and its console.
	bootPollInterval = 20 * time.Millisecond
	// shimErrorGrace is how long the shim may take to report an error after the hypervisor has exited. If it does not
	// report one in this time, watchBoot reports that the hypervisor has exited.
	shimErrorGrace = time.Second
)

var (
	// launchTimeout is how long QEMU may take to appear after the shim has created the socket of QEMU's monitor. If
	// QEMU exits at once, it is never seen, so the boot counts as failed after this time.
	launchTimeout = 30 * time.Second
	// consoleDrain is how long to wait for the last console output of a microVM that ends.
	consoleDrain = 200 * time.Millisecond

	errHypervisorExited = errors.New("the microVM's hypervisor exited before the guest was ready")
	errReady            = errors.New("the guest is ready")
)

// watchBoot runs start, which makes the shim boot a microVM, and cancels it soon after the hypervisor has exited.
// Otherwise the shim would try to reach the dead guest until its timeout. The error has the last messages of the
// hypervisor and the guest. If msbd's hypervisor service boots the microVM, watchBoot only runs start, because the
// service does all this itself.
func (r *Runtime) watchBoot(ctx context.Context, id string, start func(context.Context) error) error {
	if r.Settings.UsesDisks() {
		return start(ctx)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	watching, stop := context.WithCancelCause(ctx)
	var watchers sync.WaitGroup
	watchers.Go(func() {
		if waitHypervisorExit(watching, id) {
			select {
			case <-time.After(shimErrorGrace):
				cancel(errHypervisorExited)
			case <-watching.Done():
			}
		}
	})
	watchers.Go(func() { r.logConsole(watching, id, true) })
	err := start(ctx)
	cause := context.Cause(ctx)
	if err == nil {
		stop(errReady)
	} else {
		stop(nil)
	}
	watchers.Wait()
	cancel(nil)
	if err == nil {
		return nil
	}
	if errors.Is(cause, errHypervisorExited) {
		err = cause
	}
	err = fmt.Errorf("%w%s%s", err, tail.Quote("shim", shimErrors(r.Containerd.LogFile(), id)), tail.Quote("console", r.consoleTail(id)))
	if kept := r.keepConsole(id); kept != "" {
		err = fmt.Errorf("%w\n(the complete console log is in %s)", err, kept)
	}
	return err
}

// waitHypervisorExit waits until the QEMU of sandbox id has started and exited, and then returns true. It also returns
// true if QEMU does not appear within launchTimeout. It returns false if ctx ends first.
func waitHypervisorExit(ctx context.Context, id string) bool {
	var qemu *process.Process
	var launched time.Time
	if poll(ctx, bootPollInterval, func() bool {
		qemu, _ = findQEMU(id) // on error, the next call may succeed
		if _, err := os.Stat(filepath.Join(vmRoot, id, "qmp.sock")); err == nil && launched.IsZero() {
			launched = time.Now()
		}
		return qemu != nil || !launched.IsZero() && time.Since(launched) > launchTimeout
	}) != nil {
		return false
	}
	if qemu == nil {
		return true
	}
	defer qemu.Close()
	return qemu.Wait(ctx) == nil
}

// shimErrors returns the last error messages of sandbox id's shim in log, which is containerd's log. The shim also
// reports the errors of its hypervisor there.
func shimErrors(log, id string) string {
	const (
		maxBytes = 64 << 10
		maxLines = 8
	)
	var lines []string
	for line := range strings.Lines(tail.Read(log, maxBytes)) {
		if !strings.Contains(line, "sandbox="+id) || !strings.Contains(line, "level=error") {
			continue
		}
		var texts []string
		for _, m := range logTextRE.FindAllStringSubmatch(line, -1) {
			text, err := strconv.Unquote(m[1])
			if err != nil {
				text = m[1] // a single word is not quoted
			}
			texts = append(texts, text)
		}
		lines = append(lines, fmt.Sprintf("%.300s", strings.Join(texts, ": ")))
	}
	return strings.Join(lines[max(0, len(lines)-maxLines):], "\n")
}

// endReason returns why the microVM of sandbox id ended. Kata's shim pings the guest's agent every few seconds, ends the
// microVM if there is no answer within 30 s, and only logs why. With the host's containerd, msbd does not see the
// shim's log. If there is no such reason in the log, endReason returns other.
func (r *Runtime) endReason(id, other string) string {
	const maxBytes = 256 << 10
	for line := range strings.Lines(tail.Read(r.Containerd.LogFile(), maxBytes)) {
		if strings.Contains(line, " sandbox="+id+" ") &&
			strings.Contains(line, "failed to ping agent: rpc error: code = DeadlineExceeded") {
			return "its guest did not answer for 30 s, so Kata's shim ended it"
		}
	}
	return other
}

// logTextRE matches the message and the error in a log line of the shim.
var logTextRE = regexp.MustCompile(` (?:msg|error)=("(?:[^"\\]|\\.)*"|\S+)`)
