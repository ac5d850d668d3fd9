package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/api/audit"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// smallDisk returns a directory on a file system of its own in memory.
func smallDisk(t *testing.T, options string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, because it mounts a file system")
	}
	dir := t.TempDir()
	if err := syscall.Mount("msb-test", dir, "tmpfs", 0, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fill writes to a file until the disk is full to its last byte.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 1 << 20; size > 0; {
		if _, err := f.Write(make([]byte, size)); err != nil {
			size /= 2
		}
	}
}

func probe(t *testing.T, s *Store) {
	t.Helper()
	if err := s.Probe(); err != nil {
		t.Fatal(err)
	}
}

func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// On a full disk, the store takes the space that it needs from the ballast, again and again while others fill the disk.
// When there is room, the ballast is complete again.
func TestBallast(t *testing.T) {
	t.Parallel()
	dir := smallDisk(t, "size=200m")
	path, filler := filepath.Join(dir, ballastName), filepath.Join(dir, "filler")
	s := open(t, dir)
	probe(t, s)
	if got := allocated(t, path); got != 10<<20 {
		t.Errorf("the ballast has %d bytes, want 5 %% of the disk", got)
	}
	if err := errors.Join(s.Health(), s.CheckSpace(0)); err != nil || s.Space().Warning() != "" {
		t.Errorf("on a disk with room: %v, warning %q", err, s.Space().Warning())
	}
	if s.MakeRoom() {
		t.Error("MakeRoom released ballast on a disk with room")
	}

	fill(t, filler)
	if err := s.CheckSpace(0); !errors.Is(err, sandbox.ErrNoSpace) {
		t.Errorf("CheckSpace: got error %v, want ErrNoSpace", err)
	}
	probe(t, s)
	if err := s.Health(); err == nil || !strings.Contains(err.Error(), "the disk of "+dir+" is almost full: 0.0 MiB of 200.0 MiB") {
		t.Errorf("Health: %v, want it to name the full disk", err)
	}
	// More changes than the free pages of the store and the reserved end of the log have room for.
	for range 4 {
		fill(t, filler)
		var c keys.Change
		for range 1500 {
			e := audit.Event{Action: audit.KeyRevoke, Actor: "uid:0", Detail: map[string]string{"text": strings.Repeat("x", 300)}}
			c.Events = append(c.Events, e)
		}
		commit(t, s, c)
	}
	if got := allocated(t, path); got >= 10<<20 {
		t.Errorf("the ballast still has %d bytes, so the test did not need it", got)
	}
	for n := 0; s.MakeRoom(); n++ {
		if n > ballastParts {
			t.Fatal("MakeRoom never runs out of ballast")
		}
		fill(t, filler)
	}
	if got := allocated(t, path); got != 0 {
		t.Errorf("the ballast has %d bytes after all of it was released", got)
	}
	probe(t, s)
	if warning := s.Space().Warning(); !strings.Contains(warning, "only 0.0 MiB of 10.0 MiB") {
		t.Errorf("the warning is %q, want it to say that nothing is in reserve", warning)
	}
	if got := allocated(t, path); got != 0 {
		t.Errorf("the ballast took the last %d bytes of the disk", got)
	}

	// A child process that another test is starting may still have the file open, so removing it might free nothing yet.
	if err := os.Truncate(filler, 0); err != nil {
		t.Fatal(err)
	}
	probe(t, s)
	if err := errors.Join(s.Health(), s.CheckSpace(0)); err != nil {
		t.Errorf("after space was freed: %v", err)
	}
	if got := allocated(t, path); got != 10<<20 {
		t.Errorf("the ballast has %d bytes after space was freed, want all of it", got)
	}
	// A copy of the state directory may have the file without its space.
	if err := errors.Join(os.Truncate(path, 0), os.Truncate(path, 10<<20)); err != nil {
		t.Fatal(err)
	}
	if probe(t, s); allocated(t, path) != 10<<20 {
		t.Error("the ballast occupies no space")
	}
	checkLog(t, s)
}

// While another program writes whenever there is room, the changes do not depend on the ballast: the files of the store have
// reserved the space that they need, also after a restart.
func TestChangesBesideAWriter(t *testing.T) {
	t.Parallel()
	dir := smallDisk(t, "size=200m")
	log := filepath.Join(dir, logName)
	s := open(t, dir)
	logEvents(t, s, "a", "lost")
	probe(t, s)
	// A power loss has taken the last line, so the next start writes it again. That must not free the reserve.
	if err := errors.Join(s.Close(), os.Truncate(log, s.log.published.end.Size-10)); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(log, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(allocate(f, logReserve, unix.FALLOC_FL_KEEP_SIZE), f.Close()); err != nil {
		t.Fatal(err)
	}
	filler, err := os.OpenFile(filepath.Join(dir, "filler"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	fill(t, filler.Name())
	var stop atomic.Bool
	stopped := make(chan error)
	go func() {
		for !stop.Load() {
			_, _ = filler.Write(make([]byte, 4096))
		}
		stopped <- errors.Join(filler.Truncate(0), filler.Close())
	}()
	s = open(t, dir)
	probe(t, s)
	n := 0
	change := func() {
		for range 500 {
			n++
			revoked := keyRecord("a")
			revoked.RevokedAt = moment.Add(time.Duration(n) * time.Second)
			commit(t, s, keys.Change{Put: []keys.Record{revoked}, Events: []audit.Event{{Action: audit.KeyRevoke, Actor: "uid:0", Target: "a"}}})
		}
		if got := allocated(t, filepath.Join(dir, ballastName)); got != 10<<20 {
			t.Errorf("after %d changes, the ballast has %d bytes, want all", n, got)
		}
	}
	change()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	probe(t, s)
	change()
	stop.Store(true)
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	probe(t, s)
	checkLog(t, s)
	// A sealed segment needs no reserve, and the new file has one.
	seg, err := s.SealAudit(t.Context(), "uid:0")
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(seg.Path)
	if err != nil {
		t.Fatal(err)
	}
	if sealed, current := allocated(t, seg.Path), allocated(t, log); sealed > info.Size()+4096 || current < logReserve {
		t.Errorf("a segment of %d bytes occupies %d, the current file %d; want no reserve, and at least %d", info.Size(), sealed, current, logReserve)
	}
}

// When bbolt makes the file of a small store longer for the first time, it does not cut off the reserve.
func TestSmallStoreKeepsItsReserve(t *testing.T) {
	t.Parallel()
	dir := smallDisk(t, "size=200m")
	add := func(s *Store, id string) {
		t.Helper()
		if err := addKey(s, keyRecord(id)); err != nil {
			t.Fatal(err)
		}
	}
	s := open(t, dir)
	for i := range 50 { // its size, and so bbolt's mapping, is then a power of two with free space
		add(s, fmt.Sprint("old", i))
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	probe(t, s)
	for i := range 200 {
		add(s, fmt.Sprint("new", i))
		if got := allocated(t, filepath.Join(dir, fileName)); got < storeReserve {
			t.Fatalf("after %d changes, the store's file occupies %d bytes, want at least the reserve of %d", i+1, got, storeReserve)
		}
	}
}

func TestInodesRunOut(t *testing.T) {
	t.Parallel()
	dir := smallDisk(t, "size=20m,nr_inodes=1000")
	s := open(t, dir)
	if err := addKey(s, keyRecord("a")); err != nil {
		t.Fatal(err)
	}
	probe(t, s)
	for n := 0; ; n++ {
		if err := os.Symlink("x", filepath.Join(dir, fmt.Sprint("link-", n))); errors.Is(err, unix.ENOSPC) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	probe(t, s)
	if err := s.Health(); err == nil || !strings.Contains(err.Error(), "0 of 1000 inodes") {
		t.Errorf("Health: %v, want it to name the inodes", err)
	}
	if err := s.CheckSpace(0); !errors.Is(err, sandbox.ErrNoSpace) {
		t.Errorf("CheckSpace: got error %v, want ErrNoSpace", err)
	}
	revoked := keyRecord("a")
	revoked.RevokedAt = moment
	commit(t, s, keys.Change{Put: []keys.Record{revoked}, Events: []audit.Event{{Action: audit.KeyRevoke, Target: "a"}}})
	checkRecords(t, s, revoked)
}

func checkRecords(t *testing.T, s *Store, want ...keys.Record) {
	t.Helper()
	if got := loaded(t, s).Records; len(got) != len(want) || got[0].RevokedAt != want[0].RevokedAt {
		t.Errorf("the store has %v, want %v", got, want)
	}
}

// Health reports what is known and does not access the disk.
func TestHealthDoesNotTryToWrite(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path, aside := filepath.Join(dir, logName), filepath.Join(dir, "aside")
	s := open(t, dir)
	logEvents(t, s, "a")
	if err := errors.Join(os.Rename(path, aside), os.Mkdir(path, 0o700)); err != nil {
		t.Fatal(err)
	}
	if err := addKey(s, keyRecord("new")); err == nil {
		t.Fatal("a change that cannot be logged was made")
	}
	if err := errors.Join(os.Remove(path), os.Rename(aside, path)); err != nil {
		t.Fatal(err)
	}
	if err := s.Health(); !errdefs.IsUnavailable(err) {
		t.Errorf("Health: %v, want the last error", err)
	}
	probe(t, s)
	if err := s.Health(); err != nil {
		t.Errorf("Health after a probe: %v", err)
	}
}

// While the disk hangs, Health says so and does not wait.
func TestHealthOfAHungDisk(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir())
	hang, done := make(chan struct{}), make(chan error)
	go func() {
		done <- s.writes.update(func(*change) error { <-hang; return nil })
	}()
	for s.Health() == nil { // make the commit older as soon as it runs
		s.writes.mu.Lock()
		if !s.writes.busy.IsZero() {
			s.writes.busy = s.writes.busy.Add(-2 * slow)
		}
		s.writes.mu.Unlock()
	}
	if err := s.Health(); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "waited for the disk") {
		t.Errorf("Health: %v, want it to say that the disk hangs", err)
	}
	probe(t, s) // does not wait for the writer either
	close(hang)
	if err := errors.Join(<-done, s.Health()); err != nil {
		t.Error(err)
	}
}

// A store that was removed or replaced is not written, because the next start would not find the changes.
func TestReplacedStore(t *testing.T) {
	t.Parallel()
	for name, replace := range map[string]func(path string) error{
		"removed": func(string) error { return nil },
		"replaced": func(path string) error {
			copied, err := os.ReadFile(path + ".aside")
			return errors.Join(err, os.WriteFile(path, copied, 0o600))
		},
		"symbolic link": func(path string) error { return os.Symlink(path+".aside", path) },
	} {
		for _, byProbe := range []bool{true, false} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				path := filepath.Join(dir, fileName)
				s := open(t, dir)
				if err := os.Rename(path, path+".aside"); err != nil {
					t.Fatal(err)
				}
				if err := replace(path); err != nil {
					t.Fatal(err)
				}
				if byProbe {
					probe(t, s)
				} else if err := addKey(s, keyRecord("a")); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), path) {
					t.Errorf("change: got error %v, want unavailable naming the file", err)
				}
				if err := s.Health(); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "removed or replaced") {
					t.Errorf("Health: %v, want it to say what happened", err)
				}
				if err := os.Rename(path+".aside", path); err != nil {
					t.Fatal(err)
				}
				probe(t, s)
				if err := errors.Join(s.Health(), addKey(s, keyRecord("a"))); err != nil {
					t.Errorf("after the file was put back: %v", err)
				}
			})
		}
	}
}

// Run probes and seals the audit log until its context ends.
func TestRun(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir())
	logEvents(t, s, "a", "b")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Run(ctx, 300, slog.New(slog.DiscardHandler)) }()
	for deadline := time.Now().Add(time.Minute); s.Space().TotalBytes == 0 || len(s.AuditSegments()) == 0; {
		if time.Now().After(deadline) {
			t.Fatal("Run does not probe, or does not seal the audit log")
		}
		runtime.Gosched()
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Run ends with its context even if another writer waits for a disk that hangs.
func TestRunEndsWhileAWriterHangs(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir())
	logEvents(t, s, "a")
	if err := s.writes.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer s.writes.end()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error)
	go func() { done <- s.Run(ctx, 0, slog.New(slog.DiscardHandler)) }()
	deadline := time.After(time.Minute)
	for s.Space().TotalBytes == 0 { // next, Run settles the audit log
		select {
		case <-deadline:
			t.Fatal("Run does not probe")
		default:
			runtime.Gosched()
		}
	}
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-deadline:
		t.Error("Run does not end")
	}
}
