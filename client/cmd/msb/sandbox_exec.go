package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/client"
)

var (
	interactiveFlag = &cli.BoolFlag{Name: "interactive", Aliases: []string{"i"}, Usage: "pass standard input on to the program"}
	ttyFlag         = &cli.BoolFlag{Name: "tty", Aliases: []string{"t"}, Usage: "give the program a terminal"}
	detachFlag      = &cli.BoolFlag{Name: "detach", Aliases: []string{"d"}, Usage: "start the program in the background and print its pid"}
	tagFlag         = &cli.StringFlag{Name: "tag", Usage: "name `TAG` of the process, for 'msb process'"}
	userFlag        = &cli.StringFlag{Name: "user", Aliases: []string{"u"}, Usage: "run as `USER`, a name or a number, optionally with : and a group"}
	programEnvFlag  = &cli.GenericFlag{
		Name: "env", Aliases: []string{"e"}, Value: new(assignments),
		Usage: "environment variable `NAME=VALUE` for the program; NAME alone takes the value from msb's environment; repeatable",
	}
	programDirFlag = &cli.StringFlag{Name: "workdir", Aliases: []string{"w"}, Usage: "working directory `DIR` of the program"}
)

var sandboxExec = &cli.Command{
	Name:  "exec",
	Usage: "run a program in a sandbox and exit with its exit code",
	UsageText: "msb sandbox exec [options] NAME -- PROGRAM [ARGUMENT...]\n\n" +
		"msb sandbox exec my-env -- sh -c 'uname -r; exit 3'\n" +
		"msb sandbox exec -i my-env -- tar -x -C /srv <files.tar\n" +
		"msb sandbox exec -it my-env -- bash",
	Description: "Options must come before NAME: everything after it belongs to the program. The program is run without a\n" +
		"shell, unless PROGRAM is one. Its output is passed on at once, and unchanged unless it goes to a terminal. Without\n" +
		"-i, it has no standard input. The first Ctrl-C interrupts the program, and the second ends it and msb; with -t, Ctrl-C\n" +
		"goes to the program's terminal.\n\n" +
		"Exit codes: the exit code of the program; " + runExitCodes +
		"126 the program is not executable; 127 the sandbox has no such program; 130 interrupted.",
	Flags: []cli.Flag{
		interactiveFlag, ttyFlag, detachFlag, programEnvFlag, programDirFlag, userFlag, tagFlag, timeoutFlag, namespaceFlag, jsonFlag,
		serverURLFlag, verboseFlag,
	},
	UseShortOptionHandling: true, // -it
	Action:                 execCommand,
}

func execCommand(c *cli.Context) error {
	arguments := c.Args().Slice()
	if len(arguments) > 1 && arguments[1] == "--" {
		arguments = append(arguments[:1:1], arguments[2:]...)
	}
	forJSON, detach := c.Bool(jsonFlag.Name), c.Bool(detachFlag.Name)
	switch {
	case len(arguments) < 2 || arguments[0] == "" || arguments[1] == "":
		return usageError(c, "give the name of one sandbox and a program")
	case strings.HasPrefix(c.Args().Get(1), "-") && c.Args().Get(1) != "--":
		return usageError(c, "put %q before %q", c.Args().Get(1), arguments[0])
	case forJSON && c.Bool(ttyFlag.Name):
		return usageError(c, "--json and --tty exclude each other")
	case detach && (c.Bool(ttyFlag.Name) || c.Bool(interactiveFlag.Name)):
		return usageError(c, "a program in the background has no terminal and no standard input: leave out --tty and --interactive")
	}
	if _, err := strconv.Atoi(c.String(tagFlag.Name)); err == nil {
		return usageError(c, "--tag must not be a number, which would be taken for a pid")
	}
	name := arguments[0]
	command := programOf(c, arguments[1], arguments[2:])
	command.Detached = detach
	err := callServer(c, name, func(r *client.Client) error {
		s := r.Sandbox(c.String(namespaceFlag.Name), name)
		switch {
		case detach:
			return startDetached(c, s, command)
		case forJSON:
			return execForJSON(c, s, command)
		}
		return execAttached(c, s, command, c.Bool(interactiveFlag.Name), c.Bool(ttyFlag.Name))
	})
	return withRunExitCode(adviseShell(c, err, name, arguments[1:]))
}

// programOf returns the command that the flags of a command line describe.
func programOf(c *cli.Context, name string, args []string) client.Command {
	return client.Command{
		Name: name, Args: args, Dir: c.String(programDirFlag.Name), Env: *c.Generic(programEnvFlag.Name).(*assignments),
		User: c.String(userFlag.Name), Tag: c.String(tagFlag.Name), Timeout: runTimeout(c),
	}
}

// startDetached starts a program in the background.
func startDetached(c *cli.Context, s *client.Sandbox, command client.Command) error {
	p, err := s.StartProcess(c.Context, command)
	if err != nil {
		return err
	}
	defer p.Close()
	if c.Bool(jsonFlag.Name) {
		return printJSON(c, struct {
			PID int    `json:"pid"`
			Tag string `json:"tag,omitempty"`
		}{p.PID, command.Tag})
	}
	_, err = fmt.Fprintln(c.App.Writer, p.PID)
	return err
}

// execForJSON runs a program and prints its result as the HTTP API returns it.
func execForJSON(c *cli.Context, s *client.Sandbox, command client.Command) error {
	var out lineRecorder
	command.Stdout, command.Stderr = out.stream("stdout"), out.stream("stderr")
	if c.Bool(interactiveFlag.Name) {
		command.Stdin = c.App.Reader
	}
	ctx, interrupt, stop := untilSecondInterrupt(c.Context)
	defer stop()
	exit, err := waitInterruptible(c.Context, ctx, interrupt, s, command)
	if err != nil {
		return err
	}
	out.note(exit)
	if err := printJSON(c, out.result(command, exit.ExitCode)); err != nil {
		return err
	}
	if exit.TimedOut {
		return timedOut(command)
	}
	return exitOf(exit.ExitCode, exit.ExitCode == 0)
}

// adviseShell replaces the server's advice to use a shell, which names params of the API, by a command line of msb.
func adviseShell(c *cli.Context, err error, name string, command []string) error {
	e, ok := errors.AsType[*client.Error](err)
	if !ok || !errors.Is(err, client.ErrCommandNotFound) {
		return err
	}
	text, _, advised := strings.Cut(e.Message, "; use command ")
	if !advised {
		return err
	}
	if namespace := c.String(namespaceFlag.Name); namespace != "" {
		name = "--namespace " + namespace + " " + name
	}
	script := strings.ReplaceAll(strings.Join(command, " "), "'", `'\''`)
	own := *e
	own.Message = fmt.Sprintf("%s; run: msb exec %s -- sh -c '%s'", text, name, script)
	return &own
}
