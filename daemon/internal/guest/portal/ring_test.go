package portal

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// content returns everything in the ring: the output, and the stream of each byte.
func (r *ring) content(t *testing.T) (data, streams []byte) {
	t.Helper()
	for at := r.start; at < r.end; {
		stream, piece := r.at(at)
		if len(piece) == 0 || len(piece) > maxPiece {
			t.Fatalf("at(%d) returned %d bytes", at, len(piece))
		}
		data = append(data, piece...)
		streams = append(streams, bytes.Repeat([]byte{byte(stream)}, len(piece))...)
		at += uint64(len(piece))
	}
	return data, streams
}

// TestRing writes pieces of random sizes and compares the ring with everything that was written.
func TestRing(t *testing.T) {
	const checks = 10 // how often the content is compared
	source := rand.NewChaCha8([32]byte{})
	random := rand.New(source)
	for _, tt := range []struct {
		name            string
		piece, total    int
		budget, minKept int
		alternate       bool
	}{
		{"small pieces", 100, 3 << 20, maxRing, maxRing, false},
		{"large pieces", maxPiece, 5 << 20, maxRing, maxRing, false},
		{"pieces larger than the ring", maxPiece, 1 << 20, 8 << 10, 8 << 10, false},
		{"two streams", 1000, 3 << 20, maxRing, maxRing, true},
		{"many changes of the stream", 2, 1 << 18, maxRing, maxRing / bytesPerMark, true},
		{"no memory", 1000, 1 << 16, 0, 0, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var r ring
			var data []byte
			var streams []byte
			stream := stdout
			reserved, checked := 0, 0
			for len(data) < tt.total {
				piece := make([]byte, 1+random.IntN(tt.piece))
				_, _ = source.Read(piece)
				if tt.alternate && (tt.piece == 2 || random.IntN(2) == 0) {
					stream = stdout + stderr - stream
				}
				r.write(stream, piece, func(n int) bool {
					if reserved+n > tt.budget {
						return false
					}
					reserved += n
					return true
				})
				data = append(data, piece...)
				streams = append(streams, bytes.Repeat([]byte{byte(stream)}, len(piece))...)
				if len(r.buf) != reserved || len(r.marks) > len(r.buf)/bytesPerMark {
					t.Fatalf("the ring has %d bytes and %d marks, want %d and at most %d", len(r.buf), len(r.marks), reserved, len(r.buf)/bytesPerMark)
				}
				if r.end != uint64(len(data)) {
					t.Fatalf("after %d bytes, end is %d", len(data), r.end)
				}
				if len(data) < (checked+1)*tt.total/checks {
					continue
				}
				checked++
				kept, keptStreams := r.content(t)
				if want := min(len(data), tt.minKept); len(kept) < want {
					t.Fatalf("after %d bytes, the ring has %d, want %d", len(data), len(kept), want)
				}
				if !bytes.Equal(kept, data[len(data)-len(kept):]) {
					t.Fatalf("after %d bytes, the ring does not have the last %d", len(data), len(kept))
				}
				if !bytes.Equal(keptStreams, streams[len(streams)-len(kept):]) {
					t.Fatalf("after %d bytes, the ring does not have their streams", len(data))
				}
			}
		})
	}
}
