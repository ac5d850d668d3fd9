package rpc

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

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

// output starts a process with start and returns what it printed and its exit code. Its errors are those of start and of
// collect.
func (c *call) output(start func() (sandbox.Process, error)) (output []rpc.Line, exitCode int, err error) {
	var p sandbox.Process
	if c.Wait(func() { p, err = start() }); err != nil {
		return nil, 0, err
	}
	defer c.Wait(func() { _ = p.Close() })
	return collect(waitingProcess{p, c}, c.excerpt, c.Hold)
}

// waitingProcess is a process of a call, which waits for its events.
type waitingProcess struct {
	sandbox.Process
	call *call
}

func (p waitingProcess) Next() (event sandbox.Event, err error) {
	p.call.Wait(func() { event, err = p.Process.Next() })
	return event, err
}

// collect reads events until p exits, and returns the lines that p printed and its exit code. Before it keeps more
// output, it calls reserve with the additional bytes of encoded JSON; if that fails, collect returns the error. If excerpt
// is not 0, collect keeps only the beginning and the end of the output, together about excerpt bytes, and returns them as
// one line. The caller must close p, which ends the process if it still runs.
func collect(p sandbox.Process, excerpt int, reserve func(bytes int) error) (output []rpc.Line, exitCode int, err error) {
	l := lines{reserve: reserve}
	if excerpt != 0 {
		l.excerpt = &headTail{half: excerpt / 2}
		if err := reserve(2 * excerpt); err != nil {
			return nil, 0, err
		}
	}
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
	excerpt *headTail // if not nil, it gets the text instead of done
	done    []rpc.Line
	partial [2][]byte
	size    int
}

// add appends a piece of output. Its own error, for output over maxOutput, is an *rpc.Error; errors of reserve are
// returned unchanged.
func (l *lines) add(out sandbox.Output) error {
	cost := len(out.Data)
	if l.excerpt == nil {
		cost = jsonSize(out.Data)
	}
	if l.size += cost; l.size > maxOutput {
		return &rpc.Error{Code: rpc.CodeExhausted, Message: fmt.Sprintf("the output exceeds %d MiB, so the run was interrupted; "+
			"print less, or write to a file", maxOutput>>20)}
	}
	if l.excerpt == nil {
		if err := l.reserve(cost); err != nil {
			return err
		}
	}
	partial := &l.partial[0]
	if out.Stream == sandbox.Stderr {
		partial = &l.partial[1]
	}
	if l.excerpt != nil {
		l.addToExcerpt(out.Data, partial)
		return nil
	}
	data := out.Data
	if len(*partial) > 0 { // complete the line that has begun in an earlier piece
		line, rest, complete := bytes.Cut(data, newline)
		if *partial = append(*partial, line...); !complete {
			return nil
		}
		l.finish(out.Stream, string(*partial))
		*partial, data = (*partial)[:0], rest
	}
	if end := bytes.LastIndexByte(data, '\n'); end >= 0 {
		// These lines share the memory of one string, so that output with many short lines does not become as many objects.
		for line := range strings.SplitSeq(string(data[:end]), "\n") {
			l.finish(out.Stream, line)
		}
		data = data[end+1:]
	}
	*partial = append(*partial, data...)
	return nil
}

var newline = []byte{'\n'}

// addToExcerpt appends a piece of output to the excerpt, except its last line, which it keeps in partial until the line is
// complete or long.
func (l *lines) addToExcerpt(data []byte, partial *[]byte) {
	end := bytes.LastIndexByte(data, '\n') + 1
	if end > 0 {
		l.excerpt.Write(*partial)
		l.excerpt.Write(data[:end])
		*partial = (*partial)[:0]
	}
	if *partial = append(*partial, data[end:]...); len(*partial) > l.excerpt.half {
		l.excerpt.Write(*partial)
		*partial = (*partial)[:0]
	}
}

// end returns all lines, including a last line of each stream that has no newline. The result is never nil, so that it
// is encoded as an array.
func (l *lines) end() []rpc.Line {
	for i, stream := range []sandbox.Stream{sandbox.Stdout, sandbox.Stderr} {
		switch {
		case len(l.partial[i]) == 0:
		case l.excerpt != nil:
			l.excerpt.Write(append(l.partial[i], '\n'))
		default:
			l.finish(stream, string(l.partial[i]))
		}
	}
	if l.excerpt != nil && l.excerpt.size > 0 {
		l.done = []rpc.Line{{Stream: string(sandbox.Stdout), Text: strings.TrimSuffix(l.excerpt.String(), "\n")}}
	}
	if l.done == nil {
		return []rpc.Line{}
	}
	return l.done
}

func (l *lines) finish(stream sandbox.Stream, line string) {
	l.done = append(l.done, rpc.Line{Stream: string(stream), Text: strings.ToValidUTF8(line, "\uFFFD")})
}

// headTail keeps the first and the last half bytes of what is written to it. It holds at most three times half bytes.
type headTail struct {
	half       int
	size       int // bytes that were written
	head, tail []byte
}

func (h *headTail) Write(p []byte) {
	h.size += len(p)
	n := min(len(p), h.half-len(h.head))
	h.head = append(h.head, p[:n]...)
	if p = p[n:]; len(p) > h.half {
		p = p[len(p)-h.half:]
	}
	h.tail = append(h.tail, p...)
	if len(h.tail) > 2*h.half {
		h.tail = append(h.tail[:0], h.tail[len(h.tail)-h.half:]...)
	}
}

// String returns what was written as valid UTF-8. If bytes in the middle are left out, a line says how many.
func (h *headTail) String() string {
	head, tail := h.head, h.tail[max(0, len(h.tail)-h.half):]
	omitted := h.size - len(head) - len(tail)
	if omitted == 0 {
		return strings.ToValidUTF8(string(head)+string(tail), "\uFFFD")
	}
	// Do not replace the halves of a character that was cut.
	for range utf8.UTFMax - 1 {
		if r, n := utf8.DecodeLastRune(head); r != utf8.RuneError || n != 1 {
			break
		}
		head, omitted = head[:len(head)-1], omitted+1
	}
	for range utf8.UTFMax - 1 {
		if len(tail) == 0 || utf8.RuneStart(tail[0]) {
			break
		}
		tail, omitted = tail[1:], omitted+1
	}
	return fmt.Sprintf("%s\n[… %d bytes of the output are left out here; to read them, write the output to a file and print parts of it …]\n%s",
		strings.ToValidUTF8(string(head), "\uFFFD"), omitted, strings.ToValidUTF8(string(tail), "\uFFFD"))
}

// jsonSize estimates how many bytes a piece of output takes in a response.
func jsonSize(data []byte) int {
	size := 0
	for _, c := range data {
		size += int(jsonSizes[c])
	}
	return size
}

// jsonSizes has the size of each byte.
var jsonSizes = func() (sizes [256]uint8) {
	for c := range sizes {
		switch {
		case c == '\n':
			sizes[c] = 1 + lineCost
		case c < ' ': // \u0000
			sizes[c] = 6
		case c == '"', c == '\\':
			sizes[c] = 2
		case c >= 0x80: // may be invalid UTF-8, which is replaced by the three bytes of U+FFFD
			sizes[c] = 3
		default:
			sizes[c] = 1
		}
	}
	return sizes
}()
