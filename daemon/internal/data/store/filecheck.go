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

// bbolt trusts the structure of its file. If a disk damaged the structure, bbolt may panic (also in its own goroutines),
// read beyond its mapping, or overwrite pages that are in use. So bbolt's check runs first, in a child process that may
// crash: this program, executed again. checkPages and checkKeys check what bbolt's check omits. None of them checks the
// values, which have checksums.
const (
	// checkerName is os.Args[0] of the child process.
	checkerName = "msbd-store-check"
	// checkerFD is the child's descriptor of the file: the first of exec.Cmd's ExtraFiles.
	checkerFD = 3
	// checkerLimit bounds the time of a check. It is much longer than the check of any store takes.
	checkerLimit = 2 * time.Minute
)

// The exit codes of the child. Any other, such as the one of a panic, means that the file is damaged.
const (
	exitIntact  = 0
	exitDamaged = 1
	exitLocked  = 3
	exitTimeout = 4
	exitUnable  = 5 // a system call failed, so the file was not checked
)

// RunCheckIfChild must be the first call in main of every program that opens a store. Open and ReadKeys execute the
// program again, as a child process that checks a file. In that child, RunCheckIfChild does not return.
func RunCheckIfChild() {
	if os.Args[0] != checkerName {
		return
	}
	time.AfterFunc(checkerLimit, func() { os.Exit(exitTimeout) })
	debug.SetMaxStack(64 << 20) // a damaged tree may have a cycle
	code := exitIntact
	switch err := checkStructure(os.NewFile(checkerFD, "store")); {
	case errors.Is(err, bbolt.ErrTimeout):
		code = exitLocked
	case err != nil:
		fmt.Fprintln(os.Stderr, err)
		code = exitDamaged
		if _, refused := errors.AsType[unix.Errno](err); refused {
			code = exitUnable
		}
	}
	unix.Exit(code) // os.Exit takes a second under the race detector
}

// checkFile checks the structure of a bbolt file in a child process. It returns errdefs.ErrDataLoss if the file is
// damaged, and bbolt.ErrTimeout if another process has locked it.
func checkFile(path string) error {
	if os.Args[0] == checkerName {
		panic("store: main does not call RunCheckIfChild first") // without this, each child would start another
	}
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	fd, err := unix.MemfdCreate(checkerName, unix.MFD_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("memfd_create", err)
	}
	stderr := os.NewFile(uintptr(fd), checkerName)
	defer stderr.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{checkerName}
	cmd.Env = []string{"GOTRACEBACK=none"}
	cmd.ExtraFiles = []*os.File{file}
	cmd.Stderr = stderr
	// The child must not receive signals for this process group. It must not outlive this process, because it holds
	// the file's lock.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // the kernel sends Pdeathsig when the thread that started the child ends
	err = cmd.Run()
	runtime.UnlockOSThread()
	exit, exited := errors.AsType[*exec.ExitError](err)
	switch {
	case err == nil:
		return nil
	case !exited:
		return fmt.Errorf("check store %s in a child process: %w: %w", path, err, errdefs.ErrUnavailable)
	case exit.ExitCode() == exitLocked:
		return bbolt.ErrTimeout
	case exit.ExitCode() == exitTimeout:
		return fmt.Errorf("the check of the file took more than %v: %w", checkerLimit, errdefs.ErrUnavailable)
	}
	text, _ := io.ReadAll(io.NewSectionReader(stderr, 0, 1<<10))
	message, _, _ := strings.Cut(string(text), "\n")
	// Go turns the memory faults that damage causes into a panic. So a signal came from outside, such as from the OOM
	// killer.
	if status, _ := exit.Sys().(syscall.WaitStatus); status.Signaled() || exit.ExitCode() == exitUnable || strings.Contains(message, "out of memory") {
		return fmt.Errorf("check store %s: the check did not complete (%.200s), so the file may be intact; start msbd again: %w",
			path, cmp.Or(message, exit.Error()), errdefs.ErrUnavailable)
	}
	return fmt.Errorf("%.200s: %w", cmp.Or(message, exit.Error()), errdefs.ErrDataLoss)
}

// checkStructure checks the structure of a bbolt file without writing to it. On a damaged file it may panic or fault.
func checkStructure(file *os.File) error {
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if info.Size() == 0 {
		return errors.New("it is empty") // bbolt would initialize it as a new database
	}
	// Open it for writing, because bbolt loads the list of free pages only then. It cannot change the file, whose
	// descriptor is read-only.
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
		return fmt.Errorf("it is truncated: it has %d of %d bytes", info.Size(), tx.Size())
	}
	free, err := checkPages(file, tx, db.Info().PageSize)
	if err != nil {
		return err
	}
	for err := range tx.Check() {
		return err // the first error; the goroutine of the check ends with the process
	}
	if err := tx.ForEach(checkKeys); err != nil {
		return err
	}
	if err := tx.Rollback(); err != nil {
		return err
	}
	// tx.Check does not notice a list of free pages that names pages beyond the end of the file.
	if stats := db.Stats(); stats.FreePageN+stats.PendingPageN != free {
		return fmt.Errorf("%d pages are listed as free, of which %d exist", stats.FreePageN+stats.PendingPageN, free)
	}
	return db.Close()
}

// checkPages checks what tx.Check assumes: that no page overflows into more pages than the file has, and that the
// elements of a page lie within it. It returns the number of free pages.
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
			return 0, fmt.Errorf("page %d: %d pages long, which is beyond the end of the file", id, page.OverflowCount+1)
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

// checkElements checks that the elements of a branch or leaf page lie within it. A page begins with a header: id uint64,
// flags uint16, count uint16, overflow uint32. Then follow elements of equal size, which point to their keys and values
// in the rest of the page. The value of a small bucket is itself a leaf page.
func checkElements(page []byte) error {
	const (
		headerSize  = 16
		elementSize = 16
		branch      = 1 // flag of a page
		leaf        = 2 // flag of a page
		bucket      = 1 // flag of an element
		bucketSize  = 16
	)
	order := binary.NativeEndian
	if len(page) < headerSize {
		return errors.New("too short for a page")
	}
	flags, count := order.Uint16(page[8:]), int(order.Uint16(page[10:]))
	elementsEnd := headerSize + count*elementSize
	if flags != branch && flags != leaf || elementsEnd > len(page) {
		return fmt.Errorf("invalid header: flags %#x, %d elements", flags, count)
	}
	for i := range count {
		at := headerSize + i*elementSize
		element := page[at : at+elementSize]
		isBucket := false
		if flags == leaf {
			isBucket = order.Uint32(element) == bucket
			element = element[4:]
		}
		key := uint64(at) + uint64(order.Uint32(element)) // the offset is relative to the element
		value := key + uint64(order.Uint32(element[4:]))
		end := value
		if flags == leaf {
			end += uint64(order.Uint32(element[8:]))
		}
		if key < uint64(elementsEnd) || key == value || end > uint64(len(page)) {
			return fmt.Errorf("element %d does not lie within the page", i)
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

// checkKeys checks that the keys of a bucket are in order, which tx.Check does not do in small buckets, and that it has no
// nested buckets, which the store does not use.
func checkKeys(name []byte, b *bbolt.Bucket) error {
	if b == nil {
		return fmt.Errorf("%q is not a bucket", name)
	}
	var last []byte
	return b.ForEach(func(key, value []byte) error {
		if value == nil {
			return fmt.Errorf("bucket %q: key %q is a nested bucket", name, key)
		}
		if bytes.Compare(last, key) >= 0 {
			return fmt.Errorf("bucket %q: key %q is out of order", name, key)
		}
		last = key
		return nil
	})
}

// lostState reports whether bbolt may have opened the file in the state before its last transaction. bbolt writes the
// state after a transaction alternately to page 0 and page 1. If the checksum of one page is wrong, bbolt assumes that a
// crash interrupted the write of that page, and uses the other one.
func lostState(path string, pageSize int) (bool, error) {
	const headerSize, contentSize = 16, 56 // the checksum follows the content
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

// syncState makes the state that bbolt read durable. If a sync failed in an earlier process, the kernel may have that
// state in its cache but not on the disk, and does not write it again by itself. The next commit could then overwrite
// pages of the state that the disk has. So syncState rewrites the two pages of the state unchanged and syncs them. The
// caller must not have started a transaction yet.
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
