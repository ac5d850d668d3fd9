package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon"
	"github.com/msbd/msbd/daemon/internal/backend/host"
	"github.com/msbd/msbd/daemon/internal/sys/config"
)

// examine prints the report of --doctor. It also runs if the settings have problems, which are then part of the report.
func examine(c *cli.Context, cfg config.Config, problems error) error {
	checks := []host.Check{examineSettings(c.String("config"), problems)}
	if cfg.LibDir == "" {
		dir, err := findLibDir()
		if err != nil {
			checks = append(checks, host.Check{Name: "programs", Status: host.Problem, Detail: oneLine(err),
				Remedy: "make build guest, or install msbd again"})
		}
		cfg.LibDir = dir
	}
	_, _ = host.RaiseFileLimit() // as the server does; the report says if the limit is too low
	report := daemon.Examine(c.Context, cfg, checks...)
	if err := json.NewEncoder(c.App.Writer).Encode(report); err != nil {
		return fmt.Errorf("msbd: %w", err)
	}
	if report.Status == host.Problem {
		return cli.Exit("", exitFailure)
	}
	return nil
}

func examineSettings(file string, problems error) host.Check {
	check := host.Check{Name: "settings", Status: host.OK, Detail: file}
	if file == "" {
		file = config.DefaultFile
		check.Detail = file
		if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
			check.Detail = "the defaults, because " + file + " does not exist"
		}
	}
	switch {
	case problems == nil:
	case os.Geteuid() != 0 && errors.Is(unix.Access(file, unix.R_OK), unix.EACCES):
		check.Status, check.Detail, check.Remedy = host.Warning, "not checked: only root can read "+file, "sudo msb doctor"
	default:
		check.Status, check.Detail, check.Remedy = host.Problem, oneLine(problems), "see msbd --help"
	}
	return check
}

// oneLine returns the text of plain as one line.
func oneLine(err error) string { return strings.ReplaceAll(plain(err), "\n", "; ") }
