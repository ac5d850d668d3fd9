// Msbd is the daemon of msb. It reads its configuration, hardens its process, and runs the server until SIGTERM or
// SIGINT. The server is in package daemon.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/api/version"
	"github.com/msbd/msbd/daemon"
	"github.com/msbd/msbd/daemon/internal/backend"
	"github.com/msbd/msbd/daemon/internal/backend/host"
	"github.com/msbd/msbd/daemon/internal/data/store"
	"github.com/msbd/msbd/daemon/internal/domain/name"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
	"github.com/msbd/msbd/daemon/internal/sys/config"
	"github.com/msbd/msbd/daemon/internal/sys/process"
)

const (
	exitFailure = 1
	exitUsage   = 2
)

func main() {
	host.RunProbeIfChild()
	store.RunCheckIfChild()
	backend.RunJailIfChild()
	app := &cli.App{
		Name:            "msbd",
		Usage:           "server that runs untrusted code in microVMs",
		UsageText:       "msbd [options]",
		Description:     description,
		Version:         version.String(),
		HideHelpCommand: true,
		Flags:           flags(),
		Action:          run,
		OnUsageError: func(_ *cli.Context, err error, _ bool) error {
			return cli.Exit("msbd: "+flagError(err)+"; see msbd --help", exitUsage)
		},
		ExitErrHandler: func(*cli.Context, error) {},
	}
	err := app.Run(os.Args)
	if err == nil {
		return
	}
	if text := plain(err); text != "" {
		fmt.Fprintln(os.Stderr, text)
	}
	code := exitFailure
	var coded cli.ExitCoder
	if errors.As(err, &coded) {
		code = coded.ExitCode()
	}
	os.Exit(code)
}

// plain returns the text of an error without the text of a class at the end of a line. An error with several problems has
// a line for each of them.
func plain(err error) string {
	lines := strings.Split(err.Error(), "\n")
	for i, line := range lines {
		lines[i] = rpcerr.Message(errors.New(line))
	}
	return strings.Join(lines, "\n")
}

// flagError rewrites an error of package flag in the terms of the help.
func flagError(err error) string {
	text := err.Error()
	if name, ok := strings.CutPrefix(text, "flag provided but not defined: -"); ok {
		return "unknown option --" + name
	}
	if name, ok := strings.CutPrefix(text, "flag needs an argument: -"); ok {
		return "--" + name + " needs a value"
	}
	if match := regexp.MustCompile(`^invalid boolean value (".*") for (?:flag )?-(\S+): `).FindStringSubmatch(text); match != nil {
		return "invalid value " + match[1] + " for --" + match[2] + ": give true or false"
	}
	return text
}

const description = `Each setting can also be given in the configuration file (state_dir = "/srv/msb") or in the
environment (MSBD_STATE_DIR=/srv/msb). Flags override the environment, which overrides the file.
The file can also contain tables [namespace.NAME] with quotas for single namespaces: sandboxes,
cpus, memory_mib and runs.

msbd must run as root. SIGTERM stops it; sandboxes keep running.

Exit codes: 0 stopped by a signal; 1 failure; 2 invalid flags or configuration.`

func flags() []cli.Flag {
	list := []cli.Flag{
		&cli.StringFlag{
			Name:  "config",
			Usage: "configuration `FILE` (default: " + config.DefaultFile + " if it exists)",
		},
		&cli.BoolFlag{Name: "print-config", Usage: "check the settings of all sources, print the directories, the address and whether dev mode is on as JSON, and exit"},
		&cli.BoolFlag{Name: "doctor", Usage: "check this host, print a report as JSON ('msb doctor' prints it as text), and exit; the exit code is 1 if there is a problem"},
	}
	for _, s := range config.Settings {
		usage := s.Usage
		if s.Default != "" {
			usage += " (default: " + s.Default + ")"
		}
		usage += " [" + s.Env() + "]"
		if s.Bool {
			list = append(list, &cli.BoolFlag{Name: s.Name, Usage: usage})
		} else {
			list = append(list, &cli.StringFlag{Name: s.Name, Usage: usage})
		}
	}
	return list
}

func run(c *cli.Context) error {
	if c.NArg() > 0 {
		return cli.Exit(fmt.Sprintf("msbd: unexpected argument %q; see msbd --help", c.Args().First()), exitUsage)
	}
	cfg, err := config.Load(c.String("config"), os.LookupEnv, func(name string) (string, bool) {
		return fmt.Sprint(c.Value(name)), c.IsSet(name)
	}, func(namespace string) error { return name.Validate("namespace", namespace) })
	if c.Bool("doctor") {
		return examine(c, cfg, err)
	}
	if err == nil && cfg.LibDir == "" {
		cfg.LibDir, err = findLibDir()
	}
	if err != nil {
		return cli.Exit(fmt.Sprintf("msbd: the configuration has problems:\n%v", err), exitUsage)
	}
	if c.Bool("print-config") {
		return json.NewEncoder(c.App.Writer).Encode(map[string]any{ // for msb, which reads it
			"state_dir": cfg.StateDir, "run_dir": cfg.RunDir, "lib_dir": cfg.LibDir, "listen": cfg.Listen, "dev": cfg.Dev,
		})
	}
	cfg.Version = c.App.Version
	log := newLog(cfg)
	if err := process.ProtectFromOOM(); err != nil { // before harden, which makes the file unwritable without root
		log.Debug("could not set the OOM score", "err", err)
	}
	if err := harden(); err != nil {
		return fmt.Errorf("msbd: %w", err)
	}
	ctx, stop := signal.NotifyContext(c.Context, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	limit, err := host.RaiseFileLimit()
	if err != nil {
		return fmt.Errorf("msbd: %w", err)
	}
	for _, check := range []host.Check{
		host.CheckFileLimit(limit, backend.HostOptions(cfg), cfg.MaxConnections), host.CheckDirectories(cfg.StateDir, cfg.RunDir),
	} {
		if check.Status != host.OK {
			log.Warn(check.Name+": "+check.Detail, "remedy", check.Remedy)
		}
	}
	if err := daemon.Run(ctx, cfg, log); err != nil {
		return fmt.Errorf("msbd: %w", err)
	}
	return nil
}

// findLibDir returns the directory that has the shim. That is the executable's directory, or ../libexec/msb relative to
// it. findLibDir returns errdefs.ErrNotFound if neither has the shim.
func findLibDir() (string, error) {
	exe, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find the directory of msbd: %w", err)
	}
	if exe, err = filepath.EvalSymlinks(exe); err != nil {
		return "", fmt.Errorf("find the directory of msbd: %w", err)
	}
	exeDir := filepath.Dir(exe)
	installed := filepath.Join(filepath.Dir(exeDir), "libexec", "msb")
	for _, dir := range []string{exeDir, installed} {
		_, err := os.Stat(filepath.Join(dir, "containerd-shim-kata-v2"))
		if err == nil {
			return dir, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("look for containerd-shim-kata-v2: %w", err)
		}
	}
	return "", fmt.Errorf("containerd-shim-kata-v2 is neither in %s nor in %s: build it with 'make build', or give its "+
		"directory with --lib-dir: %w", exeDir, installed, errdefs.ErrNotFound)
}

// harden disables core files and tracing, which would expose the signing key to other processes of the same user. Child
// processes inherit the limit on core files, so that QEMU never writes the memory of a guest to a core file.
func harden() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("disable core files: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("disable tracing: %w", err)
	}
	return nil
}

func newLog(cfg config.Config) *slog.Logger {
	var level slog.Level
	_ = level.UnmarshalText([]byte(cfg.LogLevel)) // cannot fail, because config.Load checked it
	return bounded.NewLogger(os.Stderr, cfg.LogFormat == "json", level)
}
