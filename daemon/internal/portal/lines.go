package portal

import (
	"bytes"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/sandbox"
)

// MaxOutput is how much a run may print, in bytes. Each line counts lineCost more than its
// length, so that a flood of empty lines is bounded as well.
const (
	MaxOutput = 16 << 20
	lineCost  = 32
)

// lines assembles output into lines. The lines of the two streams are put together apart, and
// stand in the order in which they were completed.
type lines struct {
	done    []sandbox.Line
	partial [2][]byte
	size    int
}

// add takes a piece of output. The error is errdefs.ErrResourceExhausted.
func (l *lines) add(out *portalv1.Output) error {
	data := out.GetData()
	if l.size += len(data) + lineCost*bytes.Count(data, newline); l.size > MaxOutput {
		return fmt.Errorf("output exceeds %d MiB and the run was interrupted: print less, or write to a file: %w",
			MaxOutput>>20, errdefs.ErrResourceExhausted)
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
