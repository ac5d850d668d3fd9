package daemontest

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/msbd/msbd/daemon/internal/backend/host"
	"github.com/msbd/msbd/daemon/internal/data/store"
	"github.com/msbd/msbd/daemon/internal/domain/name"
	"github.com/msbd/msbd/daemon/internal/sys/config"
)

// MaybeChild must be called first in the main function of every test program that uses this package. The store executes
// the program again as a child process to check its file, and StartWithPortals to run a portal; in the child, MaybeChild does
// not return.
func MaybeChild() {
	store.RunCheckIfChild()
	servePortalIfChild()
}

// Main is the main function of a fake msbd. It has the same settings and exit codes as msbd, but no real microVMs. The
// server starts with two sandboxes: default/my-env is running, and team/broken has failed.
func Main() {
	trouble := Trouble(os.Getenv(TroubleEnv))
	flags := flag.NewFlagSet("msbd", flag.ExitOnError)
	file := flags.String("config", "", "")
	printConfig := flags.Bool("print-config", false, "")
	doctor := new(bool)
	if trouble != Old {
		doctor = flags.Bool("doctor", false, "")
	}
	for _, s := range config.Settings {
		if s.Bool {
			flags.Bool(s.Name, false, "")
		} else {
			flags.String(s.Name, "", "")
		}
	}
	_ = flags.Parse(os.Args[1:]) // exits on error
	set := map[string]string{}
	flags.Visit(func(f *flag.Flag) { set[f.Name] = f.Value.String() })
	cfg, err := config.Load(*file, os.LookupEnv, func(name string) (string, bool) {
		value, ok := set[name]
		return value, ok
	}, func(namespace string) error { return name.Validate("namespace", namespace) })
	switch {
	case *doctor:
		report := examine(cfg, trouble)
		fmt.Println(inJSON(report))
		if report.Status == host.Problem {
			os.Exit(1)
		}
	case err != nil:
		fmt.Fprintf(os.Stderr, "msbd: the configuration has problems:\n%v\n", err)
		os.Exit(2)
	case *printConfig:
		_ = json.NewEncoder(os.Stdout).Encode(map[string]any{"state_dir": cfg.StateDir})
	default:
		if err := run(cfg, trouble); err != nil {
			fmt.Fprintln(os.Stderr, "msbd:", err)
			os.Exit(1)
		}
	}
}

func run(cfg config.Config, trouble Trouble) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	s, err := open(ctx, cfg, trouble, initialSandboxes(), nil, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		return err
	}
	return s.serve()
}
