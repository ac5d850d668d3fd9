// Msb is the command line interface of msbd, for administrators and for holders of an API key. It is thin: each command
// makes a few calls of package client and prints the result.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/api/version"
	"github.com/msbd/msbd/client"
)

// Exit codes. The help of the commands documents them, and scripts rely on them.
const (
	exitFailure    = 1
	exitUsage      = 2
	exitNotRunning = 3
	exitNotReady   = 4
	// exitBrokenPipe is the exit code of a program that SIGPIPE has ended. The shells do not report it.
	exitBrokenPipe = 141
)

const socketFlag = "socket"

func main() {
	cli.VersionPrinter = func(c *cli.Context) { fmt.Fprintln(c.App.Writer, "msb "+c.App.Version) }
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // so that a second signal ends msb, unless the command does it better
	// Without this, a write to a closed pipe would end msb before the command can clean up. Programs that msb starts are not
	// affected.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	app := newApp()
	err := app.RunContext(ctx, flagsFirst(app, os.Args))
	stop()
	if err == nil {
		return
	}
	if errors.Is(err, syscall.EPIPE) {
		os.Exit(exitBrokenPipe)
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
	} else if errors.Is(err, context.Canceled) {
		code = exitInterrupted
	}
	os.Exit(code)
}

func newApp() *cli.App {
	app := &cli.App{
		Name:  "msb",
		Usage: "manage msbd and run code in its sandboxes",
		Description: "The commands of 'msb sandbox' work without the word sandbox: " + sandboxCommandNames() + ".\n" +
			"For example, 'msb exec' is short for 'msb sandbox exec'.",
		Version: version.String(),
		// requireSubcommand understands help, at every level.
		HideHelpCommand: true,
		Flags: []cli.Flag{&cli.StringFlag{
			Name:        socketFlag,
			Usage:       "`PATH` of the server's admin socket",
			DefaultText: client.DefaultSocket(),
			EnvVars:     []string{"MSB_SOCKET"},
		}},
		Commands: []*cli.Command{
			{
				Name:  "server",
				Usage: "start, stop and manage the server",
				Subcommands: []*cli.Command{
					serverStart, serverStop, serverStatus, serverKeygen,
					{
						Name:        "key",
						Usage:       "list, show, revoke, rotate and prune API keys ('msb server keygen' creates one)",
						Subcommands: []*cli.Command{keyList, keyShow, keyRevoke, keyRotate, keyPrune},
					},
					serverReset, serverBackup, serverRestore,
					{
						Name:        "clock",
						Usage:       "correct the time by which API keys expire",
						Subcommands: []*cli.Command{clockAccept},
					},
					{
						Name:        "audit",
						Usage:       "print, verify and archive the audit log of administrative changes",
						Subcommands: []*cli.Command{auditTail, auditVerify, auditSeal, auditAcknowledge},
					},
					serverList,
				},
			},
			{
				Name:        "image",
				Usage:       "import, list and remove the images for sandboxes",
				Subcommands: []*cli.Command{imageImport, imageList, imageRm},
			},
			poolCommands,
			runCommand,
			sandboxCommands,
			doctorCommand,
			apiCommand,
			mcpCommand,
			completionCommand,
			completeCommand,
			manCommand,
			versionCommand,
		},
		Action:         requireSubcommand,
		OnUsageError:   badUsage,
		ExitErrHandler: func(*cli.Context, error) {}, // main prints and exits
	}
	setDefaults(app.Commands)
	for _, c := range app.Commands {
		if slices.Contains([]string{"server", "image", "pool", "doctor"}, c.Name) {
			requireLinux(runtime.GOOS, c)
		}
	}
	return app
}

// sandboxCommandNames lists the commands of 'msb sandbox'.
func sandboxCommandNames() string {
	var names []string
	for _, c := range sandboxCommands.Subcommands {
		if c != sandboxRun { // 'msb run' is another command
			names = append(names, c.Name)
		}
	}
	return strings.Join(names, ", ")
}

// setDefaults sets the fields of the commands that urfave/cli does not inherit from the application.
func setDefaults(commands []*cli.Command) {
	for _, c := range commands {
		c.OnUsageError = badUsage
		c.HideHelpCommand = true
		if c.Action == nil {
			c.Action = requireSubcommand
		}
		setDefaults(c.Subcommands)
	}
}

// requireLinux makes a command for the server's own host, and its subcommands, refuse to run on systems other than Linux.
func requireLinux(system string, command *cli.Command) {
	if system == "linux" {
		return
	}
	if len(command.Subcommands) == 0 {
		command.Before = func(c *cli.Context) error {
			return cli.Exit(fmt.Sprintf("the server runs on Linux only: run '%s' on its host. On this machine, use the commands that call "+
				"the server over HTTP: see 'msb sandbox --help' and 'msb mcp --help'", c.Command.HelpName), exitUsage)
		}
	}
	for _, sub := range command.Subcommands {
		requireLinux(system, sub)
	}
}

// requireSubcommand is the action of commands that only have subcommands. It prints their help.
func requireSubcommand(c *cli.Context) error {
	words := c.Args().Slice()
	if len(words) > 0 && words[0] == "help" {
		return help(c, words[1:])
	}
	if len(words) > 0 {
		return unknownCommand(c, words[0])
	}
	if c.Command.Command(sandboxCommands.Name) != nil { // at the top level
		return cli.ShowAppHelp(c)
	}
	return cli.ShowSubcommandHelp(c)
}

// help prints the help of a subcommand, whose name words contains. No words are the command itself.
func help(c *cli.Context, words []string) error {
	command, line := c.Command, strings.Fields(c.Command.HelpName)
	for _, word := range words {
		path := findCommand(command, word)
		if path == nil {
			return unknownCommand(c, word)
		}
		for _, sub := range path {
			command, line = sub, append(line, sub.Name)
		}
	}
	return c.App.RunContext(c.Context, append(line, "--help"))
}

func unknownCommand(c *cli.Context, word string) error {
	ofSandboxes := c.Command == sandboxCommands || c.Command.Command(sandboxCommands.Name) != nil // at the top level; see findCommand
	var names []string
	for _, sub := range c.Command.Subcommands {
		if !sub.Hidden {
			names = append(names, sub.Name)
		}
	}
	if ofSandboxes {
		for _, sub := range sandboxCommands.Subcommands {
			names = append(names, sub.Name)
		}
	}
	hint := suggestion(word, names)
	if path := elsewhere(c.App.Commands, word); path != "" {
		hint = fmt.Sprintf(" (did you mean 'msb%s'?)", path)
	}
	if name := otherWords[word]; name != "" && ofSandboxes {
		hint = fmt.Sprintf(" (did you mean 'msb %s'?)", name)
	}
	return usageError(c, "unknown command %q%s", word, hint)
}

// otherWords maps words that other programs have for a command of sandboxes to the name of that command.
var otherWords = map[string]string{
	"create": "start", "delete": "stop", "destroy": "stop", "kill": "stop", "remove": "stop", "ssh": "shell", "attach": "shell", "port-forward": "forward", "logs": "process logs",
}

// elsewhere returns the words with which the command that is called word can be called, each after a space, or "" if there
// is none. It leaves out commands that take something away, because the user probably means another thing, and aliases,
// because these mean a different thing in each place.
func elsewhere(commands []*cli.Command, word string) string {
	for _, c := range commands {
		if c.Name == word && !c.Hidden && !takesAway(c) {
			return " " + c.Name
		}
	}
	for _, c := range commands {
		if path := elsewhere(c.Subcommands, word); path != "" {
			return " " + c.Name + path
		}
	}
	return ""
}

// takesAway reports whether the effect of a command cannot be undone or stops something.
func takesAway(c *cli.Command) bool {
	return slices.Contains([]*cli.Command{serverStop, sandboxStop, keyPrune}, c) || slices.Contains(c.Flags, cli.Flag(yesFlag))
}

func badUsage(c *cli.Context, err error, _ bool) error {
	return usageError(c, "%s", flagError(c.Command, err.Error()))
}

// flagError rewrites an error of package flag in the terms of msb's help.
func flagError(command *cli.Command, text string) string {
	dashed := func(name string) string {
		if len(name) == 1 {
			return "-" + name
		}
		return "--" + name
	}
	if name, ok := strings.CutPrefix(text, "flag provided but not defined: -"); ok {
		var names []string
		for _, f := range command.VisibleFlags() {
			names = append(names, f.Names()[0])
		}
		if command == serverStart && suggestion(name, names) == "" {
			return "unknown option " + dashed(name) + ": put other settings of msbd into its configuration file ('msbd --help' lists them)"
		}
		return "unknown option " + dashed(name) + strings.Replace(suggestion(name, names), `"`, `"--`, 1)
	}
	if name, ok := strings.CutPrefix(text, "flag needs an argument: -"); ok {
		return dashed(name) + " needs a value"
	}
	match := regexp.MustCompile(`^invalid (?:boolean )?value (".*") for (?:flag )?-(\S+): (.*)$`).FindStringSubmatch(text)
	if match == nil {
		return text
	}
	value, name, reason := match[1], match[2], match[3]
	switch findFlag(command, name).(type) {
	case *cli.IntFlag:
		reason = "give a whole number"
	case *cli.BoolFlag:
		reason = "give true or false"
	}
	return fmt.Sprintf("invalid value %s for %s: %s", value, dashed(name), reason)
}

// usageError returns the error for an invalid command line. It refers to the command's help.
func usageError(c *cli.Context, format string, a ...any) error {
	name := strings.TrimSpace(c.Command.HelpName)
	if name == "" {
		name = c.App.HelpName
	}
	return cli.Exit(fmt.Sprintf(format, a...)+"; see "+name+" --help", exitUsage)
}

// noArguments returns an error if the command line has arguments other than flags.
func noArguments(c *cli.Context) error {
	if c.NArg() > 0 {
		return usageError(c, "unexpected argument %q", c.Args().First())
	}
	return checkNotEmpty(c)
}

// checkNotEmpty returns an error if a flag or an argument is present but empty. Probably a shell variable is unset then, and
// the user does not want the default, which may be a key without limits.
func checkNotEmpty(c *cli.Context) error {
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
			return usageError(c, "--%s is empty; omit it to use the default", name)
		}
	}
	for _, argument := range c.Args().Slice() {
		if argument == "" {
			return usageError(c, "an argument is empty")
		}
	}
	return nil
}

// admin returns a client for the admin socket that the command line specifies.
func admin(c *cli.Context) *client.Admin { return &client.Admin{Socket: c.String(socketFlag)} }
