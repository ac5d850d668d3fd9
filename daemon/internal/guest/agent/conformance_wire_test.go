package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

// Message types, flags and sizes of ttrpc, which does not export them.
const (
	kindRequest, kindResponse, kindData = 1, 2, 3
	flagRemoteClosed, flagNoData        = 1, 4
	headerSize                          = 10
	frameLimit                          = 4 << 20
)

const (
	// hangUpDelay is usually long enough for the guest to notice that its client has disconnected.
	hangUpDelay = 150 * time.Millisecond
	// portCallTimeout is how long to wait for a response on the port before the call counts as lost.
	portCallTimeout = 4 * time.Second
	// conversationTimeout bounds a conversation, which may send megabytes.
	conversationTimeout = 30 * time.Second
)

// rawFrame returns a frame. length is the payload length in its header, which may be wrong.
func rawFrame(length, stream uint32, kind, flags byte, payload []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, length)
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(append(b, kind, flags), payload...)
}

// rawRequest returns the frame of a request.
func rawRequest(stream uint32, req *ttrpc.Request) []byte {
	payload, err := proto.Marshal(req)
	if err != nil {
		panic(err)
	}
	return rawFrame(uint32(len(payload)), stream, kindRequest, flagRemoteClosed, payload)
}

// rawCheck returns the frame of a valid request to the Health service.
func rawCheck(stream uint32) []byte {
	return rawRequest(stream, &ttrpc.Request{Service: "grpc.Health", Method: "Check"})
}

// readResponse reads a response and returns its stream id and status code.
func readResponse(conn net.Conn) (uint32, codes.Code, error) {
	var header [headerSize]byte
	if _, err := io.ReadFull(conn, header[:]); err != nil {
		return 0, 0, err
	}
	if kind := header[8]; kind != kindResponse {
		return 0, 0, fmt.Errorf("message type %d, want a response", kind)
	}
	payload := make([]byte, binary.BigEndian.Uint32(header[:]))
	if _, err := io.ReadFull(conn, payload); err != nil {
		return 0, 0, err
	}
	var resp ttrpc.Response
	err := proto.Unmarshal(payload, &resp)
	return binary.BigEndian.Uint32(header[4:]), codes.Code(resp.Status.GetCode()), err
}

// conversation is what a client sends and what the server must do: send responses with the given codes and, if ends is
// set, then close the connection. Without codes and ends, anything is allowed.
type conversation struct {
	send  []byte
	codes []codes.Code
	ends  bool
}

// conversations returns conversations that no correct client has. Many end with a valid request, to which the server must
// respond, although the bytes before it were invalid.
func conversations() map[string]conversation {
	noise := make([]byte, 5000)
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range noise {
		noise[i] = byte(rnd.Uint32())
	}
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	wait := &ttrpc.Request{Service: "grpc.AgentService", Method: "GetOOMEvent"}
	expired := &ttrpc.Request{Service: "grpc.AgentService", Method: "GetOOMEvent", TimeoutNano: -1}
	manyMetadata := &ttrpc.Request{Service: "grpc.Health", Method: "Check"}
	for range manyEntries {
		manyMetadata.Metadata = append(manyMetadata.Metadata, &ttrpc.KeyValue{Key: "k", Value: "v"})
	}
	return map[string]conversation{
		"nothing":            {},
		"noise":              {send: noise},
		"zeros":              {send: make([]byte, 1000)},
		"half a header":      {send: rawCheck(1)[:7]},
		"half a request":     {send: rawCheck(1)[:20]},
		"a huge length":      {send: rawFrame(1<<32-1, 1, kindRequest, 0, noise)},
		"too long a request": {send: join(rawFrame(frameLimit+1, 1, kindRequest, 0, make([]byte, frameLimit+1)), rawCheck(3)), codes: []codes.Code{codes.ResourceExhausted, codes.OK}},
		"an empty request":   {send: join(rawFrame(0, 1, kindRequest, 0, nil), rawCheck(3)), codes: []codes.Code{codes.Unimplemented, codes.OK}},
		"a request of noise": {send: join(rawFrame(5000, 1, kindRequest, 0, noise), rawCheck(3)), codes: []codes.Code{codes.InvalidArgument, codes.OK}},
		"an unknown service": {send: join(rawRequest(1, &ttrpc.Request{Service: "grpc.Nosuch", Method: "Check"}), rawCheck(3)), codes: []codes.Code{codes.Unimplemented, codes.OK}},
		"an unknown method":  {send: join(rawRequest(1, &ttrpc.Request{Service: "grpc.Health", Method: "Nosuch"}), rawCheck(3)), codes: []codes.Code{codes.Unimplemented, codes.OK}},
		"a payload of noise": {send: join(rawRequest(1, &ttrpc.Request{Service: "grpc.Health", Method: "Check", Payload: noise}), rawCheck(3)), codes: []codes.Code{codes.InvalidArgument, codes.OK}},
		"10,000 metadata":    {send: rawRequest(1, manyMetadata), codes: []codes.Code{codes.OK}},
		"an expired timeout": {send: join(rawRequest(1, expired), rawCheck(3)), codes: []codes.Code{codes.DeadlineExceeded, codes.OK}},
		"an even stream":     {send: join(rawCheck(2), rawCheck(3)), codes: []codes.Code{codes.InvalidArgument, codes.OK}},
		"the last stream":    {send: rawCheck(1<<32 - 1), codes: []codes.Code{codes.OK}},
		"an unknown message type": {
			send: join(rawFrame(4, 1, 99, 255, []byte("hello"[:4])), rawFrame(0, 5, kindResponse, 0, nil), rawCheck(7)), codes: []codes.Code{codes.OK},
		},
		// The agent has no streaming methods, so no data frame is valid.
		"data for no stream":         {send: rawFrame(4, 1, kindData, 0, noise[:4]), ends: true},
		"the end of no stream":       {send: rawFrame(0, 1, kindData, flagRemoteClosed|flagNoData, nil), ends: true},
		"data for a waiting request": {send: join(rawRequest(1, wait), rawFrame(4, 1, kindData, 0, noise[:4])), ends: true},
		"the end of a waiting request": {
			send: join(rawRequest(1, wait), rawFrame(0, 1, kindData, flagRemoteClosed|flagNoData, nil)), ends: true,
		},
		"data after an answer": {send: join(rawCheck(1), rawFrame(4, 1, kindData, 0, noise[:4])), ends: true},
	}
}

// run has the conversation over conn. It returns an error if the server does not respond as it must.
func (v conversation) run(conn net.Conn, limit time.Duration) error {
	if err := conn.SetDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	written := make(chan error, 1)
	go func() { // write concurrently: a server that closes the connection does not read everything
		_, err := conn.Write(v.send)
		written <- err
	}()
	want := make(map[codes.Code]int)
	for _, code := range v.codes {
		want[code]++
	}
	for range v.codes { // requests are served concurrently, so responses come in any order
		_, code, err := readResponse(conn)
		if err != nil {
			return fmt.Errorf("read responses with the codes %v: %w", v.codes, err)
		}
		want[code]--
	}
	for code, n := range want {
		if n != 0 {
			return fmt.Errorf("wrong number of responses with the code %v, want the codes %v", code, v.codes)
		}
	}
	if !v.ends {
		return <-written
	}
	for {
		_, code, err := readResponse(conn)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("the connection did not end: %w", err)
		}
		if code != codes.OK { // a response to a valid request before the data
			return fmt.Errorf("response with the code %v, want OK", code)
		}
	}
}

// testGarbage has the conversations over the virtio-serial port. The port is a single byte stream, on which each client
// begins where the previous one ended. If the guest notices too late that a client has disconnected, the next client's
// call is lost, so each conversation is tried three times.
func testGarbage(t *testing.T, c *conformance) {
	for what, v := range conversations() {
		v.ends = false // on the port, the guest cannot close the connection: it only stops responding
		var err error
		for range 3 {
			conn := c.openPort(t)
			err = v.run(conn, conversationTimeout)
			c.redial(t, conn)
			if err == nil {
				break
			}
		}
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	// Send many requests without reading the responses.
	conn := c.openPort(t)
	flood := rawRequest(1, &ttrpc.Request{Service: "grpc.AgentService", Method: "GetMetrics"})
	_ = conn.SetWriteDeadline(time.Now().Add(time.Second))
	for stream := uint32(1); stream < 1_000; stream += 2 {
		binary.BigEndian.PutUint32(flood[4:], stream)
		if _, err := conn.Write(flood); err != nil {
			break
		}
	}
	c.redial(t, conn)
	// Disconnect while many requests are waiting.
	for range 200 {
		go func(client *ttrpc.Client) {
			_ = client.Call(context.Background(), "grpc.AgentService", "GetOOMEvent", &pb.GetOOMEventRequest{}, &pb.OOMEvent{})
		}(c.client)
	}
	if _, err := c.health.Check(t.Context(), &pb.CheckRequest{}); err != nil {
		t.Error(err)
	}
	c.redial(t, nil)
}

// openPort closes the client's connection and opens the port for raw frames.
func (c *conformance) openPort(t *testing.T) net.Conn {
	t.Helper()
	c.hangUp()
	time.Sleep(hangUpDelay)
	conn, err := net.Dial("unix", c.socket)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// redial ends a conversation and makes calls until the agent responds. A call or two may be lost as part of an unfinished
// frame, until the guest notices that the previous client has disconnected.
func (c *conformance) redial(t *testing.T, conn net.Conn) {
	t.Helper()
	if conn != nil {
		conn.Close()
	}
	waitFor(t, "a response after the previous client", func() error {
		c.hangUp()
		time.Sleep(hangUpDelay)
		ctx, cancel := context.WithTimeout(t.Context(), portCallTimeout)
		defer cancel()
		if err := c.connect(ctx); err != nil {
			return err
		}
		// The response may be for the previous client, which used the same stream ids.
		details, err := c.GetGuestDetails(ctx, &pb.GuestDetailsRequest{})
		if err == nil && details.GetAgentDetails().GetVersion() == "" {
			err = fmt.Errorf("got the response to another call: %v", details)
		}
		return err
	})
}
