package portalport

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// conn is the receiving end of a connection on which sent arrives in pieces of size bytes.
type conn struct {
	net.Conn
	sent     []byte
	size     int
	deadline time.Time
}

func (c *conn) SetReadDeadline(t time.Time) error {
	c.deadline = t
	return nil
}

func (c *conn) Read(p []byte) (int, error) {
	if len(c.sent) == 0 {
		return 0, io.EOF
	}
	n := copy(p, c.sent[:min(c.size, len(c.sent))])
	c.sent = c.sent[n:]
	return n, nil
}

func TestHello(t *testing.T) {
	for _, transfer := range []string{"", strings.Repeat("0f", 16)} {
		want := Hello{NewToken(), transfer}
		var b bytes.Buffer
		if err := WriteHello(&b, want); err != nil {
			t.Fatal(err)
		}
		if n := b.Len(); transfer == "" && n != minHello || transfer != "" && n != maxHello {
			t.Errorf("a hello with the transfer %q has %d bytes", transfer, n)
		}
		b.WriteString("{\"what follows\n")
		for size := 1; size <= b.Len(); size++ {
			c := &conn{sent: bytes.Clone(b.Bytes()), size: size}
			if got, err := ReadHello(c); got != want || err != nil || string(c.sent) != "{\"what follows\n" || !c.deadline.IsZero() {
				t.Fatalf("in pieces of %d bytes: %v, left %q", size, err, c.sent)
			}
		}
	}
}

func TestBadHellos(t *testing.T) {
	token := NewToken()
	for name, h := range map[string]Hello{
		"no token":           {},
		"a short token":      {Token: token[1:]},
		"another alphabet":   {Token: strings.ToUpper(token[:63]) + "A"},
		"a short transfer":   {token, "0f"},
		"a newline":          {token[:63] + "\n", ""},
		"a transfer of text": {token, strings.Repeat("x", 32)},
	} {
		if err := WriteHello(io.Discard, h); err == nil || h.Token != "" && strings.Contains(err.Error(), h.Token) {
			t.Errorf("%s: sent, %v", name, err)
		}
	}
	for name, line := range map[string]string{
		"HTTP":       "GET / HTTP/1.1\r\n\r\n",
		"no newline": strings.Repeat(" ", 2*maxHello),
		"no token":   `{"transfer":""}` + "\n",
		"empty":      "\n",
		"two tokens": `{"token":"` + token + `","token":"x"}` + "\n",
		"the end":    `{"token":"` + token,
	} {
		if h, err := ReadHello(&conn{sent: []byte(line), size: 7}); err == nil || h != (Hello{}) || strings.Contains(err.Error(), token[:8]) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestHelloIsBoundedInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host, guest := net.Pipe()
		defer host.Close()
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			for { // more, but never the end
				if _, err := host.Write([]byte("{")); err != nil {
					return
				}
				time.Sleep(time.Second)
			}
		}()
		began := time.Now()
		_, err := ReadHello(guest)
		took := time.Since(began)
		guest.Close()
		<-ended
		if !errors.Is(err, os.ErrDeadlineExceeded) || took != helloTimeout {
			t.Errorf("%v after %v", err, took)
		}
	})
}

// FuzzReadHello reads what somebody sends, in pieces of every size.
func FuzzReadHello(f *testing.F) {
	token := strings.Repeat("0f", 32)
	for _, s := range []string{
		`{"token":"` + token + `","transfer":""}` + "\nrest", `{"token":"` + token + `","transfer":"` + token[:32] + `"}` + "\n",
		`{"transfer":"","token":"` + token + `"}` + "\n", `{"Token":"` + token + `"}` + "\n\n", "null\n", "{", strings.Repeat("x", 300),
	} {
		f.Add([]byte(s), uint8(3))
	}
	f.Fuzz(func(t *testing.T, sent []byte, size uint8) {
		c := &conn{sent: sent, size: int(size) + 1}
		h, err := ReadHello(c)
		read := sent[:len(sent)-len(c.sent)]
		if len(read) > maxHello {
			t.Fatalf("read %d bytes", len(read))
		}
		if err != nil {
			return
		}
		if end := bytes.IndexByte(read, '\n'); end != len(read)-1 {
			t.Fatalf("read %q, want one line", read)
		}
		var b bytes.Buffer
		if err := WriteHello(&b, h); err != nil {
			t.Fatal(err)
		}
		if again, err := ReadHello(&conn{sent: b.Bytes(), size: b.Len()}); again != h || err != nil {
			t.Fatalf("%+v is %+v after it was sent, %v", h, again, err)
		}
	})
}
