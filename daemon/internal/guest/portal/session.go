package portal

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

// A driver runs in an interpreter of the image. It has these descriptors, unless it is that of a shell, which repl.sh describes:
//
//	0     an anonymous file with the input of the run in progress
//	1, 2  pipes for the output of the code and of the processes that it starts
//	3     a stream socket: the driver itself and the token of the session; then for each run its token, a byte of flags, and
//	      two strings, each after its length (4 bytes, big endian): the options and the code. The options are the working
//	      directory and NAME=value entries, separated by NUL bytes. If they are empty, the run has none; if the directory is
//	      empty, it stays what it is.
//	4     a sequential packet socket for the messages below
//	5     a socket, if the language has interrupts: for each SIGINT the number of the run (4 bytes, little endian)
//
// A message of the driver has a token, a type and data. The code of a run can use the driver's sockets, so what arrives there
// is not trusted. Only who knows the token of a run can end it, and a token is of no use after that. A message with another
// token, or with that of a run while none is in progress, ends the session. So an answer either belongs to its run, or says
// that the state is lost.
//
// A pipe keeps the order of the output in it. To keep the order across both pipes, a driver that switches from one
// stream to the other within a run first sends a sync and waits for the portal to echo it. The portal echoes it after it has
// read everything that is in the pipes. To keep the order of output and displays, the portal reads what is in the pipes before
// it serves a piece of a display or error, and the driver sends a sync after the last piece and waits for the echo.
const (
	messageReady     = 'r' // with the session's token: the driver is ready for its first run
	messageBegun     = 'b' // of a shell, or with flagBegun: the run can be interrupted
	messageLate      = 'l' // with the session's token: a descriptor (1 or 2) and output that belongs to no run in progress
	messageSync      = 's' // a byte, which the portal echoes without a token
	messageInterrupt = 'i' // the driver asks for a SIGINT
	messageDisplay   = 'd' // a byte with the flags below, and a piece of the JSON text of a display, as in RunCodeResponse
	messageError     = 'e' // the same for an error
	messageEnd       = '.' // the exit code of the run, a byte
)

// flagFirst and flagLast, in the flags of a piece, say that it is the first or last one of its text. An interrupt can cut off a
// text, so that the last piece is missing.
const (
	flagLast  = 1
	flagFirst = 2
)

// These are flags of a run.
const (
	flagResults   = 1 // the driver sends displays and errors instead of printing them
	flagBegun     = 2 // the driver sends messageBegun
	flagRehearsal = 4 // the run does not count, and the driver forgets it
)

const (
	// tokenSize is the size of a token in bytes, which are letters and digits. It is that of rand.Text.
	tokenSize = 26
	// maxControl is the size of the longest message of a driver, in bytes.
	maxControl = 64 << 10
)

// newToken returns a token that nobody can guess.
func newToken() string { return rand.Text() }

// shellLines begin a run of a shell. See repl.sh.
const shellLines = "if __msb_go;then \\. /proc/self/fd/506 <&500 >&501 2>&502;else \\. /proc/self/fd/506 <&500 >&501 2>&502;fi;__msb_end\n" +
	"__msb_int\n__msb_int\n"

const (
	// startTimeout bounds the start of an interpreter. It is long because emulated machines are slow.
	startTimeout = time.Minute
	// interruptGrace is how long an interpreter has to react to an interrupt. After that, its process group is
	// interrupted. It is also how long an interpreter has to exit once its control socket is unusable.
	interruptGrace = time.Second
	// killTimeout is how long an interrupted interpreter has to end the run, unless the run has its own grace. After
	// that, it is killed and loses its state. An emulated interpreter on a busy host has taken more than 5 s.
	killTimeout = 15 * time.Second
	// shellInterrupts is the time between the interrupts of a shell. It needs some time for each.
	shellInterrupts = 50 * time.Millisecond
)

// session is an interpreter that runs the language's driver.
type session struct {
	*process
	language *language
	out      *output
	// log has what is printed while no run is in progress.
	log *program
	// input has the input of the run. A shell also has files for its options and its code.
	input, options, code *os.File
	runs, control        *os.File
	interrupts           *os.File // nil if the language has none
	token                string
	// ready is closed when the driver is ready, and ended gets the exit code of each run.
	ready chan struct{}
	ended chan byte
	// served is closed when no more messages of the driver are served.
	served chan struct{}

	mu      sync.Mutex
	current *execution // the run in progress
	count   uint32     // runs that have begun
	reason  string     // why the portal has killed the interpreter
}

// execution is a run in progress.
type execution struct {
	token string
	// begun is closed when the run can be interrupted.
	begun chan struct{}
	// since is when the portal gave the run to the interpreter, in the unit of processes.StartTime.
	since uint64
	// piece receives the pieces of displays and errors, which it must not retain.
	piece func(kind byte, piece *portalv1.Piece)
}

// executing returns the run in progress, or nil.
func (s *session) executing() *execution {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.current
}

// abandon ends the run in progress of a session whose process has exited. Its output and pieces are not received after that.
func (s *session) abandon() {
	s.awaitRest()
	s.mu.Lock()
	s.current = nil
	s.mu.Unlock()
}

// awaitRest waits until the messages and the output of a process that has exited have arrived.
func (s *session) awaitRest() {
	timeout := time.NewTimer(interruptGrace) // a child process may have the control socket
	defer timeout.Stop()
	select {
	case <-s.served:
	case <-timeout.C:
	}
	s.out.drain()
}

// startSession starts an interpreter in dir, or in the directory of the sandbox if dir is empty, and waits until it is ready. tag is
// the tag of its log. If tag is empty, no call can name the log until programs.show. Errors are gRPC statuses.
func (s *repls) startSession(ctx context.Context, language *language, user *account, e *portalv1.Environment, dir, tag string) (*session, error) {
	l := launch{argv: language.argv(), dir: dir}
	err := l.setUser(user)
	if err != nil {
		return nil, err
	}
	if l.env, err = environment(user, e.GetEnv()); err != nil {
		return nil, err
	}
	if dir == "" {
		err = l.setDirectory(e.GetWorkdir(), "")
	}
	if err != nil {
		return nil, err
	}
	l.path, err = lookPath(language.program, l.env, l.dir)
	if status.Code(err) == codes.ResourceExhausted {
		return nil, err
	}
	if err != nil {
		return nil, status.Errorf(codes.FailedPrecondition, "the image has no %s: %s; use a sandbox with an image that has it, such as %s",
			language.program, status.Convert(err).Message(), language.image)
	}
	started, err := s.launch(language, l, tag)
	if err != nil {
		return nil, err
	}
	timeout := time.NewTimer(startTimeout)
	defer timeout.Stop()
	select {
	case <-started.ready:
		started.out.attach(started.log.log)
		return started, nil
	case <-started.exited:
		started.out.drain()
		err = status.Errorf(codes.FailedPrecondition, "start %s: it %s: %s", language.program, started.exitText(),
			strings.TrimSpace(started.out.backlogText()))
	case <-timeout.C:
		err = status.Errorf(codes.FailedPrecondition, "start %s: not ready after %v", language.program, startTimeout)
	case <-ctx.Done():
		err = status.FromContextError(ctx.Err()).Err()
	}
	started.kill("it did not start")
	<-started.exited
	started.close()
	return nil, err
}

// launch starts the interpreter as l says, with the descriptors described above. It does not wait until it is ready.
func (s *repls) launch(language *language, l launch, tag string) (_ *session, err error) {
	started := &session{language: language, token: newToken(), ready: make(chan struct{}), ended: make(chan byte), served: make(chan struct{})}
	var childEnds []*os.File
	defer func() {
		for _, f := range childEnds {
			f.Close()
		}
		if err != nil {
			started.close()
			st := status.Convert(l.startError(language.program, err))
			code := codes.FailedPrecondition
			if st.Code() == codes.ResourceExhausted {
				code = st.Code()
			}
			err = status.Error(code, st.Message())
		}
	}()
	for _, file := range []**os.File{&started.input, &started.options, &started.code} {
		if *file, err = memoryFile(); err != nil {
			return nil, err
		}
		if !language.isShell {
			break
		}
	}
	var outEnd, errEnd, runsEnd, controlEnd, interruptsEnd *os.File
	if started.out, outEnd, errEnd, err = newPipes(nil, s.programs.discard); err != nil {
		return nil, err
	}
	childEnds = append(childEnds, outEnd, errEnd)
	if err := l.own(outEnd, errEnd); err != nil {
		return nil, err
	}
	if started.runs, runsEnd, err = socketPair(unix.SOCK_STREAM); err != nil {
		return nil, err
	}
	childEnds = append(childEnds, runsEnd)
	if started.control, controlEnd, err = socketPair(unix.SOCK_SEQPACKET); err != nil {
		return nil, err
	}
	childEnds = append(childEnds, controlEnd)
	beginning := language.driver + started.token
	switch {
	case language.isShell:
		null := s.programs.null
		l.files = []*os.File{runsEnd, null, null, controlEnd, started.options, started.code, started.input, outEnd, errEnd}
		beginning = language.driver + "__msb_ready " + started.token + "\n"
	case language.interrupts:
		if started.interrupts, interruptsEnd, err = socketPair(unix.SOCK_STREAM); err != nil {
			return nil, err
		}
		childEnds = append(childEnds, interruptsEnd)
		l.files = []*os.File{started.input, outEnd, errEnd, runsEnd, controlEnd, interruptsEnd}
	default:
		l.files = []*os.File{started.input, outEnd, errEnd, runsEnd, controlEnd}
	}

	// A socket has room for the driver, so this does not wait for the interpreter, which is started later. A pipe may be
	// too small: it has 64 KiB, but only one or two pages if the portal is not root and its user has many pipes.
	if _, err := started.runs.WriteString(beginning); err != nil {
		return nil, err
	}
	if started.process, err = s.programs.children.start(&l); err != nil {
		return nil, err
	}
	started.log = s.programs.adopt(started.process, started.awaitRest, l, tag)
	go started.serveControl()
	return started, nil
}

// socketPair returns the two ends of a socket of a kind: ours does not block, and the child inherits theirs.
func socketPair(kind int) (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	_ = unix.SetNonblock(fds[0], true)
	return os.NewFile(uintptr(fds[0]), "repl"), os.NewFile(uintptr(fds[1]), "repl"), nil
}

// memoryFile returns an anonymous file.
func memoryFile() (*os.File, error) {
	fd, err := unix.MemfdCreate("repl", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	return os.NewFile(uintptr(fd), "repl"), nil
}

// setFile makes data the content of an anonymous file. The interpreter has the same open file, so it reads from where the portal
// seeks to.
func setFile(file *os.File, data []byte) error {
	if err := file.Truncate(0); err != nil {
		return err
	}
	if _, err := file.WriteAt(data, 0); err != nil {
		return err
	}
	_, err := file.Seek(0, io.SeekStart)
	return err
}

// serveControl serves the driver's messages. It ends when the driver closes the control socket, or sends what no driver sends.
// Then the interpreter is exiting, or the user's code has tampered with the socket.
func (s *session) serveControl() {
	defer close(s.served)
	buf := make([]byte, maxControl)
	for {
		n, err := s.control.Read(buf)
		if err != nil || n == 0 {
			break
		}
		if !s.serveMessage(buf[:n]) {
			s.kill("the code has written to a descriptor of the REPL")
			return
		}
	}
	s.awaitExit()
}

// awaitExit waits until an interpreter that has closed a socket exits, and kills it after interruptGrace.
func (s *session) awaitExit() {
	timer := time.NewTimer(interruptGrace)
	defer timer.Stop()
	select {
	case <-s.exited:
	case <-timer.C:
		s.kill("the code has closed a descriptor of the REPL")
	}
}

// usable reports whether a run can begin. An interpreter that is exiting has closed its end of runs; then usable waits for its exit.
func (s *session) usable() bool {
	if s.running() && hungUp(s.runs) {
		s.awaitExit()
		<-s.exited
	}
	return s.running()
}

// hungUp reports whether no process has the other end of a socket.
func hungUp(socket *os.File) bool {
	fds := []unix.PollFd{{}} // the kernel reports POLLHUP without being asked for it
	if raw, err := socket.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			fds[0].Fd = int32(fd)
			_, _ = unix.Poll(fds, 0)
		})
	}
	return fds[0].Revents&unix.POLLHUP != 0
}

// serveMessage serves a message. It reports whether a driver sends such a message.
func (s *session) serveMessage(message []byte) (valid bool) {
	if len(message) <= tokenSize {
		return false
	}
	from, kind, data := string(message[:tokenSize]), message[tokenSize], message[tokenSize+1:]
	if from == s.token {
		return s.serveSessionMessage(kind, data)
	}
	s.mu.Lock()
	run := s.current
	if run == nil || run.token != from {
		s.mu.Unlock()
		return false
	}
	if kind == messageEnd {
		s.current = nil // from now on, its token is invalid
	}
	s.mu.Unlock()
	switch {
	case kind == messageBegun && len(data) == 0 && !isClosed(run.begun):
		close(run.begun)
	case kind == messageEnd && len(data) == 1:
		s.out.drain()
		select {
		case s.ended <- data[0]:
		case <-s.exited:
		}
	case kind == messageInterrupt && len(data) == 0:
		_ = s.signal(syscall.SIGINT)
	case kind == messageSync && len(data) == 1:
		s.out.drain()
		_, err := s.control.Write(data)
		return err == nil
	case (kind == messageDisplay || kind == messageError) && len(data) > 0 && data[0] <= flagFirst|flagLast:
		piece := &portalv1.Piece{Data: data[1:], First: data[0]&flagFirst != 0, Last: data[0]&flagLast != 0}
		s.out.inOrder(func() {
			if s.executing() == run {
				run.piece(kind, piece)
			}
		})
	default:
		return false
	}
	return true
}

// serveSessionMessage serves a message with the session's token.
func (s *session) serveSessionMessage(kind byte, data []byte) (valid bool) {
	switch {
	case kind == messageReady && len(data) == 0 && !isClosed(s.ready):
		close(s.ready)
		return true
	case kind == messageLate && len(data) > 1 && (data[0] == 1 || data[0] == 2):
		stream := stdout
		if data[0] == 2 {
			stream = stderr
		}
		return s.log.log(stream, data[1:]) == nil
	}
	return false
}

// isClosed reports whether a channel, to which nothing is sent, is closed.
func isClosed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// prepare puts the input of the run of req, and for a shell its options and code, into the files of the session.
func (s *session) prepare(req *portalv1.RunCodeRequest, run *execution, options []string) error {
	err := setFile(s.input, req.GetInput())
	if s.language.isShell {
		fields := run.token + "\x00" + strings.Join(options, "\x00") + "\x00"
		err = errors.Join(err, setFile(s.options, []byte(fields)), setFile(s.code, []byte(req.GetCode())))
	}
	return err
}

// maxKept is how much of the input and code of a run stays in memory after its end, in bytes.
const maxKept = 64 << 10

// tidy frees the memory of prepare if it is much.
func (s *session) tidy(req *portalv1.RunCodeRequest) {
	if len(req.GetInput())+len(req.GetCode()) > maxKept {
		_ = s.input.Truncate(0)
		if s.language.isShell {
			_ = s.code.Truncate(0)
		}
	}
}

// begin sends a run to the driver. The driver reads whenever no run is in progress, so the write blocks only if the code of an
// earlier run keeps the driver from reading.
func (s *session) begin(ctx context.Context, req *portalv1.RunCodeRequest, run *execution, options []string) error {
	s.mu.Lock()
	s.current = run
	if !req.GetRehearsal() {
		s.count++
	}
	s.mu.Unlock()
	run.since = now()
	if s.language.isShell {
		return writeUntil(ctx, s.runs, []byte(shellLines))
	}
	var flags byte
	if req.GetResults() {
		flags |= flagResults
	}
	if req.GetRehearsal() {
		flags |= flagRehearsal
	}
	if req.GetId() != "" {
		flags |= flagBegun
	} else {
		close(run.begun)
	}
	frame := append([]byte(run.token), flags)
	for _, text := range []string{strings.Join(options, "\x00"), req.GetCode()} {
		frame = binary.BigEndian.AppendUint32(frame, uint32(len(text)))
		frame = append(frame, text...)
	}
	return writeUntil(ctx, s.runs, frame)
}

// endRun interrupts a run until it ends. It returns the exit code of the run, or false if the interpreter has exited or had to be killed after
// grace, or after killTimeout if grace is nil.
func (s *session) endRun(run *execution, grace *durationpb.Duration) (code byte, ok bool) {
	timeout := killTimeout
	if grace != nil {
		timeout = grace.AsDuration()
	}
	kill := time.NewTimer(timeout)
	defer kill.Stop()
	begun := run.begun
	var signal, signalGroup <-chan time.Time
	for {
		select {
		case <-begun:
			begun = nil
			s.signalRun()
			ticker := time.NewTicker(interruptGrace)
			defer ticker.Stop()
			signalGroup = ticker.C
			if s.language.isShell {
				// A shell ignores SIGINT if the command that it waits for ends at that moment.
				ticker := time.NewTicker(shellInterrupts)
				defer ticker.Stop()
				signal = ticker.C
			}
		case code := <-s.ended:
			return code, true
		case <-signal:
			_ = s.signal(syscall.SIGINT)
		case <-signalGroup:
			_ = s.signalGroup(syscall.SIGINT)
		case <-kill.C:
			s.kill("the code did not end when it was interrupted")
			<-s.exited
			return 0, false
		case <-s.exited:
			return 0, false
		}
	}
}

// signalRun interrupts the interpreter. It may be waiting for a program that it started. So if it does not react, its process group
// is interrupted later, but not at first, because programs in the background should survive an interrupted run. Those of a shell
// ignore interrupts, so its process group is interrupted at once, as by a terminal.
func (s *session) signalRun() {
	s.sendNumber()
	if s.language.isShell {
		_ = s.signalGroup(syscall.SIGINT)
	} else {
		_ = s.signal(syscall.SIGINT)
	}
}

// kill kills the interpreter and everything in its process group. exitText then says why.
func (s *session) kill(reason string) {
	s.mu.Lock()
	if s.reason == "" {
		s.reason = reason
	}
	s.mu.Unlock()
	_ = s.signalGroup(syscall.SIGKILL)
}

// exitText describes how the interpreter ended, such as "exited with status 1".
func (s *session) exitText() string {
	s.mu.Lock()
	reason := s.reason
	s.mu.Unlock()
	switch why := s.outOfMemory(); {
	case !s.status.Signaled():
		return fmt.Sprintf("exited with status %d", s.status.ExitStatus())
	case why != "":
		return "was killed: " + why
	case reason != "" && s.status.Signal() == syscall.SIGKILL:
		return "was killed, because " + reason
	}
	return fmt.Sprintf("was killed by signal %d (%s)", s.status.Signal(), unix.SignalName(s.status.Signal()))
}

// close releases the portal's descriptors of a session whose process has exited or was not started.
func (s *session) close() {
	if s.out != nil {
		s.out.finish()
	}
	for _, f := range []*os.File{s.input, s.options, s.code, s.runs, s.control, s.interrupts} {
		f.Close() // which does nothing for nil
	}
}
