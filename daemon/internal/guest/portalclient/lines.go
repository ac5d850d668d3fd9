package portalclient

import (
	"bytes"
	"fmt"
	"strings"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// MaxOutput is how much a run may print, in bytes as JSON: each line counts lineCost more than its length,
// and a character that JSON escapes what that takes, so that neither a flood of empty lines nor one of
// control characters gets past the bound.
const (
	MaxOutput = 16 << 20
	lineCost  = 32
)

// lines assembles output into lines. The lines of the two streams are put together apart, and
// stand in the order in which they were completed.
type lines struct {
	// keep is asked before more is held; nil: there is no other bound than MaxOutput.
	keep    func(bytes int) error
	done    []sandbox.Line
	partial [2][]byte
	size    int
}

// add takes a piece of output. The error is sandbox.ErrOutputLimit.
func (l *lines) add(out *portalv1.Output) error {
	data := out.GetData()
	cost := jsonSize(data)
	if l.size += cost; l.size > MaxOutput {
		return fmt.Errorf("output exceeds %d MiB as JSON and the run was interrupted: print less, or write to a file: %w",
			MaxOutput>>20, sandbox.ErrOutputLimit)
	}
	if l.keep != nil {
		if err := l.keep(cost); err != nil {
			return err
		}
	}
	stream, partial := sandbox.Stdout, &l.partial[0]
	if out.GetStream() == portalv1.Output_STREAM_STDERR {
		stream, partial = sandbox.Stderr, &l.partial[1]
	}
	for {
		line, rest, complete := bytes.Cut(data, newline)
		*partial = append(*partial, line...)
		if !complete {
			return nil
		}
		l.finish(stream, partial)
		data = rest
	}
}

// end returns all lines, including last ones that no newline ended.
func (l *lines) end() []sandbox.Line {
	for i, stream := range []sandbox.Stream{sandbox.Stdout, sandbox.Stderr} {
		if len(l.partial[i]) > 0 {
			l.finish(stream, &l.partial[i])
		}
	}
	return l.done
}

func (l *lines) finish(stream sandbox.Stream, partial *[]byte) {
	l.done = append(l.done, sandbox.Line{Stream: stream, Text: strings.ToValidUTF8(string(*partial), "\uFFFD")})
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
		case c >= 0x80: // may be no UTF-8, and then U+FFFD
			size += 2
		}
	}
	return size
}
