package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

const (
	// ballastName is the file that reserves disk space.
	ballastName = "ballast"
	// maxBallast is the largest size of the ballast file, in bytes.
	maxBallast = 1 << 30
	// ballastParts is the number of parts in which the ballast is released. Sandboxes that are still writing take what
	// is left of a part, so one part must not be everything.
	ballastParts = 8
)

// disk is the disk that holds the state directory. Sandboxes write to it too, so they may fill it. The ballast file
// occupies space that is released in parts when a reset of the keys, the removal of a sandbox, or a store that has used up
// the reserve of its own files, needs some. So these work even then. The file contains nothing, so it does not matter when
// a crash interrupts a change to it.
type disk struct {
	dir string

	mu    sync.Mutex // guards the ballast file and last
	space Space      // as of the last probe; the zero Space before the first one
}

// Space is the space on a disk.
type Space struct {
	// FreeBytes and FreeInodes are what is free. It does not include the ballast.
	FreeBytes, FreeInodes uint64
	// TotalBytes and TotalInodes are the size of the disk. TotalInodes is 0 if the file system has no fixed number.
	TotalBytes, TotalInodes uint64
	// Ballast is how much the ballast file occupies, in bytes.
	Ballast uint64
}

// Warning returns a warning if the disk has less space in reserve than it should, or "".
func (s Space) Warning() string {
	if s.Ballast >= s.reserve() {
		return ""
	}
	return fmt.Sprintf("only %s of %s of disk space are in reserve, so it may be impossible to stop sandboxes or to reset keys when the disk is full: "+
		"the reserve is completed when there is enough free space, on file systems that can reserve space", mib(s.Ballast), mib(s.reserve()))
}

// reserve returns the size of the ballast file in bytes: 5 % of the disk, but at most maxBallast.
func (s Space) reserve() uint64 { return min(s.TotalBytes/20, maxBallast) }

// low returns the free bytes and inodes below which no sandbox is started.
func (s Space) low() (bytes, inodes uint64) { return s.reserve() / 4, min(s.TotalInodes/100, 10_000) }

// problem returns what the disk does not have enough of, such as "1 MiB of 20 MiB are free", or "".
func (s Space) problem() string {
	bytes, inodes := s.low()
	switch {
	case s.FreeBytes < bytes:
		return fmt.Sprintf("%s of %s are free, and sandboxes are started only if at least %s are", mib(s.FreeBytes), mib(s.TotalBytes), mib(bytes))
	case s.FreeInodes < inodes:
		return fmt.Sprintf("%d of %d inodes are free, and sandboxes are started only if at least %d are", s.FreeInodes, s.TotalInodes, inodes)
	}
	return ""
}

func mib(bytes uint64) string { return fmt.Sprintf("%.1f MiB", float64(bytes)/(1<<20)) }

// Space returns the space on the disk of the state directory as of the last Probe. It does not access the disk.
func (s *Store) Space() Space {
	s.disk.mu.Lock()
	defer s.disk.mu.Unlock()
	return s.disk.space
}

// CheckSpace returns an error that wraps sandbox.ErrNoSpace if the disk has too little free space to start a sandbox, or would
// have with this many bytes more on it.
func (s *Store) CheckSpace(bytes uint64) error {
	space, err := s.disk.measure()
	if err != nil {
		return err
	}
	space.FreeBytes -= min(space.FreeBytes, bytes)
	if problem := space.problem(); problem != "" {
		return fmt.Errorf("the server's disk is almost full: %s; stop sandboxes that you do not need, or ask the server's "+
			"administrator to free space: %w", problem, sandbox.ErrNoSpace)
	}
	return nil
}

// MakeRoom releases a part of the ballast if the disk is full. It reports whether it released some, so that it is worth
// trying again what has failed.
func (s *Store) MakeRoom() bool {
	space, err := s.disk.measure()
	if err != nil {
		return false
	}
	low, _ := space.low()
	return space.FreeBytes < low && s.disk.release()
}

// measure asks the file system.
func (d *disk) measure() (Space, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(d.dir, &st); err != nil {
		return Space{}, fmt.Errorf("measure the free space of %s: %w", d.dir, err)
	}
	size := uint64(st.Frsize)
	return Space{FreeBytes: st.Bavail * size, TotalBytes: st.Blocks * size, FreeInodes: st.Ffree, TotalInodes: st.Files}, nil
}

// health returns why the disk of the state directory has too little free space, as of the last probe, or nil.
func (d *disk) health() error {
	d.mu.Lock()
	problem := d.space.problem()
	d.mu.Unlock()
	if problem == "" {
		return nil
	}
	return fmt.Errorf("the disk of %s is almost full: %s. Stop sandboxes ('msb server list' shows them) or delete files", d.dir, problem)
}

// probe measures the free space, and reserves the ballast if there is room for it.
func (d *disk) probe() error {
	space, err := d.measure()
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.refill(space) {
		if space, err = d.measure(); err != nil {
			return err
		}
	}
	if f, allocated, err := d.open(0); err == nil {
		space.Ballast = allocated
		f.Close()
	}
	d.space = space
	return nil
}

// refill reserves the ballast if that leaves twice as much free space as a start needs, and reports whether it did. A
// file system that cannot reserve space has no ballast.
func (d *disk) refill(space Space) bool {
	f, allocated, err := d.open(os.O_CREATE)
	if err != nil {
		return false // the directory cannot be written, which the store finds as well
	}
	defer f.Close()
	low, _ := space.low()
	if allocated >= space.reserve() || space.FreeBytes < space.reserve()-allocated+2*low {
		return false
	}
	return unix.Fallocate(int(f.Fd()), 0, 0, int64(space.reserve())) == nil
}

// release frees a part of the ballast, and reports whether there was any.
func (d *disk) release() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	f, allocated, err := d.open(0)
	if err != nil {
		return false
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || allocated == 0 || info.Size() == 0 { // some file systems allocate blocks even for an empty file
		return false
	}
	// A part has at least 1 MiB, because less than that is of no use.
	part := max(uint64(info.Size())/ballastParts, d.space.reserve()/ballastParts, 1<<20)
	if err := f.Truncate(max(0, info.Size()-int64(part))); err != nil {
		return false
	}
	_ = f.Sync() // file systems with a journal free the space only when the journal is committed
	return true
}

// open opens the ballast file and returns how many bytes of the disk it occupies.
func (d *disk) open(flags int) (f *os.File, allocated uint64, err error) {
	f, err = os.OpenFile(filepath.Join(d.dir, ballastName), flags|os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, 0, err
	}
	var st unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &st)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = &fs.PathError{Op: "open", Path: f.Name(), Err: errors.New("it is not a regular file")}
	}
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, uint64(st.Blocks) * 512, nil
}
