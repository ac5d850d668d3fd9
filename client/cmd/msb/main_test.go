package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"msb":  main,
		"msbd": standInMain,
	})
}

// The command line as its users meet it. What needs real sandboxes is tested elsewhere; here a
// stand-in for msbd answers the admin socket.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			// Short, because a socket's path is limited.
			dir, err := os.MkdirTemp("", "msb")
			if err != nil {
				return err
			}
			env.Defer(func() { _ = os.RemoveAll(dir) })
			env.Setenv("RUN", dir+"/run")
			env.Setenv("STATE", dir+"/state")
			env.Setenv("MSB_SOCKET", dir+"/run/msbd.sock")
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){"exits": exits},
	})
}

// exits runs a command and compares its exit code: exits 3 msb server status.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	var got int
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

func standInMain() {
	runDir := flag.String("run-dir", "", "")
	port := flag.String("port", "5555", "")
	dev := flag.Bool("dev", false, "")
	resetKey := flag.Bool("reset-key", false, "")
	flag.String("state-dir", "", "")
	flag.Parse()
	if err := serveStandIn(*runDir, *port, *dev, *resetKey); err != nil {
		fmt.Fprintln(os.Stderr, "msbd:", err)
		os.Exit(1)
	}
}
