// Package control is the protocol of the guest agent's control port, and both ends of it. The control port is a
// virtio-serial port over which msbd sets the guest's clock.
//
// The host sends requests and the guest responds to them, one at a time. Each message is a JSON object on one line. The
// response has the id of its request.
//
// The host does not trust the guest. It bounds the length of the guest's lines and the time for which it waits.
package control

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// PortName is the name of the virtio-serial port.
const PortName = "msb.ctl"

// Request asks the guest to correct its clock, and for its time.
type Request struct {
	ID uint64 `json:"id"`
	// Adjust is how far the guest moves its clock forward, in nanoseconds. If it is 0, the guest only reads its clock.
	Adjust int64 `json:"adjust,omitempty"`
}

// Response is the guest's response to the request with the same ID.
type Response struct {
	ID uint64 `json:"id"`
	// Time is the guest's wall clock, in nanoseconds since 1970. If the request adjusts the clock, it is the time after
	// that.
	Time int64 `json:"time"`
	// Error says why the guest could not do what the request asks for. It is empty if the guest did it.
	Error string `json:"error,omitempty"`
}

// maxLine is the maximum length of a line in bytes, with the newline.
const maxLine = 4 << 10

var errLongLine = fmt.Errorf("a line is longer than %d bytes", maxLine)

// lineReader splits what it reads into lines.
type lineReader struct {
	r    io.Reader
	buf  [maxLine]byte
	n    int // bytes in buf
	skip int // length of the line at the start of buf that the last call of next returned
}

// next returns the next line without its newline. The line is valid until the next call. next returns errLongLine if the
// line is longer than maxLine. If it returns another error, such as a timeout, the next call continues with the same line.
func (l *lineReader) next() ([]byte, error) {
	l.n = copy(l.buf[:], l.buf[l.skip:l.n])
	l.skip = 0
	for {
		if i := bytes.IndexByte(l.buf[:l.n], '\n'); i >= 0 {
			l.skip = i + 1
			return l.buf[:i], nil
		}
		if l.n == maxLine {
			return nil, errLongLine
		}
		n, err := l.r.Read(l.buf[l.n:])
		l.n += n
		if n == 0 && err != nil {
			return nil, err
		}
	}
}

// encode returns the line for a message.
func encode(message any) ([]byte, error) {
	data, err := json.Marshal(message)
	if err != nil {
		return nil, err
	}
	return append(data, '\n'), nil
}

// Serve is the guest's end of conn. It calls handle for each request, and sends what handle returns as the response. It
// ignores lines that are no requests, because what the host sends may begin with the rest of a line of an earlier
// connection. Serve returns when the host disconnects, sends a line that is too long, or does not read a response for
// 1 s.
func Serve(conn net.Conn, handle func(Request) Response) error {
	lines := &lineReader{r: conn}
	for {
		line, err := lines.next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read a request: %w", err)
		}
		var req Request
		if json.Unmarshal(line, &req) != nil {
			continue
		}
		resp := handle(req)
		resp.ID = req.ID
		line, err = encode(resp)
		if err != nil {
			return err
		}
		if err := conn.SetWriteDeadline(time.Now().Add(responseTimeout)); err != nil {
			return err
		}
		if _, err := conn.Write(line); err != nil {
			return fmt.Errorf("send a response: %w", err)
		}
	}
}
