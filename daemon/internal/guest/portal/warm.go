package portal

import (
	"context"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

// A spare is a context whose interpreter was started in advance, for the user, the environment and the directory of the image. It
// is in repls.spares, and no other list, until the first run in the context that is not a rehearsal.

// warm makes sure that there is a spare for each of the wanted languages that the image has, and no other. It returns these
// languages.
func (s *repls) warm(ctx context.Context, wanted []portalv1.RunCodeRequest_Language) (warm []portalv1.RunCodeRequest_Language, err error) {
	s.mu.Lock()
	s.dropSpares(func(r *repl) bool {
		id, _ := languageNamed(r.language.name)
		return slices.Contains(wanted, id) && r.session.running()
	})
	s.mu.Unlock()
	for _, id := range wanted {
		language, account, credential, err := s.lookup(id, "")
		if err != nil {
			return nil, err
		}
		if language.isShell {
			continue // it starts fast
		}
		err = s.addSpare(ctx, language, account, newREPLKey(language, account, credential))
		if status.Code(err) == codes.FailedPrecondition {
			continue // the image does not have the interpreter, or it does not start; a run says why
		}
		if err != nil {
			return nil, err
		}
		warm = append(warm, id)
	}
	return warm, nil
}

// addSpare starts the interpreter of a spare, unless there is one. Errors are gRPC statuses.
func (s *repls) addSpare(ctx context.Context, language *language, user *account, key replKey) error {
	s.mu.Lock()
	found := s.spare(key) >= 0
	s.mu.Unlock()
	if found {
		return nil
	}
	session, err := s.startSession(ctx, language, user, nil, "", "")
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.spares = append(s.spares, &repl{language: language, repls: s, name: language.name, user: user, key: &key, queue: make(queue, 1), session: session})
	return nil
}

// spare returns the index of the spare with a key, or -1 if there is none. The caller holds mu.
func (s *repls) spare(key replKey) int {
	return slices.IndexFunc(s.spares, func(r *repl) bool { return *r.key == key && r.session != nil && r.session.running() })
}

// rehearse returns the spare with a key, for a run. The caller must call release, and holds mu. Errors are gRPC statuses.
func (s *repls) rehearse(key replKey) (*repl, error) {
	i := s.spare(key)
	if i < 0 {
		return nil, status.Errorf(codes.FailedPrecondition, "no %s process was started in advance", key.language.name)
	}
	s.spares[i].uses++
	return s.spares[i], nil
}

// use adds a context, whose interpreter is that of the spare with its key, if there is one. The caller uses the context, which need
// not be r, and must release it. The caller holds mu.
func (s *repls) use(r *repl, e *portalv1.Environment) (*repl, error) {
	i := s.spare(*r.key)
	if i < 0 || hasEnvironment(e) {
		return s.add(r)
	}
	spare := s.spares[i]
	spare.name = r.name
	if _, err := s.add(spare); err != nil {
		return nil, err
	}
	s.spares = slices.Delete(s.spares, i, i+1)
	s.programs.show(spare.session.log, "repl:"+r.name)
	return spare, nil
}

// hasEnvironment reports whether e differs from the environment and the directory of the image. An interpreter that runs already
// cannot take it over.
func hasEnvironment(e *portalv1.Environment) bool { return len(e.GetEnv()) > 0 || e.GetWorkdir() != "" }

// dropSpares ends all spares except those that keep returns true for. The caller holds mu.
func (s *repls) dropSpares(keep func(*repl) bool) {
	s.spares = slices.DeleteFunc(s.spares, func(r *repl) bool {
		if keep(r) {
			return false
		}
		r.removed = true
		r.session.kill("it was not used")
		go r.endRemoved()
		return true
	})
}
