package ctxio

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
)

func TestReaderAndWriter(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var out bytes.Buffer
	r, w := Reader(ctx, strings.NewReader("before")), Writer(ctx, &out)
	if _, err := io.CopyN(w, r, 3); err != nil || out.String() != "bef" {
		t.Errorf("copied %q, error %v; want bef", &out, err)
	}
	cancel()
	if n, err := r.Read(make([]byte, 1)); n != 0 || !errors.Is(err, context.Canceled) {
		t.Errorf("Read after the context ended: %d, %v; want 0, canceled", n, err)
	}
	if n, err := w.Write([]byte("x")); n != 0 || !errors.Is(err, context.Canceled) || out.String() != "bef" {
		t.Errorf("Write after the context ended: %d, %v, wrote %q; want 0, canceled", n, err, &out)
	}
}
