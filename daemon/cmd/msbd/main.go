// Msbd is the daemon: it reads its configuration, hardens its process, and runs the server until it
// is told to end. What it does is in package daemon.
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
	"runtime/debug"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon"
	"github.com/msbd/msbd/daemon/internal/backend/host"
	"github.com/msbd/msbd/daemon/internal/data/store"
	"github.com/msbd/msbd/daemon/internal/domain/name"
	"github.com/msbd/msbd/daemon/internal/sys/config"
)

// version is set by the build.
var version = ""

const (
	exitFailure = 1
	exitUsage   = 2
)

func main() {
	host.MaybeProbeChild()
	store.MaybeCheckChild()
	app := &cli.App{
		Name:            "msbd",
		Usage:           "run untrusted code in microVMs, behind API keys",
		UsageText:       "msbd [options]",
		Description:     description,
		Version:         buildVersion(),
		HideHelpCommand: true,
		Flags:           flags(),
		Action:          run,
		OnUsageError: func(_ *cli.Context, err error, _ bool) error {
			return cli.Exit("msbd: "+err.Error()+"; see msbd --help", exitUsage)
		},
		ExitErrHandler: func(*cli.Context, error) {},
	}
	err := app.Run(os.Args)
	if err == nil {
		return
	}
	if text := err.Error(); text != "" {
		fmt.Fprintln(os.Stderr, text)
	}
	code := exitFailure
	var coded cli.ExitCoder
	if errors.As(err, &coded) {
		code = coded.ExitCode()
	}
	os.Exit(code)
}

const description = `Each setting can also be given in the configuration file (state_dir = "/srv/msb") and in the
environment (MSBD_STATE_DIR=/srv/msb). Flags go over the environment, and that over the file.
SIGTERM ends msbd and leaves sandboxes running. Exit codes: 0 ended when asked to, 1 failed,
2 bad flags or configuration.`

func flags() []cli.Flag {
	list := []cli.Flag{
		&cli.StringFlag{
			Name:  "config",
			Usage: "read settings from `FILE` (default: " + config.DefaultFile + " if it is there)",
		},
		&cli.BoolFlag{Name: "print-config", Usage: "check the settings of all sources, print in JSON where msbd would be, and end"},
		&cli.BoolFlag{Name: "doctor", Usage: "examine this host, print in JSON what was found ('msb doctor' says it in words), and end: code 1 with a problem"},
	}
	for _, s := range config.Settings {
		usage := s.Usage + " [" + s.Env() + "]"
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
		return json.NewEncoder(c.App.Writer).Encode(map[string]any{ // msb asks for it
			"state_dir": cfg.StateDir, "run_dir": cfg.RunDir, "lib_dir": cfg.LibDir, "listen": cfg.Listen, "dev": cfg.Dev,
		})
	}
	cfg.Version = c.App.Version
	if err := harden(); err != nil {
		return fmt.Errorf("msbd: %w", err)
	}
	ctx, stop := signal.NotifyContext(c.Context, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := daemon.Run(ctx, cfg, newLog(cfg)); err != nil {
		return fmt.Errorf("msbd: %w", err)
	}
	return nil
}

// findLibDir finds what is installed or built beside the executable.
func findLibDir() (string, error) {
	exe, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find the directory of msbd: %w", err)
	}
	if exe, err = filepath.EvalSymlinks(exe); err != nil {
		return "", fmt.Errorf("find the directory of msbd: %w", err)
	}
	beside := filepath.Dir(exe)
	installed := filepath.Join(filepath.Dir(beside), "libexec", "msb")
	for _, dir := range []string{beside, installed} {
		_, err := os.Stat(filepath.Join(dir, "containerd-shim-kata-v2"))
		if err == nil {
			return dir, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("look for containerd-shim-kata-v2: %w", err)
		}
	}
	return "", fmt.Errorf("containerd-shim-kata-v2 is neither in %s nor in %s: build it with 'make build', or name its "+
		"directory with --lib-dir: %w", beside, installed, errdefs.ErrNotFound)
}

// harden keeps the signing key out of core files and from other processes of the same user. Children
// inherit the limit, which keeps guests' memory out of core files, too.
func harden() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core files: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid tracing: %w", err)
	}
	return nil
}

func newLog(cfg config.Config) *slog.Logger {
	var level slog.Level
	_ = level.UnmarshalText([]byte(cfg.LogLevel)) // the configuration is valid
	options := &slog.HandlerOptions{Level: level}
	if cfg.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, options))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, options))
}

func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}
