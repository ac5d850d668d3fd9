// Package agent is the first process of a microVM's guest: it boots the guest, answers Kata's
// AgentService to the shim on the host, and runs the sandbox's container.
//
// Only the command msb-agent imports this package. Requests come from the host, which owns the guest.
// What runs in a container is untrusted: the agent takes nothing from it but its output and its exit
// status.
//
// The packages below import each other in this direction only: refusal; mount, devices and channel;
// network and storage; container.
//
// The same binary is the first program of each process in the container (see package container).
package agent

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

	"github.com/msbd/msbd/daemon/internal/guest/agent/channel"
	"github.com/msbd/msbd/daemon/internal/guest/agent/container"
	"github.com/msbd/msbd/daemon/internal/guest/agent/storage"
)

// Main is the whole program. It never returns.
func Main() {
	container.RunIfChild()
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "msb-agent is the init of a microVM's guest: it runs as PID 1 only")
		os.Exit(2)
	}
	err := run() // until something fails
	slog.New(slog.NewTextHandler(os.Stderr, nil)).Error("guest stops", "err", err)
	powerOff()
}

func run() error {
	if err := mountSystem(); err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	log, warnings, err := configure()
	if err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	if err := bringUp(log); err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	for _, w := range warnings {
		log.Info("kernel parameter is ignored", "parameter", w)
	}
	a := newAgent(log)
	sigchld := make(chan os.Signal, 1)
	signal.Notify(sigchld, unix.SIGCHLD)
	go a.reaper.Run(sigchld)
	go a.endOnSignal()

	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(a.intercept))
	if err != nil {
		return err
	}
	pb.RegisterAgentServiceService(server, a)
	pb.RegisterHealthService(server, health{})
	return serve(server, log)
}

// configure returns the agent's log, at the level that the kernel's command line asks for, and what the agent
// cannot use of that line.
func configure() (log *slog.Logger, warnings []string, err error) {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, nil, err
	}
	level, warnings := parseCmdline(string(line))
	log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	return log, warnings, nil
}

// endOnSignal ends the sandbox when a signal stands for the machine's power button. No other signal ends
// PID 1. They are caught rather than ignored: the containers would inherit ignored signals.
func (a *agent) endOnSignal() {
	// The kernel turns Ctrl-Alt-Del into SIGINT, where it would reboot.
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF)
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGPWR, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE)
	for sig := range signals {
		if sig == unix.SIGTERM || sig == unix.SIGINT || sig == unix.SIGPWR {
			a.log.Info("the machine is asked to stop", "signal", sig.String())
			break
		}
	}
	time.AfterFunc(killLimit+syncLimit, powerOff) // whatever hangs
	if err := a.endSandbox(); err != nil {
		a.log.Warn("end the sandbox", "err", err)
	}
	powerOff()
}

// serve answers on every channel that leads to the host, and returns when none does.
func serve(server *ttrpc.Server, log *slog.Logger) error {
	listeners, err := channel.Listen()
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
	reaper   *container.Reaper
	storages *storage.Set
	oom      chan string

	mu         sync.Mutex
	containers map[string]*member
	// changing serializes what makes and removes containers.
	changing sync.Mutex
}

func newAgent(log *slog.Logger) *agent {
	return &agent{
		log:        log,
		reaper:     container.NewReaper(),
		storages:   storage.NewSet(),
		oom:        make(chan string, 64),
		containers: make(map[string]*member),
	}
}
