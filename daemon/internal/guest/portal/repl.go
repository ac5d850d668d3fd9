package portal

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
	"github.com/msbd/msbd/daemon/internal/sys/interrupts"
)

const (
	// maxREPLs is how many contexts a portal has.
	maxREPLs = 32
	// maxContextName limits the name of a context that a request chooses, in bytes.
	maxContextName = 64
	// maxContextText limits each text in the description of a context, in bytes. All of them must fit into a message.
	maxContextText = 1 << 10
)

// repls are the contexts of a portal: those that were created, and one for each language and user that has run code without
// naming a context. Runs that name no user share no context with those that name one, because the environment of the former is
// that of the image.
type repls struct {
	programs  *programs
	namedRuns interrupts.Set[string] // the runs in progress that have an id

	// mu guards the fields below, and the fields of each repl that say so.
	mu     sync.Mutex
	all    []*repl // in the order of their creation
	spares []*repl // contexts that nothing has used (warm.go)
}

// repl is a context: it runs code in one language as one user, in a session of the interpreter.
type repl struct {
	*language
	repls *repls
	name  string
	user  *account
	// spec is the user as the request named it, and dir the directory in which the interpreter starts; empty for that of the
	// sandbox.
	spec, dir string
	// key is not nil if the context was created by a run without a context.
	key *replKey
	// queue is held by the run in progress, or by what else uses the session.
	queue queue

	// The fields below are guarded by repls.mu. Only the holder of queue changes session.
	session *session
	// cancelStart cancels the start of a session, if one is in progress.
	cancelStart context.CancelFunc
	kills       int // how often kill was called
	uses        int // runs in progress or waiting
	removed     bool
}

// replKey has all that distinguishes the interpreters of two contexts that runs create.
type replKey struct {
	language *language
	uid, gid uint32
	groups   string // empty if the processes have the credentials of the portal
	// name and home are those of a user who was named. Only then are they in the environment.
	name, home string
}

// newREPLKey returns the key of the context of account. credential is that of account.
func newREPLKey(language *language, account *account, credential *syscall.Credential) replKey {
	key := replKey{language: language, uid: account.uid, gid: account.gid}
	if credential != nil {
		key.groups = fmt.Sprint(slices.Sorted(slices.Values(credential.Groups)))
	}
	if account.named {
		key.name, key.home = account.name, account.home
	}
	return key
}

// find returns the context of a run. The caller must call release. Errors are gRPC statuses.
func (s *repls) find(req *portalv1.RunCodeRequest) (*repl, error) {
	name, requested := req.GetContext(), req.GetLanguage()
	if id, ok := languageNamed(name); ok && (requested == 0 || requested == id) {
		name, requested = "", id
	}
	if name != "" {
		r, err := s.named(name)
		if err == nil && requested != 0 && languages[requested] != r.language {
			s.release(r)
			return nil, status.Errorf(codes.InvalidArgument, "the context %q runs %s: leave out the language, or name another context",
				name, r.language.name)
		}
		return r, err
	}
	language, account, credential, err := s.lookup(requested, req.GetUser())
	if err != nil {
		return nil, err
	}
	key := newREPLKey(language, account, credential)
	s.mu.Lock()
	defer s.mu.Unlock()
	if req.GetRehearsal() {
		return s.rehearse(key)
	}
	for _, r := range s.all {
		if r.key != nil && *r.key == key {
			r.uses++
			return r, nil
		}
	}
	name = language.name
	if req.GetUser() != "" {
		name += ":" + req.GetUser()
	}
	for s.has(name) { // /etc/passwd has changed since
		name += "+"
	}
	return s.use(&repl{language: language, name: name, user: account, spec: req.GetUser(), key: &key}, req.GetEnvironment())
}

// named returns the context with a name. The caller must call release.
func (s *repls) named(name string) (*repl, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.all {
		if r.name == name {
			r.uses++
			return r, nil
		}
	}
	return nil, errNoContext(name)
}

func errNoContext(name string) error {
	return status.Errorf(codes.NotFound, "there is no context %q in the sandbox: create it, or list those that there are", name)
}

// lookup returns the language and the user of a context. Errors are gRPC statuses.
func (s *repls) lookup(language portalv1.RunCodeRequest_Language, user string) (*language, *account, *syscall.Credential, error) {
	l, ok := languages[language]
	if !ok {
		return nil, nil, nil, status.Errorf(codes.InvalidArgument, "unknown language %v", language)
	}
	account, err := lookupUser(user)
	if err != nil {
		return nil, nil, nil, err
	}
	credential, err := account.credential()
	return l, account, credential, err
}

// has reports whether there is a context with a name. The caller holds mu.
func (s *repls) has(name string) bool {
	return slices.ContainsFunc(s.all, func(r *repl) bool { return r.name == name })
}

// add adds a context, which its caller uses and must release. The caller holds mu.
func (s *repls) add(r *repl) (*repl, error) {
	if len(s.all) >= maxREPLs {
		s.forgetUnused()
	}
	if len(s.all) >= maxREPLs {
		return nil, status.Errorf(codes.ResourceExhausted,
			"the sandbox has %d contexts, which is the most that it can: remove one, or run the code in one of them", maxREPLs)
	}
	if r.queue == nil {
		r.repls, r.queue = s, make(queue, 1)
	}
	r.uses++
	s.all = append(s.all, r)
	return r, nil
}

// release ends a use of a context.
func (s *repls) release(r *repl) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.uses--
}

// forgetUnused forgets the contexts that a run has created and that have no session, because it was never started or has ended.
// The caller holds mu.
func (s *repls) forgetUnused() {
	s.all = slices.DeleteFunc(s.all, func(r *repl) bool {
		if r.key == nil || r.uses > 0 || r.session != nil && r.session.running() {
			return false
		}
		if r.session != nil {
			r.session.close()
		}
		return true
	})
}

// sink receives the output and the displays and error of a run. It is not called concurrently.
type sink struct {
	output emitFunc
	piece  func(kind byte, piece *portalv1.Piece)
}

// run runs the code of req and passes what it prints and shows to out, which it does not use after it has returned. It
// interrupts the code, once that has begun, for each value from interrupts.
func (r *repl) run(ctx context.Context, interrupts <-chan struct{}, req *portalv1.RunCodeRequest, out sink) (*portalv1.CodeResult, error) {
	options, err := r.options(req)
	if err != nil {
		return nil, err
	}
	begin := time.Now().Add(-req.GetWaited().AsDuration())
	turn, cancel := withLimit(ctx, req.GetTimeout(), begin)
	defer cancel()
	if err := r.acquire(turn); err != nil {
		return nil, err
	}
	defer r.queue.release()
	waited := time.Since(begin)

	result := &portalv1.CodeResult{}
	s := r.session
	if s != nil && !s.usable() {
		if result.StateLost = s.count > 0; result.StateLost {
			r.reportExit(out.output, " after the last run")
		} else {
			r.end() // there was no run, so there is no state
		}
		s = nil
	}
	if s == nil {
		if s, err = r.start(ctx, req.GetEnvironment()); err != nil {
			return nil, err
		}
	}
	run := &execution{token: newToken(), begun: make(chan struct{}), piece: out.piece}
	if err := s.prepare(req, run, options); err != nil {
		return nil, status.Errorf(codes.ResourceExhausted, "pass the code to the %s process: %v", r.language.name, err)
	}
	s.oomKills.Store(s.parent.load.oomKills())
	s.out.attach(out.output)
	// The start of the interpreter does not count.
	ctx, cancelRun := withLimit(ctx, req.GetTimeout(), time.Now().Add(-waited))
	defer cancelRun()
	if s.begin(ctx, req, run, options) != nil {
		s.kill("it did not read the code of the run")
	}
	endInterrupts := s.forwardInterrupts(interrupts, run)
	defer endInterrupts()
	var code byte
	alive := true
	select {
	case code = <-s.ended:
	case <-s.exited:
		alive = false
	case <-ctx.Done():
		err = endError(ctx)
		if code, alive = s.endRun(run, req.GetGrace()); !alive {
			st := status.Convert(err)
			err = status.Errorf(st.Code(), "%s; the %s process %s and its state is lost", st.Message(), r.language.name, s.exitText())
		}
	}
	if result.Count = s.count; !alive {
		r.reportExit(out.output, "")
		result.StateLost, result.ExitCode = true, exitCode(s.status)
		return result, err
	}
	s.out.attach(s.log.log)
	s.tidy(req)
	result.Success, result.ExitCode = code == 0, int32(code)
	return result, err
}

// acquire waits for the turn of a run. ctx is from withLimit. Errors are gRPC statuses.
func (r *repl) acquire(ctx context.Context) error {
	if err := r.queue.acquire(ctx); err != nil {
		if st := status.Convert(endError(ctx)); st.Code() == codes.DeadlineExceeded {
			return status.Errorf(st.Code(), "%s before it began, for example because another run was in progress in the context %q", st.Message(), r.name)
		}
		return status.FromContextError(err).Err()
	}
	if r.isRemoved() {
		r.queue.release()
		return errNoContext(r.name)
	}
	return nil
}

func (r *repl) isRemoved() bool {
	r.repls.mu.Lock()
	defer r.repls.mu.Unlock()
	return r.removed
}

// start starts a session. The caller holds queue.
func (r *repl) start(ctx context.Context, e *portalv1.Environment) (*session, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	mu := &r.repls.mu
	mu.Lock()
	if hasEnvironment(e) {
		r.repls.dropSpares(func(*repl) bool { return false }) // nothing in this sandbox can use them
	}
	kills := r.kills
	r.cancelStart = cancel
	mu.Unlock()
	s, err := r.repls.startSession(ctx, r.language, r.user, e, r.dir, "repl:"+r.name)
	mu.Lock()
	defer mu.Unlock()
	r.cancelStart = nil
	if r.kills != kills {
		if err == nil {
			s.kill("the context was restarted or removed")
			go func() {
				<-s.exited
				s.close()
			}()
		}
		return nil, status.Errorf(codes.FailedPrecondition, "the context %q was restarted or removed while its interpreter started", r.name)
	}
	if err == nil {
		r.session = s
	}
	return s, err
}

// end waits until the process of the session, which exits, has exited, and releases the session. The caller holds queue.
func (r *repl) end() {
	s := r.session
	<-s.exited
	r.forgetSession()
	s.close()
}

// forgetSession removes the session, which the caller closes. The caller holds queue.
func (r *repl) forgetSession() {
	r.repls.mu.Lock()
	defer r.repls.mu.Unlock()
	r.session = nil
}

// options returns the options of a run: the directory, or an empty string, and NAME=value entries. They are empty if there are none.
func (r *repl) options(req *portalv1.RunCodeRequest) ([]string, error) {
	if req.GetCwd() == "" && len(req.GetEnv()) == 0 && !r.isShell {
		return nil, nil
	}
	if err := checkEnv(req.GetEnv()); err != nil {
		return nil, err
	}
	dir := ""
	if req.GetCwd() != "" {
		var err error
		if dir, err = directory(req.GetEnvironment().GetWorkdir(), req.GetCwd(), r.user.home); err != nil {
			return nil, err
		}
	}
	return append([]string{dir}, req.GetEnv()...), nil
}

// reportExit releases a session whose process has exited. It passes to emit the remaining output and a line that says
// how the process exited. The caller holds queue.
func (r *repl) reportExit(emit emitFunc, when string) {
	s := r.session
	r.forgetSession()
	s.abandon()
	s.out.attach(emit)
	s.out.report(fmt.Sprintf("the %s process %s%s; its state is lost", r.language.name, s.exitText(), when))
	s.close()
}

// create creates the context that req describes, and starts its interpreter. Errors are gRPC statuses.
func (s *repls) create(ctx context.Context, req *portalv1.CreateContextRequest) (*repl, error) {
	if err := checkContextName(req.GetName()); err != nil {
		return nil, err
	}
	language, account, _, err := s.lookup(req.GetLanguage(), req.GetUser())
	if err != nil {
		return nil, err
	}
	r := &repl{language: language, name: req.GetName(), user: account, spec: req.GetUser()}
	if req.GetCwd() != "" {
		if r.dir, err = directory(req.GetEnvironment().GetWorkdir(), req.GetCwd(), account.home); err != nil {
			return nil, err
		}
	}
	if r.name == "" {
		r.name = strings.ToLower(rand.Text())
	}
	if err := s.reserve(r); err != nil {
		return nil, err
	}
	defer s.release(r)
	if err = r.acquire(ctx); err == nil {
		_, err = r.start(ctx, req.GetEnvironment())
		r.queue.release()
	}
	if err != nil {
		s.forget(r)
	}
	return r, err
}

// reserve adds a context with a name of its own, which its caller uses and must release.
func (s *repls) reserve(r *repl) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.has(r.name) {
		return status.Errorf(codes.AlreadyExists, "the sandbox has a context %q: choose another name, or remove that context", r.name)
	}
	_, err := s.add(r)
	return err
}

// checkContextName returns a gRPC status unless a request may choose the name for a context.
func checkContextName(name string) error {
	_, isLanguage := languageNamed(name)
	other := func(c rune) bool {
		return !strings.ContainsRune("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-", c)
	}
	switch {
	case len(name) > maxContextName || strings.ContainsFunc(name, other):
		return status.Errorf(codes.InvalidArgument, "the name of a context has up to %d of the characters A-Z a-z 0-9 . _ -", maxContextName)
	case isLanguage:
		return status.Errorf(codes.InvalidArgument, "%q is the name of the context of runs that name none: choose another one", name)
	}
	return nil
}

// languageNamed returns the language with a name, if there is one.
func languageNamed(name string) (portalv1.RunCodeRequest_Language, bool) {
	for id, l := range languages {
		if l.name == name {
			return id, true
		}
	}
	return 0, false
}

// restart replaces the session of a context. It interrupts the run in progress, but the runs that wait keep their turns.
func (s *repls) restart(ctx context.Context, name string, e *portalv1.Environment) (*repl, error) {
	r, err := s.named(name)
	if err != nil {
		return nil, err
	}
	defer s.release(r)
	old := s.kill(r, "the context was restarted")
	if err := r.acquire(ctx); err != nil {
		return nil, err
	}
	defer r.queue.release()
	if session := r.session; session != nil && (session == old || !session.running()) {
		r.end()
	} else if session != nil {
		return r, nil // a run that waited has started it
	}
	_, err = r.start(ctx, e)
	return r, err
}

// kill kills the session of a context, and returns it. It also ends the start of a session.
func (s *repls) kill(r *repl, reason string) *session {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.kills++
	if r.cancelStart != nil {
		r.cancelStart()
	}
	if r.session != nil {
		r.session.kill(reason)
	}
	return r.session
}

// remove removes a context, and kills its interpreter.
func (s *repls) remove(name string) error {
	r, err := s.named(name)
	if err != nil {
		return err
	}
	if !s.forget(r) {
		s.release(r)
		return errNoContext(name)
	}
	s.kill(r, "the context was removed")
	go func() {
		defer s.release(r)
		r.endRemoved()
	}()
	return nil
}

// endRemoved releases the session of a context that is in no list and whose interpreter was killed.
func (r *repl) endRemoved() {
	_ = r.queue.acquire(context.Background()) // the run in progress ends with the interpreter
	defer r.queue.release()
	if r.session != nil {
		r.end()
	}
}

// forget removes a context from the list. It reports whether the context was in it.
func (s *repls) forget(r *repl) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	found := !r.removed
	r.removed = true
	s.all = slices.DeleteFunc(s.all, func(other *repl) bool { return other == r })
	return found
}

// list returns descriptions of all contexts.
func (s *repls) list() (all []*portalv1.Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.all {
		all = append(all, r.describe())
	}
	return all
}

// info describes the context.
func (r *repl) info() *portalv1.Context {
	r.repls.mu.Lock()
	defer r.repls.mu.Unlock()
	return r.describe()
}

// describe describes the context. The caller holds repls.mu.
func (r *repl) describe() *portalv1.Context {
	c := &portalv1.Context{
		Name: bounded.Text(r.name, maxContextText), User: bounded.Text(r.spec, maxContextText), Cwd: bounded.Text(r.dir, maxContextText),
	}
	c.Language, _ = languageNamed(r.language.name)
	if s := r.session; s != nil && s.running() {
		s.mu.Lock()
		defer s.mu.Unlock()
		c.Pid, c.Count, c.Busy = uint32(s.pid), s.count, s.current != nil
	}
	return c
}
