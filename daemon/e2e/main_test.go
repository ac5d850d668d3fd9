// Package e2e tests the whole system as its users meet it: the built programs, a real containerd,
// real microVMs, HTTP and the command line. Nothing here reaches into the daemon.
//
// The same tests run on every route: MSB_E2E_HYPERVISOR=kata or =builtin has them run on KVM with that
// hypervisor; without it each server chooses. MSB_E2E_PATIENCE=N is for machines that are N times slower
// than most: every limit on waiting is as many times longer.
package e2e

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// bin is where `make build guest images` leaves what is tested.
var bin = func() string {
	dir, err := os.Getwd()
	if err != nil {
		panic(err)
	}
	return filepath.Join(dir, "..", "..", "bin")
}()

// root is the checkout.
var root = filepath.Dir(bin)

// route is what the servers are told to run sandboxes on, in msbd's settings.
var route = func() map[string]string {
	if hypervisor := os.Getenv("MSB_E2E_HYPERVISOR"); hypervisor != "" {
		return map[string]string{"hypervisor": hypervisor, "accelerator": "kvm"}
	}
	return nil
}()

// patience is how many times longer than on most machines everything may take.
var patience = func() time.Duration {
	n, err := strconv.Atoi(cmp.Or(os.Getenv("MSB_E2E_PATIENCE"), "1"))
	if err != nil || n < 1 {
		panic("MSB_E2E_PATIENCE must be a whole number from 1 on")
	}
	return time.Duration(n)
}()

// until waits for a condition outside of this process.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	limit := patience * time.Minute
	for deadline := time.Now().Add(limit); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited %s for %s", limit, strings.TrimSpace(what))
		}
	}
}

func TestMain(m *testing.M) {
	for _, f := range []string{"msb", "msbd", "containerd", "containerd-shim-kata-v2", "guest/vmlinux", "guest/initrd.img", "images/python.tar", "images/node.tar"} {
		if _, err := os.Stat(filepath.Join(bin, f)); err != nil {
			fmt.Fprintf(os.Stderr, "%s is missing: run `make build guest images` first\n", f)
			os.Exit(1)
		}
	}
	var err error
	if serversDir, err = os.MkdirTemp("", "msb"); err != nil { // short, because Unix sockets lie below it
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	if err := errors.Join(closeShared(), os.RemoveAll(serversDir)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}
