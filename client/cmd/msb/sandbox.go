package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/client"
)

// sandboxCommands are for whoever holds an API key, on the server's machine or another one. All others go
// over the admin socket.
var sandboxCommands = &cli.Command{
	Name:  "sandbox",
	Usage: "start sandboxes and run code in them, with an API key",
	Description: "The server and the key are MSB_SERVER_URL and MSB_API_KEY: of the environment; else of the file .env in\n" +
		"this directory or the nearest one above it; else of ~/.config/msb/env. Each is looked for by itself, and\n" +
		"--verbose says where it was found. A server that a .env file names gets no key from elsewhere.",
	Subcommands: []*cli.Command{sandboxStart, sandboxRun, sandboxExec, sandboxMetrics, sandboxStop},
}

// Exit codes of runs, whose lower ones are the program's own: those of timeout, docker run and shells.
const (
	exitTimeLimit       = 124
	exitNotRun          = 125
	exitCommandNotFound = 127
	exitInterrupted     = 130
)

const (
	callExitCodes = "Exit codes: 0 it is done; 1 it is not; 2 bad usage; 3 the server cannot be reached; 4 it is not ready or too\n" +
		"busy, try again; 130 interrupted."
	runExitCodes = "124 the time limit was reached;\n" +
		"125 it could not be run, or not to its end; 130 interrupted, and the run with it; 2, without a run, bad usage."
)

var (
	serverURLFlag = &cli.StringFlag{Name: "server", Usage: "`URL` of the server (default: see 'msb sandbox --help', then " + client.DefaultServerURL + ")"}
	verboseFlag   = &cli.BoolFlag{Name: "verbose", Usage: "say where the server's URL and the API key were found"}
	withinFlag    = &cli.StringFlag{Name: "namespace", Aliases: []string{"n"}, Usage: "tenant namespace `NS` (default: the key's own, or default)"}
	timeoutFlag   = &cli.DurationFlag{Name: "timeout", Usage: "interrupt the run after this `TIME`, such as 90s or 5m", DefaultText: "the server's maximum"}
)

// remotely calls the server for a sandbox, which may have no name. Its error says what to do next.
func remotely(c *cli.Context, name string, call func(*client.Client) error) error {
	say := func(format string, a ...any) {
		if c.Bool(verboseFlag.Name) {
			fmt.Fprintln(c.App.ErrWriter, "msb: "+printable(fmt.Sprintf(format, a...)))
		}
	}
	config, err := client.LoadConfig(c.String(serverURLFlag.Name))
	if err != nil {
		return err
	}
	if c.IsSet(serverURLFlag.Name) {
		config.ServerFrom = "--" + serverURLFlag.Name
	}
	say("server %s, from %s", config.ServerURL, config.ServerFrom)
	if config.Key.IsZero() {
		say("no API key")
	} else {
		say("API key from %s", config.KeyFrom)
	}
	err = call(config.Client())
	if e, ok := errors.AsType[*client.Error](err); ok {
		if e.RequestID != "" {
			say("request id %s", e.RequestID)
		}
		if within := c.String(withinFlag.Name); name != "" && within != "" {
			name += " --namespace " + within
		}
		return nextStep(e, config, name)
	}
	return err
}

// nextStep adds to what the server said what can be done about it here.
func nextStep(e *client.Error, config *client.Config, name string) error {
	switch {
	case errdefs.IsUnauthorized(e) && config.Key.IsZero():
		return fmt.Errorf("there is no API key, and the server wants one: set %s, or write %[1]s=KEY into the file .env of this directory or "+
			"one above it, or into %s. 'msb server keygen' makes keys, on the server", client.EnvAPIKey, client.ConfigFile())
	case errdefs.IsUnauthorized(e):
		return fmt.Errorf("the server does not accept the API key from %s: it has expired or was revoked, or is another server's, or is not whole. "+
			"'msb server keygen' makes keys, on the server", config.KeyFrom)
	case errdefs.IsPermissionDenied(e):
		return fmt.Errorf("%w. Name a namespace with --namespace, or use another key; this one is from %s", e, config.KeyFrom)
	case errdefs.IsNotFound(e) && name != "":
		return fmt.Errorf("%w: start it with 'msb sandbox start %s'", e, name)
	case errdefs.IsConflict(e) && name != "":
		return fmt.Errorf("%w: 'msb sandbox stop %s' makes room for another one", e, name)
	}
	return e
}

// exitOfCall gives the error of a call that runs nothing its exit code.
func exitOfCall(err error) error {
	_, answered := errors.AsType[*client.Error](err)
	switch {
	case errors.Is(err, context.Canceled):
		return cli.Exit("interrupted", exitInterrupted)
	case answered && (errdefs.IsUnavailable(err) || errdefs.IsResourceExhausted(err)):
		return cli.Exit(err.Error(), exitNotReady)
	case errdefs.IsUnavailable(err), errors.Is(err, client.ErrNotRunning), errors.Is(err, context.DeadlineExceeded):
		return cli.Exit(err.Error(), exitNotRunning)
	}
	return err
}

// exitOfRun gives the error of a run its exit code.
func exitOfRun(err error) error {
	if err == nil {
		return nil
	}
	text, code := err.Error(), exitNotRun
	switch {
	case errors.Is(err, context.Canceled):
		text, code = "interrupted, and the run with it", exitInterrupted
	case errors.Is(err, client.ErrRunTimeout):
		code = exitTimeLimit
	case errors.Is(err, client.ErrCommandNotFound):
		code = exitCommandNotFound
	}
	return cli.Exit(text, code)
}

// oneSandbox is the argument of a command that takes nothing else.
func oneSandbox(c *cli.Context) (name string, err error) {
	if c.NArg() != 1 {
		return "", usage(c, "name one sandbox")
	}
	return c.Args().First(), noneEmpty(c)
}

// printLines writes each line where the program wrote it, in their order. A terminal gets to see what would
// command it: the program is not trusted.
func printLines(c *cli.Context, lines []rpc.Line) error {
	stdout, stderr := bufio.NewWriter(c.App.Writer), bufio.NewWriter(c.App.ErrWriter)
	to, other := stdout, stderr
	for _, line := range lines {
		if (line.Stream == "stderr") != (to == stderr) {
			if err := to.Flush(); err != nil {
				return err
			}
			to, other = other, to
		}
		text := line.Text
		if to == stdout && isTerminal(c.App.Writer) || to == stderr && isTerminal(c.App.ErrWriter) {
			text = printable(text)
		}
		if _, err := to.WriteString(text + "\n"); err != nil {
			return err
		}
	}
	return to.Flush()
}
