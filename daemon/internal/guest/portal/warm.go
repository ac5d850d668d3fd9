package portal

import (
	"context"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

// spare is an interpreter that was started in advance, for the context of a language and the user of the image. It has the
// environment and the directory of the image. It is in no list until a context takes it.
type spare struct {
	key     replKey
	session *session
}

// warm makes sure that there is a spare interpreter of each of the wanted languages that the image has, and of no other. It
// returns these languages. Each interpreter has run a line of code, which left nothing behind.
func (s *repls) warm(ctx context.Context, wanted []portalv1.RunCodeRequest_Language) (warm []portalv1.RunCodeRequest_Language, err error) {
	s.mu.Lock()
	s.dropSpares(func(sp spare) bool {
		id, _ := languageNamed(sp.key.language.name)
		return slices.Contains(wanted, id) && sp.session.running()
	})
	s.mu.Unlock()
	for _, id := range wanted {
		language, account, credential, err := s.lookup(id, "")
		if err != nil {
			return nil, err
		}
		if language.warm == "" {
			continue
		}
		key := newREPLKey(language, account, credential)
		if s.hasSpare(key) {
			warm = append(warm, id)
			continue
		}
		session, err := s.startSpare(ctx, language, account)
		if status.Code(err) == codes.FailedPrecondition {
			continue // the image does not have the interpreter, or it does not start; a run says why
		}
		if err != nil {
			return nil, err
		}
		s.mu.Lock()
		s.spares = append(s.spares, spare{key, session})
		s.mu.Unlock()
		warm = append(warm, id)
	}
	return warm, nil
}

// startSpare starts an interpreter and runs a line of code in it. Errors are gRPC statuses.
func (s *repls) startSpare(ctx context.Context, language *language, user *account) (*session, error) {
	started, err := s.startSession(ctx, language, user, nil, "", "")
	if err != nil {
		return nil, err
	}
	if err := started.warm(ctx); err != nil {
		started.discard("it was not used")
		return nil, err
	}
	return started, nil
}

// warm runs a line of code that does not count. Errors are gRPC statuses.
func (s *session) warm(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	run := &execution{token: newToken(), begun: make(chan struct{}), piece: func(byte, *portalv1.Piece) {}, warming: true}
	req := &portalv1.RunCodeRequest{Code: s.language.warm}
	if err := s.prepare(req, run, nil); err != nil {
		return status.Errorf(codes.ResourceExhausted, "pass the code to the %s process: %v", s.language.name, err)
	}
	s.out.attach(func(portalv1.Output_Stream, []byte) error { return nil })
	if err := s.begin(ctx, req, run, nil); err != nil {
		return status.Errorf(codes.FailedPrecondition, "warm the %s process: %v", s.language.name, err)
	}
	select {
	case code := <-s.ended:
		if code != 0 {
			return status.Errorf(codes.FailedPrecondition, "warm the %s process: exit code %d", s.language.name, code)
		}
	case <-s.exited:
		return status.Errorf(codes.FailedPrecondition, "warm the %s process: it %s", s.language.name, s.exitText())
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
	s.out.attach(s.log.log)
	return nil
}

// discard kills a session that nothing uses, and releases it once its process has exited.
func (s *session) discard(reason string) {
	s.kill(reason)
	go func() {
		<-s.exited
		s.close()
	}()
}

func (s *repls) hasSpare(key replKey) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.ContainsFunc(s.spares, func(sp spare) bool { return sp.key == key })
}

// dropSpares ends all spare interpreters except those that keep returns true for. The caller holds mu.
func (s *repls) dropSpares(keep func(spare) bool) {
	s.spares = slices.DeleteFunc(s.spares, func(sp spare) bool {
		if keep(sp) {
			return false
		}
		sp.session.discard("it was not used")
		return true
	})
}

// takeSpare makes a spare interpreter the session of a context, if there is one for it, and reports whether there was. A running
// interpreter cannot take over an environment or a workdir, so if e has one, all spare interpreters are ended. The caller holds
// queue and repls.mu.
func (r *repl) takeSpare(e *portalv1.Environment) bool {
	s := r.repls
	if len(e.GetEnv()) > 0 || e.GetWorkdir() != "" {
		s.dropSpares(func(spare) bool { return false })
	}
	i := slices.IndexFunc(s.spares, func(sp spare) bool { return r.key != nil && sp.key == *r.key && sp.session.running() })
	if i < 0 {
		return false
	}
	r.session = s.spares[i].session
	s.spares = slices.Delete(s.spares, i, i+1)
	s.programs.show(r.session.log, "repl:"+r.name)
	return true
}
