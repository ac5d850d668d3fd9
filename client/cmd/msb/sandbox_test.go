//go:build linux

package main

import (
	"bufio"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/msbd/msbd/daemon/daemontest"
)

// TestSandboxScripts runs the scripts in testdata/sandbox, which test the commands for holders of an API key against a
// server without microVMs. The server answers at $URL over plain HTTP, and at $TLS_URL with the certificate in $CA.
// Nothing listens at $DEAD_URL. The key $GOOD may do everything, $TEAM is limited to the namespace team-alpha,
// and $READER may only read.
func TestSandboxScripts(t *testing.T) { runSandboxScripts(t, "testdata/sandbox", daemontest.Start) }

// TestPortalScripts runs the scripts in testdata/portals. They are like those of TestSandboxScripts, but the sandboxes run real
// programs on this host, and msb calls the server at $URL with the key $GOOD.
func TestPortalScripts(t *testing.T) {
	runSandboxScripts(t, "testdata/portals", daemontest.StartWithPortals)
}

func runSandboxScripts(t *testing.T, scripts string, start func(dir string) (*daemontest.Server, error)) {
	t.Parallel()
	testscript.Run(t, testscript.Params{
		Dir: scripts,
		Setup: func(env *testscript.Env) error {
			dir, err := shortDir(env)
			if err != nil {
				return err
			}
			s, err := start(dir)
			if err != nil {
				return err
			}
			env.Defer(func() {
				if err := s.Close(); err != nil {
					env.T().Fatal(err)
				}
			})
			good, err := s.Key()
			if err != nil {
				return err
			}
			team, err := s.Key("team-alpha")
			if err != nil {
				return err
			}
			secure := httptest.NewUnstartedServer(s.Handler())
			secure.Config.ErrorLog = log.New(io.Discard, "", 0)
			secure.StartTLS()
			env.Defer(secure.Close)
			ca := filepath.Join(env.WorkDir, "ca.pem")
			block := &pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw}
			if err := os.WriteFile(ca, pem.EncodeToMemory(block), 0o600); err != nil {
				return err
			}
			home := filepath.Join(env.WorkDir, "home")
			if err := os.MkdirAll(home, 0o700); err != nil {
				return err
			}
			reader, err := s.ScopedKey("sandbox:read")
			if err != nil {
				return err
			}
			for name, value := range map[string]string{
				"URL": s.URL(), "TLS_URL": secure.URL, "DEAD_URL": "http://127.0.0.3:1", "CA": ca, "HOME": home,
				"GOOD": good, "TEAM": team, "READER": reader, "XDG_CONFIG_HOME": "", "MSB_API_KEY": "", "MSB_SERVER_URL": "",
			} {
				env.Setenv(name, value)
			}
			if filepath.Base(scripts) == "portals" {
				env.Setenv("MSB_SERVER_URL", s.URL())
				env.Setenv("MSB_API_KEY", good)
			}
			env.Values[serverValue{}] = s
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits": exits, "capture": capture, "interrupts": interrupts, "last-run": lastRun, "sandboxes": sandboxes,
			"interrupt-at":       func(ts *testscript.TestScript, neg bool, args []string) { interruptAt(ts, neg, args, "") },
			"interrupt-twice-at": func(ts *testscript.TestScript, neg bool, args []string) { interruptAt(ts, neg, args, "ignored") },
		},
	})
}

type serverValue struct{}

func serverOf(ts *testscript.TestScript) *daemontest.Server {
	return ts.Value(serverValue{}).(*daemontest.Server)
}

// lastRun prints the last run as the sandbox received it.
func lastRun(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) > 0 {
		ts.Fatalf("usage: last-run")
	}
	select {
	case run := <-serverOf(ts).Runs:
		fmt.Fprintln(ts.Stdout(), run.Asked)
	default:
		ts.Fatalf("nothing ran since the previous last-run")
	}
}

// sandboxes prints the records of all sandboxes.
func sandboxes(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) > 0 {
		ts.Fatalf("usage: sandboxes")
	}
	fmt.Fprintln(ts.Stdout(), serverOf(ts).Sandboxes())
}

// interrupts runs a command, interrupts it when its run has begun, waits until the run has ended in the sandbox, and
// checks the exit code: interrupts 130 msb sandbox run my-env wait.
func interrupts(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: interrupts CODE COMMAND...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	runs := serverOf(ts).Runs
	select {
	case <-runs: // discard an earlier run
	default:
	}
	command := exec.Command(args[1], args[2:]...)
	command.Dir = ts.MkAbs(".")
	command.Env = append(os.Environ(), "MSB_API_KEY="+ts.Getenv("MSB_API_KEY"), "MSB_SERVER_URL="+ts.Getenv("MSB_SERVER_URL"))
	ts.Check(command.Start())
	ended := make(chan error, 1)
	go func() { ended <- command.Wait() }()
	var run daemontest.Run
	select {
	case run = <-runs:
	case err := <-ended:
		ts.Fatalf("ended before its run began: %v", err)
	}
	ts.Check(command.Process.Signal(syscall.SIGINT))
	<-run.Ended
	var exit *exec.ExitError
	if err := <-ended; !errors.As(err, &exit) || exit.ExitCode() != want {
		ts.Fatalf("ended with %v, want %d", err, want)
	}
}

// interruptAt runs a command, interrupts it when it has printed a line, and checks its exit code: interrupt-at LINE CODE COMMAND...
// If again is not empty, it interrupts the command again when it has printed that line. It prints what the command has printed.
func interruptAt(ts *testscript.TestScript, neg bool, args []string, again string) {
	if neg || len(args) < 3 {
		ts.Fatalf("usage: interrupt-at LINE CODE COMMAND...")
	}
	want, err := strconv.Atoi(args[1])
	ts.Check(err)
	command := exec.Command(args[2], args[3:]...)
	command.Dir, command.Stderr = ts.MkAbs("."), ts.Stderr()
	command.Env = append(os.Environ(), "MSB_API_KEY="+ts.Getenv("MSB_API_KEY"), "MSB_SERVER_URL="+ts.Getenv("MSB_SERVER_URL"))
	out, err := command.StdoutPipe()
	ts.Check(err)
	ts.Check(command.Start())
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		fmt.Fprintln(ts.Stdout(), lines.Text())
		if lines.Text() == args[0] || again != "" && lines.Text() == again {
			ts.Check(command.Process.Signal(syscall.SIGINT))
		}
	}
	if err := command.Wait(); command.ProcessState.ExitCode() != want {
		ts.Fatalf("ended with %v, want %d", err, want)
	}
}
