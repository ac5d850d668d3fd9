package stream

import (
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"
)

// The input grows only while the memory for it can be counted. Then it waits until it is read.
func TestInputIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for held, want := range map[int]int{0: freeInput, 1: 2 * freeInput, 1000: maxInput} {
			counted := 0
			q := newInput(func(bytes int) error {
				if counted == held*freeInput {
					return errors.New("no room")
				}
				counted += bytes
				return nil
			})
			ctx, cancel := context.WithCancelCause(t.Context())
			written, ended := 0, make(chan error)
			go func() {
				var err error
				for piece := make([]byte, 1000); err == nil; {
					if err = q.write(ctx, piece); err == nil {
						written += len(piece)
					}
				}
				ended <- err
			}()
			synctest.Wait()
			if written > want || written < want-1000 || counted > max(0, want-freeInput) {
				t.Errorf("the input accepted %d bytes, of which %d are counted; want %d", written, counted, want)
			}
			before := written
			if _, err := io.ReadFull(q.reader(ctx), make([]byte, 5000)); err != nil {
				t.Error(err)
			}
			synctest.Wait()
			if more := written - before; more < 4000 || more > 6000 {
				t.Errorf("after 5000 bytes were read, the input accepted %d more", more)
			}
			cause := errors.New("the end")
			cancel(cause)
			if err := <-ended; err != cause {
				t.Errorf("write ended with %v, want the cause", err)
			}
			q.end()
			if rest, err := io.ReadAll(q.reader(context.Background())); err != nil || len(rest) != written-5000 {
				t.Errorf("the rest has %d bytes, error %v; want %d", len(rest), err, written-5000)
			}
		}
	})
}
