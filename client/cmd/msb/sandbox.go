package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/client"
)

// sandboxCommands are the commands for holders of an API key, on the server's machine or another one. They use HTTP;
// most other commands use the admin socket.
var sandboxCommands = &cli.Command{
	Name:  "sandbox",
	Usage: "start and stop sandboxes and run code in them, with an API key",
	Description: "The server's URL and the API key are read from MSB_SERVER_URL and MSB_API_KEY. Each of them is looked up in\n" +
		"the environment, then in the file .env in this directory and the directories above it, then in\n" +
		"~/.config/msb/env. --verbose prints where they were found. If a .env file sets the server, the key must be\n" +
		"in the same file, unless the server is on this machine.\n\n" +
		"The word sandbox can be omitted: 'msb exec' is short for 'msb sandbox exec'. Only 'msb run' is another command.",
	Subcommands: []*cli.Command{
		sandboxStart, sandboxRun, sandboxExec, sandboxShell, sandboxRepl, sandboxCp, processCommands, sandboxForward,
		sandboxList, sandboxInspect, sandboxMetrics, sandboxStop,
	},
}

// Exit codes of runs. They follow timeout, docker run and the shells, and leave lower codes to the program.
const (
	exitTimeLimit       = 124
	exitNotRun          = 125
	exitNotExecutable   = 126
	exitCommandNotFound = 127
	exitInterrupted     = 130
)

const (
	callExitCodes = "Exit codes: 0 success; 1 failure; 2 invalid usage; 3 the server cannot be reached; 4 the server is not ready\n" +
		"or too busy (try again); 130 interrupted."
	// runExitCodes are the exit codes of all runs, except exitInterrupted, which comes last.
	runExitCodes = "2 invalid usage (nothing was run);\n" +
		"124 the time limit was reached; 125 the run could not be started or completed;\n"
)

var (
	serverURLFlag = &cli.StringFlag{Name: "server", Usage: "`URL` of the server (default: MSB_SERVER_URL, or " + client.DefaultServerURL + ")"}
	verboseFlag   = &cli.BoolFlag{Name: "verbose", Usage: "print where the server's URL and the API key were found"}
	namespaceFlag = &cli.StringFlag{Name: "namespace", Aliases: []string{"n"}, Usage: "namespace `NS` (default: the key's namespace if it has exactly one, else \"default\")"}
	timeoutFlag   = &cli.GenericFlag{Name: "timeout", Value: new(timeLimit), Usage: "interrupt the run after `TIME`: a number of seconds, or with units, such as 90s, 1h30m or 1d " +
		"(default: the server's maximum, usually 1h)"}
)

// callServer calls the server with the configured URL and key. If the server returns an error, callServer adds what to do
// next. name is the sandbox of the call, or "".
func callServer(c *cli.Context, name string, call func(*client.Client) error) error {
	verbose := func(format string, a ...any) {
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
	verbose("server %s, from %s", config.ServerURL, config.ServerFrom)
	if config.Key.IsZero() {
		verbose("no API key")
	} else {
		verbose("API key from %s", config.KeyFrom)
	}
	err = call(config.Client())
	if e, ok := errors.AsType[*client.Error](err); ok {
		if e.RequestID != "" {
			verbose("request id %s", e.RequestID)
		}
		if namespace := c.String(namespaceFlag.Name); name != "" && namespace != "" {
			name += " --namespace " + namespace
		}
		return nextStep(e, config, name)
	}
	return err
}

// nextStep adds to an error of the server what the user can do about it. name is the sandbox of the call, as the
// arguments of a command, or "".
func nextStep(e *client.Error, config *client.Config, name string) error {
	switch {
	case errdefs.IsUnauthorized(e) && config.Key.IsZero():
		return fmt.Errorf("the server requires an API key, but none was found: set %s, or add a line %[1]s=KEY to the file .env in this directory or "+
			"one above it, or to %s. Create a key on the server with 'msb server keygen'", client.EnvAPIKey, client.ConfigFile())
	case errdefs.IsUnauthorized(e):
		return fmt.Errorf("the server does not accept the API key from %s: it may be expired, revoked, truncated, or belong to another server. "+
			"Create one on the server with 'msb server keygen'", config.KeyFrom)
	case errdefs.IsPermissionDenied(e) && strings.Contains(e.Message, "limited to"):
		return fmt.Errorf("%w. Choose a namespace with --namespace, or use another key; this one is from %s", e, config.KeyFrom)
	case errdefs.IsPermissionDenied(e):
		return fmt.Errorf("%w. Use another key; this one is from %s", e, config.KeyFrom)
	case name != "" && noSandbox(e):
		return fmt.Errorf("%w: start it with 'msb sandbox start %s'", e, name)
	case errdefs.IsConflict(e) && name != "" && strings.Contains(e.Error(), "already running with another configuration"):
		return fmt.Errorf("%w. To stop it, run 'msb sandbox stop %s'", e, name)
	}
	return e
}

// noSandbox reports whether an error says that the sandbox does not exist, and not only a file or a process in it.
func noSandbox(err error) bool {
	return errdefs.IsNotFound(err) && strings.HasPrefix(err.Error(), "sandbox ") && strings.Contains(err.Error(), "does not exist")
}

// withCallExitCode adds the exit code to the error of a call that is not a run. See callExitCodes.
func withCallExitCode(err error) error {
	_, answered := errors.AsType[*client.Error](err)
	switch {
	case errors.Is(err, syscall.EPIPE):
		return err
	case errors.Is(err, context.Canceled):
		return cli.Exit("interrupted", exitInterrupted)
	case answered && (errdefs.IsUnavailable(err) || errdefs.IsResourceExhausted(err)):
		return cli.Exit(err.Error(), exitNotReady)
	case errdefs.IsUnavailable(err), errors.Is(err, client.ErrNotRunning), errors.Is(err, context.DeadlineExceeded):
		return cli.Exit(err.Error(), exitNotRunning)
	}
	return err
}

// withRunExitCode adds the exit code to the error of a run. See runExitCodes.
func withRunExitCode(err error) error {
	if err == nil {
		return nil
	}
	if _, ended := errors.AsType[cli.ExitCoder](err); ended || errors.Is(err, syscall.EPIPE) { // it has its exit code
		return err
	}
	text, code := err.Error(), exitNotRun
	switch {
	case errors.Is(err, context.Canceled):
		text, code = "interrupted; the run is canceled", exitInterrupted
	case errors.Is(err, client.ErrRunTimeout):
		code = exitTimeLimit
	case errors.Is(err, client.ErrCommandNotExecutable): // which is an ErrCommandNotFound as well
		code = exitNotExecutable
	case errors.Is(err, client.ErrCommandNotFound):
		code = exitCommandNotFound
	case errdefs.IsInvalidArgument(err):
		code = exitUsage
	}
	return cli.Exit(text, code)
}

// runTimeout returns the value of timeoutFlag. 0 means the server's maximum.
func runTimeout(c *cli.Context) time.Duration {
	return time.Duration(*c.Generic(timeoutFlag.Name).(*timeLimit))
}

// oneSandbox returns the name of the sandbox, which must be the only argument.
func oneSandbox(c *cli.Context) (name string, err error) {
	if c.NArg() != 1 {
		return "", usageError(c, "give the name of one sandbox")
	}
	return c.Args().First(), checkNotEmpty(c)
}
