package store

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// bbolt trusts the form of its file: if a disk damaged it, bbolt panics, also in goroutines of its own,
// reads beyond its mapping, or writes over pages that are in use. So bbolt's own check runs first, in a
// process that may die of it: this program, executed again. checkPages and walk add what bbolt's check
// leaves out. They say nothing of the values, which have checksums.
const (
	// checkerName is the zeroth argument of the child process.
	checkerName = "msbd-store-check"
	// checkerFD is where the child finds the file: the first of exec.Cmd's ExtraFiles.
	checkerFD = 3
	// checkerLimit is far beyond what the check of any store takes.
	checkerLimit = 2 * time.Minute
)

// The exit codes of the child. Any other, such as that of a panic, means damage.
const (
	exitIntact  = 0
	exitDamaged = 1
	exitHeld    = 3
	exitLate    = 4
	exitUnable  = 5 // the system refused something: the file was not checked
)

// MaybeCheckChild must be called first in main of every program that opens a store: Open and ReadKeys
// execute that program again, as a child process that checks a file. In such a child it does not return.
func MaybeCheckChild() {
	if os.Args[0] != checkerName {
		return
	}
	time.AfterFunc(checkerLimit, func() { os.Exit(exitLate) })
	debug.SetMaxStack(64 << 20) // a damaged tree may have no end
	code := exitIntact
	switch err := checkForm(os.NewFile(checkerFD, "store")); {
	case errors.Is(err, bbolt.ErrTimeout):
		code = exitHeld
	case err != nil:
		fmt.Fprintln(os.Stderr, err)
		code = exitDamaged
		if _, refused := errors.AsType[unix.Errno](err); refused {
			code = exitUnable
		}
	}
	unix.Exit(code) // os.Exit takes a second under the race detector
}

// checkFile checks the form of a bbolt file in a child process. A damaged file is errdefs.ErrDataLoss, a
// file that another process holds bbolt.ErrTimeout.
func checkFile(path string) error {
	if os.Args[0] == checkerName {
		panic("store: main does not call MaybeCheckChild first") // else there would be no end of children
	}
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	said, err := unix.MemfdCreate(checkerName, unix.MFD_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("memfd_create", err)
	}
	stderr := os.NewFile(uintptr(said), checkerName)
	defer stderr.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{checkerName}
	cmd.Env = []string{"GOTRACEBACK=none"}
	cmd.ExtraFiles = []*os.File{file}
	cmd.Stderr = stderr
	// It gets no signal that is for this process, and does not outlive it: it holds the file's lock.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // Pdeathsig is about the thread
	err = cmd.Run()
	runtime.UnlockOSThread()
	exit, exited := errors.AsType[*exec.ExitError](err)
	switch {
	case err == nil:
		return nil
	case !exited:
		return fmt.Errorf("check store %s in a child process: %w: %w", path, err, errdefs.ErrUnavailable)
	case exit.ExitCode() == exitHeld:
		return bbolt.ErrTimeout
	case exit.ExitCode() == exitLate:
		return fmt.Errorf("its check takes more than %v: %w", checkerLimit, errdefs.ErrUnavailable)
	}
	text, _ := io.ReadAll(io.NewSectionReader(stderr, 0, 1<<10))
	what, _, _ := strings.Cut(string(text), "\n")
	// Go turns the faults that damage causes into a panic: a signal came from outside, such as from the OOM killer.
	if status, _ := exit.Sys().(syscall.WaitStatus); status.Signaled() || exit.ExitCode() == exitUnable || strings.Contains(what, "out of memory") {
		return fmt.Errorf("check store %s: the check did not end (%.200s), so that nothing is known of the file; start msbd again: %w",
			path, cmp.Or(what, exit.Error()), errdefs.ErrUnavailable)
	}
	return fmt.Errorf("%.200s: %w", cmp.Or(what, exit.Error()), errdefs.ErrDataLoss)
}

// checkForm checks the form of a bbolt file, which it only reads. On a damaged one it may panic or fault.
func checkForm(file *os.File) error {
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if info.Size() == 0 {
		return errors.New("it is empty") // bbolt would make a store of it
	}
	// bbolt counts free pages only in a database that it may write. It cannot: the file is open for reading.
	db, err := bbolt.Open(file.Name(), 0, &bbolt.Options{
		Timeout:  openTimeout,
		OpenFile: func(string, int, fs.FileMode) (*os.File, error) { return file, nil },
	})
	if err != nil {
		return err
	}
	tx, err := db.Begin(true)
	if err != nil {
		return err
	}
	if tx.Size() > info.Size() {
		return fmt.Errorf("%d bytes are not %d: cut off", info.Size(), tx.Size())
	}
	free, err := checkPages(file, tx, db.Info().PageSize)
	if err != nil {
		return err
	}
	for err := range tx.Check() {
		return err // the first; the rest of the check ends with the process
	}
	if err := tx.ForEach(walk); err != nil {
		return err
	}
	if err := tx.Rollback(); err != nil {
		return err
	}
	// tx.Check takes a list of free pages for good that names pages beyond the end.
	if stats := db.Stats(); stats.FreePageN+stats.PendingPageN != free {
		return fmt.Errorf("%d pages are listed as free, of which %d exist", stats.FreePageN+stats.PendingPageN, free)
	}
	return db.Close()
}

// checkPages checks what tx.Check takes for granted: that no page overflows into more pages than there are,
// and that what is on a page lies within it. It returns how many pages are free.
func checkPages(file io.ReaderAt, tx *bbolt.Tx, pageSize int) (free int, err error) {
	n := int(tx.Size() / int64(pageSize))
	for id := 2; id < n; id++ {
		page, err := tx.Page(id)
		if err != nil {
			return 0, err
		}
		switch {
		case page.Type == "free":
			free++
			continue
		case page.OverflowCount >= n-id:
			return 0, fmt.Errorf("page %d: %d pages long, behind the end", id, page.OverflowCount+1)
		case page.Type == "branch" || page.Type == "leaf":
			content := make([]byte, (1+page.OverflowCount)*pageSize)
			if _, err := file.ReadAt(content, int64(id*pageSize)); err != nil {
				return 0, err
			}
			if err := checkElements(content); err != nil {
				return 0, fmt.Errorf("page %d: %w", id, err)
			}
		}
		id += page.OverflowCount
	}
	return free, nil
}

// checkElements checks that the elements of a branch or leaf page lie within it. A page begins with a
// header: id uint64, flags, count uint16, overflow uint32. Elements of one size follow, and then their keys
// and values, to which they point. The value of a small bucket is a leaf page in itself.
func checkElements(page []byte) error {
	const (
		headerSize  = 16
		elementSize = 16
		branch      = 1 // of the flags of a page
		leaf        = 2
		bucket      = 1 // of the flags of an element
		bucketSize  = 16
	)
	order := binary.NativeEndian
	if len(page) < headerSize {
		return errors.New("too short for a page")
	}
	flags, count := order.Uint16(page[8:]), int(order.Uint16(page[10:]))
	elementsEnd := headerSize + count*elementSize
	if flags != branch && flags != leaf || elementsEnd > len(page) {
		return fmt.Errorf("of type %#x with %d elements", flags, count)
	}
	for i := range count {
		at := headerSize + i*elementSize
		element := page[at : at+elementSize]
		isBucket := false
		if flags == leaf {
			isBucket = order.Uint32(element) == bucket
			element = element[4:]
		}
		key := uint64(at) + uint64(order.Uint32(element)) // an element points from where it lies
		value := key + uint64(order.Uint32(element[4:]))
		end := value
		if flags == leaf {
			end += uint64(order.Uint32(element[8:]))
		}
		if key < uint64(elementsEnd) || key == value || end > uint64(len(page)) {
			return fmt.Errorf("element %d is not within the page", i)
		}
		if !isBucket {
			continue
		}
		if end-value < bucketSize {
			return fmt.Errorf("element %d is too short for a bucket", i)
		}
		if root := order.Uint64(page[value:]); root == 0 {
			if err := checkElements(page[value+bucketSize : end]); err != nil {
				return fmt.Errorf("element %d: %w", i, err)
			}
		}
	}
	return nil
}

// walk checks the order of a bucket's keys: tx.Check does not look into small buckets. A bucket of ours holds
// no other bucket.
func walk(name []byte, b *bbolt.Bucket) error {
	if b == nil {
		return fmt.Errorf("%q is no bucket", name)
	}
	var last []byte
	return b.ForEach(func(key, value []byte) error {
		if value == nil {
			return fmt.Errorf("bucket %q: %q is a bucket", name, key)
		}
		if bytes.Compare(last, key) >= 0 {
			return fmt.Errorf("bucket %q: key %q is out of order", name, key)
		}
		last = key
		return nil
	})
}

// lostState reports whether bbolt opened the file as of the transaction before the last one. bbolt writes
// the state after a transaction to page 0 or 1, by turns. If the checksum of one is wrong, it takes that
// for a transaction that a crash cut short, and uses the other.
func lostState(path string, pageSize int) (bool, error) {
	const headerSize, contentSize = 16, 56 // the checksum follows
	file, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer file.Close()
	for id := range 2 {
		var page [headerSize + contentSize + 8]byte
		if _, err := file.ReadAt(page[:], int64(id*pageSize)); err != nil {
			return false, err
		}
		sum := fnv.New64a()
		sum.Write(page[headerSize : headerSize+contentSize])
		if sum.Sum64() != binary.NativeEndian.Uint64(page[headerSize+contentSize:]) {
			return true, nil
		}
	}
	return false, nil
}

// syncState makes the state that was read durable. If an earlier process ended because a sync failed, the
// kernel may still have that state in its cache although it is not on the disk, and would never write it
// again by itself: the next commit could then go over pages of the state that the disk has. So the pages
// that hold the state are written again, as they are. Nobody uses the database yet.
func syncState(path string, pageSize int) error {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	pages := make([]byte, 2*pageSize)
	if _, err = file.ReadAt(pages, 0); err == nil {
		_, err = file.WriteAt(pages, 0)
	}
	if err == nil {
		err = file.Sync()
	}
	return errors.Join(err, file.Close())
}
