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
	// bootPoll is how often a boot is looked at for its hypervisor and its console.
	bootPoll = 20 * time.Millisecond
	// endGrace is what the shim has to report why it ended a microVM, before its death is what there is to report.
	endGrace = time.Second
)

var (
	// launchLimit is how long after its monitor's socket, which the shim makes before it starts anything, a QEMU may
	// appear. One that ends at once is never seen.
	launchLimit = 30 * time.Second
	// lastWords is how long what a dying microVM says is waited for.
	lastWords = 200 * time.Millisecond

	errHypervisorEnded = errors.New("the microVM's hypervisor ended before the guest was ready")
	errReady           = errors.New("the guest is ready")
)

// watchBoot runs start, which has the shim boot a microVM, and ends it soon after the hypervisor's death: the shim
// would call the dead guest until its time is over. An error tells what the hypervisor and the guest said last.
// Where msbd's hypervisor service boots the microVM, it does all that.
func (r *Runtime) watchBoot(ctx context.Context, id string, start func(context.Context) error) error {
	if r.Settings.useService() {
		return start(ctx)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	watching, stop := context.WithCancelCause(ctx)
	var watchers sync.WaitGroup
	watchers.Go(func() {
		if awaitDeath(watching, id) {
			select {
			case <-time.After(endGrace):
				cancel(errHypervisorEnded)
			case <-watching.Done():
			}
		}
	})
	watchers.Go(func() { r.followConsole(watching, id, true) })
	err := start(ctx)
	ended := context.Cause(ctx)
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
	if errors.Is(ended, errHypervisorEnded) {
		err = ended
	}
	err = fmt.Errorf("%w%s%s", err, tail.Quote("shim", shimErrors(r.Containerd.LogFile(), id)), tail.Quote("console", r.consoleEnd(id)))
	if kept := r.keepConsole(id); kept != "" {
		err = fmt.Errorf("%w\n(the whole console is in %s)", err, kept)
	}
	return err
}

// awaitDeath waits until the sandbox's QEMU has begun and has ended. It returns false if ctx ends first.
func awaitDeath(ctx context.Context, id string) bool {
	var qemu *process.Process
	var launched time.Time
	if poll(ctx, bootPoll, func() bool {
		qemu, _ = findQEMU(id) // a later look may succeed
		if _, err := os.Stat(filepath.Join(vmRoot, id, "qmp.sock")); err == nil && launched.IsZero() {
			launched = time.Now()
		}
		return qemu != nil || !launched.IsZero() && time.Since(launched) > launchLimit
	}) != nil {
		return false
	}
	if qemu == nil {
		return true
	}
	defer qemu.Close()
	return qemu.Wait(ctx) == nil
}

// shimErrors picks from containerd's log what the shim of a sandbox, and through it the hypervisor, said at the
// end that was no good news.
func shimErrors(log, id string) string {
	const (
		lookAt   = 64 << 10
		maxLines = 8
	)
	var lines []string
	for line := range strings.Lines(tail.Read(log, lookAt)) {
		if !strings.Contains(line, "sandbox="+id) || !strings.Contains(line, "level=error") {
			continue
		}
		var said []string
		for _, m := range saidRE.FindAllStringSubmatch(line, -1) {
			text, err := strconv.Unquote(m[1])
			if err != nil {
				text = m[1] // one word
			}
			said = append(said, text)
		}
		lines = append(lines, fmt.Sprintf("%.300s", strings.Join(said, ": ")))
	}
	return strings.Join(lines[max(0, len(lines)-maxLines):], "\n")
}

// saidRE finds what matters in a line of the shim's.
var saidRE = regexp.MustCompile(` (?:msg|error)=("(?:[^"\\]|\\.)*"|\S+)`)
