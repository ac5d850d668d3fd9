package rpc

import (
	"bytes"
	"fmt"
	"io"
	"strings"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// maxOutput is how much a run may print, in bytes as JSON: each line counts lineCost more than its length,
// and a character that JSON escapes counts as what that takes, so that neither a flood of empty lines nor one of
// control characters gets past the bound.
const (
	maxOutput = 16 << 20
	lineCost  = 32
)

// collect reads a process to its end and returns all lines that it printed, and its exit code. hold is asked before
// more output is held; its error ends the process. The caller closes the process.
func collect(p sandbox.Process, hold func(bytes int) error) (output []rpc.Line, exitCode int, err error) {
	l := lines{hold: hold}
	for {
		event, err := p.Next()
		switch event := event.(type) {
		case sandbox.Output:
			if err := l.add(event); err != nil {
				return nil, 0, err
			}
		case sandbox.Exit:
			return l.end(), event.Code, nil
		case nil:
			if err == io.EOF {
				err = io.ErrUnexpectedEOF // there was no exit
			}
			return nil, 0, err
		}
	}
}

// lines assembles output into lines. The lines of the two streams are put together separately, and
// stand in the order in which they were completed.
type lines struct {
	hold    func(bytes int) error
	done    []rpc.Line
	partial [2][]byte
	size    int
}

// add takes a piece of output. Its error is an *rpc.Error.
func (l *lines) add(out sandbox.Output) error {
	cost := jsonSize(out.Data)
	if l.size += cost; l.size > maxOutput {
		return &rpc.Error{Code: rpc.CodeExhausted, Message: fmt.Sprintf("output exceeds %d MiB as JSON and the run was interrupted: print less, or write to a file: "+
			"output limit of the run reached", maxOutput>>20)}
	}
	if err := l.hold(cost); err != nil {
		return err
	}
	partial := &l.partial[0]
	if out.Stream == sandbox.Stderr {
		partial = &l.partial[1]
	}
	data := out.Data
	for {
		line, rest, complete := bytes.Cut(data, newline)
		*partial = append(*partial, line...)
		if !complete {
			return nil
		}
		l.finish(out.Stream, partial)
		data = rest
	}
}

// end returns all lines, including last ones that no newline ended. It is never nil.
func (l *lines) end() []rpc.Line {
	for i, stream := range []sandbox.Stream{sandbox.Stdout, sandbox.Stderr} {
		if len(l.partial[i]) > 0 {
			l.finish(stream, &l.partial[i])
		}
	}
	if l.done == nil {
		return []rpc.Line{}
	}
	return l.done
}

func (l *lines) finish(stream sandbox.Stream, partial *[]byte) {
	l.done = append(l.done, rpc.Line{Stream: string(stream), Text: strings.ToValidUTF8(string(*partial), "\uFFFD")})
	*partial = (*partial)[:0]
}

var newline = []byte{'\n'}

// jsonSize is about how many bytes a piece of output has in an answer.
func jsonSize(data []byte) int {
	size := len(data)
	for _, c := range data {
		switch {
		case c == '\n':
			size += lineCost
		case c < ' ': // \u0000
			size += 5
		case c == '"', c == '\\':
			size++
		case c >= 0x80: // may not be UTF-8, and then is U+FFFD
			size += 2
		}
	}
	return size
}
