package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/client"
)

var serverStop = &cli.Command{
	Name:      "stop",
	Usage:     "stop the server and wait until its process has exited",
	UsageText: "msb server stop [options]",
	Description: "Sandboxes keep running, and the next start adopts them. Use --sandboxes to stop them as well.\n\n" +
		"Exit codes: 0 the server is stopped, or was not running; 1 it could not be stopped; 2 invalid usage.",
	Flags:  []cli.Flag{&cli.BoolFlag{Name: "sandboxes", Usage: "stop all sandboxes as well"}},
	Action: stop,
}

// drainTimeout is how long the server may take to exit after it has accepted the request.
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
	// Open the pidfd before the process exits, because its pid may be reused afterwards.
	process, err := openProcess(int(st.GetPid()))
	if err != nil {
		return fmt.Errorf("watch process %d of msbd: %w", st.GetPid(), err)
	}
	defer process.close()
	if c.Bool("sandboxes") && st.GetSandboxesRunning() > 0 {
		fmt.Fprintf(c.App.ErrWriter, "stopping %s …\n", plural(st.GetSandboxesRunning(), "sandbox", "sandboxes"))
	}
	resp, err := a.Shutdown(c.Context, c.Bool("sandboxes"))
	if err != nil {
		return err
	}
	_ = a.Close() // the server waits until its clients have disconnected
	if err := waitForExit(c.Context, process); err != nil {
		return fmt.Errorf("wait for msbd (pid %d) to exit: %w", st.GetPid(), err)
	}
	fmt.Fprintln(c.App.ErrWriter, "msbd is stopped")
	if n := resp.GetSandboxesStopped(); n > 0 {
		fmt.Fprintln(c.App.ErrWriter, plural(n, "sandbox was stopped", "sandboxes were stopped"))
	}
	if n := resp.GetSandboxesLeftRunning(); n > 0 {
		fmt.Fprintf(c.App.ErrWriter, "%s running; the next 'msb server start' adopts them\n", plural(n, "sandbox keeps", "sandboxes keep"))
	}
	return nil
}

// waitForExit waits until a process has exited.
func waitForExit(ctx context.Context, p process) error {
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	for ctx.Err() == nil {
		if exited, err := p.wait(100 * time.Millisecond); exited || err != nil {
			return err
		}
	}
	return ctx.Err()
}
