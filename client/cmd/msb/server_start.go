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

// msbdFlags are the flags that are passed to msbd, which has flags of the same names.
var msbdFlags = []cli.Flag{
	&cli.StringFlag{Name: "host", Usage: "`HOST` of the HTTP API; overrides the one in the setting listen (default: 127.0.0.1)"},
	&cli.StringFlag{Name: "port", Usage: "`PORT` of the HTTP API; overrides the one in the setting listen (default: 5555)"},
	&cli.BoolFlag{Name: "dev", Usage: "accept requests without an API key; on loopback only, never in production"},
	&cli.BoolFlag{Name: "reset-key", Aliases: []string{"r"}, Usage: "replace the signing key, which invalidates all existing API keys"},
	&cli.StringFlag{Name: "config", Usage: "configuration `FILE` (default: /etc/msb/msbd.toml if it exists)"},
	&cli.StringFlag{Name: "state-dir", Usage: "`DIR` for data that must survive a reboot: keys, records, images (default: /var/lib/msb; for users other than root, ~/.local/state/msb)"},
	&cli.StringFlag{Name: "lib-dir", Usage: "`DIR` with containerd, Kata's shim and the guest's files (default: the directory of msbd, or ../libexec/msb relative to it)"},
}

// msbdFlagsNamed returns those of msbdFlags that have one of these names.
func msbdFlagsNamed(names ...string) (flags []cli.Flag) {
	for _, f := range msbdFlags {
		if slices.Contains(names, f.Names()[0]) {
			flags = append(flags, f)
		}
	}
	return flags
}

var runDirFlag = &cli.StringFlag{Name: "run-dir", Usage: "`DIR` for sockets and the files of running microVMs (default: the directory of the admin socket)"}

var serverStart = &cli.Command{
	Name:      "start",
	Usage:     "start the server",
	UsageText: "msb server start [options]",
	Description: "The server, msbd, must run as root. It runs in the foreground and logs to standard error. With --detach, it\n" +
		"runs in the background and logs to msbd.log in its state directory, and msb returns when it is ready. Unlike\n" +
		"the systemd service, it is then not restarted after a crash.\n\n" +
		"If the server is already running, msb says so and starts nothing. This is an error if --host, --port or --dev\n" +
		"differ from the running server. With --reset-key, the running server replaces its signing key; msb refuses\n" +
		"this together with --config, --state-dir or --lib-dir, because they may refer to another server.\n\n" +
		"msbd has more settings: see 'msbd --help'.",
	Flags: append(msbdFlags[:len(msbdFlags):len(msbdFlags)],
		runDirFlag,
		&cli.BoolFlag{Name: "detach", Aliases: []string{"d"}, Usage: "run the server in the background, and return when it is ready"},
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
	// Unlike other commands, --reset-key needs no --yes without a terminal: the flag has no other purpose.
	if c.Bool("reset-key") && isTerminal(c.App.Reader) {
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
		return fmt.Errorf("check whether msbd is running: %w", err)
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

// msbdArgs returns the arguments of msbd: the run directory and the msbdFlags that are set.
func msbdArgs(c *cli.Context, runDir string) []string {
	args := []string{"--run-dir", runDir}
	for _, f := range msbdFlags {
		name := f.Names()[0]
		if c.IsSet(name) {
			args = append(args, fmt.Sprintf("--%s=%v", name, c.Value(name)))
		}
	}
	return args
}

const socketName = "msbd.sock"

// chooseRunDir returns the absolute path of the run directory: --run-dir, or the directory of the admin socket that the
// other commands use.
func chooseRunDir(c *cli.Context) (string, error) {
	if dir := c.String("run-dir"); dir != "" {
		return filepath.Abs(dir)
	}
	socket := c.String(socketFlag)
	if socket == "" {
		socket = client.DefaultSocket()
	}
	if filepath.Base(socket) != socketName {
		return "", usageError(c, "msbd creates its socket as %s in its run directory: use --run-dir instead of --socket %s", socketName, socket)
	}
	return filepath.Abs(filepath.Dir(socket))
}

func alreadyRunning(c *cli.Context, a *client.Admin, st *adminv1.GetStatusResponse) error {
	host, port, _ := net.SplitHostPort(st.GetListenAddress())
	wants := func(flag, is string) bool { return c.IsSet(flag) && c.String(flag) != is }
	if wants("host", host) || wants("port", port) && c.String("port") != "0" || c.IsSet("dev") && c.Bool("dev") != st.GetDevMode() {
		return fmt.Errorf("msbd is already running at %s (pid %d, dev mode %s). To change its address or dev mode, run 'msb server stop' first; "+
			"sandboxes keep running", gatewayURL(st), st.GetPid(), onOff(st.GetDevMode()))
	}
	if c.Bool("reset-key") {
		// The status does not say with which configuration the running server was started, and resetting the wrong
		// server would permanently invalidate its keys.
		if ambiguous := flagsInUse(c, "config", "state-dir", "lib-dir"); len(ambiguous) > 0 {
			return fmt.Errorf("msbd is already running at %s (pid %d), but %s may refer to another server: the signing key was not reset. "+
				"To reset the key of the running server, omit these flags; to start a second server, use a different --run-dir and --port",
				gatewayURL(st), st.GetPid(), strings.Join(ambiguous, ", "))
		}
		return reset(c, a)
	}
	fmt.Fprintf(c.App.ErrWriter, "msbd is already running at %s (pid %d)\n", gatewayURL(st), st.GetPid())
	return nil
}

// flagsInUse returns those of the flags that the command line sets, with their values, such as "--config FILE".
func flagsInUse(c *cli.Context, names ...string) (flags []string) {
	for _, name := range names {
		if c.IsSet(name) {
			flags = append(flags, "--"+name+" "+c.String(name))
		}
	}
	return flags
}

// findMsbd returns the path of the msbd that belongs to this msb. It looks in the directory of this msb, in
// ../libexec/msb, and in PATH.
func findMsbd() (string, error) {
	exe, err := os.Executable()
	if err == nil {
		exe, err = filepath.EvalSymlinks(exe)
	}
	if err != nil {
		return "", fmt.Errorf("find msbd: %w", err)
	}
	exeDir := filepath.Dir(exe)
	for _, path := range []string{filepath.Join(exeDir, "msbd"), filepath.Join(exeDir, "..", "libexec", "msb", "msbd")} {
		if found, err := exec.LookPath(path); err == nil {
			return found, nil
		}
	}
	found, err := exec.LookPath("msbd")
	if err != nil {
		return "", fmt.Errorf("msbd is neither in %s nor in PATH: install it there", exeDir)
	}
	return filepath.Abs(found)
}
