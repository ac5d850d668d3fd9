package agent

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
)

const (
	// bootList names the modules that every guest loads, one path on each line.
	bootList = "/lib/modules/load"
	// demandList names those that wait until the host asks for what they drive: a module and the
	// paths to load for it, in order, on each line.
	demandList = "/lib/modules/demand"
)

// loadModules loads what the image lists, in its order. Only the list itself must be there: a
// machine without, say, a network works without its driver.
func loadModules(log *slog.Logger) error {
	list, err := os.ReadFile(bootList)
	if err != nil {
		return err
	}
	for path := range strings.FieldsSeq(string(list)) {
		if err := loadModule(path, ""); err != nil {
			log.Warn("load module", "path", path, "err", err)
		}
	}
	return nil
}

// needModule loads a module that the image carries for whoever asks, after those that it needs.
func needModule(name, parameters string) error {
	if _, err := os.Stat("/sys/module/" + name); err == nil {
		return nil
	}
	list, err := os.ReadFile(demandList)
	if err != nil {
		return err
	}
	paths := demandedPaths(string(list), name)
	if paths == nil {
		return fmt.Errorf("kernel module %s is not in this guest: %w", name, errdefs.ErrNotFound)
	}
	for i, path := range paths {
		own := ""
		if i == len(paths)-1 {
			own = parameters
		}
		if err := loadModule(path, own); err != nil {
			return fmt.Errorf("load %s: %w", path, err)
		}
	}
	return nil
}

// demandedPaths returns what a list such as demandList says of a module.
func demandedPaths(list, name string) []string {
	for line := range strings.Lines(list) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == name {
			return f[1:]
		}
	}
	return nil
}

func loadModule(path, parameters string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), parameters, 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

// loadRequested loads the modules that the host's configuration names.
func loadRequested(modules []*pb.KernelModule) error {
	for _, m := range modules {
		name := strings.ReplaceAll(m.GetName(), "-", "_")
		if err := validateID("kernel module", name); err != nil {
			return err
		}
		if err := needModule(name, strings.Join(m.GetParameters(), " ")); err != nil {
			return err
		}
	}
	return nil
}
