package portal

import (
	"bytes"
	"context"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

// A run whose context ends while its code is passed to the interpreter does not interrupt the next run.
func TestSubmitAfterCanceledSubmit(t *testing.T) {
	runs, driver, err := socketPair("runs")
	if err != nil {
		t.Fatal(err)
	}
	defer runs.Close()
	go func() { _, _ = io.Copy(io.Discard, driver) }()
	defer driver.Close()
	s := &session{runs: runs}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for i := range 5000 {
		_ = s.submit(canceled, "", "1")
		if err := s.submit(t.Context(), "", "1"); err != nil {
			t.Fatalf("run %d: %v", i, err)
		}
	}
}

// Accounts share a REPL only if the credentials and the environment of their processes are the same.
func TestREPLKey(t *testing.T) {
	alice := account{uid: 1000, gid: 1000, groups: []uint32{1000, 27}, name: "alice", home: "/home/alice", named: true}
	key := func(a account, credential *syscall.Credential) replKey {
		return newREPLKey(portalv1.RunCodeRequest_LANGUAGE_PYTHON, &a, credential)
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
	for language, comment := range map[portalv1.RunCodeRequest_Language]string{
		portalv1.RunCodeRequest_LANGUAGE_PYTHON: "\n#", portalv1.RunCodeRequest_LANGUAGE_NODE: "\n//",
	} {
		r, err := newREPLs(children, discard).find(language, "")
		if err != nil {
			t.Fatal(err)
		}
		r.driver += comment + strings.Repeat("x", 100<<10)
		var printed bytes.Buffer
		ok, err := r.run(t.Context(), &portalv1.RunCodeRequest{Code: "1 + 1"}, func(_ portalv1.Output_Stream, data []byte) error {
			printed.Write(data)
			return nil
		})
		if err != nil || !ok || printed.String() != "2\n" {
			t.Errorf("%s: success %t, error %v, output %q, want 2", r.name, ok, err, &printed)
		}
	}
	children.kill()
}

// FuzzControl sends arbitrary bytes over the control socket: the code in a sandbox can write anything to it.
func FuzzControl(f *testing.F) {
	f.Add([]byte("r+-"))
	f.Add([]byte{controlReady, 0x80, 0xff, controlOK})
	f.Add([]byte{controlReady, 0, controlOK})
	f.Fuzz(func(t *testing.T, sent []byte) {
		sent = sent[:min(len(sent), 4096)]
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		control, driver := os.NewFile(uintptr(pair[0]), "control"), os.NewFile(uintptr(pair[1]), "driver")
		defer control.Close()
		defer driver.Close()
		s := &session{
			process: &process{parent: &children{}, exited: make(chan struct{})},
			out:     &output{},
			control: control,
			events:  make(chan byte),
		}
		var events, echoes []byte
		for _, b := range sent {
			if b >= controlSync {
				echoes = append(echoes, b)
			} else if slices.Contains([]byte{controlReady, controlOK, controlFailed}, b) {
				events = append(events, b)
			} else {
				break
			}
		}

		ended := make(chan struct{})
		go func() { defer close(ended); s.serveControl() }()
		go func() { _, _ = driver.Write(sent) }()
		// Read the echoes concurrently with the events: the socket buffers only a few hundred, and the portal blocks
		// until they are read.
		echoed := make(chan []byte, 1)
		go func() {
			got := make([]byte, len(echoes))
			n, _ := io.ReadFull(driver, got)
			echoed <- got[:n]
		}()
		for i, want := range events {
			if got := <-s.events; got != want {
				t.Fatalf("after %q: event %d is %q, want %q", sent, i, got, want)
			}
		}
		if got := <-echoed; !bytes.Equal(got, echoes) {
			t.Fatalf("after %q: echoes are %x, want %x", sent, got, echoes)
		}
		_ = unix.Shutdown(pair[1], unix.SHUT_RDWR)
		close(s.exited)
		<-ended
	})
}
