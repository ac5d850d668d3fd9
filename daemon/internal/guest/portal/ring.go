package portal

import (
	"sort"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

const (
	// maxRing is the size of the ring buffer of a process, in bytes. maxRings is the size of all of them together.
	maxRing  = 1 << 20
	maxRings = 32 << 20
	// minRing is the size of a ring buffer with which it begins, in bytes.
	minRing = 4 << 10
	// bytesPerMark bounds the marks of a ring, whose size is 16 bytes: a ring has at most one for this many bytes.
	bytesPerMark = 128
)

// ring keeps the last bytes that a process has printed, with their streams. Bytes are addressed by their offset in
// everything that the process has printed.
type ring struct {
	buf        []byte // the byte at the offset i is buf[i%len(buf)]
	start, end uint64 // the offsets of the bytes in the ring
	// marks say from which offset on a stream applies. The first one applies to start.
	marks []mark
}

type mark struct {
	from   uint64
	stream portalv1.Output_Stream
}

// write appends data, and overwrites the oldest bytes if the ring cannot grow any more. Before the ring grows by n bytes,
// it calls reserve, which reports whether it may.
func (r *ring) write(stream portalv1.Output_Stream, data []byte, reserve func(n int) bool) {
	if n := len(r.marks); n == 0 || r.marks[n-1].stream != stream {
		r.marks = append(r.marks, mark{r.end, stream})
	}
	for r.end+uint64(len(data))-r.start > uint64(len(r.buf)) || len(r.marks) > len(r.buf)/bytesPerMark {
		if !r.grow(reserve) {
			break
		}
	}
	r.end += uint64(len(data))
	size := uint64(len(r.buf))
	if size == 0 {
		r.start, r.marks = r.end, nil
		return
	}
	if r.end-r.start > size {
		r.start = r.end - size
	}
	if extra := len(r.marks) - len(r.buf)/bytesPerMark; extra > 0 {
		r.start = max(r.start, r.marks[extra].from)
	}
	for len(r.marks) > 1 && r.marks[1].from <= r.start {
		r.marks = r.marks[1:]
	}
	data = data[max(0, len(data)-len(r.buf)):]
	n := copy(r.buf[(r.end-uint64(len(data)))%size:], data)
	copy(r.buf, data[n:])
}

// grow doubles the size of the ring, and reports whether it has done so.
func (r *ring) grow(reserve func(n int) bool) bool {
	size := min(max(2*len(r.buf), minRing), maxRing)
	if size == len(r.buf) || !reserve(size-len(r.buf)) {
		return false
	}
	buf := make([]byte, size)
	for at := r.start; at < r.end; {
		at += uint64(copy(buf[at%uint64(size):], r.contiguous(at, r.end)))
	}
	r.buf = buf
	return true
}

// skip counts n bytes that are not kept.
func (r *ring) skip(n int) {
	r.end += uint64(n)
	r.start = r.end
}

// discard empties the ring, and returns the size that its buffer had.
func (r *ring) discard() int {
	size := len(r.buf)
	r.buf, r.marks, r.start = nil, nil, r.end
	return size
}

// at returns a piece of the output in the ring that begins at the offset from, which is one of a byte in the ring. The
// caller must not keep it after the next write.
func (r *ring) at(from uint64) (portalv1.Output_Stream, []byte) {
	i := sort.Search(len(r.marks), func(i int) bool { return r.marks[i].from > from }) - 1
	end := r.end
	if i+1 < len(r.marks) {
		end = r.marks[i+1].from
	}
	return r.marks[i].stream, r.contiguous(from, min(end, from+maxPiece))
}

// contiguous returns the bytes from the offset from up to end, or up to the end of buf.
func (r *ring) contiguous(from, end uint64) []byte {
	i := from % uint64(len(r.buf))
	return r.buf[i:min(uint64(len(r.buf)), i+end-from)]
}
