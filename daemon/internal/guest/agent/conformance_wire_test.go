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

// Kinds of frames, and where a frame ends the stream. ttrpc keeps these to itself.
const (
	kindRequest, kindResponse, kindData = 1, 2, 3
	flagRemoteClosed, flagNoData        = 1, 4
	headerSize                          = 10
	frameLimit                          = 4 << 20
)

const (
	// lineGap is mostly enough for a guest to notice that its caller has hung up.
	lineGap = 150 * time.Millisecond
	// lineLimit is when a call on the line counts as lost.
	lineLimit = 4 * time.Second
	// holdLimit is that of a conversation, which may send megabytes.
	holdLimit = 30 * time.Second
)

// rawFrame returns a frame of any kind, with a length that need not be the payload's.
func rawFrame(length, stream uint32, kind, flags byte, payload []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, length)
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(append(b, kind, flags), payload...)
}

// rawRequest returns the frame of a request to a method.
func rawRequest(stream uint32, req *ttrpc.Request) []byte {
	payload, err := proto.Marshal(req)
	if err != nil {
		panic(err)
	}
	return rawFrame(uint32(len(payload)), stream, kindRequest, flagRemoteClosed, payload)
}

func rawCheck(stream uint32) []byte {
	return rawRequest(stream, &ttrpc.Request{Service: "grpc.Health", Method: "Check"})
}

// readAnswer reads the answer to a request, and returns its stream and status code.
func readAnswer(conn net.Conn) (uint32, codes.Code, error) {
	var header [headerSize]byte
	if _, err := io.ReadFull(conn, header[:]); err != nil {
		return 0, 0, err
	}
	if kind := header[8]; kind != kindResponse {
		return 0, 0, fmt.Errorf("frame of kind %d", kind)
	}
	payload := make([]byte, binary.BigEndian.Uint32(header[:]))
	if _, err := io.ReadFull(conn, payload); err != nil {
		return 0, 0, err
	}
	var resp ttrpc.Response
	err := proto.Unmarshal(payload, &resp)
	return binary.BigEndian.Uint32(header[4:]), codes.Code(resp.Status.GetCode()), err
}

// conversation is what a caller sends, and how the server answers: with some codes, one each, and then
// perhaps by hanging up. No codes and no end means that nothing is promised.
type conversation struct {
	send    []byte
	answers []codes.Code
	ends    bool
}

// conversations are what no client would say. check is an answer that comes in any case: the request
// after the nonsense is a good one.
func conversations() map[string]conversation {
	noise := make([]byte, 5000)
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range noise {
		noise[i] = byte(rnd.Uint32())
	}
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	wait := &ttrpc.Request{Service: "grpc.AgentService", Method: "GetOOMEvent"}
	hurried := &ttrpc.Request{Service: "grpc.AgentService", Method: "GetOOMEvent", TimeoutNano: -1}
	chatty := &ttrpc.Request{Service: "grpc.Health", Method: "Check"}
	for range manyEntries {
		chatty.Metadata = append(chatty.Metadata, &ttrpc.KeyValue{Key: "k", Value: "v"})
	}
	return map[string]conversation{
		"nothing":             {},
		"noise":               {send: noise},
		"zeros":               {send: make([]byte, 1000)},
		"half a header":       {send: rawCheck(1)[:7]},
		"half a request":      {send: rawCheck(1)[:20]},
		"an absurd length":    {send: rawFrame(1<<32-1, 1, kindRequest, 0, noise)},
		"too long a request":  {send: join(rawFrame(frameLimit+1, 1, kindRequest, 0, make([]byte, frameLimit+1)), rawCheck(3)), answers: []codes.Code{codes.ResourceExhausted, codes.OK}},
		"an empty request":    {send: join(rawFrame(0, 1, kindRequest, 0, nil), rawCheck(3)), answers: []codes.Code{codes.Unimplemented, codes.OK}},
		"a request of noise":  {send: join(rawFrame(5000, 1, kindRequest, 0, noise), rawCheck(3)), answers: []codes.Code{codes.InvalidArgument, codes.OK}},
		"an unknown service":  {send: join(rawRequest(1, &ttrpc.Request{Service: "grpc.Nosuch", Method: "Check"}), rawCheck(3)), answers: []codes.Code{codes.Unimplemented, codes.OK}},
		"an unknown method":   {send: join(rawRequest(1, &ttrpc.Request{Service: "grpc.Health", Method: "Nosuch"}), rawCheck(3)), answers: []codes.Code{codes.Unimplemented, codes.OK}},
		"a payload of noise":  {send: join(rawRequest(1, &ttrpc.Request{Service: "grpc.Health", Method: "Check", Payload: noise}), rawCheck(3)), answers: []codes.Code{codes.InvalidArgument, codes.OK}},
		"10,000 metadata":     {send: rawRequest(1, chatty), answers: []codes.Code{codes.OK}},
		"a time that is past": {send: join(rawRequest(1, hurried), rawCheck(3)), answers: []codes.Code{codes.DeadlineExceeded, codes.OK}},
		"an even stream":      {send: join(rawCheck(2), rawCheck(3)), answers: []codes.Code{codes.InvalidArgument, codes.OK}},
		"the last stream":     {send: rawCheck(1<<32 - 1), answers: []codes.Code{codes.OK}},
		"a kind from the future": {
			send: join(rawFrame(4, 1, 99, 255, []byte("hello"[:4])), rawFrame(0, 5, kindResponse, 0, nil), rawCheck(7)), answers: []codes.Code{codes.OK},
		},
		// Nothing here has streams: data is for nobody.
		"data for no stream":         {send: rawFrame(4, 1, kindData, 0, noise[:4]), ends: true},
		"the end of no stream":       {send: rawFrame(0, 1, kindData, flagRemoteClosed|flagNoData, nil), ends: true},
		"data for a waiting request": {send: join(rawRequest(1, wait), rawFrame(4, 1, kindData, 0, noise[:4])), ends: true},
		"the end of a waiting request": {
			send: join(rawRequest(1, wait), rawFrame(0, 1, kindData, flagRemoteClosed|flagNoData, nil)), ends: true,
		},
		"data after an answer": {send: join(rawCheck(1), rawFrame(4, 1, kindData, 0, noise[:4])), ends: true},
	}
}

// hold has a conversation and returns what is wrong with the answers.
func (v conversation) hold(conn net.Conn, limit time.Duration) error {
	if err := conn.SetDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	written := make(chan error, 1)
	go func() { // a server that hangs up does not read all of it
		_, err := conn.Write(v.send)
		written <- err
	}()
	want := make(map[codes.Code]int)
	for _, code := range v.answers {
		want[code]++
	}
	for range v.answers { // requests are served at once, answers come in any order
		_, code, err := readAnswer(conn)
		if err != nil {
			return fmt.Errorf("one of the answers %v: %w", v.answers, err)
		}
		want[code]--
	}
	for code, n := range want {
		if n != 0 {
			return fmt.Errorf("answers are not %v: %v", v.answers, code)
		}
	}
	if !v.ends {
		return <-written
	}
	for {
		_, code, err := readAnswer(conn)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("the connection did not end: %w", err)
		}
		if code != codes.OK { // of a request that came before
			return fmt.Errorf("answer %v", code)
		}
	}
}

// testGarbage speaks nonsense on the line itself. There is one line: where a caller ends, the next one
// begins, and if the guest sees the end too late, it is the next one whose call is lost.
func testGarbage(t *testing.T, c *conformance) {
	for what, v := range conversations() {
		v.ends = false // the end of a caller's time on the line is silence
		var err error
		for range 3 {
			conn := c.takeLine(t)
			err = v.hold(conn, holdLimit)
			c.redial(t, conn)
			if err == nil {
				break
			}
		}
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	// Requests in a row, whose answers nobody reads.
	conn := c.takeLine(t)
	flood := rawRequest(1, &ttrpc.Request{Service: "grpc.AgentService", Method: "GetMetrics"})
	_ = conn.SetWriteDeadline(time.Now().Add(time.Second))
	for stream := uint32(1); stream < 1_000; stream += 2 {
		binary.BigEndian.PutUint32(flood[4:], stream)
		if _, err := conn.Write(flood); err != nil {
			break
		}
	}
	c.redial(t, conn)
	// A caller that leaves with many requests waiting.
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

// takeLine hangs up, and takes the line for frames.
func (c *conformance) takeLine(t *testing.T) net.Conn {
	t.Helper()
	c.hangUp()
	time.Sleep(lineGap)
	conn, err := net.Dial("unix", c.socket)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// redial ends a conversation and calls until the agent answers. What it left unfinished may swallow a
// call or two, until the guest notices that the caller is gone.
func (c *conformance) redial(t *testing.T, conn net.Conn) {
	t.Helper()
	if conn != nil {
		conn.Close()
	}
	waitFor(t, "the agent after the last caller", func() error {
		c.hangUp()
		time.Sleep(lineGap)
		ctx, cancel := context.WithTimeout(t.Context(), lineLimit)
		defer cancel()
		if err := c.connect(ctx); err != nil {
			return err
		}
		// The answer may have been for the caller before, which numbers its calls alike.
		details, err := c.GetGuestDetails(ctx, &pb.GuestDetailsRequest{})
		if err == nil && details.GetAgentDetails().GetVersion() == "" {
			err = fmt.Errorf("got another call's answer, %v", details)
		}
		return err
	})
}
