package channel

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
)

// frameReader follows the frames of ttrpc in what a caller sends.
type frameReader struct {
	header  [ttrpcHeader]byte // length, stream, kind, flags
	have    int
	payload uint32 // bytes of the current frame that are still to come
}

const (
	ttrpcHeader  = 10
	ttrpcRequest = 1
	ttrpcData    = 3
)

// scan shows each frame's header to accept, and returns how many of p's bytes come before one that is
// not accepted. rest, if not nil, begins with that one: the rest of p, and what earlier calls had
// taken of the header.
func (r *frameReader) scan(p []byte, accept func(stream uint32, kind byte) bool) (own int, rest []byte) {
	for i := 0; i < len(p); {
		if r.payload > 0 {
			n := min(uint64(r.payload), uint64(len(p)-i))
			r.payload -= uint32(n)
			i += int(n)
			continue
		}
		n := copy(r.header[r.have:], p[i:])
		r.have += n
		i += n
		if r.have < ttrpcHeader {
			continue
		}
		if !accept(binary.BigEndian.Uint32(r.header[4:]), r.header[8]) {
			return i - n, append(bytes.Clone(r.header[:]), p[i:]...)
		}
		r.payload, r.have = binary.BigEndian.Uint32(r.header[:]), 0
	}
	return len(p), nil
}

// RequestsOnly returns a listener whose connections end where a caller sends anything but a request. The
// agent's methods have no streams, and ttrpc's server dies of data for a stream that it does not know.
func RequestsOnly(l net.Listener) net.Listener { return requestListener{l} }

type requestListener struct{ net.Listener }

func (l requestListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &requestConn{Conn: conn}, nil
}

// requestConn ends where a caller sends data.
type requestConn struct {
	net.Conn
	frames frameReader
	ended  bool
}

func (c *requestConn) Read(p []byte) (int, error) {
	if c.ended {
		return 0, io.EOF
	}
	n, err := c.Conn.Read(p)
	own, rest := c.frames.scan(p[:n], func(_ uint32, kind byte) bool { return kind != ttrpcData })
	if rest == nil {
		return n, err
	}
	c.ended = true
	if own == 0 {
		return 0, io.EOF
	}
	return own, nil
}
