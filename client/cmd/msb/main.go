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
	err := newApp().RunContext(ctx, os.Args)
	stop()
	if err == nil {
		return
	}
	if text := err.Error(); text != "" {
		fmt.Fprintln(os.Stderr, "msb: "+text)
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
		Name:                 "msb",
		Usage:                "run untrusted code in microVMs, behind API keys",
		Version:              buildVersion(),
		HideVersion:          true, // there is a command
		EnableBashCompletion: true,
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
					serverStart, serverStop, serverStatus, serverKeygen, serverList,
				},
			},
			{
				Name:        "image",
				Usage:       "what sandboxes are started from",
				Subcommands: []*cli.Command{imageImport, imageList},
			},
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
	return nil
}

// flagsFirst refuses flags behind the first argument, where they would be taken for arguments.
func flagsFirst(c *cli.Context) error {
	for _, arg := range c.Args().Slice() {
		if strings.HasPrefix(arg, "-") && arg != "-" {
			return usage(c, "put %q before %q", arg, c.Args().First())
		}
	}
	return nil
}

// admin is the connection that the command line asks for.
func admin(c *cli.Context) *client.Admin { return &client.Admin{Socket: c.String(socketFlag)} }
