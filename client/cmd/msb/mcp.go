package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/client"
)

var mcpCommand = &cli.Command{
	Name:      "mcp",
	Usage:     "connect an AI assistant on this machine to the server",
	UsageText: "msb mcp [options]\nmsb mcp config [options] claude|cursor|vscode",
	Description: "This command speaks the Model Context Protocol (MCP) on standard input and output and forwards the messages\n" +
		"to the server. Assistants start it themselves: 'msb mcp config' prints the configuration for them.\n\n" +
		"The server and the key are MSB_SERVER_URL and MSB_API_KEY; 'msb sandbox --help' says where they are looked up.",
	Flags:       []cli.Flag{serverURLFlag},
	Subcommands: []*cli.Command{mcpConfig},
	Action: func(c *cli.Context) error {
		if c.NArg() > 0 {
			return unknownCommand(c, c.Args().First())
		}
		if err := noArguments(c); err != nil {
			return err
		}
		config, err := client.LoadConfig(c.String(serverURLFlag.Name))
		if err != nil {
			return err
		}
		b := &bridge{config: config, server: config.Client(), out: c.App.Writer, log: c.App.ErrWriter, running: map[string]context.CancelCauseFunc{}}
		return b.serve(c.Context, c.App.Reader)
	},
}

// maxMessage is the longest message that is forwarded, in bytes. It is longer than the server accepts, so that the server
// answers a message that is too long.
const maxMessage = 64 << 20

// bridge forwards the messages of one assistant to the server, each in a separate request and byte for byte.
//
// The transports of the MCP SDK do not do this. They decode each message, so an id that is not an int64 comes back as a
// different number. A line that is not JSON or a response with status 401 ends their connection, and they drop the
// server's message in a response with status 401, 429 or 503.
type bridge struct {
	config *client.Config
	server *client.Client
	log    io.Writer

	mu  sync.Mutex
	out io.Writer
	// header has the protocol revision that initialize negotiated, and the label that the server gave the assistant with it.
	// Revisions without initialize state the revision in each message.
	header http.Header
	// running maps the id of each request in progress, as the assistant wrote it, to the function that cancels the request.
	running map[string]context.CancelCauseFunc
}

// errCanceledByAssistant is the cause of a request that the assistant canceled.
var errCanceledByAssistant = errors.New("canceled by the assistant")

// serve forwards the messages from in. It returns when in has ended and every message was answered, when in has ended and
// the assistant no longer reads the answers, or when ctx is done.
func (b *bridge) serve(ctx context.Context, in io.Reader) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		var requests sync.WaitGroup
		lines := bufio.NewScanner(in)
		lines.Buffer(nil, maxMessage)
		for lines.Scan() {
			if line := bytes.TrimSpace(bytes.Clone(lines.Bytes())); len(line) > 0 {
				b.receive(ctx, line, &requests)
			}
		}
		// The end of the input does not mean that the assistant has exited: it may still be waiting for answers.
		go func() {
			if waitReaderGone(ctx, b.out) {
				cancel()
			}
		}()
		requests.Wait()
		ended <- lines.Err()
	}()
	select {
	case err := <-ended:
		if err != nil {
			return fmt.Errorf("read the assistant's messages: %w", err)
		}
		return nil
	case <-ctx.Done():
		return nil // an assistant ends msb mcp with a signal
	}
}

// mcpMessage is the part of a message that the bridge needs to forward it.
type mcpMessage struct {
	ID     jsontext.Value `json:"id"`
	Method string         `json:"method"`
	Params struct {
		Meta struct {
			Revision string `json:"io.modelcontextprotocol/protocolVersion"`
		} `json:"_meta"`
		Name      string         `json:"name"`
		URI       string         `json:"uri"`
		RequestID jsontext.Value `json:"requestId"`
	} `json:"params"`
}

// receive handles a message from the assistant: it starts a request that forwards the message or, if the message is
// notifications/cancelled, cancels the request that it names.
func (b *bridge) receive(ctx context.Context, line []byte, requests *sync.WaitGroup) {
	var m mcpMessage
	if json.Unmarshal(line, &m) != nil {
		m = mcpMessage{ID: jsontext.Value("null")} // forwarded, because the server's answer says what is wrong
	}
	if m.Method == "notifications/cancelled" {
		// Canceling the HTTP request makes the server interrupt its run, in every revision of the protocol.
		b.mu.Lock()
		defer b.mu.Unlock()
		if cancel := b.running[string(m.Params.RequestID)]; cancel != nil {
			cancel(errCanceledByAssistant)
		}
		return
	}
	ctx, cancel := context.WithCancelCause(ctx)
	id := string(m.ID)
	b.mu.Lock()
	if m.ID != nil {
		b.running[id] = cancel
	}
	b.mu.Unlock()
	requests.Go(func() {
		err := b.send(ctx, m, line)
		b.mu.Lock()
		delete(b.running, id)
		b.mu.Unlock()
		if err != nil && context.Cause(ctx) != errCanceledByAssistant {
			b.replyError(m, err)
		}
		cancel(nil)
	})
}

// send forwards a message and prints the server's response. It is an error if the response does not contain an answer to
// a message that wants one.
func (b *bridge) send(ctx context.Context, m mcpMessage, line []byte) error {
	res, err := b.server.MCP(ctx, line, b.requestHeader(m))
	if err != nil {
		return err
	}
	defer res.Body.Close()
	answered := m.ID == nil || m.Method == "" // a notification, or a response
	deliver := func(text []byte) error {
		if m.Method == "initialize" {
			b.setHeader(text, res.Header.Get(labelHeader))
		}
		// Messages with a method are notifications and requests of the server; the answer has none.
		var reply mcpMessage
		if json.Unmarshal(text, &reply) != nil || reply.Method == "" {
			answered = true
		}
		return b.print(text)
	}
	if strings.HasPrefix(res.Header.Get("Content-Type"), "text/event-stream") {
		err = readEvents(res.Body, deliver)
	} else {
		var body []byte
		if body, err = io.ReadAll(res.Body); err == nil && len(body) > 0 {
			err = deliver(body)
		}
	}
	if err == nil && !answered {
		err = errors.New("the server closed the connection before it answered; try again")
	}
	return err
}

// requestHeader returns the HTTP header for a message.
func (b *bridge) requestHeader(m mcpMessage) http.Header {
	if m.Params.Meta.Revision == "" {
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.header
	}
	header := http.Header{"Mcp-Protocol-Version": {m.Params.Meta.Revision}, "Mcp-Method": {m.Method}}
	switch m.Method {
	case "tools/call", "prompts/get":
		header.Set("Mcp-Name", m.Params.Name)
	case "resources/read":
		header.Set("Mcp-Name", m.Params.URI)
	}
	return header
}

// labelHeader is the header by which the server recognizes the assistant, for example to know its log level.
const labelHeader = "Mcp-Session-Id"

// setHeader stores the protocol revision from the answer to initialize, and the label of the assistant unless it is empty, for the
// header of all later requests.
func (b *bridge) setHeader(answer []byte, label string) {
	var res struct {
		Result struct {
			Revision string `json:"protocolVersion"`
		} `json:"result"`
	}
	if json.Unmarshal(answer, &res) == nil && res.Result.Revision != "" {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.header = http.Header{"Mcp-Protocol-Version": {res.Result.Revision}}
		if label != "" {
			b.header.Set(labelHeader, label)
		}
	}
}

// replyError answers a message with an error. If the message is a notification, which gets no answer, it logs the error.
func (b *bridge) replyError(m mcpMessage, err error) {
	code := rpc.CodeInternal
	if e, ok := errors.AsType[*client.Error](err); ok {
		if e.Code != 0 {
			code = e.Code
		}
		err = nextStep(e, b.config, "")
	}
	if m.ID == nil {
		fmt.Fprintln(b.log, "msb: "+printable(err.Error()))
		return
	}
	answer, err := json.Marshal(rpc.Response{JSONRPC: rpc.Version, ID: m.ID, Error: &rpc.Error{Code: code, Message: err.Error()}}, jsontext.AllowInvalidUTF8(true))
	if err == nil {
		err = b.print(answer)
	}
	if err != nil {
		fmt.Fprintln(b.log, "msb: "+printable(err.Error()))
	}
}

// print writes a message to the assistant as one line.
func (b *bridge) print(message jsontext.Value) error {
	if err := message.Compact(); err != nil {
		return fmt.Errorf("the server's response is not JSON: %w", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	_, err := b.out.Write(append(message, '\n'))
	return err
}

// readEvents calls event with the data of each server-sent event in body.
func readEvents(body io.Reader, event func(data []byte) error) error {
	lines := bufio.NewReader(body)
	var data []byte
	for {
		line, err := lines.ReadBytes('\n')
		if err == io.EOF {
			return nil // an event without the empty line at its end is incomplete
		}
		if err != nil {
			return fmt.Errorf("read the server's response: %w", err)
		}
		line = bytes.TrimRight(line, "\r\n")
		if more, ok := bytes.CutPrefix(line, []byte("data:")); ok {
			if data != nil {
				data = append(data, '\n')
			}
			data = append(data, bytes.TrimPrefix(more, []byte(" "))...)
		}
		if len(line) == 0 && len(data) > 0 {
			if err := event(data); err != nil {
				return err
			}
			data = nil
		}
	}
}
