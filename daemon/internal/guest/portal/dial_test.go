package portal

import (
	"net"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A program that does not accept a connection in time has too many that wait. The kernel then drops the packets that would
// open another one.
func TestConnectTimeout(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	d := net.Dialer{Timeout: 1}
	_, err = d.Dial("tcp", listener.Addr().String())
	got := status.Convert(connectError(t.Context(), "port 80", err))
	if got.Code() != codes.ResourceExhausted || got.Message() != "port 80 has too many connections that wait to be accepted: try again" {
		t.Errorf("%v: %s %q", err, got.Code(), got.Message())
	}
}
