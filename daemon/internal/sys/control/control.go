// Package control is the protocol of the guest agent's control port, and both ends of it. The control port is a
// virtio-serial port over which msbd sets the guest's clock, and makes a guest that was restored from a template another one.
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
	"regexp"
	"strings"
	"time"
)

// PortName is the name of the virtio-serial port.
const PortName = "msb.ctl"

// Request asks the guest to do what its fields say, in their order, and for its time. All fields but Adjust may be sent again
// if the response is lost.
type Request struct {
	ID uint64 `json:"id"`
	// Adjust is how far the guest moves its clock forward, in nanoseconds. If it is 0, the guest only reads its clock.
	Adjust int64 `json:"adjust,omitempty"`
	// Seed has SeedSize random bytes. The guest adds them to its kernel's random number generator and reseeds that at once.
	Seed []byte `json:"seed,omitempty"`
	// Token is a token of package portalport. From now on, the guest accepts new connections to the portal with this one only.
	// A guest that has a template's container also drops what is left of the connection of the template's builder.
	Token string `json:"token,omitempty"`
	// Hostname is the new hostname of the sandbox. It is an RFC 1123 label.
	Hostname string `json:"hostname,omitempty"`
	// AwaitPortal makes the guest wait for up to PortalWait until the portal is ready.
	AwaitPortal bool `json:"await_portal,omitempty"`
}

const (
	// SeedSize is the number of bytes of a seed.
	SeedSize = 64
	// maxHostname is the maximum length of a hostname in bytes.
	maxHostname = 63
	// PortalWait is how long the guest waits for the portal before it responds that it is not ready. It is less than the
	// time for which the host waits for a response.
	PortalWait = responseTimeout / 2
)

// tokenPattern matches what portalport.NewToken returns.
var tokenPattern = regexp.MustCompile(`^[0-9a-f]{64}$`)

// check returns an error if the guest may not do what r says. The error does not have the token.
func (r Request) check() error {
	if len(r.Seed) != 0 && len(r.Seed) != SeedSize {
		return fmt.Errorf("the seed has %d bytes, not %d", len(r.Seed), SeedSize)
	}
	if r.Token != "" {
		if !tokenPattern.MatchString(r.Token) {
			return errors.New("the token is not 64 hexadecimal digits")
		}
	}
	if h := r.Hostname; h != "" {
		other := func(c rune) bool {
			return !('0' <= c && c <= '9' || 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z' || c == '-')
		}
		if len(h) > maxHostname || strings.ContainsFunc(h, other) || strings.HasPrefix(h, "-") || strings.HasSuffix(h, "-") {
			return fmt.Errorf("the hostname %.100q is not 1 to %d letters, digits and hyphens, with no hyphen at an end", h, maxHostname)
		}
	}
	return nil
}

// Response is the guest's response to the request with the same ID.
type Response struct {
	ID uint64 `json:"id"`
	// Time is the guest's wall clock, in nanoseconds since 1970. If the request adjusts the clock, it is the time after
	// that.
	Time int64 `json:"time"`
	// Ready says that the portal is ready, if the request waits for that.
	Ready bool `json:"ready,omitempty"`
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
// refuses a request with a field that is not valid. It ignores lines that are no requests, because what the host sends may begin with the rest of a line of an earlier
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
		var resp Response
		if err := req.check(); err != nil {
			resp.Error = err.Error()
		} else {
			resp = handle(req)
		}
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
