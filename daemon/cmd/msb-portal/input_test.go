package main

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

func TestProcessInput(t *testing.T) {
	t.Parallel()
	c := startGuest(t).dial(t)

	// The input of the request comes first, although it is larger than a pipe, and messages do not mix.
	req := &portalv1.StartProcessRequest{Argv: []string{"cat"}, Input: bytes.Repeat([]byte("f"), 300_000), OpenInput: true}
	e := c.start(t, req)
	var all sync.WaitGroup
	const message = 20_000
	for i := range 10 {
		all.Go(func() {
			data := bytes.Repeat([]byte{'0' + byte(i)}, message)
			if err := c.write(t, &portalv1.WriteInputRequest{Process: e.selector(), Data: data}, &portalv1.WriteInputRequest{Data: data}); err != nil {
				t.Error(err)
			}
		})
	}
	go func() {
		all.Wait()
		if err := c.write(t, &portalv1.WriteInputRequest{Process: e.selector(), Data: []byte("end"), Close: true}); err != nil {
			t.Error(err)
		}
	}()
	e.finish(t)
	data, ok := strings.CutPrefix(e.data(), string(req.GetInput()))
	data, ended := strings.CutSuffix(data, "end")
	if !ok || !ended || len(data) != 20*message {
		t.Fatalf("the input of the request comes first: %t, the last message comes last: %t, %d bytes between them", ok, ended, len(data))
	}
	for piece := range slices.Chunk([]byte(data), message) {
		if n := bytes.Count(piece, piece[:1]); n != message {
			t.Fatalf("a message of %q is mixed with another one", piece[0])
		}
	}

	id := e.selector()
	wantStatus(t, "ended process", c.write(t, &portalv1.WriteInputRequest{Process: id, Data: []byte("x")}), codes.FailedPrecondition, "has ended")
	_, err := c.SignalProcess(t.Context(), &portalv1.SignalProcessRequest{Process: id, Signal: 15})
	wantStatus(t, "signal to an ended process", err, codes.FailedPrecondition, "has ended")

	held := fifo(t)
	e = c.start(t, shell("read x <%s", held))
	wantStatus(t, "no input", c.write(t, &portalv1.WriteInputRequest{Process: e.selector()}), codes.FailedPrecondition, "has no input: start it with stdin open")
	release(t, held)
	e.finish(t)

	req = shell("cat; read x <%s", held)
	req.Input = []byte("all\n")
	e = c.start(t, req)
	e.until(t, "all\n")
	wantStatus(t, "input without open_input", c.write(t, &portalv1.WriteInputRequest{Process: e.selector(), Data: []byte("x")}), codes.FailedPrecondition, "was closed")
	release(t, held)
	e.finish(t)

	req = shell("exec <&-; echo closed; read x <%s", held)
	req.OpenInput = true
	e = c.start(t, req)
	e.until(t, "closed")
	wantStatus(t, "input that the process has closed", c.write(t, &portalv1.WriteInputRequest{Process: e.selector(), Data: []byte("x")}), codes.FailedPrecondition, "has closed its input")
	release(t, held)
	e.finish(t)

	req = shell("read line; echo got $line; read x <%s", held)
	req.OpenInput = true
	e = c.start(t, req)
	id = e.selector()
	err = c.write(t, &portalv1.WriteInputRequest{Process: id, Data: []byte("one\n"), Close: true}, &portalv1.WriteInputRequest{Data: []byte("two\n")})
	wantStatus(t, "input after close", err, codes.FailedPrecondition, "was closed")
	e.until(t, "got one")
	release(t, held)
	e.finish(t)

	// A write that waits ends with its context, and with the process.
	req = shell("read line; echo reading; read x <%s", held)
	req.OpenInput = true
	e = c.start(t, req)
	id = e.selector()
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := c.WriteInput(ctx)
	if err != nil {
		t.Fatal(err)
	}
	big := append([]byte("\n"), make([]byte, 1<<20)...)
	if err := stream.Send(&portalv1.WriteInputRequest{Process: id, Data: big}); err != nil {
		t.Fatal(err)
	}
	e.until(t, "reading")
	cancel()
	if _, err := stream.CloseAndRecv(); status.Code(err) != codes.Canceled {
		t.Errorf("canceled write: %v", err)
	}
	result := make(chan error, 1)
	go func() { result <- c.write(t, &portalv1.WriteInputRequest{Process: id, Data: big}) }()
	release(t, held)
	e.finish(t)
	wantStatus(t, "write during the end of the process", <-result, codes.FailedPrecondition, "the process has")

	// Here a child in the background still has the input.
	keep := fifo(t)
	req = shell("exec 3<&0; (read x <%s) & read line; echo reading; read x <%s", keep, held)
	req.OpenInput = true
	e = c.start(t, req)
	go func() { result <- c.write(t, &portalv1.WriteInputRequest{Process: e.selector(), Data: big}) }()
	e.until(t, "reading")
	release(t, held)
	e.finish(t)
	wantStatus(t, "write during the end of the process", <-result, codes.FailedPrecondition, "the process has ended")
	release(t, keep)
}

func TestTerminal(t *testing.T) {
	t.Parallel()
	c := startGuest(t, "TERM=").dial(t)
	run := func(argv ...string) *portalv1.StartProcessRequest {
		return &portalv1.StartProcessRequest{Argv: argv, Terminal: &portalv1.TerminalSize{Columns: 101, Rows: 37}}
	}
	e := c.start(t, run("sh", "-c", "tty <&0 && tty <&1 && tty <&2; stty size; echo err >&2; cat /proc/$$/stat | cut -d' ' -f5,6,7; echo $$"))
	exit := e.finish(t)
	lines := strings.Split(e.data(), "\r\n")
	pid := e.started.GetPid()
	if exit.GetExitCode() != 0 || len(lines) != 8 || !strings.HasPrefix(lines[0], "/dev/pts/") || lines[1] != lines[0] || lines[2] != lines[0] ||
		lines[3] != "37 101" || lines[4] != "err" || lines[6] != fmt.Sprint(pid) || !strings.HasPrefix(lines[5], fmt.Sprintf("%d %d ", pid, pid)) || strings.HasSuffix(lines[5], " 0") {
		t.Errorf("exit %v, lines %q", exit, lines)
	}
	for _, o := range e.out {
		if o.Stream != sandbox.Terminal {
			t.Errorf("output has the stream %v", o.Stream)
		}
	}

	for env, want := range map[string]string{"TERM=dumb": "dumb\r\n", "X=": "\r\n"} { // the portal's TERM is empty
		req := run("sh", "-c", "echo $TERM")
		req.Env = []string{env}
		e := c.start(t, req)
		if e.finish(t); e.data() != want {
			t.Errorf("with %s, TERM is %q, want %q", env, e.data(), want)
		}
	}

	// Input and resizing.
	req := run("bash", "-c", `trap 'echo resized $(stty size)' WINCH; echo ready; while :; do read -r line || break; echo "got $line"; done; echo end`)
	req.Input = []byte("first\n")
	e = c.start(t, req)
	id := e.selector()
	e.until(t, "got first")
	if _, err := c.ResizeTerminal(t.Context(), &portalv1.ResizeTerminalRequest{Process: id, Size: &portalv1.TerminalSize{Columns: 20, Rows: 10}}); err != nil {
		t.Fatal(err)
	}
	if err := c.write(t, &portalv1.WriteInputRequest{Process: id, Data: []byte("second\n")}); err != nil {
		t.Fatal(err)
	}
	e.until(t, "got second")
	e.until(t, "resized 10 20")
	_, err := c.ResizeTerminal(t.Context(), &portalv1.ResizeTerminalRequest{Process: id, Size: &portalv1.TerminalSize{Columns: 1 << 16}})
	wantStatus(t, "resize", err, codes.InvalidArgument, "is too large")
	wantStatus(t, "close of a terminal", c.write(t, &portalv1.WriteInputRequest{Process: id, Close: true}), codes.FailedPrecondition, "Ctrl-D (4)")
	if err := c.write(t, &portalv1.WriteInputRequest{Process: id, Data: []byte{4}}); err != nil {
		t.Fatal(err)
	}
	e.until(t, "end\r\n")
	if exit := e.finish(t); exit.GetExitCode() != 0 {
		t.Errorf("after Ctrl-D: %v", exit)
	}
	_, err = c.ResizeTerminal(t.Context(), &portalv1.ResizeTerminalRequest{Process: id, Size: &portalv1.TerminalSize{}})
	wantStatus(t, "resize after the end", err, codes.FailedPrecondition, "has ended")

	// Ctrl-C ends the program in the foreground.
	e = c.start(t, run("sh", "-c", "trap 'echo shell' INT; sh -c 'echo ready; exec cat'; echo after $?"))
	e.until(t, "ready")
	if err := c.write(t, &portalv1.WriteInputRequest{Process: e.selector(), Data: []byte{3}}); err != nil {
		t.Fatal(err)
	}
	if e.finish(t); !strings.HasSuffix(e.data(), "shell\r\nafter 130\r\n") {
		t.Errorf("output after Ctrl-C: %q", e.data())
	}

	// All output arrives, also that of a program that ends at once.
	e = c.start(t, run("seq", "100000"))
	e.finish(t)
	for i, line := range strings.Split(strings.TrimSuffix(e.data(), "\r\n"), "\r\n") {
		if line != fmt.Sprint(i+1) {
			t.Fatalf("line %d is %q", i+1, line)
		}
	}
	if !strings.HasSuffix(e.data(), "\r\n100000\r\n") {
		t.Errorf("the output ends with %q", e.data()[max(0, len(e.data())-20):])
	}

	// A program in the background that keeps the terminal does not keep the process.
	alive, start := fifo(t), fifo(t)
	e = c.start(t, run("sh", "-c", fmt.Sprintf("trap '' HUP; (read x <%s; echo lost; echo alive >%s) & echo here", start, alive)))
	if e.finish(t); e.data() != "here\r\n" {
		t.Errorf("output %q", e.data())
	}
	release(t, start)
	if got := wait(t, alive); got != "alive\n" {
		t.Errorf("the child wrote %q", got)
	}

	e = c.start(t, shell("read x <%s", start))
	_, err = c.ResizeTerminal(t.Context(), &portalv1.ResizeTerminalRequest{Process: e.selector(), Size: &portalv1.TerminalSize{}})
	wantStatus(t, "resize without a terminal", err, codes.FailedPrecondition, "has no terminal")
	release(t, start)
	e.finish(t)
}

// TestTerminalType checks the TERM of a portal whose environment has none.
func TestTerminalType(t *testing.T) {
	t.Parallel()
	g := newGuest()
	serve := msbPortal(t, "serve", g.socket)
	serve.Env = slices.DeleteFunc(serve.Env, func(entry string) bool { return strings.HasPrefix(entry, "TERM=") })
	g.start(t, serve)
	e := g.dial(t).start(t, &portalv1.StartProcessRequest{Argv: []string{"sh", "-c", "echo $TERM"}, Terminal: &portalv1.TerminalSize{}})
	if e.finish(t); e.data() != "xterm-256color\r\n" {
		t.Errorf("TERM is %q", e.data())
	}
}
