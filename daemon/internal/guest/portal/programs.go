package portal

import (
	"bytes"
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

const (
	// maxRunning is how many programs run at a time that continue without their call.
	maxRunning = 64
	// maxEnded is how many programs that have ended are remembered.
	maxEnded = 64
	// maxInfo limits the arguments, and the environment, that ProcessInfo has, in bytes.
	maxInfo = 16 << 10
	// defaultGrace is the time between SIGTERM and SIGKILL at the time limit.
	defaultGrace = 2 * time.Second
)

// programs are the programs that StartProcess has started: those that run, and those of the last ones that have ended. The
// interpreters of contexts are among them. Programs of RunCommand are started here as well, but no other call can name them.
type programs struct {
	children *children
	discard  *discarder
	null     *os.File // the stdin of programs without input

	// mu guards the fields below, and the fields of each program that say so.
	mu      sync.Mutex
	all     []*program // in the order of their start
	ended   []*program // those of all without with_call that have ended, in the order of their end
	running int        // programs that count for maxRunning
	rings   int        // bytes of all ring buffers
}

// program is a program that StartProcess or RunCommand has started, or the interpreter of a context.
//
// Its output passes through three steps. The pump of out reads a piece and calls print. The piece then waits until every
// reader has sent it. Then it goes to the ring. So a ring changes only when no reader is behind.
//
// What an interpreter prints while no run is in progress does not wait for readers, because the next run would wait as well.
// It goes to the ring at once (see log), and a reader that the ring has overtaken is ended.
type program struct {
	*process
	programs *programs
	info     *portalv1.ProcessInfo // without exit and output_bytes
	out      *output               // nil for an interpreter, and after the end
	input    *input                // nil if the program has none
	// isInterpreter says that the program is the interpreter of a context.
	isInterpreter bool
	// hidden says that no call can name the program. It is guarded by programs.mu.
	hidden bool
	// done is closed when the program has ended and exit is set. Its output may not have been read yet.
	done chan struct{}
	exit *portalv1.ProcessExit

	// The fields below are guarded by programs.mu. changed is signaled when one of them changes.
	changed *sync.Cond
	ring    ring
	stream  portalv1.Output_Stream
	piece   []byte // printed after what is in ring; it has the stream above
	readers map[*reader]bool
	// finished says that all output has been printed.
	finished bool
}

// reader is a call that reads the output of a program.
type reader struct {
	next uint64 // the offset of the byte to send next
	end  uint64 // the offset at which to stop
}

// adopt lets calls name the interpreter of a context, which was started as l says, and returns it as a program. If tag is
// empty, calls can name it only after show. After the interpreter has exited, awaitRest waits for the rest of what it has printed.
func (s *programs) adopt(interpreter *process, awaitRest func(), l launch, tag string) *program {
	p := &program{
		process: interpreter, isInterpreter: true, hidden: tag == "", programs: s, done: make(chan struct{}), changed: sync.NewCond(&s.mu), readers: map[*reader]bool{},
		info: &portalv1.ProcessInfo{
			Pid: uint32(interpreter.pid), Argv: cut(l.argv), Tag: strings.ToValidUTF8(tag, "\uFFFD"),
			Cwd: strings.ToValidUTF8(l.dir, "\uFFFD"), User: strings.ToValidUTF8(l.user.name, "\uFFFD"), StartedAt: timestamppb.Now(),
		},
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = append(s.all, p)
	go func() {
		<-p.exited
		p.group.release()
		awaitRest()
		s.mu.Lock()
		defer s.mu.Unlock()
		p.exit = p.describeExit(false)
		close(p.done)
		if !p.hidden {
			s.ended = append(s.ended, p)
		}
		p.finished = true
		p.changed.Broadcast()
		s.forgetExcess()
	}()
	return p
}

// show lets calls name a program that adopt has hidden, as if it had just been started.
func (s *programs) show(p *program, tag string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p.hidden = false
	p.info.Tag, p.info.StartedAt = strings.ToValidUTF8(tag, "\uFFFD"), timestamppb.Now()
	s.all = append(slices.DeleteFunc(s.all, func(other *program) bool { return other == p }), p)
	if p.exit != nil {
		s.ended = append(s.ended, p)
	}
}

// describeExit describes how the program has ended.
func (p *program) describeExit(timedOut bool) *portalv1.ProcessExit {
	exit := &portalv1.ProcessExit{TimedOut: timedOut, ExitCode: exitCode(p.status), Reason: p.outOfMemory()}
	if p.status.Signaled() {
		exit.Signal = int32(p.status.Signal())
	}
	return exit
}

// start starts the program that req describes, and lets other calls name it. The returned reader gets its output from the
// beginning; the caller must call follow. If req has with_call, everything that the program has started is killed when call
// ends before the program. Errors are gRPC statuses.
func (s *programs) start(call context.Context, req *portalv1.StartProcessRequest) (*program, *reader, error) {
	if req.GetWithCall() {
		return s.launch(call, req, true)
	}
	if err := s.reserve(); err != nil {
		return nil, nil, err
	}
	p, r, err := s.launch(context.Background(), req, true)
	if err != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.running--
	}
	return p, r, err
}

// run is start for a program that only its call can name.
func (s *programs) run(call context.Context, req *portalv1.StartProcessRequest) (*program, *reader, error) {
	req.WithCall = true
	return s.launch(call, req, false)
}

// reserve counts a program without with_call that is about to start.
func (s *programs) reserve() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running >= maxRunning {
		return status.Errorf(codes.ResourceExhausted,
			"%d processes run in the sandbox, which is the most that can: end one of them, or wait until one ends", maxRunning)
	}
	s.running++
	return nil
}

// launch starts a program. Everything that it has started is killed when call ends before it. If named is true, other calls
// can name the program.
func (s *programs) launch(call context.Context, req *portalv1.StartProcessRequest, named bool) (*program, *reader, error) {
	argv := req.GetArgv()
	if len(argv) == 0 || argv[0] == "" {
		return nil, nil, status.Error(codes.InvalidArgument, "command is empty: name a program")
	}
	user, err := lookupUser(req.GetUser())
	if err != nil {
		return nil, nil, err
	}
	l := launch{argv: argv, terminal: req.GetTerminal() != nil}
	if err := l.setUser(user); err != nil {
		return nil, nil, err
	}
	if l.env, err = environment(user, req.GetEnvironment().GetEnv(), req.GetEnv()); err != nil {
		return nil, nil, err
	}
	if _, ok := getenv(l.env, "TERM"); l.terminal && !ok {
		l.env = append(l.env, "TERM=xterm-256color")
	}
	if err := l.setDirectory(req.GetEnvironment().GetWorkdir(), req.GetCwd()); err != nil {
		return nil, nil, err
	}
	if l.path, err = lookPath(argv[0], l.env, l.dir); err != nil {
		return nil, nil, err
	}
	first := &reader{end: 1<<64 - 1}
	p := &program{
		programs: s, done: make(chan struct{}),
		changed: sync.NewCond(&s.mu), readers: map[*reader]bool{first: true},
		info: &portalv1.ProcessInfo{
			Argv: cut(argv), Env: cut(req.GetEnv()), Tag: req.GetTag(), User: strings.ToValidUTF8(user.name, "\uFFFD"),
			Terminal: l.terminal, WithCall: req.GetWithCall(), StartedAt: timestamppb.Now(),
		},
	}
	if err := p.launch(&l, req); err != nil {
		return nil, nil, l.startError(argv[0], err)
	}
	p.info.Pid, p.info.Cwd = uint32(p.pid), strings.ToValidUTF8(l.dir, "\uFFFD")
	if p.input != nil {
		p.writeFirst(req.GetInput(), !req.GetOpenInput() && !l.terminal)
	}
	if named {
		s.mu.Lock()
		s.all = append(s.all, p)
		s.mu.Unlock()
	}
	go p.supervise(call.Done(), req.GetTimeout(), req.GetGrace())
	return p, first, nil
}

// launch opens the standard streams of the program and starts it.
func (p *program) launch(l *launch, req *portalv1.StartProcessRequest) (err error) {
	var childEnds []*os.File
	defer func() {
		for _, f := range childEnds {
			f.Close()
		}
		if err != nil {
			p.input.end()
			if p.out != nil {
				p.out.finish()
			}
		}
	}()
	if l.terminal {
		master, peer, err := openTerminal(req.GetTerminal())
		if err != nil {
			return err
		}
		childEnds = []*os.File{peer}
		p.input = newInput(master, true)
		if p.out, err = newTerminalOutput(p.print, p.programs.discard, master); err != nil {
			return err
		}
		l.files = []*os.File{peer, peer, peer}
	} else {
		in := p.programs.null
		if req.GetOpenInput() || len(req.GetInput()) > 0 {
			if p.input, in, err = newPipeInput(); err != nil {
				return err
			}
			childEnds = append(childEnds, in)
		}
		var out, errors *os.File
		if p.out, out, errors, err = newPipes(p.print, p.programs.discard); err != nil {
			return err
		}
		childEnds = append(childEnds, out, errors)
		l.files = []*os.File{in, out, errors}
	}
	if err := l.own(childEnds...); err != nil {
		return err
	}
	p.process, err = p.programs.children.start(l)
	return err
}

// writeFirst writes the beginning of the input in a goroutine. Later writes wait for it.
func (p *program) writeFirst(data []byte, end bool) {
	if len(data) == 0 && !end {
		return
	}
	_ = p.input.queue.acquire(context.Background()) // no other call knows the program yet
	go func() { _ = p.input.writeNext(context.Background(), data, end) }()
}

// supervise waits for the end of the program and its output. It kills everything that the program has started when killed
// is closed, and ends it at the time limit.
func (p *program) supervise(killed <-chan struct{}, timeout, grace *durationpb.Duration) {
	exit := p.describeExit(p.wait(killed, timeout, grace))
	p.input.end()
	p.group.release()
	s := p.programs
	s.mu.Lock()
	p.exit = exit
	close(p.done)
	if !p.info.GetWithCall() {
		s.ended = append(s.ended, p)
		s.running--
	}
	s.mu.Unlock()

	if exit.Reason != "" {
		p.out.drain()
		p.out.report("killed: " + exit.Reason)
	}
	p.out.finish()
	p.out = nil
	s.mu.Lock()
	defer s.mu.Unlock()
	p.finished = true
	p.changed.Broadcast()
	s.forgetExcess()
}

// wait waits until the program has ended, and reports whether it reached its time limit.
func (p *program) wait(killed <-chan struct{}, timeout, grace *durationpb.Duration) (timedOut bool) {
	var limit <-chan time.Time
	if d := timeout.AsDuration(); d > 0 {
		timer := time.NewTimer(d)
		defer timer.Stop()
		limit = timer.C
	}
	delay := defaultGrace
	if grace != nil {
		delay = grace.AsDuration()
	}
	for {
		select {
		case <-p.exited:
			return timedOut
		case <-killed:
			killed = nil
			_ = p.signalAll(syscall.SIGKILL)
		case <-limit:
			timedOut = true
			_ = p.signalAll(syscall.SIGTERM)
			// Not stopped when the program ends, because others in its cgroup may remain.
			time.AfterFunc(delay, func() { _ = p.signalAll(syscall.SIGKILL) })
		}
	}
}

// print hands a piece of output to the readers, and waits until each of them has sent it or is gone. It then puts the piece
// into the ring.
func (p *program) print(stream portalv1.Output_Stream, data []byte) error {
	s := p.programs
	s.mu.Lock()
	defer s.mu.Unlock()
	p.stream, p.piece = stream, data
	p.changed.Broadcast()
	for p.behind() {
		p.changed.Wait()
	}
	p.piece = nil
	if p.info.GetWithCall() {
		p.ring.skip(len(data))
	} else {
		p.ring.write(stream, data, s.growRings)
	}
	return nil
}

// log puts a piece of the output of an interpreter into the ring.
func (p *program) log(stream portalv1.Output_Stream, data []byte) error {
	s := p.programs
	s.mu.Lock()
	defer s.mu.Unlock()
	if !p.finished {
		p.ring.write(stream, data, s.growRings)
		p.changed.Broadcast()
	}
	return nil
}

// behind reports whether a reader has output to send. The caller holds programs.mu.
func (p *program) behind() bool {
	for r := range p.readers {
		if r.next < min(r.end, p.printed()) {
			return true
		}
	}
	return false
}

// printed returns how many bytes the program has printed. The caller holds programs.mu.
func (p *program) printed() uint64 { return p.ring.end + uint64(len(p.piece)) }

// endPatience is how long a reader that does not follow a program waits for the rest of its output after its end. Others that
// read slowly may delay that.
const endPatience = time.Second

// attach adds a reader. With replay, it begins with the output in the ring; with noFollow, it ends with what has been
// printed so far. The caller must call follow.
func (p *program) attach(replay, noFollow bool) *reader {
	s := p.programs
	s.mu.Lock()
	defer s.mu.Unlock()
	r := &reader{next: p.printed(), end: 1<<64 - 1}
	stop := func() {
		r.end = p.printed()
		p.changed.Broadcast()
	}
	switch {
	case !noFollow:
	case p.exit != nil && !p.finished: // the rest of the output is about to come
		time.AfterFunc(endPatience, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			stop()
		})
	default:
		stop()
	}
	if replay {
		r.next = p.ring.start
	}
	p.readers[r] = true
	return r
}

// follow calls started, and then output for each piece of output that r gets. It returns when r has all of it, ctx is done or a
// call returns an error. It then removes r. complete reports whether the program has ended, and r has got all of its output.
func (p *program) follow(ctx context.Context, r *reader, started func(skipped uint64) error, output emitFunc) (complete bool, err error) {
	s := p.programs
	stop := context.AfterFunc(ctx, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		p.changed.Broadcast()
	})
	defer stop()
	err = started(r.next)
	s.mu.Lock()
	defer s.mu.Unlock()
	for err == nil {
		if ctx.Err() != nil {
			err = status.FromContextError(ctx.Err()).Err()
		} else if r.next < min(r.end, p.ring.start) {
			err = status.Error(codes.ResourceExhausted, "the output was read too slowly, so that a part of it is lost")
		} else if r.next < min(r.end, p.printed()) {
			stream, data := p.stream, p.piece
			if r.next < p.ring.end {
				stream, data = p.ring.at(r.next)
			}
			// Neither the ring nor the piece of a program changes while r is behind.
			if p.isInterpreter {
				data = bytes.Clone(data)
			}
			s.mu.Unlock()
			err = output(stream, data)
			s.mu.Lock()
			r.next += uint64(len(data))
			p.changed.Broadcast()
		} else if p.finished || r.next >= r.end {
			break
		} else {
			p.changed.Wait()
		}
	}
	delete(p.readers, r)
	p.changed.Broadcast()
	s.forgetExcess()
	return p.finished && r.next == p.printed(), err
}

// growRings reserves n more bytes for ring buffers. If necessary, it empties those of the programs that ended first. It reports
// whether that worked. The caller holds mu.
func (s *programs) growRings(n int) bool {
	for _, p := range s.ended {
		if s.rings+n <= maxRings {
			break
		}
		if p.idle() {
			s.rings -= p.ring.discard()
		}
	}
	if s.rings+n > maxRings {
		return false
	}
	s.rings += n
	return true
}

// idle reports whether everything that the program has printed is in the ring, and nobody reads it. The caller holds
// programs.mu.
func (p *program) idle() bool { return p.finished && len(p.readers) == 0 }

// forgetExcess forgets programs that have ended: those with with_call, whose call has returned everything, and of the others
// so many that at most maxEnded are left. The caller holds mu.
func (s *programs) forgetExcess() {
	excess := len(s.ended) - maxEnded
	s.ended = slices.DeleteFunc(s.ended, func(p *program) bool {
		if excess <= 0 || !p.idle() {
			return false
		}
		excess--
		s.rings -= p.ring.discard()
		return true
	})
	s.all = slices.DeleteFunc(s.all, func(p *program) bool { return p.idle() && !slices.Contains(s.ended, p) })
}

// find returns the newest program with the pid or tag. Errors are gRPC statuses.
func (s *programs) find(selector *portalv1.ProcessSelector) (*program, error) {
	pid, tag := selector.GetPid(), selector.GetTag()
	if (pid == 0) == (tag == "") {
		return nil, status.Error(codes.InvalidArgument, "name the process by either its pid or its tag")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range slices.Backward(s.all) {
		if p.hidden {
			continue
		}
		if pid == p.info.GetPid() || tag != "" && tag == p.info.GetTag() {
			return p, nil
		}
	}
	if tag != "" {
		return nil, status.Errorf(codes.NotFound, "there is no process with the tag %q, or it ended long ago", tag)
	}
	return nil, status.Errorf(codes.NotFound, "there is no process %d, or it ended long ago", pid)
}

// list returns descriptions of all programs.
func (s *programs) list() []*portalv1.ProcessInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	var infos []*portalv1.ProcessInfo
	for _, p := range s.all {
		if p.hidden {
			continue
		}
		info := &portalv1.ProcessInfo{
			Pid: p.info.GetPid(), Argv: p.info.GetArgv(), Env: p.info.GetEnv(), Cwd: p.info.GetCwd(), User: p.info.GetUser(),
			Tag: p.info.GetTag(), Terminal: p.info.GetTerminal(), WithCall: p.info.GetWithCall(),
			StartedAt: p.info.GetStartedAt(), Exit: p.exit, OutputBytes: p.printed(),
		}
		infos = append(infos, info)
	}
	return infos
}

// cut returns a copy of texts that has at most maxInfo bytes. Each text counts one byte more than it has.
func cut(texts []string) []string {
	var copied []string
	left := maxInfo
	for _, text := range texts {
		if left <= 0 {
			break
		}
		end := min(len(text), left)
		for end < len(text) && !utf8.RuneStart(text[end]) {
			end--
		}
		copied = append(copied, string([]byte(text[:end])))
		left -= end + 1
	}
	return copied
}

var errProcessEnded = status.Error(codes.FailedPrecondition, "the process has ended")

// sendSignal sends a signal to the program, or with all to everything that it has started. Errors are gRPC statuses.
func (p *program) sendSignal(signal int32, all bool) error {
	if signal < 1 || signal > 64 {
		return status.Errorf(codes.InvalidArgument, "signal %d is invalid: use a number from 1 to 64", signal)
	}
	if !p.running() && !(all && p.group.populated()) {
		return errProcessEnded
	}
	send := p.signal
	if all {
		send = p.signalAll
	}
	switch err := send(syscall.Signal(signal)); {
	case errors.Is(err, errEnded):
		return errProcessEnded
	case err != nil:
		return status.Errorf(codes.FailedPrecondition, "send signal %d: %v", signal, err)
	}
	return nil
}
