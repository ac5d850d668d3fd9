//go:build linux

package main

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"os/user"
	"regexp"
	"strconv"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/msbd/msbd/client"
	"github.com/msbd/msbd/daemon/daemontest"
)

func TestMain(m *testing.M) {
	daemontest.MaybeChild()
	testscript.Main(m, map[string]func(){
		"msb":  main,
		"msbd": daemontest.Main,
	})
}

// TestScripts runs the scripts in testdata, which test the commands for administrators against an msbd without microVMs.
// daemon/e2e tests with real microVMs. $TAKEN is a port that is in use, and $ME and $MY_UID are the user who runs the
// scripts.
func TestScripts(t *testing.T) {
	t.Parallel()
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			dir, err := shortDir(env)
			if err != nil {
				return err
			}
			me, err := user.Current()
			if err != nil {
				return err
			}
			taken, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return err
			}
			env.Defer(func() { taken.Close(); stopServer(dir + "/run/msbd.sock") })
			env.Setenv("TAKEN", strconv.Itoa(taken.Addr().(*net.TCPAddr).Port))
			env.Setenv("RUN", dir+"/run")
			env.Setenv("STATE", dir+"/state")
			env.Setenv("MSB_SOCKET", dir+"/run/msbd.sock")
			env.Setenv("MSBD_STATE_DIR", dir+"/state")
			env.Setenv("MSBD_PORT", "0")     // a free port, unless the script sets one
			env.Setenv("MSBD_POOL_MIN", "0") // no pool, unless the script sets one
			env.Setenv("ME", me.Username)
			env.Setenv("MY_UID", me.Uid)
			env.Setenv("TZ", "UTC")
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){"exits": exits, "capture": capture},
	})
}

// shortDir creates a directory for a script. Its path is short, because the length of a socket's path is limited.
func shortDir(env *testscript.Env) (string, error) {
	dir, err := os.MkdirTemp("", "msb")
	env.Defer(func() { _ = os.RemoveAll(dir) })
	return dir, err
}

// stopServer stops the server, which still runs if the script failed.
func stopServer(socket string) {
	a := &client.Admin{Socket: socket}
	defer a.Close()
	_, _ = a.Shutdown(context.Background(), false)
}

// exits runs a command and checks its exit code: exits 3 msb server status.
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

// capture sets a variable to the text that the group of a pattern matches in a file, or in stdout or stderr:
// capture ID stderr '^API key ([0-9a-f]{32})'.
func capture(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: capture NAME FILE PATTERN")
	}
	pattern, err := regexp.Compile("(?m)" + args[2])
	ts.Check(err)
	found := pattern.FindStringSubmatch(ts.ReadFile(args[1]))
	if len(found) != 2 {
		ts.Fatalf("%#q does not match in %s, or does not have exactly one group", args[2], args[1])
	}
	ts.Setenv(args[0], found[1])
}
