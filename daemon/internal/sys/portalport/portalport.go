// Package portalport is how msbd reaches the portal of a sandbox over the network: the addresses on the link between the
// host and the guest, and the hello with which msbd begins each connection.
//
// The guest's agent accepts the connections. It passes a connection to the portal if its hello has the token that msbd has
// given to the agent over the control port. Otherwise it closes the connection.
package portalport

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"time"
)

const (
	// Port is the TCP port at GuestAddress.
	Port = 4600
	// GuestMAC is the MAC address of the guest's network interface.
	GuestMAC = "02:00:00:00:00:01"
	// MTU is that of the link.
	MTU = 1500
)

// The addresses on the link. They are the same for each guest, because each has a link of its own.
var (
	GuestAddress = netip.MustParsePrefix("10.0.2.15/24")
	HostAddress  = netip.MustParseAddr("10.0.2.2")
)

const (
	tokenLength    = 64 // characters of a token
	transferLength = 32 // characters of the id of a transfer
	// minHello is the length of the shortest hello, with the newline. It has no transfer.
	minHello = len(`{"token":"","transfer":""}`+"\n") + tokenLength
	maxHello = minHello + transferLength
	// helloTimeout bounds the wait for a hello.
	helloTimeout = 10 * time.Second
)

// Hello is the first line of a connection. All that follows is for the portal.
type Hello struct {
	// Token is the token of the guest. See NewToken.
	Token string `json:"token"`
	// Transfer is the id of the transfer that the connection is for, in hexadecimal. It is empty for a connection over
	// which msbd makes calls.
	Transfer string `json:"transfer"`
}

// NewToken returns a new token: 32 random bytes in hexadecimal.
func NewToken() string {
	b := make([]byte, tokenLength/2)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// CheckToken returns an error, without the token, if NewToken could not have returned it.
func CheckToken(token string) error {
	if !isHex(token, tokenLength) {
		return fmt.Errorf("the token is not %d hexadecimal digits", tokenLength)
	}
	return nil
}

func isHex(s string, length int) bool {
	return len(s) == length && strings.Trim(s, "0123456789abcdef") == ""
}

func (h Hello) check() error {
	if h.Transfer != "" && !isHex(h.Transfer, transferLength) {
		return fmt.Errorf("the id of the transfer is not %d hexadecimal digits", transferLength)
	}
	return CheckToken(h.Token)
}

// WriteHello sends a hello. There is no response. A guest that does not accept it closes the connection.
func WriteHello(w io.Writer, h Hello) error {
	if err := h.check(); err != nil {
		return err
	}
	line, err := json.Marshal(h)
	if err == nil {
		_, err = w.Write(append(line, '\n'))
	}
	return err
}

// errNoHello is returned for a line that is no hello. It does not quote the line, which may have a token.
var errNoHello = errors.New("the connection does not begin with a hello")

// ReadHello reads the hello of a connection, and nothing that follows it. It fails if there is none within 10 s.
func ReadHello(conn net.Conn) (Hello, error) {
	if err := conn.SetReadDeadline(time.Now().Add(helloTimeout)); err != nil {
		return Hello{}, err
	}
	var line []byte
	for bytes.IndexByte(line, '\n') < 0 {
		if len(line) == maxHello {
			return Hello{}, errNoHello
		}
		// Read no more than the rest of the shortest hello, so that the piece ends with the hello at the latest.
		piece := make([]byte, max(1, minHello-len(line)))
		n, err := conn.Read(piece)
		if n == 0 && err != nil {
			return Hello{}, fmt.Errorf("read the hello of a connection: %w", err)
		}
		line = append(line, piece[:n]...)
	}
	var h Hello
	if bytes.IndexByte(line, '\n') < len(line)-1 || json.Unmarshal(line, &h) != nil || h.check() != nil {
		return Hello{}, errNoHello
	}
	return h, conn.SetReadDeadline(time.Time{})
}
