//go:build unix

package main

import (
	"context"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// waitReaderGone waits until the other end of w, a pipe or a socket, is closed, and then returns true. It returns false if
// ctx is done first, or if w is not a file.
func waitReaderGone(ctx context.Context, w io.Writer) (gone bool) {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	for ctx.Err() == nil {
		fds := []unix.PollFd{{Fd: int32(f.Fd())}} // no Events: poll always reports POLLERR and POLLHUP
		if n, err := unix.Poll(fds, 500); n > 0 || err != nil && err != unix.EINTR {
			return n > 0 && fds[0].Revents&(unix.POLLERR|unix.POLLHUP) != 0
		}
	}
	return false
}
