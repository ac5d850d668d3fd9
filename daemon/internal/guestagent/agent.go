// Package guestagent is the first process of a microVM's guest: it boots the guest, answers Kata's
// AgentService to the shim on the host, and runs the sandbox's container.
//
// Only the command msb-agent enters here. Whatever arrives comes from the host, which owns the
// guest; whatever runs in the container is untrusted, and the agent takes nothing from it but bytes
// of its streams and its exit status.
//
// The same binary is the first program of each process in the container: a re-executed child
// prepares itself (child.go) and then becomes the user's program.
package guestagent

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
)

// Main is the whole program. It never returns.
func Main() {
	if os.Args[0] == childName {
		childMain()
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "msb-agent is the init of a microVM's guest: it runs as PID 1 only")
		os.Exit(2)
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil)) // the console
	log.Error("guest stops", "err", run(log))            // it runs until something fails
	powerOff()
}

func run(log *slog.Logger) error {
	if err := mountSystem(); err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	if err := bringUp(log); err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	a := newAgent(log)
	sigchld := make(chan os.Signal, 1)
	signal.Notify(sigchld, unix.SIGCHLD)
	go a.reaper.run(sigchld)

	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(a.intercept))
	if err != nil {
		return err
	}
	pb.RegisterAgentServiceService(server, a)
	pb.RegisterHealthService(server, health{})
	return serve(server, log)
}

// serve answers on every channel that leads to the host, and returns when none does.
func serve(server *ttrpc.Server, log *slog.Logger) error {
	listeners, err := hostListeners()
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	for _, l := range listeners {
		wg.Go(func() {
			if err := server.Serve(context.Background(), l); err != nil {
				log.Error("channel to the host ended", "channel", l.Addr().String(), "err", err)
			}
		})
	}
	wg.Wait()
	return fmt.Errorf("no channel to the host is left")
}

// agent holds the guest's state and answers AgentService.
type agent struct {
	log      *slog.Logger
	reaper   *reaper
	storages *storages
	oom      chan string

	mu         sync.Mutex
	containers map[string]*container
	// changing serializes what makes and removes containers.
	changing sync.Mutex
}

func newAgent(log *slog.Logger) *agent {
	return &agent{
		log:        log,
		reaper:     &reaper{children: make(map[int]func(unix.WaitStatus))},
		storages:   &storages{users: make(map[string]int)},
		oom:        make(chan string, 64),
		containers: make(map[string]*container),
	}
}

// powerOff ends the guest. A VM that the host lost track of must not outlive its use.
func powerOff() {
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	for {
		time.Sleep(time.Hour) // returning would panic the kernel
	}
}
