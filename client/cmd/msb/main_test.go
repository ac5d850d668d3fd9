package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/msbd/msbd/client"
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
			env.Defer(func() { endStandIn(dir + "/run/msbd.sock"); _ = os.RemoveAll(dir) })
			env.Setenv("RUN", dir+"/run")
			env.Setenv("STATE", dir+"/state")
			env.Setenv("MSB_SOCKET", dir+"/run/msbd.sock")
			env.Setenv("MSBD_STATE_DIR", dir+"/state")
			env.Setenv("TZ", "UTC")
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){"exits": exits},
	})
}

// endStandIn ends the server that a script which failed left in the background.
func endStandIn(socket string) {
	a := &client.Admin{Socket: socket}
	defer a.Close()
	_, _ = a.Shutdown(context.Background(), false)
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
	stateDir := flag.String("state-dir", os.Getenv("MSBD_STATE_DIR"), "")
	config := flag.String("config", "", "")
	port := flag.String("port", "5555", "")
	dev := flag.Bool("dev", false, "")
	resetKey := flag.Bool("reset-key", false, "")
	printConfig := flag.Bool("print-config", false, "")
	doctor := flag.Bool("doctor", false, "")
	flag.Parse()
	if *doctor {
		examineAsStandIn(*runDir, *stateDir, *port)
	}
	if *config != "" {
		content, err := os.ReadFile(*config)
		if err != nil {
			fmt.Fprintln(os.Stderr, "msbd: the configuration has problems:\n"+err.Error())
			os.Exit(2)
		}
		*stateDir = cmp.Or(*stateDir, strings.TrimSpace(string(content)))
	}
	if *printConfig {
		fmt.Printf("{\"state_dir\": %q}\n", *stateDir)
		return
	}
	if err := serveStandIn(*runDir, *stateDir, *port, *dev, *resetKey); err != nil {
		fmt.Fprintln(os.Stderr, "msbd:", err)
		os.Exit(1)
	}
}
