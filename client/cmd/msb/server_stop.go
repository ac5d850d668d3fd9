package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/client"
)

var serverStop = &cli.Command{
	Name:      "stop",
	Usage:     "stop the server and wait until its process has exited",
	UsageText: "msb server stop [options]",
	Description: "Sandboxes keep running, and the next start adopts them. Use --sandboxes to stop them as well.\n\n" +
		"If the server is not running, msb stops nothing. With --sandboxes, it is an error if sandboxes of an earlier\n" +
		"server keep running, for example because the server crashed.\n\n" +
		"Exit codes: 0 the server is stopped, or was not running; 1 it or the sandboxes could not be stopped; 2 invalid\n" +
		"usage.",
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
		return alreadyStopped(c)
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
		fmt.Fprintf(c.App.ErrWriter, "%s running; the next 'msb server start' adopts %s\n", plural(n, "sandbox keeps", "sandboxes keep"), itOrThem(n))
	}
	return nil
}

// alreadyStopped reports that there is no server to stop. Its sandboxes may run nevertheless, and only a server can stop
// them.
func alreadyStopped(c *cli.Context) error {
	// Each sandbox has a directory here until it was removed completely.
	dir := filepath.Join(filepath.Dir(cmp.Or(c.String(socketFlag), client.DefaultSocket())), "sandbox")
	left, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	switch {
	case !c.Bool("sandboxes") && len(left) > 0:
		fmt.Fprintf(c.App.ErrWriter, "msbd is not running; %s running. The next 'msb server start' adopts %s\n",
			plural(len(left), "sandbox keeps", "sandboxes keep"), itOrThem(int32(len(left))))
		return nil
	case !c.Bool("sandboxes"):
	case err != nil:
		return fmt.Errorf("msbd is not running, and msb could not find out whether its sandboxes are: %w", err)
	case len(left) > 0:
		return fmt.Errorf("msbd is not running, but %s running and can be stopped only by a server, which adopts %s: "+
			"run 'msb server start --detach', then 'msb server stop --sandboxes'",
			plural(len(left), "sandbox keeps", "sandboxes keep"), itOrThem(int32(len(left))))
	}
	fmt.Fprintln(c.App.ErrWriter, "msbd is not running")
	return nil
}

// itOrThem returns the pronoun for n things.
func itOrThem(n int32) string {
	if n == 1 {
		return "it"
	}
	return "them"
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
