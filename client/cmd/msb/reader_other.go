//go:build !unix

package main

import (
	"context"
	"io"
)

// waitReaderGone returns false when ctx is done: this system does not tell whether the other end of a pipe is closed.
func waitReaderGone(ctx context.Context, _ io.Writer) (gone bool) {
	<-ctx.Done()
	return false
}
