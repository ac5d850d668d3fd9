// Command msb-portal is the helper inside each sandbox.
//
//	msb-portal serve [SOCKET]    run code and commands for msbd; this is the container's main process
//	msb-portal connect [SOCKET]  connect stdin and stdout to the process that serves
//	msb-portal version           print the version
//
// It starts in every sandbox. Emulated machines are slow, so the packages that it imports must not do slow work before
// main.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/msbd/msbd/api/version"
	"github.com/msbd/msbd/daemon/internal/guest/portal"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "msb-portal:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	socket := portal.Socket
	if len(args) == 2 {
		socket = args[1]
	}
	switch {
	case len(args) == 1 && args[0] == "version":
		fmt.Println(version.String())
		return nil
	case len(args) < 1 || len(args) > 2:
	case args[0] == "serve":
		return portal.Serve(ctx, socket, version.String())
	case args[0] == "connect":
		return portal.Connect(ctx, socket, os.Stdin, os.Stdout)
	}
	return errors.New("invalid arguments; usage: msb-portal serve|connect [SOCKET], or msb-portal version")
}
