package rpc

import (
	"bytes"
	"fmt"
	"io"
	"strings"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// maxOutput limits the output of one run, in bytes of encoded JSON. Each line counts lineCost bytes more than its text,
// and a character that JSON escapes counts with the length of its escape, so that floods of empty lines or of control
// characters cannot evade the limit.
const (
	maxOutput = 16 << 20
	lineCost  = 32
)

// collect reads events until p exits, and returns the lines that p printed and its exit code. Before it keeps more
// output, it calls reserve with the additional bytes of encoded JSON; if that fails, collect returns the error. The
// caller must close p, which ends the process if it still runs.
func collect(p sandbox.Process, reserve func(bytes int) error) (output []rpc.Line, exitCode int, err error) {
	l := lines{reserve: reserve}
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
				err = io.ErrUnexpectedEOF // the stream ended without an Exit event
			}
			return nil, 0, err
		}
	}
}

// lines splits output into lines. Each stream is split separately, and the lines of both streams are kept in the order
// in which they were completed.
type lines struct {
	reserve func(bytes int) error
	done    []rpc.Line
	partial [2][]byte
	size    int
}

// add appends a piece of output. Its own error, for output over maxOutput, is an *rpc.Error; errors of reserve are
// returned unchanged.
func (l *lines) add(out sandbox.Output) error {
	cost := jsonSize(out.Data)
	if l.size += cost; l.size > maxOutput {
		return &rpc.Error{Code: rpc.CodeExhausted, Message: fmt.Sprintf("the output exceeds %d MiB of JSON, so the run was interrupted; "+
			"print less, or write to a file", maxOutput>>20)}
	}
	if err := l.reserve(cost); err != nil {
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

// end returns all lines, including a last line of each stream that has no newline. The result is never nil, so that it
// is encoded as an array.
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

// jsonSize estimates how many bytes a piece of output takes in a response.
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
		case c >= 0x80: // may be invalid UTF-8, which is replaced by the three bytes of U+FFFD
			size += 2
		}
	}
	return size
}
