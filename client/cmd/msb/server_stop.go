package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/client"
)

var serverStop = &cli.Command{
	Name:  "stop",
	Usage: "stop the server and wait until its process is gone",
	Description: "Sandboxes go on running, and the next start finds them again, unless --sandboxes.\n" +
		"Exit codes: 0 it is stopped, also if it was before; 1 it is not; 2 bad usage.",
	Flags:  []cli.Flag{&cli.BoolFlag{Name: "sandboxes", Usage: "stop every sandbox, too"}},
	Action: stop,
}

// drainTimeout is how long the server may take from its answer to its end.
const drainTimeout = 30 * time.Second

func stop(c *cli.Context) error {
	if err := noArguments(c); err != nil {
		return err
	}
	a := admin(c)
	defer a.Close()
	st, err := a.Status(c.Context)
	if errors.Is(err, client.ErrNotRunning) {
		fmt.Fprintln(c.App.ErrWriter, "msbd is not running")
		return nil
	}
	if err != nil {
		return err
	}
	// Held from before the end on, so that it cannot come to mean another process.
	process, err := unix.PidfdOpen(int(st.GetPid()), 0)
	if err != nil {
		return fmt.Errorf("watch process %d of msbd: %w", st.GetPid(), err)
	}
	defer unix.Close(process)
	if c.Bool("sandboxes") && st.GetSandboxesRunning() > 0 {
		fmt.Fprintf(c.App.ErrWriter, "stopping %d sandboxes …\n", st.GetSandboxesRunning())
	}
	resp, err := a.Shutdown(c.Context, c.Bool("sandboxes"))
	if err != nil {
		return err
	}
	_ = a.Close() // the server waits for its clients
	if err := waitForEnd(c.Context, process); err != nil {
		return fmt.Errorf("wait for msbd (pid %d) to end: %w", st.GetPid(), err)
	}
	fmt.Fprintln(c.App.ErrWriter, "msbd is stopped")
	if n := resp.GetSandboxesStopped(); n > 0 {
		fmt.Fprintf(c.App.ErrWriter, "%d sandboxes were stopped\n", n)
	}
	if n := resp.GetSandboxesLeftRunning(); n > 0 {
		fmt.Fprintf(c.App.ErrWriter, "%d sandboxes go on running; the next 'msb server start' finds them again\n", n)
	}
	return nil
}

// waitForEnd waits until the process behind a pidfd has ended.
func waitForEnd(ctx context.Context, pidfd int) error {
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	for ctx.Err() == nil {
		// In steps, to notice the end of ctx.
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 100)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if n > 0 {
			return nil
		}
	}
	return ctx.Err()
}
