package portal

import (
	"bytes"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

const (
	stdout = portalv1.Output_STREAM_STDOUT
	stderr = portalv1.Output_STREAM_STDERR
)

// maxBacklog bounds the output, in bytes, that is kept while no run of a REPL is in progress. Further output is
// dropped, so that a background thread that prints a lot neither blocks nor fills the memory.
const maxBacklog = 1 << 20

// These constants make pump batch output. Otherwise each line of a program that prints line by line would be sent as a
// message. After unbatchedReads reads without a pause of idlePause between them, pump waits batchDelay before each
// read, so that it reads more at once. This does not delay the result of a run, because drain reads immediately.
const (
	unbatchedReads = 32
	idlePause      = 10 * time.Millisecond
	batchDelay     = 2 * time.Millisecond
)

// emitFunc receives a piece of output. It must not retain data.
type emitFunc func(stream portalv1.Output_Stream, data []byte) error

// output collects what a process and its descendants print into two pipes.
//
// The pipes are read until their last writer has closed them, by a discarder after the process's end. That may take
// long. A server in the background must not die of SIGPIPE because the command that started it has ended.
type output struct {
	// mu is held from the read of a piece until the piece has been emitted. Pieces are therefore emitted in the order
	// in which they were read. A goroutine that acquires mu knows that everything that was read has been emitted.
	mu    sync.Mutex
	pipes [2]outputPipe
	// epoll watches the open pipes. ready is the same descriptor as a file, which Go's poller watches.
	epoll       int
	ready       *os.File
	discard     *discarder
	buf         [64 << 10]byte
	emit        emitFunc
	backlog     []backlogPiece // output to emit when attach is called
	backlogSize int            // bytes in backlog
}

// outputPipe is the read end of a pipe.
type outputPipe struct {
	stream portalv1.Output_Stream
	fd     int
	// open is true until the last writer has closed the pipe.
	open    bool
	midLine bool // the last byte was not a newline
}

type backlogPiece struct {
	stream portalv1.Output_Stream
	data   []byte
}

// newOutput returns an output and the write ends of its pipes, which the caller must close after it has started the
// process. If emit is nil, up to maxBacklog bytes are kept until attach is called. discard reads the pipes after finish.
func newOutput(emit emitFunc, discard *discarder) (_ *output, outEnd, errEnd *os.File, err error) {
	var fds []int
	defer func() {
		if err != nil {
			for _, fd := range fds {
				unix.Close(fd)
			}
		}
	}()
	// A separate epoll instance reports which pipe became readable first. Go's poller does not.
	ready, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, nil, nil, os.NewSyscallError("epoll_create1", err)
	}
	fds = append(fds, ready)
	if err := unix.SetNonblock(ready, true); err != nil {
		return nil, nil, nil, os.NewSyscallError("fcntl", err)
	}
	o := &output{emit: emit, epoll: ready, discard: discard}
	var ends [2]int
	for i, stream := range []portalv1.Output_Stream{stdout, stderr} {
		var pair [2]int
		if err := unix.Pipe2(pair[:], unix.O_CLOEXEC); err != nil {
			return nil, nil, nil, os.NewSyscallError("pipe2", err)
		}
		fds = append(fds, pair[:]...)
		// Only the read end is non-blocking, because programs expect a blocking stdout.
		if err := unix.SetNonblock(pair[0], true); err != nil {
			return nil, nil, nil, os.NewSyscallError("fcntl", err)
		}
		event := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(i)}
		if err := unix.EpollCtl(ready, unix.EPOLL_CTL_ADD, pair[0], &event); err != nil {
			return nil, nil, nil, os.NewSyscallError("epoll_ctl", err)
		}
		o.pipes[i] = outputPipe{stream: stream, fd: pair[0], open: true}
		ends[i] = pair[1]
	}
	o.ready = os.NewFile(uintptr(ready), "epoll")
	go o.pump()
	return o, os.NewFile(uintptr(ends[0]), "stdout"), os.NewFile(uintptr(ends[1]), "stderr"), nil
}

// pump emits the output in the pipes until their last writers have closed them, or finish was called.
func (o *output) pump() {
	defer o.ready.Close()
	raw, err := o.ready.SyscallConn()
	if err != nil {
		return
	}
	var last time.Time
	reads := 0
	_ = raw.Read(func(uintptr) (ended bool) {
		for {
			if time.Since(last) > idlePause {
				reads = 0
			}
			if reads++; reads > unbatchedReads {
				time.Sleep(batchDelay)
			}
			last = time.Now()
			o.mu.Lock()
			n := 0
			if ended = !o.pipes[0].open && !o.pipes[1].open; !ended {
				n = o.read()
				ended = !o.pipes[0].open && !o.pipes[1].open
			}
			o.mu.Unlock()
			if ended || n == 0 {
				return ended
			}
		}
	})
}

// read emits the bytes that are in the pipes, and returns how many pipes were readable. It starts with the pipe that
// became readable first. It stops reading a pipe once it has read the bytes that were in the pipe at the beginning, so
// that it returns even if a writer never stops. The caller holds mu.
func (o *output) read() int {
	var events [len(o.pipes)]unix.EpollEvent
	n, err := unix.EpollWait(o.epoll, events[:], 0)
	for err == unix.EINTR {
		n, err = unix.EpollWait(o.epoll, events[:], 0)
	}
	for _, event := range events[:max(n, 0)] {
		p := &o.pipes[event.Fd]
		waiting, _ := unix.IoctlGetInt(p.fd, unix.TIOCINQ)
		for {
			n, err := unix.Read(p.fd, o.buf[:])
			if err == unix.EINTR {
				continue
			}
			if n > 0 {
				o.deliver(p, o.buf[:n])
			} else if err != unix.EAGAIN {
				o.unwatch(p)
				unix.Close(p.fd)
			}
			if waiting -= n; waiting <= 0 || n <= 0 {
				break
			}
		}
	}
	return max(n, 0)
}

// deliver emits data, or adds it to the backlog if there is no emit. The caller holds mu.
func (o *output) deliver(p *outputPipe, data []byte) {
	p.midLine = data[len(data)-1] != '\n'
	if o.emit != nil {
		// An error means that the caller of the run is gone. The context then ends the run.
		_ = o.emit(p.stream, data)
		return
	}
	data = data[:min(len(data), maxBacklog-o.backlogSize)]
	if len(data) > 0 {
		o.backlogSize += len(data)
		o.backlog = append(o.backlog, backlogPiece{p.stream, bytes.Clone(data)})
	}
}

// attach makes emit the receiver of all output, starting with the backlog.
func (o *output) attach(emit emitFunc) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, piece := range o.backlog {
		_ = emit(piece.stream, piece.data)
	}
	o.emit, o.backlog, o.backlogSize = emit, nil, 0
}

// detach undoes attach. The function that was attached is not called after detach has returned.
func (o *output) detach() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.emit = nil
}

// finish emits the output that was printed before the call, and drops all later output. Nothing is emitted after it.
func (o *output) finish() {
	o.drain()
	o.mu.Lock()
	for i := range o.pipes {
		if p := &o.pipes[i]; p.open {
			o.unwatch(p)
			o.discard.add(p.fd)
		}
	}
	o.mu.Unlock()
	o.ready.Close() // waits until pump has ended
}

// unwatch ends the use of a pipe. Closing it would not remove it from epoll if a child that is just being forked holds it
// for a moment. Then epoll would report it again, when its descriptor may already be that of another file. The caller
// holds mu.
func (o *output) unwatch(p *outputPipe) {
	p.open = false
	_ = unix.EpollCtl(o.epoll, unix.EPOLL_CTL_DEL, p.fd, nil)
}

// drain emits all output that was printed before the call.
func (o *output) drain() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.pipes[0].open || o.pipes[1].open {
		o.read()
	}
}

// report emits a message of the portal on stderr. If the process's last line there has no newline, report first ends
// it.
func (o *output) report(line string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	p := &o.pipes[1]
	if p.midLine {
		line = "\n" + line
	}
	o.deliver(p, []byte(line+"\n"))
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
