package portal

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"testing"
	"testing/synctest"

	"golang.org/x/sys/unix"
)

func TestTurnsAreTakenInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turn := make(turn, 1)
		if err := turn.take(t.Context()); err != nil {
			t.Fatal(err)
		}
		var order []int
		for i := range 20 {
			go func() {
				if err := turn.take(t.Context()); err != nil {
					t.Error(err)
				}
				order = append(order, i)
				turn.give()
			}()
			synctest.Wait()
		}
		turn.give()
		synctest.Wait()
		if len(order) != 20 || !slices.IsSorted(order) {
			t.Errorf("turns were taken in the order %v", order)
		}
	})
}

func TestWaitForATurnEndsWithItsContext(t *testing.T) {
	turn := make(turn, 1)
	if err := turn.take(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := turn.take(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("take with a cancelled context: %v", err)
	}
}

// The control socket is in reach of the sandbox's code, which may write anything to it.
func FuzzControl(f *testing.F) {
	f.Add([]byte("r+-"))
	f.Add([]byte{controlReady, 0x80, 0xff, controlOK})
	f.Add([]byte{controlReady, 0, controlOK})
	f.Fuzz(func(t *testing.T, sent []byte) {
		sent = sent[:min(len(sent), 4096)]
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		control, driver := os.NewFile(uintptr(pair[0]), "control"), os.NewFile(uintptr(pair[1]), "driver")
		defer control.Close()
		defer driver.Close()
		s := &session{
			process: &process{parent: &children{}, exited: make(chan struct{})},
			out:     &output{},
			control: control,
			events:  make(chan byte),
		}
		var events, echoes []byte
		for _, b := range sent {
			if b >= controlSync {
				echoes = append(echoes, b)
			} else if slices.Contains([]byte{controlReady, controlOK, controlFailed}, b) {
				events = append(events, b)
			} else {
				break
			}
		}

		ended := make(chan struct{})
		go func() { defer close(ended); s.listen() }()
		go func() { _, _ = driver.Write(sent) }()
		// Beside the events: the socket holds some hundred echoes, and the portal waits until they are taken.
		echoed := make(chan []byte, 1)
		go func() {
			got := make([]byte, len(echoes))
			n, _ := io.ReadFull(driver, got)
			echoed <- got[:n]
		}()
		for i, want := range events {
			if got := <-s.events; got != want {
				t.Fatalf("event %d of %q is %q, want %q", i, sent, got, want)
			}
		}
		if got := <-echoed; !bytes.Equal(got, echoes) {
			t.Fatalf("echoes of %q are %x, want %x", sent, got, echoes)
		}
		_ = unix.Shutdown(pair[1], unix.SHUT_RDWR)
		close(s.exited)
		<-ended
	})
}
