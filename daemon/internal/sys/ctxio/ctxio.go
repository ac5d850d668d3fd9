// Package ctxio ends a copy of data when a context ends.
package ctxio

import (
	"context"
	"io"
)

type reader struct {
	ctx context.Context
	io.Reader
}

// Reader returns a reader that reads from r until ctx ends. Then each Read fails with the error of ctx. It does not
// interrupt a Read that is waiting.
func Reader(ctx context.Context, r io.Reader) io.Reader { return reader{ctx, r} }

func (r reader) Read(b []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(b)
}

type writer struct {
	ctx context.Context
	io.Writer
}

// Writer returns a writer that writes to w until ctx ends. Then each Write fails with the error of ctx. It does not
// interrupt a Write that is waiting.
func Writer(ctx context.Context, w io.Writer) io.Writer { return writer{ctx, w} }

func (w writer) Write(b []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	return w.Writer.Write(b)
}
