package portal

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

// A run whose context ends while its code is passed to the interpreter does not interrupt the next run.
func TestSubmitAfterCanceledSubmit(t *testing.T) {
	runs, driver, err := socketPair(unix.SOCK_STREAM)
	if err != nil {
		t.Fatal(err)
	}
	defer runs.Close()
	go func() { _, _ = io.Copy(io.Discard, driver) }()
	defer driver.Close()
	s := &session{runs: runs, language: &language{}}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for i := range 5000 {
		run := func() *execution { return &execution{begun: make(chan struct{})} }
		_ = s.begin(canceled, &portalv1.RunCodeRequest{Code: "1"}, run(), nil)
		if err := s.begin(t.Context(), &portalv1.RunCodeRequest{Code: "1"}, run(), nil); err != nil {
			t.Fatalf("run %d: %v", i, err)
		}
	}
}

// Accounts share a REPL only if the credentials and the environment of their processes are the same.
func TestREPLKey(t *testing.T) {
	alice := account{uid: 1000, gid: 1000, groups: []uint32{1000, 27}, name: "alice", home: "/home/alice", named: true}
	key := func(a account, credential *syscall.Credential) replKey {
		return newREPLKey(languages[portalv1.RunCodeRequest_LANGUAGE_PYTHON], &a, credential)
	}
	credential := &syscall.Credential{Uid: alice.uid, Gid: alice.gid, Groups: alice.groups}
	want := key(alice, credential)
	if got := key(alice, &syscall.Credential{Uid: alice.uid, Gid: alice.gid, Groups: []uint32{27, 1000}}); got != want {
		t.Errorf("the same groups in another order: got key %v, want %v", got, want)
	}
	same := alice
	same.name = "alias"
	unnamed := alice
	unnamed.named = false
	for what, got := range map[string]replKey{
		"another group":            key(alice, &syscall.Credential{Uid: alice.uid, Gid: alice.gid, Groups: []uint32{1000}}),
		"another name of the user": key(same, credential),
		"no named user":            key(unnamed, credential),
		"the portal's credentials": key(alice, nil),
	} {
		if got == want {
			t.Errorf("%s: the key is the same", what)
		}
	}
	// The portal's own groups are not those in /etc/group.
	root := account{groups: []uint32{0}, name: "root", home: "/root", named: true}
	others := root
	others.groups = []uint32{0, 5}
	if key(root, nil) != key(others, nil) {
		t.Error("processes with the portal's credentials: the keys differ")
	}
}

// An interpreter starts even if its driver is larger than a pipe, whose size depends on how many pipes the user has.
func TestDriverLargerThanAPipe(t *testing.T) {
	children, err := theChildren()
	if err != nil {
		t.Fatal(err)
	}
	discard, err := newDiscarder()
	if err != nil {
		t.Fatal(err)
	}
	defer discard.close()
	repls := &repls{programs: &programs{children: children, discard: discard}}
	for language, comment := range map[portalv1.RunCodeRequest_Language]string{
		portalv1.RunCodeRequest_LANGUAGE_PYTHON: "\n#", portalv1.RunCodeRequest_LANGUAGE_NODE: "\n//",
	} {
		r, err := repls.find(&portalv1.RunCodeRequest{Language: language})
		if err != nil {
			t.Fatal(err)
		}
		large := *r.language
		large.driver += comment + strings.Repeat("x", 100<<10)
		r.language = &large
		var printed bytes.Buffer
		result, err := r.run(t.Context(), nil, &portalv1.RunCodeRequest{Code: "1 + 1"}, sink{output: func(_ portalv1.Output_Stream, data []byte) error {
			printed.Write(data)
			return nil
		}})
		if err != nil || !result.GetSuccess() || printed.String() != "2\n" {
			t.Errorf("%s: %v, error %v, output %q, want 2", r.language.name, result, err, &printed)
		}
	}
	children.kill()
}

// FuzzControl sends messages over the control socket, as the code in a sandbox can, and compares what the portal makes of them
// with a model: each answer belongs to the run that was in progress, or the session is lost.
func FuzzControl(f *testing.F) {
	const (
		begin  = iota // begin a run, if none is in progress
		end           // end the run in progress
		show          // a display of the run in progress
		sync          // a sync of the run in progress
		replay        // the end of the run before
		late          // late output
		ready         // the session's message at its start
		forge         // the end of a run, with a token that nobody has
		odd           // a message of a type that does not exist, with the token of the run in progress
		short         // no complete token
		steps
	)
	f.Add([]byte{ready, begin, sync, show, end, begin, late, end})
	f.Add([]byte{ready, begin, end, replay})
	f.Add([]byte{ready, begin, end, begin, replay, end})
	f.Add([]byte{ready, begin, forge})
	f.Add([]byte{ready, ready})
	f.Add([]byte{begin, odd})
	f.Add([]byte{late, begin, short})
	f.Add(bytes.Repeat([]byte{late}, 250))
	f.Fuzz(func(t *testing.T, script []byte) {
		script = script[:min(len(script), 256)]
		control, driver, err := socketPair(unix.SOCK_SEQPACKET)
		if err != nil {
			t.Fatal(err)
		}
		defer control.Close()
		defer driver.Close()
		runs, reader, err := socketPair(unix.SOCK_STREAM)
		if err != nil {
			t.Fatal(err)
		}
		defer runs.Close()
		defer reader.Close()
		go func() { _, _ = io.Copy(io.Discard, reader) }()
		log := &programs{}
		interpreter := &process{parent: &children{}, exited: make(chan struct{})}
		s := &session{
			process: interpreter, out: &output{},
			control: control, runs: runs, token: newToken(), language: &language{},
			ready: make(chan struct{}), ended: make(chan byte), served: make(chan struct{}),
		}
		s.log = log.adopt(interpreter, s.awaitRest, launch{user: ownAccount()}, "")
		go s.serveControl()

		// The model.
		var current, previous *execution
		var name string            // of the run in progress
		var shown, logged []string // what the portal must have received
		var got []string           // by the runs
		lost, isReady := false, false
		message := func(token string, kind byte, data ...byte) []byte {
			return append(append([]byte(token), kind), data...)
		}
		for i, step := range script {
			var send []byte
			valid := current != nil
			from := strings.Repeat("x", tokenSize)
			if current != nil {
				from = current.token
			}
			switch step % steps {
			case begin:
				if current != nil {
					continue
				}
				begun := fmt.Sprint("run ", i)
				run := &execution{token: newToken(), begun: make(chan struct{})}
				run.piece = func(_ byte, piece *portalv1.Piece) { got = append(got, begun+": "+string(piece.GetData())) }
				if err := s.begin(t.Context(), &portalv1.RunCodeRequest{Code: begun}, run, nil); err != nil {
					t.Fatal(err)
				}
				current, name = run, begun
				continue
			case end:
				send = message(from, messageEnd, byte(i))
			case show:
				send = message(from, messageDisplay, 1, byte('a'+i%26))
			case sync:
				send = message(from, messageSync, byte(i))
			case replay:
				if previous == nil {
					continue
				}
				send, valid = message(previous.token, messageEnd, byte(i)), false
			case late:
				send, valid = message(s.token, messageLate, 1, byte('A'+i%26)), true
			case ready:
				send, valid = message(s.token, messageReady), !isReady
			case forge:
				send, valid = message(newToken(), messageEnd, 0), false
			case odd:
				send, valid = message(from, 'x', 1), false
			case short:
				send, valid = []byte(from), false
			}
			if _, err := driver.Write(send); err != nil {
				t.Fatal(err)
			}
			if !valid {
				lost = true
				break
			}
			switch step % steps {
			case end:
				if code := <-s.ended; code != byte(i) {
					t.Fatalf("step %d of %v: the run ended with %d", i, script, code)
				}
				previous, current = current, nil
			case show:
				shown = append(shown, fmt.Sprintf("%s: %c", name, 'a'+i%26))
			case sync:
				var echo [1]byte
				if _, err := driver.Read(echo[:]); err != nil || echo[0] != byte(i) {
					t.Fatalf("step %d of %v: the echo is %d, %v", i, script, echo, err)
				}
			case late:
				logged = append(logged, string(rune('A'+i%26)))
			case ready:
				isReady = true
			}
		}
		if lost {
			<-s.served // a session that is lost is killed at once
		}
		close(s.exited)
		driver.Close()
		<-s.served
		if s.mu.Lock(); (s.reason != "") != lost {
			t.Errorf("%v: the session was killed for the reason %q, lost is %t in the model", script, s.reason, lost)
		}
		s.mu.Unlock()
		if !slices.Equal(got, shown) {
			t.Errorf("%v: the runs got %q, want %q", script, got, shown)
		}
		log.mu.Lock()
		defer log.mu.Unlock()
		ring := s.log.ring
		if want := strings.Join(logged, ""); ring.end != uint64(len(want)) || want != "" && string(ring.contiguous(ring.start, ring.end)) != want {
			t.Errorf("%v: the log has %d bytes, want %q", script, ring.end, want)
		}
	})
}
