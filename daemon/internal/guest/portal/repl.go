package portal

import (
	"context"
	_ "embed"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"slices"
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

// The drivers (repl.py and repl.js) run in the image's interpreters. Each has five descriptors:
//
//	0     an anonymous file with the input of the run in progress
//	1, 2  pipes for the output of the code and of the processes that it starts
//	3     socket "runs": the driver itself, then for each run two strings, each after its length (4 bytes, big endian):
//	      the options and the code. The options are the working directory and NAME=value entries, separated by NUL
//	      bytes. If they are empty, the run has none; if the directory is empty, it stays what it is.
//	4     socket "control": the single bytes below
//
// The interpreter's arguments are a short program that reads the driver and executes it. The driver itself would make
// the output of ps unreadable.
//
// A pipe keeps the order of the output in it. To keep the order across both pipes, a driver that switches from one
// stream to the other within a run first sends a sync byte and waits for the portal to echo it. The portal echoes the
// byte after it has read everything that is in the pipes.
const (
	controlReady  = 'r' // the driver is ready for its first run
	controlOK     = '+' // the run ended without an error
	controlFailed = '-' // the run ended with an error, which the driver has printed
	controlSync   = 0x80
)

//go:embed repl.py
var pythonDriver string

//go:embed repl.js
var nodeDriver string

const (
	// startTimeout bounds the start of an interpreter. It is long because emulated machines are slow.
	startTimeout = time.Minute
	// interruptGrace is how long an interpreter has to react to an interrupt. After that, its process group is
	// interrupted. It is also how long an interpreter has to exit once its control socket is unusable.
	interruptGrace = time.Second
	// killTimeout is how long an interrupted interpreter has to end the run, unless the run has its own grace. After
	// that, it is killed and loses its state. An emulated interpreter on a busy host has taken more than 5 s.
	killTimeout = 15 * time.Second
	// maxREPLs is how many REPLs a portal has.
	maxREPLs = 16
)

// interpreter says how to run code in a language.
type interpreter struct {
	name    string
	program string
	driver  string
	// option and loader are the interpreter's arguments. %d in loader is the size of the driver in bytes.
	option, loader string
}

var interpreters = map[portalv1.RunCodeRequest_Language]interpreter{
	portalv1.RunCodeRequest_LANGUAGE_PYTHON: {
		name: "python", program: "python3", driver: pythonDriver,
		option: "-c", loader: "import os; exec(os.read(3, %d))",
	},
	portalv1.RunCodeRequest_LANGUAGE_NODE: {
		name: "node", program: "node", driver: nodeDriver,
		// The name [eval] lets the driver recognize its own frames, as if it were the argument.
		option: "-e", loader: "{ const b = Buffer.alloc(%d); fs.readSync(3, b); vm.runInThisContext(b.toString(), '[eval]') }",
	},
}

// repls are the REPLs of a portal: one for each language and user that has been used. Runs that name no user
// share no REPL with those that name one, because the environment of the former is that of the image.
type repls struct {
	children *children
	discard  *discarder

	mu  sync.Mutex
	all map[replKey]*repl
}

// replKey has all that distinguishes the interpreters of two REPLs.
type replKey struct {
	language portalv1.RunCodeRequest_Language
	uid, gid uint32
	groups   string // empty if the processes have the credentials of the portal
	// name and home are those of a user who was named. Only then are they in the environment.
	name, home string
}

// newREPLKey returns the key of the REPL of account. credential is that of account.
func newREPLKey(language portalv1.RunCodeRequest_Language, account *account, credential *syscall.Credential) replKey {
	key := replKey{language: language, uid: account.uid, gid: account.gid}
	if credential != nil {
		key.groups = fmt.Sprint(slices.Sorted(slices.Values(credential.Groups)))
	}
	if account.named {
		key.name, key.home = account.name, account.home
	}
	return key
}

func newREPLs(c *children, discard *discarder) *repls {
	return &repls{children: c, discard: discard, all: make(map[replKey]*repl)}
}

// find returns the REPL of a language and a user, as in StartProcessRequest. The caller must call release. Errors are gRPC
// statuses.
func (s *repls) find(language portalv1.RunCodeRequest_Language, user string) (*repl, error) {
	interpreter, ok := interpreters[language]
	if !ok {
		return nil, status.Errorf(codes.InvalidArgument, "unknown language %v", language)
	}
	account, err := lookupUser(user)
	if err != nil {
		return nil, err
	}
	credential, err := account.credential()
	if err != nil {
		return nil, err
	}
	key := newREPLKey(language, account, credential)
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.all[key]
	if r == nil {
		if len(s.all) >= maxREPLs {
			s.forgetUnused()
		}
		if len(s.all) >= maxREPLs {
			return nil, status.Errorf(codes.ResourceExhausted,
				"the sandbox has REPLs of %d users and languages, which is the most that it can: run the code as one of these users", maxREPLs)
		}
		r = &repl{interpreter: interpreter, user: account, children: s.children, discard: s.discard, queue: make(queue, 1)}
		s.all[key] = r
	}
	r.runs++
	return r, nil
}

// release ends the use of a REPL that find has returned.
func (s *repls) release(r *repl) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.runs--
}

// forgetUnused forgets the REPLs that have no session, because it was never started or has ended. The caller holds mu.
func (s *repls) forgetUnused() {
	for key, r := range s.all {
		if r.runs > 0 || r.session != nil && r.session.running() {
			continue
		}
		if r.session != nil {
			r.session.close()
		}
		delete(s.all, key)
	}
}

// repl runs code in one language as one user, in a session that is started by the first run.
type repl struct {
	interpreter
	user     *account
	children *children
	discard  *discarder
	queue    queue    // held by the run in progress
	session  *session // used by the run that holds queue, and by forgetUnused while there is no run
	runs     int      // in progress or waiting; guarded by repls.mu
}

// run runs the code of req and passes its output to emit. It does not call emit after it has returned. success is false
// if the code raised an exception, exited with a code other than 0, or ended the interpreter.
func (r *repl) run(ctx context.Context, req *portalv1.RunCodeRequest, emit emitFunc) (success bool, err error) {
	options, err := r.options(req)
	if err != nil {
		return false, err
	}
	if err := r.queue.acquire(ctx); err != nil {
		return false, status.FromContextError(err).Err()
	}
	defer r.queue.release()

	if r.session != nil && !r.session.running() {
		r.reportExit(emit, " after the last run")
	}
	if r.session == nil {
		if r.session, err = r.start(ctx, req.GetEnvironment()); err != nil {
			return false, err
		}
	}
	s := r.session
	if err := s.setInput(req.GetInput()); err != nil {
		return false, status.Errorf(codes.ResourceExhausted, "pass the input to the %s process: %v", r.name, err)
	}
	s.oomKills = r.children.load.oomKills()
	s.out.attach(emit)
	ctx, cancel := withLimit(ctx, req.GetTimeout())
	defer cancel()
	if err := s.submit(ctx, options, req.GetCode()); err != nil {
		_ = s.signalGroup(syscall.SIGKILL)
	}
	var event byte // 0 if the session is lost
	select {
	case event = <-s.events:
	case <-s.exited:
	case <-ctx.Done():
		err = endError(ctx)
		if event = s.interrupt(req.GetGrace()); event == 0 {
			st := status.Convert(err)
			err = status.Errorf(st.Code(), "%s; the %s process %s and its state is lost", st.Message(), r.name, s.exitText())
		}
	}
	if event == 0 {
		r.reportExit(emit, "")
	} else {
		s.out.detach()
	}
	return event == controlOK, err
}

// options returns the options of a run, as its frame has them.
func (r *repl) options(req *portalv1.RunCodeRequest) (string, error) {
	if req.GetCwd() == "" && len(req.GetEnv()) == 0 {
		return "", nil
	}
	if err := checkEnv(req.GetEnv()); err != nil {
		return "", err
	}
	dir := ""
	if req.GetCwd() != "" {
		var err error
		if dir, err = directory(req.GetEnvironment().GetWorkdir(), req.GetCwd(), r.user.home); err != nil {
			return "", err
		}
	}
	return strings.Join(append([]string{dir}, req.GetEnv()...), "\x00"), nil
}

// reportExit releases a session whose process has exited. It passes to emit the remaining output and a line that says
// how the process exited.
func (r *repl) reportExit(emit emitFunc, when string) {
	s := r.session
	r.session = nil
	s.out.attach(emit)
	s.out.drain()
	s.out.report(fmt.Sprintf("the %s process %s%s; its state is lost", r.name, s.exitText(), when))
	s.close()
}

// exitText describes how a process ended, such as "exited with status 1".
func (p *process) exitText() string {
	if !p.status.Signaled() {
		return fmt.Sprintf("exited with status %d", p.status.ExitStatus())
	}
	if why := p.outOfMemory(); why != "" {
		return "was killed: " + why
	}
	return fmt.Sprintf("was killed by signal %d (%s)", p.status.Signal(), unix.SignalName(p.status.Signal()))
}

// session is an interpreter that runs the language's driver.
type session struct {
	*process
	out *output
	// input is the interpreter's descriptor 0.
	input   *os.File
	runs    *os.File
	control *os.File
	// events carries the bytes that the driver sends, except for syncs.
	events chan byte
}

// start starts the interpreter and waits until it is ready.
func (r *repl) start(ctx context.Context, e *portalv1.Environment) (*session, error) {
	var l launch
	err := l.setUser(r.user)
	if err != nil {
		return nil, err
	}
	if l.env, err = environment(r.user, e.GetEnv()); err != nil {
		return nil, err
	}
	if l.dir, err = directory(e.GetWorkdir(), "", ""); err != nil {
		return nil, err
	}
	l.path, err = lookPath(r.program, l.env, l.dir)
	if status.Code(err) == codes.ResourceExhausted {
		return nil, err
	}
	if err != nil {
		return nil, status.Errorf(codes.FailedPrecondition, "the image has no %s: %s; use a sandbox with an image that has it, such as microsandbox/%s",
			r.program, status.Convert(err).Message(), r.name)
	}
	s, err := r.launch(l)
	if err != nil {
		return nil, err
	}
	timeout := time.NewTimer(startTimeout)
	defer timeout.Stop()
	select {
	case <-s.events:
		return s, nil
	case <-s.exited:
		s.out.drain()
		err = status.Errorf(codes.FailedPrecondition, "start %s: it %s: %s", r.program, s.exitText(),
			strings.TrimSpace(s.out.backlogText()))
	case <-timeout.C:
		err = status.Errorf(codes.FailedPrecondition, "start %s: not ready after %v", r.program, startTimeout)
	case <-ctx.Done():
		err = status.FromContextError(ctx.Err()).Err()
	}
	_ = s.signalGroup(syscall.SIGKILL)
	<-s.exited
	s.close()
	return nil, err
}

// launch starts the interpreter as l says, with the five descriptors described above. It does not wait until it is ready.
func (r *repl) launch(l launch) (_ *session, err error) {
	s := &session{events: make(chan byte)}
	var childEnds []*os.File
	defer func() {
		for _, f := range childEnds {
			f.Close()
		}
		if err != nil {
			s.close()
			st := status.Convert(l.startError(r.program, err))
			code := codes.FailedPrecondition
			if st.Code() == codes.ResourceExhausted {
				code = st.Code()
			}
			err = status.Error(code, st.Message())
		}
	}()
	memory, err := unix.MemfdCreate("stdin", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	s.input = os.NewFile(uintptr(memory), "stdin")
	l.files = []*os.File{s.input}
	var outEnd, errEnd, runsEnd, controlEnd *os.File
	if s.out, outEnd, errEnd, err = newPipes(nil, r.discard); err != nil {
		return nil, err
	}
	childEnds = append(childEnds, outEnd, errEnd)
	if err := l.own(outEnd, errEnd); err != nil {
		return nil, err
	}
	if s.runs, runsEnd, err = socketPair("runs"); err != nil {
		return nil, err
	}
	childEnds = append(childEnds, runsEnd)
	if s.control, controlEnd, err = socketPair("control"); err != nil {
		return nil, err
	}
	childEnds = append(childEnds, controlEnd)
	l.files = append(l.files, childEnds...)

	// A socket has room for the driver, so this does not wait for the interpreter, which is started later. A pipe may be
	// too small: it has 64 KiB, but only one or two pages if the portal is not root and its user has many pipes.
	if _, err := s.runs.WriteString(r.driver); err != nil {
		return nil, err
	}
	l.argv = []string{r.program, r.option, fmt.Sprintf(r.loader, len(r.driver))}
	if s.process, err = r.children.start(l); err != nil {
		return nil, err
	}
	go s.serveControl()
	return s, nil
}

// setInput makes data the input of the next run. The interpreter has the same open file, so it reads from where the
// portal seeks to.
func (s *session) setInput(data []byte) error {
	if err := s.input.Truncate(0); err != nil {
		return err
	}
	if _, err := s.input.WriteAt(data, 0); err != nil {
		return err
	}
	_, err := s.input.Seek(0, io.SeekStart)
	return err
}

// socketPair returns the two ends of a stream: ours does not block, and the child inherits theirs.
func socketPair(name string) (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	_ = unix.SetNonblock(fds[0], true)
	return os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name), nil
}

// serveControl echoes sync bytes and passes events to s.events. It ends when the driver closes the control socket, or
// when a byte arrives that no driver sends. Then the interpreter is exiting, or the user's code has tampered with the
// socket. If the interpreter has not exited interruptGrace later, serveControl kills its process group.
func (s *session) serveControl() {
	defer func() {
		timer := time.NewTimer(interruptGrace)
		defer timer.Stop()
		select {
		case <-s.exited:
		case <-timer.C:
			_ = s.signalGroup(syscall.SIGKILL)
		}
	}()
	var b [1]byte
	for {
		if _, err := s.control.Read(b[:]); err != nil {
			return
		}
		// Emit what was printed before the driver sent this byte, whatever the byte means.
		s.out.drain()
		switch {
		case b[0] >= controlSync:
			if _, err := s.control.Write(b[:]); err != nil {
				return
			}
		case b[0] == controlReady || b[0] == controlOK || b[0] == controlFailed:
			select {
			case s.events <- b[0]:
			case <-s.exited:
				return
			}
		default:
			return
		}
	}
}

// submit sends a run to the driver. The driver reads whenever no run is in progress, so the write blocks only if the code
// of an earlier run keeps the driver from reading.
func (s *session) submit(ctx context.Context, options, code string) error {
	frame := make([]byte, 0, 8+len(options)+len(code))
	for _, text := range []string{options, code} {
		frame = binary.BigEndian.AppendUint32(frame, uint32(len(text)))
		frame = append(frame, text...)
	}
	return writeUntil(ctx, s.runs, frame)
}

// interrupt ends the run in progress. It returns the driver's event for the run, or 0 if the interpreter has exited or
// had to be killed after grace, or after killTimeout if grace is nil.
func (s *session) interrupt(grace *durationpb.Duration) byte {
	_ = s.signal(syscall.SIGINT)
	// The interpreter may be waiting for a program that it started. So if it does not react, interrupt its process
	// group. Do not do this at first, because programs in the background should survive an interrupted run.
	retry := time.NewTicker(interruptGrace)
	defer retry.Stop()
	timeout := killTimeout
	if grace != nil {
		timeout = grace.AsDuration()
	}
	kill := time.NewTimer(timeout)
	defer kill.Stop()
	for {
		select {
		case event := <-s.events:
			return event
		case <-retry.C:
			_ = s.signalGroup(syscall.SIGINT)
		case <-kill.C:
			_ = s.signalGroup(syscall.SIGKILL)
			<-s.exited
			return 0
		case <-s.exited:
			return 0
		}
	}
}

// close releases the portal's descriptors of a session whose process has exited or was not started.
func (s *session) close() {
	if s.out != nil {
		s.out.finish()
	}
	for _, f := range []*os.File{s.input, s.runs, s.control} {
		f.Close() // which does nothing for nil
	}
}
