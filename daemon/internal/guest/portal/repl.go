package portal

import (
	"context"
	_ "embed"
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

// The drivers run in the image's own interpreters. Each has five descriptors:
//
//	0     /dev/null
//	1, 2  pipes: what is printed, by the code and by the processes that it starts
//	3     pipe, runs: for each run a length (4 bytes, big endian) and the code
//	4     socket, control: single bytes, below
//
// What is printed to one pipe keeps its order by itself. When the driver turns from one stream to
// the other within a run, it first sends a sync byte and waits for its echo; the portal has then
// read what is in the pipes. So the order is kept across both streams too.
const (
	controlReady  = 'r' // the driver awaits its first run
	controlOK     = '+' // the run ended
	controlFailed = '-' // the run ended with an error, which the driver has printed
	controlSync   = 0x80
)

//go:embed repl.py
var pythonDriver string

//go:embed repl.js
var nodeDriver string

const (
	// startWait bounds the start of an interpreter; emulated machines are slow.
	startWait = time.Minute
	// politeWait is how long an interpreter has to react to an interrupt before its whole group
	// gets one too, and how long one without control has to exit.
	politeWait = time.Second
	// patience is how long it has to react before it is killed, and its state with it. An emulated one on a busy
	// host has taken more than 5 s.
	patience = 15 * time.Second
)

// repl runs code in one language, in a session that is started when first needed.
type repl struct {
	name     string
	program  string
	args     []string
	children *children
	null     *os.File
	turn     turn
	session  *session
}

func newREPLs(c *children, null *os.File) map[portalv1.RunCodeRequest_Language]*repl {
	return map[portalv1.RunCodeRequest_Language]*repl{
		portalv1.RunCodeRequest_LANGUAGE_PYTHON: {
			name: "python", program: "python3", args: []string{"-c", pythonDriver},
			children: c, null: null, turn: make(turn, 1),
		},
		portalv1.RunCodeRequest_LANGUAGE_NODE: {
			name: "node", program: "node", args: []string{"-e", nodeDriver},
			children: c, null: null, turn: make(turn, 1),
		},
	}
}

// turn is held by the run in progress. Goroutines that wait for a channel are served in order,
// which a mutex does not promise.
type turn chan struct{}

func (t turn) take(ctx context.Context) error {
	select {
	case t <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (t turn) give() { <-t }

// run runs the code of req and emits its output; no emit follows its return. success is false
// when the code raised, or ended the interpreter.
func (r *repl) run(ctx context.Context, req *portalv1.RunCodeRequest, emit emitFunc) (success bool, err error) {
	if err := r.turn.take(ctx); err != nil {
		return false, status.FromContextError(err).Err()
	}
	defer r.turn.give()

	if r.session != nil && !r.session.running() {
		r.bury(emit, " after the last run")
	}
	if r.session == nil {
		if r.session, err = r.start(ctx, req.GetEnvironment()); err != nil {
			return false, err
		}
	}
	s := r.session
	s.out.attach(emit)
	ctx, cancel := withLimit(ctx, req.GetTimeout())
	defer cancel()
	if err := s.submit(ctx, req.GetCode()); err != nil {
		s.signalGroup(syscall.SIGKILL)
	}
	var event byte // none: the session is lost
	select {
	case event = <-s.events:
	case <-s.exited:
	case <-ctx.Done():
		err = endError(ctx)
		if event = s.interrupt(); event == 0 {
			st := status.Convert(err)
			err = status.Errorf(st.Code(), "%s; the %s process %s: its state is lost", st.Message(), r.name, ending(s.status))
		}
	}
	if event == 0 {
		r.bury(emit, "")
	} else {
		s.out.detach()
	}
	return event == controlOK, err
}

// bury releases a session that has exited. Its last words and a line about its end go to emit.
func (r *repl) bury(emit emitFunc, when string) {
	s := r.session
	r.session = nil
	s.out.attach(emit)
	s.out.drain()
	s.out.report(fmt.Sprintf("the %s process %s%s; its state is lost", r.name, ending(s.status), when))
	s.close()
}

// ending says how a process ended.
func ending(s syscall.WaitStatus) string {
	if !s.Signaled() {
		return fmt.Sprintf("exited with status %d", s.ExitStatus())
	}
	return fmt.Sprintf("was killed by signal %d (%s)", s.Signal(), unix.SignalName(s.Signal()))
}

// session is an interpreter under its driver.
type session struct {
	*process
	out     *output
	runs    *os.File
	control *os.File
	// events are the bytes that the driver sends, without syncs.
	events chan byte
}

// start starts the interpreter and waits until it is ready.
func (r *repl) start(ctx context.Context, environment *portalv1.Environment) (*session, error) {
	env, dir, err := surroundings(environment)
	if err != nil {
		return nil, err
	}
	path, err := lookPath(r.program, env, dir)
	if err != nil {
		return nil, status.Errorf(codes.FailedPrecondition, "image has no %s: %v", r.program, err)
	}
	s, err := r.launch(path, env, dir)
	if err != nil {
		return nil, err
	}
	late := time.NewTimer(startWait)
	defer late.Stop()
	select {
	case <-s.events:
		return s, nil
	case <-s.exited:
		s.out.drain()
		err = status.Errorf(codes.FailedPrecondition, "start %s: it %s: %s", r.program, ending(s.status),
			strings.TrimSpace(s.out.backlogText()))
	case <-late.C:
		err = status.Errorf(codes.FailedPrecondition, "start %s: it is not ready after %v", r.program, startWait)
	case <-ctx.Done():
		err = status.FromContextError(ctx.Err()).Err()
	}
	s.signalGroup(syscall.SIGKILL)
	<-s.exited
	s.close()
	return nil, err
}

// launch starts the process with its descriptors.
func (r *repl) launch(path string, env []string, dir string) (_ *session, err error) {
	var opened []*os.File
	defer func() {
		for _, f := range opened {
			f.Close()
		}
		if err != nil {
			err = status.Errorf(codes.ResourceExhausted, "start %s: %v", r.program, err)
		}
	}()
	out, outEnd, errEnd, err := newOutput(nil)
	if err != nil {
		return nil, err
	}
	opened = append(opened, outEnd, errEnd)

	var runs, control [2]int
	if err := unix.Pipe2(runs[:], unix.O_CLOEXEC); err != nil {
		return nil, err
	}
	_ = unix.SetNonblock(runs[1], true)
	s := &session{out: out, runs: os.NewFile(uintptr(runs[1]), "runs"), events: make(chan byte)}
	runsEnd := os.NewFile(uintptr(runs[0]), "runs")
	opened = append(opened, runsEnd)

	if control, err = unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		s.runs.Close()
		return nil, err
	}
	_ = unix.SetNonblock(control[0], true)
	s.control = os.NewFile(uintptr(control[0]), "control")
	controlEnd := os.NewFile(uintptr(control[1]), "control")
	opened = append(opened, controlEnd)

	argv := append([]string{r.program}, r.args...)
	s.process, err = r.children.start(path, argv, env, dir, r.null, outEnd, errEnd, runsEnd, controlEnd)
	if err != nil {
		s.runs.Close()
		s.control.Close()
		return nil, err
	}
	go s.listen()
	return s, nil
}

// listen answers syncs and passes on events, until the driver closes its end or says what it
// never would: then the code has laid its hands on it, and it is killed unless it exits by itself.
func (s *session) listen() {
	defer func() {
		timer := time.NewTimer(politeWait)
		defer timer.Stop()
		select {
		case <-s.exited:
		case <-timer.C:
			s.signalGroup(syscall.SIGKILL)
		}
	}()
	var b [1]byte
	for {
		if _, err := s.control.Read(b[:]); err != nil {
			return
		}
		// Whatever the byte means, what was printed before it comes first.
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

// submit hands the code to the driver, which always reads between runs, unless the code of an
// earlier run keeps it from it.
func (s *session) submit(ctx context.Context, code string) error {
	frame := make([]byte, 4, 4+len(code))
	binary.BigEndian.PutUint32(frame, uint32(len(code)))
	_ = s.runs.SetWriteDeadline(time.Time{})
	stop := context.AfterFunc(ctx, func() { _ = s.runs.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	_, err := s.runs.Write(append(frame, code...))
	return err
}

// interrupt ends the run in progress. It returns the driver's last event, or 0 when the
// interpreter has exited or had to be killed.
func (s *session) interrupt() byte {
	s.signal(syscall.SIGINT)
	// The programs that the interpreter may be waiting for get an interrupt only if it does not
	// react: what runs in the background shall live.
	again := time.NewTicker(politeWait)
	defer again.Stop()
	patient := time.NewTimer(patience)
	defer patient.Stop()
	for {
		select {
		case event := <-s.events:
			return event
		case <-again.C:
			s.signalGroup(syscall.SIGINT)
		case <-patient.C:
			s.signalGroup(syscall.SIGKILL)
			<-s.exited
			return 0
		case <-s.exited:
			return 0
		}
	}
}

// close releases what the portal holds of a session that has exited.
func (s *session) close() {
	s.out.discard()
	s.runs.Close()
	s.control.Close()
}
