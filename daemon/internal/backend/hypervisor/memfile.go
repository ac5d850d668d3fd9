package hypervisor

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// The memory and the state of a template are files in memory (memfd_create(2)). Once the template is complete, they are
// sealed, so that no process can change them. This matters because all clones of the template map the same memory: if code in
// one clone takes over its QEMU, it must not be able to change another clone. Permissions cannot prevent that, because QEMU
// 7.2 opens the file for writing, also if it maps only a private copy of it.

// newMemFile returns a file in memory of size bytes. name is shown in /proc and has no other meaning.
func newMemFile(name string, size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("create a file in memory: %w", err)
	}
	file := os.NewFile(uintptr(fd), name)
	err = file.Truncate(size)
	if err == nil {
		err = file.Chmod(0o666) // QEMU, which runs as another user, opens the file again through /proc/self/fd
	}
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("create a file in memory: %w", err)
	}
	return file, nil
}

// seal makes the content and the size of a file in memory final. It fails while a process has a shared mapping of the file
// through which it may write.
func seal(file *os.File) error {
	_, err := unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	if err != nil {
		return fmt.Errorf("seal a file in memory: %w", err)
	}
	return nil
}

// reopen opens a file in memory again. The result has its own offset. reopen returns nil if file is nil.
func reopen(file *os.File, flag int) (*os.File, error) {
	if file == nil {
		return nil, nil
	}
	return os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", file.Fd()), flag, 0)
}
