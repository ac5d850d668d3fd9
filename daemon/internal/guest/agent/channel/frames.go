package channel

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
)

// frameReader finds the headers of ttrpc frames in the bytes that one end of a connection sends.
type frameReader struct {
	header    [ttrpcHeader]byte // payload length, stream id, message type, flags
	headerLen int               // bytes of the current frame's header that have been read
	payload   uint32            // bytes of the current frame's payload that have not been read
}

const (
	ttrpcHeader = 10 // bytes

	// Message types.
	ttrpcRequest = 1
	ttrpcData    = 3
)

// scan reads p and calls accept with each complete frame header in it. If accept returns true for all of them, scan
// returns len(p) and nil. When accept returns false, scan stops. It then returns in n the number of bytes of p before
// that frame. rest is the frame's header, including the part that earlier calls have read, followed by the remaining
// bytes of p.
func (r *frameReader) scan(p []byte, accept func(stream uint32, kind byte) bool) (n int, rest []byte) {
	for i := 0; i < len(p); {
		if r.payload > 0 {
			skip := min(uint64(r.payload), uint64(len(p)-i))
			r.payload -= uint32(skip)
			i += int(skip)
			continue
		}
		copied := copy(r.header[r.headerLen:], p[i:])
		r.headerLen += copied
		i += copied
		if r.headerLen < ttrpcHeader {
			continue
		}
		if !accept(binary.BigEndian.Uint32(r.header[4:]), r.header[8]) {
			return i - copied, append(bytes.Clone(r.header[:]), p[i:]...)
		}
		r.payload, r.headerLen = binary.BigEndian.Uint32(r.header[:]), 0
	}
	return len(p), nil
}

// inFrame reports whether a part of the current frame has been scanned.
func (r *frameReader) inFrame() bool { return r.payload > 0 || r.headerLen > 0 }

// RequestsOnly returns a listener that is like l but protects ttrpc's server, which crashes on data for a stream that
// it does not know. When a client sends a data frame, Read on its connection returns io.EOF from then on. A correct
// client never sends one, because the agent has no streaming methods.
func RequestsOnly(l net.Listener) net.Listener { return requestListener{l} }

type requestListener struct{ net.Listener }

func (l requestListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &requestConn{Conn: conn}, nil
}

// requestConn is a connection whose Read returns io.EOF once the client has sent a data frame.
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
	accepted, rest := c.frames.scan(p[:n], func(_ uint32, kind byte) bool { return kind != ttrpcData })
	if rest == nil {
		return n, err
	}
	c.ended = true
	if accepted == 0 {
		return 0, io.EOF
	}
	return accepted, nil
}
