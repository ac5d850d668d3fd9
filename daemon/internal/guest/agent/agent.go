// Package agent is the guest agent, the first process (PID 1) of a microVM's guest. It boots the guest, serves Kata's
// AgentService to the shim on the host, and runs the sandbox's container.
//
// Only the command msb-agent imports this package.
//
// Requests come from the host, which the agent trusts. The programs in a container are not trusted. The agent accepts
// only their output and their exit status.
//
// The packages below this one form layers. The first layer is refusal, the second is mount, devices and
// channel, the third is network, storage, gate and control, and the last is container. A package imports only packages of
// earlier layers.
//
// Each process in a container starts as this same binary (see package container).
package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/guest/agent/channel"
	"github.com/msbd/msbd/daemon/internal/guest/agent/container"
	"github.com/msbd/msbd/daemon/internal/guest/agent/control"
	"github.com/msbd/msbd/daemon/internal/guest/agent/gate"
	"github.com/msbd/msbd/daemon/internal/guest/agent/network"
	"github.com/msbd/msbd/daemon/internal/guest/agent/storage"
)

// initName is the name by which the kernel starts the init process.
const initName = "/init"

// RunIfInit runs the agent if this process is the guest's init process. If it is the child that prepares a container's process, it
// runs that (see container.RunIfChild). In both cases it never returns. Otherwise it does nothing. It must be called first in main.
func RunIfInit() {
	container.RunIfChild()
	if os.Getpid() != 1 || os.Args[0] != initName {
		return
	}
	err := run()
	slog.New(slog.NewTextHandler(os.Stderr, nil)).Error("agent failed, powering off", "err", err)
	powerOff()
}

// run boots the guest and serves requests. It returns only on an error.
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
		log.Info("kernel parameter ignored", "parameter", w)
	}
	linked, err := network.SetUpLink()
	if err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	a := newAgent(log)
	if linked {
		if err := a.openGate(); err != nil {
			return fmt.Errorf("boot: %w", err)
		}
	}
	listeners, hangUp, err := channel.Listen()
	if err != nil {
		return err
	}
	a.hangUp = hangUp
	sigchld := make(chan os.Signal, 1)
	signal.Notify(sigchld, unix.SIGCHLD)
	go a.reaper.Run(sigchld)
	go a.powerOffOnSignal()
	go control.Serve(log, a)

	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(a.intercept))
	if err != nil {
		return err
	}
	pb.RegisterAgentServiceService(server, a)
	pb.RegisterHealthService(server, health{})
	return serve(server, listeners, log)
}

// openGate accepts connections to the portal over the network interface to the host.
func (a *agent) openGate() error {
	l, err := gate.Listen()
	if err != nil {
		return fmt.Errorf("listen for connections to the portal: %w", err)
	}
	a.gate = gate.New(a.log)
	go a.gate.Serve(l)
	return nil
}

// configure returns a logger with the level that the kernel's command line sets, and a warning for each agent parameter
// on that line that the agent cannot use.
func configure() (log *slog.Logger, warnings []string, err error) {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, nil, err
	}
	level, warnings := parseCmdline(string(line))
	log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	return log, warnings, nil
}

// powerOffOnSignal stops the sandbox and powers the machine off on SIGTERM, SIGINT or SIGPWR. These signals correspond
// to the machine's power button. The agent survives all other signals. It catches them instead of ignoring them,
// because containers would inherit ignored signals.
func (a *agent) powerOffOnSignal() {
	// Have the kernel send SIGINT on Ctrl-Alt-Del instead of rebooting.
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF)
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGPWR, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE)
	for sig := range signals {
		if sig == unix.SIGTERM || sig == unix.SIGINT || sig == unix.SIGPWR {
			a.log.Info("powering off on request", "signal", sig.String())
			break
		}
	}
	time.AfterFunc(killTimeout+syncTimeout, powerOff) // in case stopSandbox hangs
	if err := a.stopSandbox(); err != nil {
		a.log.Warn("could not stop the sandbox", "err", err)
	}
	powerOff()
}

// serve serves requests on every channel to the host. It returns when all channels have ended.
func serve(server *ttrpc.Server, listeners []net.Listener, log *slog.Logger) error {
	var wg sync.WaitGroup
	for _, l := range listeners {
		wg.Go(func() {
			if err := server.Serve(context.Background(), l); err != nil {
				log.Error("channel to the host ended", "channel", l.Addr().String(), "err", err)
			}
		})
	}
	wg.Wait()
	return fmt.Errorf("all channels to the host ended")
}

// agent holds the guest's state and implements AgentService.
type agent struct {
	log      *slog.Logger
	reaper   *container.Reaper
	storages *storage.Set
	oom      chan string // ids of containers in which the kernel killed a process, for GetOOMEvent
	gate     *gate.Gate  // nil if the guest has no network interface to the host
	hangUp   func()      // ends the connection over the virtio-serial port

	mu         sync.Mutex
	containers map[string]*containerEntry // by id
	// lifecycleMu serializes the creation and removal of containers.
	lifecycleMu sync.Mutex
}

func newAgent(log *slog.Logger) *agent {
	return &agent{
		log:        log,
		reaper:     container.NewReaper(),
		storages:   storage.NewSet(),
		oom:        make(chan string, 64),
		containers: make(map[string]*containerEntry),
	}
}
