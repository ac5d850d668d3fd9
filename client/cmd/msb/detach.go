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

	"github.com/msbd/msbd/client"
)

const (
	// readyTimeout is long enough for a server that adopts many sandboxes on a slow machine.
	readyTimeout = 3 * time.Minute
	pollInterval = 50 * time.Millisecond
	// progressInterval is how often a slow start reports its progress.
	progressInterval = 5 * time.Second
	// logTail is how many bytes of the log are shown if msbd exits while it starts.
	logTail = 4 << 10
)

// detach starts msbd in a new session and waits until it is ready.
func detach(c *cli.Context, a *client.Admin, msbd string, args []string) error {
	log, err := openLog(c.Context, msbd, args)
	if err != nil {
		return err
	}
	defer log.Close()
	logOffset, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	cmd := exec.Command(msbd, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = newSession
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start msbd: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()

	err = waitReady(c, a, ended)
	switch {
	case err == nil:
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("msbd is not ready after %s and keeps running in the background: see 'msb server status' and %s", readyTimeout, log.Name())
	case errors.Is(err, context.Canceled):
		_ = cmd.Process.Signal(syscall.SIGTERM)
		<-ended
		return cli.Exit("interrupted; msbd was stopped", exitInterrupted)
	default:
		return fmt.Errorf("msbd exited while starting (%w). The end of its log, %s:\n%s", err, log.Name(), tail(log, logOffset))
	}
	st, err := a.Status(c.Context)
	if err != nil {
		return err
	}
	if st.GetState() == degraded {
		return cli.Exit(fmt.Sprintf("msbd is running (pid %d, log %s), but is degraded: %s", st.GetPid(), log.Name(),
			strings.Join(st.GetDegradedReasons(), "; ")), exitNotReady)
	}
	next := "Create an API key with 'msb server keygen'."
	if !st.GetAuthRequired() {
		next = "It is in dev mode and accepts requests without an API key."
	}
	fmt.Fprintf(c.App.ErrWriter, "msbd is ready on %s (pid %d, log %s). %s\n", gatewayURL(st), st.GetPid(), log.Name(), next)
	return nil
}

// openLog opens msbd's log for appending. The log is in msbd's state directory, which openLog creates if msbd has not
// done so yet.
func openLog(ctx context.Context, msbd string, args []string) (*os.File, error) {
	// Only msbd can evaluate its configuration files and environment. --print-config does so without starting it, and
	// reports problems on standard error.
	var problems strings.Builder
	printConfig := exec.CommandContext(ctx, msbd, append([]string{"--print-config"}, args...)...)
	printConfig.Stderr = &problems
	out, err := printConfig.Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.Exited() {
		return nil, cli.Exit(strings.TrimSpace(problems.String()), exit.ExitCode())
	}
	if err != nil {
		return nil, fmt.Errorf("get the configuration of msbd: %w", err)
	}
	var config struct {
		StateDir string `json:"state_dir"`
	}
	if err := json.Unmarshal(out, &config); err != nil || config.StateDir == "" {
		return nil, fmt.Errorf("get the configuration of msbd: unexpected output %q; install the msbd that belongs to this msb", out)
	}
	if err := os.MkdirAll(config.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("create state directory: %w", err)
	}
	log, err := os.OpenFile(filepath.Join(config.StateDir, "msbd.log"), os.O_RDWR|os.O_CREATE|os.O_APPEND|noFollow, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	return log, nil
}

// waitReady waits until msbd is ready or degraded. It returns an error if msbd exits first, or the context's error.
func waitReady(c *cli.Context, a *client.Admin, ended <-chan error) error {
	ctx, cancel := context.WithTimeout(c.Context, readyTimeout)
	defer cancel()
	poll := time.NewTicker(pollInterval)
	defer poll.Stop()
	start, reported := time.Now(), time.Now()
	for {
		state := "starting"
		// Use a new connection for each attempt, because gRPC waits longer and longer before it reconnects.
		st, err := a.Status(ctx)
		_ = a.Close()
		if err == nil {
			state = stateName(st)
			if st.GetState() == ready || st.GetState() == degraded {
				return nil
			}
		}
		if time.Since(reported) >= progressInterval {
			reported = time.Now()
			fmt.Fprintf(c.App.ErrWriter, "msbd is %s (%s) …\n", state, age(time.Since(start)))
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

// tail returns the end of the log, at most logTail bytes, starting at logOffset or later.
func tail(log *os.File, logOffset int64) []byte {
	info, err := log.Stat()
	if err != nil {
		return nil
	}
	from := max(logOffset, info.Size()-logTail)
	data, _ := io.ReadAll(io.NewSectionReader(log, from, logTail))
	if _, rest, ok := bytes.Cut(data, []byte("\n")); ok && from > logOffset {
		data = rest // drop the first line, which may be incomplete
	}
	return bytes.TrimSpace(data)
}
