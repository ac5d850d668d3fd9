package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/client"
)

var mcpCommand = &cli.Command{
	Name:      "mcp",
	Usage:     "connect an AI assistant on this machine to the server",
	UsageText: "msb mcp [--server URL]\n\nmsb mcp config claude|cursor|vscode",
	Description: "Speaks the Model Context Protocol on standard input and output, and passes it on to the server. Assistants\n" +
		"start it by themselves: 'msb mcp config' prints what to put into their settings.\n\n" +
		"The server and the key are MSB_SERVER_URL and MSB_API_KEY, which are looked for as 'msb sandbox --help' says.",
	Flags:       []cli.Flag{serverURLFlag},
	Subcommands: []*cli.Command{mcpConfig},
	Action: func(c *cli.Context) error {
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

// maxMessage is more than the server takes, so that what is too long gets its answer from there.
const maxMessage = 64 << 20

// bridge passes the messages of one assistant on to the server, each in a request of its own, as they were written.
//
// The transports of the MCP SDK do not do this. They decode each message: an id that is not an int64 comes back as another
// number. A line that is not JSON and an answer with status 401 end their connection, and they drop the server's message
// of an answer with status 401, 429 or 503.
type bridge struct {
	config *client.Config
	server *client.Client
	log    io.Writer

	mu  sync.Mutex
	out io.Writer
	// header is what was agreed on with initialize. Revisions that have no such exchange say it all in each message.
	header http.Header
	// running has what ends the requests whose answers are awaited, by the ids as they were written.
	running map[string]context.CancelCauseFunc
}

// errByClient is why a request ends that the assistant cancelled.
var errByClient = errors.New("cancelled by the assistant")

// serve returns when in has ended and all is answered, or nobody is left to read an answer, or ctx ends.
func (b *bridge) serve(ctx context.Context, in io.Reader) error {
	ctx, leave := context.WithCancel(ctx)
	defer leave()
	ended := make(chan error, 1)
	go func() {
		var sent sync.WaitGroup
		lines := bufio.NewScanner(in)
		lines.Buffer(nil, maxMessage)
		for lines.Scan() {
			if line := bytes.TrimSpace(bytes.Clone(lines.Bytes())); len(line) > 0 {
				b.receive(ctx, line, &sent)
			}
		}
		// The end of what it says need not be that of an assistant: it may still wait for answers.
		go func() {
			if waitForReader(ctx, b.out) {
				leave()
			}
		}()
		sent.Wait()
		ended <- lines.Err()
	}()
	select {
	case err := <-ended:
		if err != nil {
			return fmt.Errorf("read the assistant's messages: %w", err)
		}
		return nil
	case <-ctx.Done():
		return nil // it is how assistants end what they started
	}
}

// waitForReader returns true when nobody reads any more what is written to a pipe or a socket, and false when
// ctx ends first.
func waitForReader(ctx context.Context, w io.Writer) (gone bool) {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	for ctx.Err() == nil {
		fds := []unix.PollFd{{Fd: int32(f.Fd())}} // asks for nothing: the ends of things are told unasked
		if n, err := unix.Poll(fds, 500); n > 0 || err != nil && err != unix.EINTR {
			return n > 0 && fds[0].Revents&(unix.POLLERR|unix.POLLHUP) != 0
		}
	}
	return false
}

// mcpMessage is what has to be known of a message to pass it on.
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

// receive begins what a message asks for.
func (b *bridge) receive(ctx context.Context, line []byte, sent *sync.WaitGroup) {
	var m mcpMessage
	if json.Unmarshal(line, &m) != nil {
		m = mcpMessage{ID: jsontext.Value("null")} // the server says what is wrong with it
	}
	if m.Method == "notifications/cancelled" {
		// To the server, the end of a request is that of its run, in every revision.
		b.mu.Lock()
		defer b.mu.Unlock()
		if cancel := b.running[string(m.Params.RequestID)]; cancel != nil {
			cancel(errByClient)
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
	sent.Go(func() {
		err := b.send(ctx, m, line)
		b.mu.Lock()
		delete(b.running, id)
		b.mu.Unlock()
		if err != nil && context.Cause(ctx) != errByClient {
			b.fail(m, err)
		}
		cancel(nil)
	})
}

// send passes a message on and prints what the server says to it.
func (b *bridge) send(ctx context.Context, m mcpMessage, line []byte) error {
	res, err := b.server.MCP(ctx, line, b.headerOf(m))
	if err != nil {
		return err
	}
	defer res.Body.Close()
	answered := m.ID == nil
	deliver := func(text []byte) error {
		if m.Method == "initialize" {
			b.agree(text)
		}
		// An answer is the message without a method.
		var back mcpMessage
		if json.Unmarshal(text, &back) != nil || back.Method == "" {
			answered = true
		}
		return b.print(text)
	}
	if strings.HasPrefix(res.Header.Get("Content-Type"), "text/event-stream") {
		err = readEvents(res.Body, deliver)
	} else {
		var whole []byte
		if whole, err = io.ReadAll(res.Body); err == nil && len(whole) > 0 {
			err = deliver(whole)
		}
	}
	if err == nil && !answered {
		err = errors.New("the server ended the connection before it answered; try again")
	}
	return err
}

// headerOf is what HTTP is told of a message.
func (b *bridge) headerOf(m mcpMessage) http.Header {
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

// agree keeps the revision that an answer to initialize settles on: HTTP is told of it from then on.
func (b *bridge) agree(answer []byte) {
	var res struct {
		Result struct {
			Revision string `json:"protocolVersion"`
		} `json:"result"`
	}
	if json.Unmarshal(answer, &res) == nil && res.Result.Revision != "" {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.header = http.Header{"Mcp-Protocol-Version": {res.Result.Revision}}
	}
}

// fail answers what did not come to an answer of the server, or tells of it what wants no answer.
func (b *bridge) fail(m mcpMessage, err error) {
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

// print writes a message on a line of its own.
func (b *bridge) print(message jsontext.Value) error {
	if err := message.Compact(); err != nil {
		return fmt.Errorf("the server's answer is not JSON: %w", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	_, err := b.out.Write(append(message, '\n'))
	return err
}

// readEvents calls with the data of each server-sent event.
func readEvents(body io.Reader, event func(data []byte) error) error {
	lines := bufio.NewReader(body)
	var data []byte
	for {
		line, err := lines.ReadBytes('\n')
		if err == io.EOF {
			return nil // an event ends with an empty line
		}
		if err != nil {
			return fmt.Errorf("read the server's answer: %w", err)
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
