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

// maxBacklog bounds what is kept of the output that a REPL prints while no run is there to take it.
// What exceeds it is dropped, so that a chatty thread neither stalls nor fills the memory.
const maxBacklog = 1 << 20

// A program that prints a line at a time would have each one carried alone: after promptReads reads
// without a pause of calm between them, what is printed within gather is read together. Nobody
// waits for that: drain reads at once.
const (
	promptReads = 32
	calm        = 10 * time.Millisecond
	gather      = 2 * time.Millisecond
)

// emitFunc passes a piece of output on. It must not keep data.
type emitFunc func(stream portalv1.Output_Stream, data []byte) error

// output collects what a process and its descendants print into two pipes.
//
// The pipes are read until their last writer is gone, which may be long after the process: a
// server left in the background must not die of SIGPIPE because the command that started it ended.
type output struct {
	// mu is held from reading a piece until it was emitted: pieces are emitted as they were read,
	// and who holds it knows that nothing that was read is still on its way.
	mu    sync.Mutex
	pipes [2]outputPipe
	// epoll watches the open pipes, and Go's poller watches ready, which is the same.
	epoll   int
	ready   *os.File
	buf     [64 << 10]byte
	emit    emitFunc
	backlog []backlogPiece
	kept    int
}

// outputPipe is the read end of a pipe.
type outputPipe struct {
	stream portalv1.Output_Stream
	fd     int
	// open until the last writer is gone.
	open    bool
	midLine bool
}

type backlogPiece struct {
	stream portalv1.Output_Stream
	data   []byte
}

// newOutput returns an output and the write ends of its pipes, which the caller closes after it
// has started the process. Without an emit, output is kept until attach.
func newOutput(emit emitFunc) (_ *output, outEnd, errEnd *os.File, err error) {
	var fds []int
	defer func() {
		if err != nil {
			for _, fd := range fds {
				unix.Close(fd)
			}
		}
	}()
	// An epoll of our own says which pipe became readable first, which Go's poller does not.
	ready, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, nil, nil, os.NewSyscallError("epoll_create1", err)
	}
	fds = append(fds, ready)
	if err := unix.SetNonblock(ready, true); err != nil {
		return nil, nil, nil, os.NewSyscallError("fcntl", err)
	}
	o := &output{emit: emit, epoll: ready}
	var ends [2]int
	for i, stream := range []portalv1.Output_Stream{stdout, stderr} {
		var pair [2]int
		if err := unix.Pipe2(pair[:], unix.O_CLOEXEC); err != nil {
			return nil, nil, nil, os.NewSyscallError("pipe2", err)
		}
		fds = append(fds, pair[:]...)
		// Only our end: programs expect a blocking stdout.
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
	go o.follow()
	return o, os.NewFile(uintptr(ends[0]), "stdout"), os.NewFile(uintptr(ends[1]), "stderr"), nil
}

// follow emits what comes out of the pipes until their last writers are gone.
func (o *output) follow() {
	defer o.ready.Close()
	raw, err := o.ready.SyscallConn()
	if err != nil {
		return
	}
	var last time.Time
	reads := 0
	_ = raw.Read(func(uintptr) (ended bool) {
		for {
			if time.Since(last) > calm {
				reads = 0
			}
			if reads++; reads > promptReads {
				time.Sleep(gather)
			}
			last = time.Now()
			o.mu.Lock()
			n := o.read()
			ended = !o.pipes[0].open && !o.pipes[1].open
			o.mu.Unlock()
			if ended || n == 0 {
				return ended
			}
		}
	})
}

// read emits what is in the pipes, beginning with the one that became readable first, and returns
// how many were readable. It does not run after a writer that never stops. mu is held.
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
				o.pass(p, o.buf[:n])
			} else if err != unix.EAGAIN {
				p.open = false
				unix.Close(p.fd)
			}
			if waiting -= n; waiting <= 0 || n <= 0 {
				break
			}
		}
	}
	return max(n, 0)
}

// pass gives data to whoever takes the output. mu is held.
func (o *output) pass(p *outputPipe, data []byte) {
	p.midLine = data[len(data)-1] != '\n'
	if o.emit != nil {
		// An error means that nobody listens any more: the run ends by its context.
		_ = o.emit(p.stream, data)
		return
	}
	data = data[:min(len(data), maxBacklog-o.kept)]
	if len(data) > 0 {
		o.kept += len(data)
		o.backlog = append(o.backlog, backlogPiece{p.stream, bytes.Clone(data)})
	}
}

// attach makes emit the receiver of all output, beginning with what was printed since detach.
func (o *output) attach(emit emitFunc) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, piece := range o.backlog {
		_ = emit(piece.stream, piece.data)
	}
	o.emit, o.backlog, o.kept = emit, nil, 0
}

// detach ends what attach began: emit is not called after it.
func (o *output) detach() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.emit = nil
}

// discard emits what was printed before, and nothing that is printed later.
func (o *output) discard() {
	o.drain()
	o.mu.Lock()
	defer o.mu.Unlock()
	o.emit = func(portalv1.Output_Stream, []byte) error { return nil }
}

// drain returns when all that was printed before the call was emitted.
func (o *output) drain() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.pipes[0].open || o.pipes[1].open {
		o.read()
	}
}

// report adds a line of the portal's own to stderr.
func (o *output) report(line string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	p := &o.pipes[1]
	if p.midLine {
		line = "\n" + line
	}
	o.pass(p, []byte(line+"\n"))
}

// backlogText is what was printed without anyone to take it.
func (o *output) backlogText() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	var text []byte
	for _, piece := range o.backlog {
		text = append(text, piece.data...)
	}
	return string(text)
}
