package main

import (
	"context"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/client"
)

var sandboxRun = &cli.Command{
	Name:  "run",
	Usage: "run code in a sandbox",
	UsageText: "msb sandbox run [options] NAME [CODE]\n\n" +
		"msb sandbox run my-env 'x = 6 * 7; x'\n" +
		"msb sandbox run my-env program.py",
	Description: codeHelp + " Variables and functions that it defines stay available to later runs.\n" +
		"What the code prints is printed at once, except with --json. " + interruptHelp + "\nWith --json, the first one cancels the run.\n\n" +
		"Exit codes: 0 success; 1 the code raised an exception, or the code that it exited with; " + runExitCodes +
		"130 interrupted, and the code failed or was canceled.",
	Flags: []cli.Flag{
		languageFlag, timeoutFlag, namespaceFlag, jsonFlag, serverURLFlag, verboseFlag,
	},
	Action: runCode,
}

func runCode(c *cli.Context) error {
	if n := c.NArg(); n != 1 && n != 2 {
		return usageError(c, "give the name of one sandbox, and the code as one argument or on standard input")
	}
	if c.NArg() == 2 && c.Args().First() != "" && c.Args().Get(1) == "" {
		return usageError(c, "the code is empty")
	}
	if err := checkNotEmpty(c); err != nil {
		return err
	}
	name := c.Args().First()
	text, language, err := readCode(c, c.Args().Get(1))
	if err != nil {
		return err
	}
	code := client.Code{Language: language, Source: text, Timeout: runTimeout(c)}
	return withRunExitCode(callServer(c, name, func(r *client.Client) error {
		s := r.Sandbox(c.String(namespaceFlag.Name), name)
		if c.Bool(jsonFlag.Name) {
			return runForJSON(c, s, code)
		}
		return runAndShow(c, s, code)
	}))
}

// runAndShow runs code, prints its output while it runs, and returns an error with the exit code unless the code succeeded. The first
// Ctrl-C interrupts the code, which may handle that. The second one cancels the run.
func runAndShow(c *cli.Context, s *client.Sandbox, code client.Code) error {
	ctx, interrupt, stop := untilSecondInterrupt(c.Context)
	defer stop()
	output := newQueue()
	defer context.AfterFunc(ctx, func() { output.abandon(context.Canceled) })()
	code.Stdout, code.Stderr = output.to(forTerminal(c.App.Writer)), output.to(forTerminal(c.App.ErrWriter))
	code.Interrupt = interrupt
	res, err := s.Run(ctx, code)
	interrupted := isClosed(interrupt)
	if closeErr := output.finish(ctx); err == nil {
		err = closeErr
	}
	switch {
	case err != nil && interrupted && ctx.Err() == nil: // such as that of a run that waited for its turn
		return cli.Exit(err.Error(), exitInterrupted)
	case err != nil:
		return err
	case interrupted && res.ExitCode == 1: // of code that has not handled the interrupt
		return exitStatus(exitInterrupted)
	}
	return exitOf(res.ExitCode, res.Err() == nil)
}

// isClosed reports whether a channel, to which nothing is sent, is closed.
func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// runForJSON runs code and prints the result as JSON.
func runForJSON(c *cli.Context, s *client.Sandbox, code client.Code) error {
	res, err := s.RunCode(c.Context, code.Language, code.Source, code.Timeout)
	if err != nil {
		return err
	}
	if err := printJSON(c, res); err != nil {
		return err
	}
	return exitOf(res.ExitCode, res.Status == rpc.StatusSuccess)
}

// exitStatus is the result of a run that began and ended. Its code is the exit code of msb, and there is no message.
type exitStatus int

func (exitStatus) Error() string   { return "" }
func (e exitStatus) ExitCode() int { return int(e) }

// exitOf returns nil for a success, and otherwise an exitStatus.
func exitOf(code int, success bool) error {
	switch {
	case success:
		return nil
	case code == 0:
		return exitStatus(exitFailure)
	}
	return exitStatus(code & 0xff)
}
