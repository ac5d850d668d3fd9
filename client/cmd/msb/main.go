// Msb is the command line of msbd for those who administer it. It is thin: each command is a call
// or two of package client, and words around the answer.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/client"
)

// Exit codes. They are documented in the help of the commands; scripts rely on them.
const (
	exitFailure    = 1
	exitUsage      = 2
	exitNotRunning = 3
	exitNotReady   = 4
)

const socketFlag = "socket"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	app := newApp()
	err := app.RunContext(ctx, arrange(app, os.Args))
	stop()
	if err == nil {
		return
	}
	if text := err.Error(); text != "" {
		fmt.Fprintln(os.Stderr, "msb: "+printable(text))
	}
	code := exitFailure
	var coded cli.ExitCoder
	if errors.As(err, &coded) {
		code = coded.ExitCode()
	} else if errdefs.IsInvalidArgument(err) {
		code = exitUsage
	}
	os.Exit(code)
}

func newApp() *cli.App {
	app := &cli.App{
		Name:        "msb",
		Usage:       "run untrusted code in microVMs, behind API keys",
		Version:     buildVersion(),
		HideVersion: true, // there is a command
		Flags: []cli.Flag{&cli.StringFlag{
			Name:    socketFlag,
			Usage:   "`PATH` of msbd's admin socket (default: " + client.DefaultSocket() + ")",
			EnvVars: []string{"MSB_SOCKET"},
		}},
		Commands: []*cli.Command{
			{
				Name:  "server",
				Usage: "start, stop and look after the server",
				Subcommands: []*cli.Command{
					serverStart, serverStop, serverStatus, serverKeygen,
					{
						Name:        "key",
						Usage:       "look after the API keys that were made",
						Subcommands: []*cli.Command{keyList, keyShow, keyRevoke, keyRotate, keyPrune},
					},
					serverReset, serverBackup, serverRestore,
					{
						Name:        "audit",
						Usage:       "what administrators did, in a log that shows if it was changed",
						Subcommands: []*cli.Command{auditTail, auditVerify},
					},
					serverList,
				},
			},
			{
				Name:        "image",
				Usage:       "what sandboxes are started from",
				Subcommands: []*cli.Command{imageImport, imageList},
			},
			sandboxCommands,
			doctorCommand,
			apiCommand,
			mcpCommand,
			completionCommand,
			completeCommand,
			manCommand,
			versionCommand,
		},
		Action:         group,
		OnUsageError:   badUsage,
		ExitErrHandler: func(*cli.Context, error) {}, // main prints and exits
	}
	finish(app.Commands)
	return app
}

// finish sets what urfave/cli does not inherit.
func finish(commands []*cli.Command) {
	for _, c := range commands {
		c.OnUsageError = badUsage
		c.HideHelpCommand = true
		if c.Action == nil {
			c.Action = group
		}
		finish(c.Subcommands)
	}
}

// group is the action of what only has commands below it.
func group(c *cli.Context) error {
	if c.NArg() > 0 {
		return usage(c, "unknown command %q", c.Args().First())
	}
	return cli.ShowSubcommandHelp(c)
}

func badUsage(c *cli.Context, err error, _ bool) error { return usage(c, "%s", err) }

// usage is the error of a command line that makes no sense.
func usage(c *cli.Context, format string, a ...any) error {
	name := strings.TrimSpace(c.Command.HelpName)
	if name == "" {
		name = c.App.HelpName
	}
	return cli.Exit(fmt.Sprintf(format, a...)+"; see "+name+" --help", exitUsage)
}

// noArguments refuses whatever is not a flag.
func noArguments(c *cli.Context) error {
	if c.NArg() > 0 {
		return usage(c, "unexpected argument %q", c.Args().First())
	}
	return noneEmpty(c)
}

// noneEmpty refuses flags and arguments that are given, but empty: an unset variable of a shell is more
// likely than a wish for what leaving them out means, such as a key without limits.
func noneEmpty(c *cli.Context) error {
	for _, f := range c.Command.Flags {
		name := f.Names()[0]
		empty := false
		switch f.(type) {
		case *cli.StringFlag:
			empty = c.String(name) == ""
		case *cli.StringSliceFlag:
			for _, value := range c.StringSlice(name) {
				empty = empty || value == ""
			}
		}
		if empty && c.IsSet(name) {
			return usage(c, "--%s is empty; leave it out if it is not wanted", name)
		}
	}
	for _, argument := range c.Args().Slice() {
		if argument == "" {
			return usage(c, "an argument is empty")
		}
	}
	return nil
}

// admin is the connection that the command line asks for.
func admin(c *cli.Context) *client.Admin { return &client.Admin{Socket: c.String(socketFlag)} }
