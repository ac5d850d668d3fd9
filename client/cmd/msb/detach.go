package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/client"
)

const (
	// readyTimeout is for a start that finds many sandboxes on a slow machine.
	readyTimeout = 3 * time.Minute
	pollInterval = 50 * time.Millisecond
	// progressInterval is how often a long start says that it is not stuck.
	progressInterval = 5 * time.Second
	// logTail is how much of the log is shown when msbd dies at its start.
	logTail = 4 << 10
)

// detach starts msbd in a session of its own and waits until it is ready.
func detach(c *cli.Context, a *client.Admin, msbd string, args []string) error {
	log, err := openLog(c.Context, msbd, args)
	if err != nil {
		return err
	}
	defer log.Close()
	began, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	cmd := exec.Command(msbd, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start msbd: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()

	err = waitReady(c, a, ended)
	switch {
	case err == nil:
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("msbd is not ready after %s and goes on in the background: see 'msb server status' and %s", readyTimeout, log.Name())
	case errors.Is(err, context.Canceled):
		_ = cmd.Process.Signal(syscall.SIGTERM)
		<-ended
		return errors.New("interrupted; msbd was stopped again")
	default:
		return fmt.Errorf("msbd ended at its start (%w). The end of its log, %s:\n%s", err, log.Name(), tail(log, began))
	}
	st, err := a.Status(c.Context)
	if err != nil {
		return err
	}
	if st.GetState() == degraded {
		return cli.Exit(fmt.Sprintf("msbd runs (pid %d, log %s), but is degraded: %s", st.GetPid(), log.Name(),
			strings.Join(st.GetDegradedReasons(), "; ")), exitNotReady)
	}
	next := "Make an API key with 'msb server keygen'."
	if !st.GetAuthRequired() {
		next = "It is in dev mode and takes requests without an API key."
	}
	fmt.Fprintf(c.App.ErrWriter, "msbd is ready on %s (pid %d, log %s). %s\n", gatewayURL(st), st.GetPid(), log.Name(), next)
	return nil
}

// openLog opens the log for appending, in the state directory that msbd will use. msbd itself makes its
// directories with what they need; this one may come before it.
func openLog(ctx context.Context, msbd string, args []string) (*os.File, error) {
	// Only msbd knows what its files and environment set; it says so without starting, or what is wrong.
	var problems strings.Builder
	ask := exec.CommandContext(ctx, msbd, append([]string{"--print-config"}, args...)...)
	ask.Stderr = &problems
	out, err := ask.Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.Exited() {
		return nil, cli.Exit(strings.TrimSpace(problems.String()), exit.ExitCode())
	}
	if err != nil {
		return nil, fmt.Errorf("ask msbd for its configuration: %w", err)
	}
	var config struct {
		StateDir string `json:"state_dir"`
	}
	if err := json.Unmarshal(out, &config); err != nil || config.StateDir == "" {
		return nil, fmt.Errorf("ask msbd for its configuration: it says %q, which is of another version than msb", out)
	}
	if err := os.MkdirAll(config.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("make state directory: %w", err)
	}
	log, err := os.OpenFile(filepath.Join(config.StateDir, "msbd.log"), os.O_RDWR|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	return log, nil
}

// waitReady returns nil when msbd is ready, or as ready as it gets by itself; or what came instead: the
// way it ended, or the context's error.
func waitReady(c *cli.Context, a *client.Admin, ended <-chan error) error {
	ctx, cancel := context.WithTimeout(c.Context, readyTimeout)
	defer cancel()
	poll := time.NewTicker(pollInterval)
	defer poll.Stop()
	began, said := time.Now(), time.Now()
	for {
		state := "starting"
		// A connection made anew each time: gRPC would wait longer and longer between attempts.
		st, err := a.Status(ctx)
		_ = a.Close()
		if err == nil {
			state = stateName(st)
			if st.GetState() == ready || st.GetState() == degraded {
				return nil
			}
		}
		if time.Since(said) >= progressInterval {
			said = time.Now()
			fmt.Fprintf(c.App.ErrWriter, "msbd is %s (%s) …\n", state, age(time.Since(began)))
		}
		select {
		case err := <-ended:
			if err == nil {
				err = errors.New("exit status 0")
			}
			return err
		case <-ctx.Done():
			return ctx.Err()
		case <-poll.C:
		}
	}
}

// tail returns the end of the log, of what was written since began.
func tail(log *os.File, began int64) []byte {
	info, err := log.Stat()
	if err != nil {
		return nil
	}
	from := max(began, info.Size()-logTail)
	data, _ := io.ReadAll(io.NewSectionReader(log, from, logTail))
	if _, whole, ok := bytes.Cut(data, []byte("\n")); ok && from > began {
		data = whole // not from the middle of a line
	}
	return bytes.TrimSpace(data)
}
