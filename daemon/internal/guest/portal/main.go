package portal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/msbd/msbd/api/version"
)

// Main is the program msb-portal.
func Main() {
	if err := runProgram(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "msb-portal:", err)
		os.Exit(1)
	}
}

func runProgram(args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	var command, transfer string
	if len(args) > 0 {
		command, args = args[0], args[1:]
	}
	if command == "transfer" && len(args) > 0 {
		transfer, args = args[0], args[1:]
	}
	socket := Socket
	if len(args) > 0 {
		socket, args = args[0], args[1:]
	}
	switch {
	case len(args) > 0:
	case command == "version":
		fmt.Println(version.String())
		return nil
	case command == "serve":
		return Serve(ctx, socket, version.String())
	case command == "connect", command == "transfer" && transfer != "":
		return Connect(ctx, socket, transfer, os.Stdin, os.Stdout)
	}
	return errors.New("invalid arguments; usage: msb-portal serve|connect [SOCKET], msb-portal transfer ID [SOCKET], or msb-portal version")
}
