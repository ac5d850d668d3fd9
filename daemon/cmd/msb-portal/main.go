// Command msb-portal is the helper inside each sandbox.
//
//	msb-portal serve [SOCKET]        run code and commands for msbd; this is the container's main process
//	msb-portal connect [SOCKET]      connect stdin and stdout to the process that serves
//	msb-portal transfer ID [SOCKET]  the same, for the data of the transfer that it has offered with this id
//	msb-portal version               print the version
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
	var command, transfer string
	if len(args) > 0 {
		command, args = args[0], args[1:]
	}
	if command == "transfer" && len(args) > 0 {
		transfer, args = args[0], args[1:]
	}
	socket := portal.Socket
	if len(args) > 0 {
		socket, args = args[0], args[1:]
	}
	switch {
	case len(args) > 0:
	case command == "version":
		fmt.Println(version.String())
		return nil
	case command == "serve":
		return portal.Serve(ctx, socket, version.String())
	case command == "connect", command == "transfer" && transfer != "":
		return portal.Connect(ctx, socket, transfer, os.Stdin, os.Stdout)
	}
	return errors.New("invalid arguments; usage: msb-portal serve|connect [SOCKET], msb-portal transfer ID [SOCKET], or msb-portal version")
}
