package portal

import (
	"bytes"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

const (
	stdout = portalv1.Output_STREAM_STDOUT
	stderr = portalv1.Output_STREAM_STDERR
	tty    = portalv1.Output_STREAM_TERMINAL
)

const (
	// maxPiece is the largest piece of output, in bytes.
	maxPiece = 64 << 10
	// maxTerminal is more than the kernel buffers of the output of a terminal, in bytes: 8 KiB of the pseudo-terminal
	// and 4 KiB of its line discipline.
	maxTerminal = 16 << 10
)

// maxBacklog bounds the output, in bytes, that is kept while an interpreter starts. Further output is dropped.
const maxBacklog = 1 << 20

// These constants make pump batch output. Otherwise each line of a program that prints line by line would be sent as a
// message. After unbatchedReads reads without a pause of idlePause, in which there was nothing to read, pump waits
// batchDelay before a read of less than fullRead bytes, so that it reads more at once. It also does so before the first read
// after attach, because most runs of code print little and then end, and the output and the result are sent together. This does
// not delay the result of a run, because drain reads immediately.
const (
	unbatchedReads = 32
	idlePause      = 10 * time.Millisecond
	batchDelay     = 2 * time.Millisecond
	fullRead       = maxPiece / 2
)

// emitFunc receives a piece of output. It must not retain data.
type emitFunc func(stream portalv1.Output_Stream, data []byte) error

// output collects what a process and its descendants print into two pipes, or on a terminal.
//
// These sources are read until their last writer has closed them, by a discarder after the process's end. That may take
// long. A server in the background must not die of SIGPIPE because the command that started it has ended.
type output struct {
	// mu is held from the read of a piece until the piece has been emitted. Pieces are therefore emitted in the order
	// in which they were read. A goroutine that acquires mu knows that everything that was read has been emitted.
	mu sync.Mutex
	// sources are stdout and stderr, or a terminal. Messages of the portal go to the last one.
	sources []source
	// epoll watches the open sources. ready is the same descriptor as a file, which Go's poller watches.
	epoll       int
	ready       *os.File
	discard     *discarder
	buf         [maxPiece]byte
	emit        emitFunc
	attached    bool           // pump has found nothing to read since attach
	drained     chan struct{}  // gets a value, if there is room, when drain was called
	backlog     []backlogPiece // output to emit when attach is called
	backlogSize int            // bytes in backlog
}

// source is the non-blocking read end of a pipe, or the master of a terminal.
type source struct {
	stream portalv1.Output_Stream
	fd     int
	// open is true until the last writer has closed the source.
	open    bool
	midLine bool // the last byte was not a newline
}

type backlogPiece struct {
	stream portalv1.Output_Stream
	data   []byte
}

// newPipes returns an output of two new pipes, and their write ends, which the caller must close after it has started the
// process. The other parameters are those of newOutput.
func newPipes(emit emitFunc, discard *discarder) (_ *output, outEnd, errEnd *os.File, err error) {
	var fds []int
	defer func() {
		if err != nil {
			for _, fd := range fds {
				unix.Close(fd)
			}
		}
	}()
	var sources []source
	for _, stream := range []portalv1.Output_Stream{stdout, stderr} {
		var pair [2]int
		if err := unix.Pipe2(pair[:], unix.O_CLOEXEC); err != nil {
			return nil, nil, nil, os.NewSyscallError("pipe2", err)
		}
		fds = append(fds, pair[:]...)
		// Only the read end is non-blocking, because programs expect a blocking stdout.
		if err := unix.SetNonblock(pair[0], true); err != nil {
			return nil, nil, nil, os.NewSyscallError("fcntl", err)
		}
		sources = append(sources, source{stream: stream, fd: pair[0]})
	}
	o, err := newOutput(emit, discard, sources...)
	if err != nil {
		return nil, nil, nil, err
	}
	return o, os.NewFile(uintptr(fds[1]), "stdout"), os.NewFile(uintptr(fds[3]), "stderr"), nil
}

// newOutput returns an output of sources, whose descriptors it takes over unless it returns an error. If emit is nil, up
// to maxBacklog bytes are kept until attach is called. discard reads the sources after finish.
func newOutput(emit emitFunc, discard *discarder, sources ...source) (*output, error) {
	// A separate epoll instance reports which source became readable first. Go's poller does not.
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	if err := unix.SetNonblock(epoll, true); err != nil {
		unix.Close(epoll)
		return nil, os.NewSyscallError("fcntl", err)
	}
	for i := range sources {
		event := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(i)}
		if err := unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, sources[i].fd, &event); err != nil {
			unix.Close(epoll)
			return nil, os.NewSyscallError("epoll_ctl", err)
		}
		sources[i].open = true
	}
	o := &output{
		emit: emit, sources: sources, epoll: epoll, ready: os.NewFile(uintptr(epoll), "epoll"), discard: discard, drained: make(chan struct{}, 1),
	}
	go o.pump()
	return o, nil
}

// pump emits the output of the sources until their last writers have closed them, or finish was called.
func (o *output) pump() {
	defer o.ready.Close()
	raw, err := o.ready.SyscallConn()
	if err != nil {
		return
	}
	reads := 0
	var empty time.Time // when a read last found nothing
	_ = raw.Read(func(uintptr) (ended bool) {
		if time.Since(empty) > idlePause {
			reads = 0
		}
		for {
			o.mu.Lock()
			if reads++; o.incomplete(reads) {
				o.mu.Unlock()
				o.await()
				o.mu.Lock()
			}
			progress := o.read()
			ended = !o.open()
			o.mu.Unlock()
			if ended || !progress {
				empty = time.Now()
				return ended
			}
		}
	})
}

// open reports whether a source is open. The caller holds mu.
func (o *output) open() bool {
	return slices.ContainsFunc(o.sources, func(s source) bool { return s.open })
}

// incomplete reports whether the next read, which is the number reads without a pause, should wait for more bytes. The caller
// holds mu.
func (o *output) incomplete(reads int) bool {
	if !o.attached && reads <= unbatchedReads {
		return false
	}
	waiting := 0
	for _, s := range o.sources {
		if s.open {
			n, _ := unix.IoctlGetInt(s.fd, unix.TIOCINQ)
			waiting += n
		}
	}
	if o.attached && waiting == 0 {
		return false
	}
	o.attached = false
	select {
	case <-o.drained: // by an earlier drain
	default:
	}
	return waiting < fullRead
}

// await waits for batchDelay after incomplete, or for a drain if that comes first.
func (o *output) await() {
	timer := time.NewTimer(batchDelay)
	defer timer.Stop()
	select {
	case <-o.drained:
	case <-timer.C:
	}
}

// read emits the bytes that are in the sources, and reports whether there were any or a source has ended. It starts with
// the source that became readable first. It stops reading a source once it has read the bytes that were in it at the
// beginning, so that it returns even if a writer never stops. The caller holds mu.
func (o *output) read() (progress bool) {
	if !o.open() {
		return false
	}
	for _, i := range o.readySources() {
		s := &o.sources[i]
		waiting := maxTerminal
		if s.stream != tty {
			waiting, _ = unix.IoctlGetInt(s.fd, unix.TIOCINQ)
		}
		for more := true; more; {
			n, err := unix.Read(s.fd, o.buf[:])
			switch {
			case err == unix.EINTR:
			case err == unix.EAGAIN:
				more = false
			case n <= 0: // a terminal without writers returns EIO
				o.unwatch(s)
				unix.Close(s.fd)
				progress, more = true, false
			default:
				o.deliver(s, o.buf[:n])
				waiting -= n
				progress, more = true, waiting > 0
			}
		}
	}
	return progress
}

// readySources returns the indexes of the sources that have something to read, in the order in which they became
// readable. It always returns that of a terminal, because the kernel may not yet have moved what was printed on it to the
// buffer that epoll watches. A read waits for that.
func (o *output) readySources() []int32 {
	if o.sources[0].stream == tty {
		return []int32{0}
	}
	var events [2]unix.EpollEvent
	n, err := unix.EpollWait(o.epoll, events[:], 0)
	for err == unix.EINTR {
		n, err = unix.EpollWait(o.epoll, events[:], 0)
	}
	var ready []int32
	for _, event := range events[:max(n, 0)] {
		ready = append(ready, event.Fd)
	}
	return ready
}

// deliver emits data, or adds it to the backlog if there is no emit. The caller holds mu.
func (o *output) deliver(s *source, data []byte) {
	s.midLine = data[len(data)-1] != '\n'
	if o.emit != nil {
		// An error means that the caller of the run is gone. The context then ends the run.
		_ = o.emit(s.stream, data)
		return
	}
	data = data[:min(len(data), maxBacklog-o.backlogSize)]
	if len(data) > 0 {
		o.backlogSize += len(data)
		o.backlog = append(o.backlog, backlogPiece{s.stream, bytes.Clone(data)})
	}
}

// attach makes emit the receiver of all output that is printed after the call. If there was no receiver, emit gets the backlog
// first. The previous receiver is not called after attach has returned.
func (o *output) attach(emit emitFunc) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.read()
	for _, piece := range o.backlog {
		_ = emit(piece.stream, piece.data)
	}
	o.emit, o.backlog, o.backlogSize, o.attached = emit, nil, 0, true
}

// inOrder calls f after all output that was printed before the call has been emitted.
func (o *output) inOrder(f func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.read()
	f()
}

// finish emits the output that was printed before the call, and drops all later output. Nothing is emitted after it.
func (o *output) finish() {
	o.drain()
	o.mu.Lock()
	for i := range o.sources {
		if s := &o.sources[i]; s.open {
			o.unwatch(s)
			o.discard.add(s.fd)
		}
	}
	o.mu.Unlock()
	o.ready.Close() // waits until pump has ended
}

// unwatch ends the use of a source. Closing it would not remove it from epoll if a child that is just being forked holds
// it for a moment. Then epoll would report it again, when its descriptor may already be that of another file. The caller
// holds mu.
func (o *output) unwatch(s *source) {
	s.open = false
	_ = unix.EpollCtl(o.epoll, unix.EPOLL_CTL_DEL, s.fd, nil)
}

// drain emits all output that was printed before the call.
func (o *output) drain() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.read()
	select {
	case o.drained <- struct{}{}:
	default:
	}
}

// report emits a message of the portal on stderr, or on the terminal. If the process's last line there has no newline,
// report first ends it.
func (o *output) report(line string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := &o.sources[len(o.sources)-1]
	newline := "\n"
	if s.stream == tty {
		newline = "\r\n"
	}
	if s.midLine {
		line = newline + line
	}
	o.deliver(s, []byte(line+newline))
}

// maxQuote limits the output that an error quotes, in bytes.
const maxQuote = 1 << 10

// backlogText returns the end of the backlog of both streams as text. An interpreter that fails says why in its last lines.
func (o *output) backlogText() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	var text []byte
	for _, piece := range o.backlog {
		text = append(text, piece.data...)
	}
	if len(text) > maxQuote {
		return "…" + string(text[len(text)-maxQuote:])
	}
	return string(text)
}
