package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/client"
)

// passedOn are the flags that msbd takes under the same names.
var passedOn = []cli.Flag{
	&cli.StringFlag{Name: "host", Usage: "`HOST` of the HTTP gateway (default: 127.0.0.1)"},
	&cli.StringFlag{Name: "port", Usage: "`PORT` of the HTTP gateway (default: 5555)"},
	&cli.BoolFlag{Name: "dev", Usage: "take requests without an API key; on loopback only, never in production"},
	&cli.BoolFlag{Name: "reset-key", Aliases: []string{"r"}, Usage: "replace the signing key: every API key made before is refused"},
	&cli.StringFlag{Name: "config", Usage: "configuration `FILE` (default: /etc/msb/msbd.toml if it is there)"},
	&cli.StringFlag{Name: "state-dir", Usage: "`DIR` for what outlives a reboot (default: /var/lib/msb; for users other than root, ~/.local/state/msb)"},
	&cli.StringFlag{Name: "lib-dir", Usage: "`DIR` of the shim and the guest's files (default: found beside msbd)"},
}

// passedOnNamed are some of them.
func passedOnNamed(names ...string) (flags []cli.Flag) {
	for _, f := range passedOn {
		if slices.Contains(names, f.Names()[0]) {
			flags = append(flags, f)
		}
	}
	return flags
}

var runDirFlag = &cli.StringFlag{Name: "run-dir", Usage: "`DIR` for sockets and running microVMs (default: that of the admin socket)"}

var serverStart = &cli.Command{
	Name:  "start",
	Usage: "start the server",
	Description: "In the foreground, msb becomes msbd, and its log goes to standard error. With --detach, msbd goes on\n" +
		"in the background with its log in msbd.log in the state directory, and msb returns when it is ready.\n\n" +
		"If the server runs already, nothing is started: with --reset-key the running one replaces its signing\n" +
		"key, unless --config, --state-dir or --lib-dir may mean another server; without, msb says that it runs,\n" +
		"and that is no error unless --host, --port or --dev ask for something else than it does.\n\n" +
		"msbd has more settings than these: 'msbd --help'.",
	Flags: append(passedOn[:len(passedOn):len(passedOn)],
		runDirFlag,
		&cli.BoolFlag{Name: "detach", Aliases: []string{"d"}, Usage: "return when the server is ready, and leave it in the background"},
		yesFlag,
		secretFlag(),
	),
	Action: start,
}

func start(c *cli.Context) error {
	if err := refuseSecret(c); err != nil {
		return err
	}
	if err := noArguments(c); err != nil {
		return err
	}
	runDir, err := chooseRunDir(c)
	if err != nil {
		return err
	}
	if c.Bool("reset-key") {
		if err := confirm(c, resetConsequence); err != nil {
			return err
		}
	}
	a := &client.Admin{Socket: filepath.Join(runDir, socketName)}
	defer a.Close()
	ctx, cancel := context.WithTimeout(c.Context, statusTimeout)
	defer cancel()
	switch st, err := a.Status(ctx); {
	case err == nil:
		return alreadyRunning(c, a, st)
	case !errors.Is(err, client.ErrNotRunning):
		return fmt.Errorf("see whether msbd is running: %w", err)
	}
	msbd, err := findMsbd()
	if err != nil {
		return err
	}
	args := msbdArgs(c, runDir)
	if c.Bool("detach") {
		return detach(c, a, msbd, args)
	}
	err = syscall.Exec(msbd, append([]string{msbd}, args...), os.Environ())
	return fmt.Errorf("run %s: %w", msbd, err)
}

// msbdArgs passes on what the command line says.
func msbdArgs(c *cli.Context, runDir string) []string {
	args := []string{"--run-dir", runDir}
	for _, f := range passedOn {
		name := f.Names()[0]
		if c.IsSet(name) {
			args = append(args, fmt.Sprintf("--%s=%v", name, c.Value(name)))
		}
	}
	return args
}

const socketName = "msbd.sock"

// chooseRunDir returns the absolute directory of the socket that the other commands will use.
func chooseRunDir(c *cli.Context) (string, error) {
	if dir := c.String("run-dir"); dir != "" {
		return filepath.Abs(dir)
	}
	socket := c.String(socketFlag)
	if socket == "" {
		socket = client.DefaultSocket()
	}
	if filepath.Base(socket) != socketName {
		return "", usage(c, "msbd makes its socket as %s in its run directory: name that with --run-dir, not --socket %s", socketName, socket)
	}
	return filepath.Abs(filepath.Dir(socket))
}

func alreadyRunning(c *cli.Context, a *client.Admin, st *adminv1.GetStatusResponse) error {
	host, port, _ := net.SplitHostPort(st.GetListenAddress())
	wants := func(flag, is string) bool { return c.IsSet(flag) && c.String(flag) != is }
	if wants("host", host) || wants("port", port) && c.String("port") != "0" || c.IsSet("dev") && c.Bool("dev") != st.GetDevMode() {
		return fmt.Errorf("msbd is already running on %s (pid %d, dev mode %t): to change that, 'msb server stop' first; "+
			"sandboxes go on running", st.GetListenAddress(), st.GetPid(), st.GetDevMode())
	}
	if c.Bool("reset-key") {
		// A server does not say what it was started with, and of the wrong one no key would ever be good again.
		if others := setFlags(c, "config", "state-dir", "lib-dir"); len(others) > 0 {
			return fmt.Errorf("msbd is already running on %s (pid %d), and may be another server than %s means: no key was reset. "+
				"To reset that of the running one, leave that out; to start another one beside it, give a --run-dir and a --port of its own",
				st.GetListenAddress(), st.GetPid(), strings.Join(others, ", "))
		}
		return reset(c, a)
	}
	fmt.Fprintf(c.App.ErrWriter, "msbd is already running on %s (pid %d)\n", gatewayURL(st), st.GetPid())
	return nil
}

// setFlags are those of the flags that the command line has, as people write them.
func setFlags(c *cli.Context, names ...string) (set []string) {
	for _, name := range names {
		if c.IsSet(name) {
			set = append(set, "--"+name+" "+c.String(name))
		}
	}
	return set
}

// findMsbd finds the daemon that belongs to this msb.
func findMsbd() (string, error) {
	exe, err := os.Executable()
	if err == nil {
		exe, err = filepath.EvalSymlinks(exe)
	}
	if err != nil {
		return "", fmt.Errorf("find msbd: %w", err)
	}
	beside := filepath.Dir(exe)
	for _, path := range []string{filepath.Join(beside, "msbd"), filepath.Join(beside, "..", "libexec", "msb", "msbd")} {
		if found, err := exec.LookPath(path); err == nil {
			return found, nil
		}
	}
	found, err := exec.LookPath("msbd")
	if err != nil {
		return "", fmt.Errorf("msbd is neither in %s nor in PATH: install it there", beside)
	}
	return filepath.Abs(found)
}
