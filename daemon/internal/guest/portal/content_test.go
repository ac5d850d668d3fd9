package portal

import (
	"bytes"
	"errors"
	"testing"
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
