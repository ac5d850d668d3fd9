package rpc

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
	"github.com/msbd/msbd/daemon/internal/serve/wire"
)

// maxOutput limits the output of one run, in bytes of encoded JSON. Each line counts lineCost bytes more than its text,
// and a character that JSON escapes counts with the length of its escape, so that floods of empty lines or of control
// characters cannot evade the limit.
const (
	maxOutput = 16 << 20
	lineCost  = 32
)

// followed is what a process did while a call followed it.
type followed struct {
	output []rpc.Line // what it printed; empty in a stream of events
	// skipped is how many bytes it had printed before.
	skipped uint64
	exit    *sandbox.Exit // nil if it still runs
	reports *reports
}

// run is follow for a process that ends with the call. If it returns no error, the process has exited.
func (c *call) run(encoding rpc.Encoding, start func() (sandbox.Process, error)) (followed, error) {
	f, err := c.follow(encoding, start)
	if err == nil && f.exit == nil {
		err = io.ErrUnexpectedEOF
	}
	return f, err
}

// follow starts a process with start, or attaches to one, and reads its events to their end. Its errors are those of start
// and of collect. If the process was interrupted after it had begun, the error has its output.
func (c *call) follow(encoding rpc.Encoding, start func() (sandbox.Process, error)) (f followed, err error) {
	var p sandbox.Process
	if c.wait(func() { p, err = start() }); err != nil {
		return f, err
	}
	defer c.wait(func() { _ = p.Close() })
	out, err := c.newSink(encoding)
	if err != nil {
		return f, err
	}
	f.reports = &reports{quota: quota{reserve: c.Hold}, events: c.events, displays: []rpc.Display{}}
	f.reports.excerpt, _ = out.(*excerpt)
	f.skipped, f.exit, err = collect(waitingProcess{p, c}, out, f.reports)
	f.output = out.end()
	if err != nil {
		err = c.addOutput(err, f.output)
	}
	return f, err
}

// addOutput adds output to err, the error of a run that reached a limit, or that failed after it had printed something.
func (c *call) addOutput(err error, output []rpc.Line) error {
	e := *rpcerr.JSONRPC(err, c.ID)
	switch {
	case e.Code == rpc.CodeRunTimeout, e.Code == rpc.CodeRunFailed && len(output) > 0:
	case e.Code == rpc.CodeExhausted && e.Data == nil: // otherwise, nothing was started
	default:
		return err
	}
	partial := &rpc.PartialOutput{Output: output, TimedOut: e.Code == rpc.CodeRunTimeout}
	if c.excerpt == nil {
		partial.Output, partial.Truncated = headAndTail(output, rpc.PartialBytes)
	}
	if e.Code == rpc.CodeExhausted { // the output that exceeded the limit is missing
		partial.Truncated = true
	}
	e.Data = &rpc.ErrorData{PartialOutput: partial}
	return &e
}

// waitingProcess is a process of a call, which waits for its events.
type waitingProcess struct {
	sandbox.Process
	call *call
}

func (p waitingProcess) Next() (event sandbox.Event, err error) {
	p.call.wait(func() { event, err = p.Process.Next() })
	return event, err
}

// collect passes the output of p to out, and what it reports to reports, until p exits or its events end. Then exit is nil. skipped
// is how much p had printed before. The caller must close p, which ends a run that has not exited.
func collect(p sandbox.Process, out sink, reports *reports) (skipped uint64, exit *sandbox.Exit, err error) {
	for {
		event, err := p.Next()
		switch event := event.(type) {
		case sandbox.Started:
			skipped = event.SkippedBytes
		case sandbox.Output:
			if err := out.add(event); err != nil {
				return skipped, nil, err
			}
		case sandbox.Piece:
			if err := reports.add(event); err != nil {
				return skipped, nil, err
			}
		case sandbox.Exit:
			return skipped, &event, nil
		case nil:
			if err == io.EOF {
				err = nil
			}
			return skipped, nil, err
		}
	}
}

// sink takes the output of a process.
type sink interface {
	// add takes a piece of output, unless it returns an error.
	add(sandbox.Output) error
	// end returns the output for the result of the call. It is not nil, so that it is encoded as an array.
	end() []rpc.Line
}

// newSink returns the sink that the response to c needs.
func (c *call) newSink(encoding rpc.Encoding) (sink, error) {
	switch {
	case c.outputEvents:
		return &eventSink{events: c.events, encoding: encoding, incomplete: map[sandbox.Stream][]byte{}}, nil
	case c.excerpt != nil:
		return newExcerpt(c.excerpt, c.newOutputFile, c.Hold)
	case encoding == rpc.EncodingBase64:
		return &pieces{quota: quota{reserve: c.Hold}}, nil
	default:
		return &lines{quota: quota{reserve: c.Hold}}, nil
	}
}

// quota counts the output of a run.
type quota struct {
	size int
	// reserve counts more bytes of encoded JSON, before they are kept.
	reserve func(bytes int) error
}

// take counts n more bytes. Its own error, for output over maxOutput, is an *rpc.Error; errors of reserve are returned
// unchanged.
func (q *quota) take(n int) error {
	if q.size += n; q.size > maxOutput {
		return &rpc.Error{Code: rpc.CodeExhausted, Message: fmt.Sprintf("the output exceeds %d MiB, so the run was interrupted; "+
			"print less, or write to a file", maxOutput>>20)}
	}
	return q.reserve(n)
}

// lines splits output into lines. Each stream is split separately, and the lines of all streams are kept in the order
// in which they began.
type lines struct {
	quota
	done    []rpc.Line
	partial partialLines
	// begun has the index in done of the partial line of each stream that has one.
	begun [len(streams)]int
}

// partialLines has the last line of each stream, which is not complete yet.
type partialLines [len(streams)][]byte

// streams are the streams of a process. A process has either the first two or the last one.
var streams = [...]sandbox.Stream{sandbox.Stdout, sandbox.Stderr, sandbox.Terminal}

// of returns the partial line of a stream.
func (p *partialLines) of(stream sandbox.Stream) *[]byte { return &p[indexOf(stream)] }

// indexOf returns the index of a stream in streams.
func indexOf(stream sandbox.Stream) int { return max(0, slices.Index(streams[:], stream)) }

func (l *lines) add(out sandbox.Output) error {
	if err := l.take(jsonSize(out.Data)); err != nil {
		return err
	}
	partial, data := l.partial.of(out.Stream), out.Data
	if len(*partial) > 0 { // complete the line that has begun in an earlier piece
		line, rest, complete := bytes.Cut(data, newline)
		if *partial = append(*partial, line...); !complete {
			return nil
		}
		l.complete(indexOf(out.Stream))
		data = rest
	}
	if end := bytes.LastIndexByte(data, '\n'); end >= 0 {
		// These lines share the memory of one string, so that output with many short lines does not become as many objects.
		for line := range strings.SplitSeq(string(data[:end]), "\n") {
			l.begin(out.Stream, line)
		}
		data = data[end+1:]
	}
	if len(data) > 0 {
		l.begun[indexOf(out.Stream)] = len(l.done)
		l.begin(out.Stream, "")
		*partial = append(*partial, data...)
	}
	return nil
}

var newline = []byte{'\n'}

// end returns all lines, including a last line of each stream that has no newline.
func (l *lines) end() []rpc.Line {
	for i, partial := range l.partial {
		if len(partial) > 0 {
			l.complete(i)
		}
	}
	if l.done == nil {
		return []rpc.Line{}
	}
	return l.done
}

func (l *lines) begin(stream sandbox.Stream, line string) {
	l.done = append(l.done, rpc.Line{Stream: string(stream), Text: strings.ToValidUTF8(line, "\uFFFD")})
}

// complete gives a line of which only the beginning was known its text. i is the index of its stream.
func (l *lines) complete(i int) {
	l.done[l.begun[i]].Text = strings.ToValidUTF8(string(l.partial[i]), "\uFFFD")
	l.partial[i] = l.partial[i][:0]
}

// pieces keeps output as it was read.
type pieces struct {
	quota
	done []rpc.Line
}

func (p *pieces) add(out sandbox.Output) error {
	if err := p.take(base64.StdEncoding.EncodedLen(len(out.Data)) + lineCost); err != nil {
		return err
	}
	p.done = append(p.done, rpc.Line{Stream: string(out.Stream), Base64: slices.Clone(out.Data)})
	return nil
}

func (p *pieces) end() []rpc.Line {
	if p.done == nil {
		return []rpc.Line{}
	}
	return p.done
}

// excerpt keeps only the beginning and the end of output, as one line. If it leaves something out, all of the output is in a
// file of the sandbox, if possible.
type excerpt struct {
	quota
	wanted  *wire.Excerpt
	text    headTail
	partial partialLines
	newFile func() *outputFile // nil if no file is wanted
	file    *outputFile        // nil unless something is left out
}

// newExcerpt returns an excerpt of about wanted.Bytes bytes. Its error is that of reserve.
func newExcerpt(wanted *wire.Excerpt, newFile func() *outputFile, reserve func(bytes int) error) (*excerpt, error) {
	e := &excerpt{
		quota: quota{reserve: func(int) error { return nil }}, wanted: wanted, text: headTail{half: wanted.Bytes / 2}, newFile: newFile,
	}
	return e, reserve(2 * wanted.Bytes)
}

// add keeps the last line of each stream in partial until the line is complete or long, so that lines stay complete.
func (e *excerpt) add(out sandbox.Output) error {
	if err := e.take(len(out.Data)); err != nil {
		return err
	}
	partial := e.partial.of(out.Stream)
	end := bytes.LastIndexByte(out.Data, '\n') + 1
	if end > 0 {
		e.write(*partial)
		e.write(out.Data[:end])
		*partial = (*partial)[:0]
	}
	if *partial = append(*partial, out.Data[end:]...); len(*partial) > e.text.half {
		e.write(*partial)
		*partial = (*partial)[:0]
	}
	return nil
}

// write adds p to the text. As long as the text has everything, the file can still be begun with it.
func (e *excerpt) write(p []byte) {
	if e.newFile != nil && e.file == nil && e.text.size+len(p) > 2*e.text.half {
		e.file = e.newFile()
		e.file.write(e.text.head)
		e.file.write(e.text.tail)
	}
	if e.file != nil {
		e.file.write(p)
	}
	e.text.Write(p)
}

func (e *excerpt) end() []rpc.Line {
	for _, partial := range e.partial {
		if len(partial) > 0 {
			e.write(append(partial, '\n'))
		}
	}
	if e.text.size == 0 {
		return []rpc.Line{}
	}
	rest := "to read them, write the output to a file and print parts of it"
	if e.file != nil {
		if e.wanted.File = e.file.finish(); e.wanted.File != nil {
			rest = "all of it is in the file " + e.wanted.File.Path + " of the sandbox"
		}
	}
	return []rpc.Line{{Stream: string(sandbox.Stdout), Text: strings.TrimSuffix(e.text.String(rest), "\n")}}
}

// eventSink sends output as events. It keeps nothing but the incomplete last character of each stream.
type eventSink struct {
	events     *events
	encoding   rpc.Encoding
	incomplete map[sandbox.Stream][]byte
}

func (s *eventSink) add(out sandbox.Output) error {
	if s.encoding == rpc.EncodingBase64 {
		return s.events.send(rpc.EventOutput, rpc.Line{Stream: string(out.Stream), Base64: out.Data})
	}
	text := out.Data
	if begun := s.incomplete[out.Stream]; len(begun) > 0 {
		text = append(begun, text...)
	}
	complete := completeRunes(text)
	s.incomplete[out.Stream] = slices.Clone(text[complete:])
	if complete == 0 {
		return nil
	}
	return s.events.send(rpc.EventOutput, rpc.Line{Stream: string(out.Stream), Text: string(text[:complete])})
}

// end sends what is left of incomplete characters.
func (s *eventSink) end() []rpc.Line {
	for _, stream := range streams {
		if text := s.incomplete[stream]; len(text) > 0 {
			_ = s.events.send(rpc.EventOutput, rpc.Line{Stream: string(stream), Text: string(text)}) // if it fails, so does the result
		}
	}
	return []rpc.Line{}
}

// completeRunes returns the length of text without the beginning of a character at its end.
func completeRunes(text []byte) int {
	for n := len(text) - 1; n >= 0 && n > len(text)-utf8.UTFMax; n-- {
		if utf8.RuneStart(text[n]) {
			if !utf8.FullRune(text[n:]) {
				return n
			}
			break
		}
	}
	return len(text)
}

// headAndTail returns the first and the last half bytes of output, if there are more. Each line counts one byte more than its
// text.
func headAndTail(output []rpc.Line, half int) (kept []rpc.Line, cut bool) {
	size := 0
	for _, l := range output {
		size += lineSize(l)
	}
	if size <= 2*half {
		return output, false
	}
	head, room := 0, half
	for ; lineSize(output[head]) <= room; head++ {
		room -= lineSize(output[head])
	}
	kept = append(kept, output[:head]...)
	if room > 0 {
		kept = append(kept, firstBytes(output[head], room))
	}
	tail, room := len(output), half
	for ; lineSize(output[tail-1]) <= room; tail-- {
		room -= lineSize(output[tail-1])
	}
	if room > 0 {
		kept = append(kept, lastBytes(output[tail-1], room))
	}
	return append(kept, output[tail:]...), true
}

func lineSize(l rpc.Line) int { return len(l.Text) + len(l.Base64) + 1 }

// firstBytes returns the first n bytes of a line, without the beginning of a character at their end.
func firstBytes(l rpc.Line, n int) rpc.Line {
	if l.Base64 != nil {
		l.Base64 = l.Base64[:n]
		return l
	}
	for n > 0 && n < len(l.Text) && !utf8.RuneStart(l.Text[n]) {
		n--
	}
	l.Text = l.Text[:n]
	return l
}

// lastBytes returns the last n bytes of a line, without the end of a character at their beginning.
func lastBytes(l rpc.Line, n int) rpc.Line {
	if l.Base64 != nil {
		l.Base64 = l.Base64[len(l.Base64)-n:]
		return l
	}
	from := len(l.Text) - n
	for from < len(l.Text) && !utf8.RuneStart(l.Text[from]) {
		from++
	}
	l.Text = l.Text[from:]
	return l
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

// String returns what was written as valid UTF-8. If bytes in the middle are left out, a line says how many, and rest.
func (h *headTail) String(rest string) string {
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
	return fmt.Sprintf("%s\n[… %d bytes of the output are left out here; %s …]\n%s",
		strings.ToValidUTF8(string(head), "\uFFFD"), omitted, rest, strings.ToValidUTF8(string(tail), "\uFFFD"))
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
