package portal

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/msbd/msbd/daemon/internal/sys/limit"
)

func TestPieces(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789"), 20_000)
	var got []byte
	w := pieces(func(piece []byte) error {
		if len(piece) == 0 || len(piece) > pieceSize {
			t.Errorf("a piece has %d bytes", len(piece))
		}
		got = append(got, piece...)
		return nil
	})
	if n, err := w.Write(data); n != len(data) || err != nil || !bytes.Equal(got, data) {
		t.Errorf("wrote %d bytes, error %v, and got %d", n, err, len(got))
	}
	broken := errors.New("broken")
	sent := 0
	w = func([]byte) error {
		if sent++; sent == 2 {
			return broken
		}
		return nil
	}
	if n, err := w.Write(data); n != pieceSize || err != broken {
		t.Errorf("wrote %d bytes, error %v, want the first piece", n, err)
	}
}

// The content of a generated file counts as memory.
func TestReadGeneratedHoldsMemory(t *testing.T) {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m := &memory{budget: newTreeMemory()}
	text, err := readGenerated(f, m)
	if err != nil || len(text) == 0 || m.held < len(text) {
		t.Errorf("%d bytes are held for %d bytes, error %v", m.held, len(text), err)
	}
	if _, err := f.Seek(0, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := readGenerated(f, &memory{budget: limit.NewBudget(100, 100)}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("with little memory: error %v, want ResourceExhausted", err)
	}
}
