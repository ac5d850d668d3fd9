// Package e2e tests the system from the outside, as its users see it: the built programs, a real containerd, real
// microVMs, HTTP and the command line. It uses no internals of the daemon.
//
// With MSB_E2E_HYPERVISOR=kata or MSB_E2E_HYPERVISOR=builtin the tests run on KVM with that hypervisor; otherwise each
// server chooses its hypervisor and accelerator. MSB_E2E_PATIENCE=N is for machines that are N times slower than most:
// it multiplies every time limit by N.
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

// bin is the directory of the programs, guest files and images under test. `make build guest base-images` creates them.
var bin = func() string {
	dir, err := os.Getwd()
	if err != nil {
		panic(err)
	}
	return filepath.Join(dir, "..", "..", "bin")
}()

// root is the root directory of the checkout.
var root = filepath.Dir(bin)

// hypervisorSettings are the msbd settings that select the hypervisor and accelerator of every server under test. It is
// nil if each server chooses for itself.
var hypervisorSettings = func() map[string]string {
	if hypervisor := os.Getenv("MSB_E2E_HYPERVISOR"); hypervisor != "" {
		return map[string]string{"hypervisor": hypervisor, "accelerator": "kvm"}
	}
	return nil
}()

// patience multiplies every time limit, for slow machines. It is set by MSB_E2E_PATIENCE.
var patience = func() time.Duration {
	n, err := strconv.Atoi(cmp.Or(os.Getenv("MSB_E2E_PATIENCE"), "1"))
	if err != nil || n < 1 {
		panic("MSB_E2E_PATIENCE must be an integer of at least 1")
	}
	return time.Duration(n)
}()

// hung is the time after which a test that still waits for something fails. It is long, because a busy machine may need a
// minute for the start of a sandbox.
var hung = patience * 3 * time.Minute

// until polls ok, a condition outside of this process, until it holds. It fails the test if that takes too long. what
// says in the failure message what the test waited for.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	if !poll(hung, ok) {
		t.Fatalf("still waiting after %s for %s", hung, strings.TrimSpace(what))
	}
}

// poll calls ok until it is true, or until the limit. It reports whether it was true.
func poll(limit time.Duration, ok func() bool) bool {
	for deadline := time.Now().Add(limit); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

func TestMain(m *testing.M) {
	for _, f := range []string{"msb", "msbd", "containerd", "containerd-shim-kata-v2", "guest/vmlinux", "guest/initrd.img", "images/python.tar", "images/node.tar"} {
		if _, err := os.Stat(filepath.Join(bin, f)); err != nil {
			fmt.Fprintf(os.Stderr, "%s is missing: run `make build guest base-images` first\n", f)
			os.Exit(1)
		}
	}
	var err error
	// Keep the path short: the path of a Unix socket below it may have 107 bytes at most.
	if serversDir, err = os.MkdirTemp("", "msb"); err != nil {
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
