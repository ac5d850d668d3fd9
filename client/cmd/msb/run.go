package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/client"
)

var (
	removeFlag = &cli.BoolFlag{Name: "rm", Usage: "stop the sandbox after the run, whatever happens"}
	nameFlag   = &cli.StringFlag{Name: "name", Usage: "`NAME` of the new sandbox", DefaultText: "a new one, such as run-k3v9q2x7"}
)

var runCommand = &cli.Command{
	Name:  "run",
	Usage: "start a sandbox and run code in it",
	UsageText: "msb run [options] [CODE]\n\n" +
		"msb run --rm '6 * 7'\n" +
		"msb run --rm program.py\n" +
		"msb run --image microsandbox/node -l node 'process.version'",
	Description: codeHelp + "\n\n" +
		"Without --rm, the sandbox keeps running, and its name is printed on standard error. To run code in a sandbox that\n" +
		"exists, use 'msb sandbox run'. " + interruptHelp + "\n\n" +
		"Exit codes: 0 success; 1 the code raised an exception, or the code that it exited with; " + runExitCodes +
		"130 interrupted, and the code failed or was canceled.",
	Flags: append([]cli.Flag{languageFlag, removeFlag, nameFlag, timeoutFlag}, startFlags...),
	Action: func(c *cli.Context) error {
		if n := c.NArg(); n == 2 {
			return usageError(c, "give only the code; to run it in the sandbox %[1]s, use 'msb sandbox run %[1]s CODE'", c.Args().First())
		} else if n > 2 {
			return usageError(c, "give the code as one argument")
		}
		if c.Bool(removeFlag.Name) && c.IsSet(nameFlag.Name) {
			return usageError(c, "--rm and --name exclude each other: --rm is only for a sandbox that msb has named itself")
		}
		if err := checkNotEmpty(c); err != nil {
			return err
		}
		text, language, err := readCode(c, c.Args().First())
		if err != nil {
			return err
		}
		name := c.String(nameFlag.Name)
		if name == "" {
			name = "run-" + strings.ToLower(rand.Text()[:8])
		}
		config := startConfig(c)
		if config.Image == "" && language == "node" {
			config.Image = "microsandbox/node"
		}
		return withRunExitCode(callServer(c, name, func(r *client.Client) error {
			return runOnce(c, r.Sandbox(c.String(namespaceFlag.Name), name), config, client.Code{Language: language, Source: text, Timeout: runTimeout(c)})
		}))
	},
}

// runOnce starts a sandbox, runs code in it, and stops it if the command line says so.
func runOnce(c *cli.Context, s *client.Sandbox, config *rpc.SandboxConfig, code client.Code) (err error) {
	ctx, stop := endWith(c.Context, syscall.SIGHUP)
	defer stop()
	c.Context = ctx
	clear := announce(c, "starting the sandbox "+s.Name)
	err = s.Start(ctx, config)
	clear()
	if c.Bool(removeFlag.Name) {
		defer func() {
			// Also a start that was interrupted may have taken effect. msb has made up the name, so the sandbox is its own.
			if stopErr := s.Stop(context.WithoutCancel(ctx)); stopErr != nil && !errdefs.IsNotFound(stopErr) {
				fmt.Fprintf(c.App.ErrWriter, "msb: the sandbox %s was not stopped: %s\n", s.Name, printable(stopErr.Error()))
				if err == nil {
					err = exitStatus(exitNotRun)
				}
			}
		}()
	}
	if err != nil {
		return err
	}
	if !c.Bool(removeFlag.Name) {
		fmt.Fprintf(c.App.ErrWriter, "msb: sandbox %[1]s keeps running; to stop it: msb sandbox stop %[1]s\n", s.Name)
	}
	return runAndShow(c, s, code)
}

// endWith returns a context that also ends with a signal, unless msb was started so that it ignores the signal.
func endWith(ctx context.Context, sig os.Signal) (context.Context, context.CancelFunc) {
	if signal.Ignored(sig) {
		return context.WithCancel(ctx)
	}
	return signal.NotifyContext(ctx, sig)
}
