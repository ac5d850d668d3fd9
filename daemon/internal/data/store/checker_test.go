package store_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/data/store"
)

// If the process of the check is killed, for example by the OOM killer, the store is not reported as damaged.
func TestKilledCheckIsNotDamage(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	s, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// The check waits while another process has locked the file.
	file, err := os.OpenFile(filepath.Join(dir, "msb.db"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	opened := make(chan error, 1)
	go func() {
		s, err := store.Open(dir)
		if err == nil {
			s.Close()
		}
		opened <- err
	}()
	pid := 0
	for pid == 0 {
		select {
		case err := <-opened:
			t.Fatalf("Open returned without a check: %v", err)
		case <-time.After(time.Millisecond):
			pid = checker()
		}
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := <-opened; !errdefs.IsUnavailable(err) || errdefs.IsDataLoss(err) {
		t.Errorf("Open whose check was killed: %v, want unavailable", err)
	}
	if err := unix.Flock(int(file.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	if s, err = store.Open(dir); err != nil {
		t.Fatalf("Open again: %v", err)
	}
	s.Close()
}

// checker returns the pid of the child process that checks a store, or 0 if there is none.
func checker() int {
	children, _ := filepath.Glob("/proc/self/task/*/children")
	for _, file := range children {
		pids, _ := os.ReadFile(file)
		for _, field := range bytes.Fields(pids) {
			line, _ := os.ReadFile(fmt.Sprintf("/proc/%s/cmdline", field))
			if bytes.HasPrefix(line, []byte("msbd-store-check")) {
				pid, _ := strconv.Atoi(string(field))
				return pid
			}
		}
	}
	return 0
}
