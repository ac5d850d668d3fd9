package portal

import (
	"bytes"
	"math/rand/v2"
	"testing"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

// content returns everything in the ring: each byte of the output and its stream.
func (r *ring) content(t *testing.T) (data []byte, streams []portalv1.Output_Stream) {
	t.Helper()
	for at := r.start; at < r.end; {
		stream, piece := r.at(at)
		if len(piece) == 0 || len(piece) > maxPiece {
			t.Fatalf("at(%d) returned %d bytes", at, len(piece))
		}
		data = append(data, piece...)
		for range piece {
			streams = append(streams, stream)
		}
		at += uint64(len(piece))
	}
	return data, streams
}

// TestRing writes pieces of random sizes and compares the ring with everything that was written.
func TestRing(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
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
			var streams []portalv1.Output_Stream
			reserved := 0
			for len(data) < tt.total {
				piece := make([]byte, 1+random.IntN(tt.piece))
				for i := range piece {
					piece[i] = byte(random.Uint32())
				}
				stream := stdout
				if tt.alternate && len(streams) > 0 && (tt.piece == 2 || random.IntN(2) == 0) {
					stream = stdout + stderr - streams[len(streams)-1]
				}
				r.write(stream, piece, func(n int) bool {
					if reserved+n > tt.budget {
						return false
					}
					reserved += n
					return true
				})
				data = append(data, piece...)
				for range piece {
					streams = append(streams, stream)
				}
				if len(r.buf) != reserved || len(r.marks) > len(r.buf)/bytesPerMark {
					t.Fatalf("the ring has %d bytes and %d marks, want %d and at most %d", len(r.buf), len(r.marks), reserved, len(r.buf)/bytesPerMark)
				}
				if r.end != uint64(len(data)) || random.IntN(100) > 0 && len(data) < tt.total {
					continue
				}
				kept, keptStreams := r.content(t)
				if want := min(len(data), tt.minKept); len(kept) < want {
					t.Fatalf("after %d bytes, the ring has %d, want %d", len(data), len(kept), want)
				}
				if !bytes.Equal(kept, data[len(data)-len(kept):]) {
					t.Fatalf("after %d bytes, the ring does not have the last %d", len(data), len(kept))
				}
				for i, stream := range keptStreams {
					if want := streams[len(streams)-len(kept)+i]; stream != want {
						t.Fatalf("byte %d has the stream %v, want %v", i, stream, want)
					}
				}
			}
		})
	}
}
