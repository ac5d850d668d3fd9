package main

import (
	"bytes"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

func TestAttach(t *testing.T) {
	t.Parallel()
	c := startGuest(t).dial(t)
	next := fifo(t)
	req := shell("exec 3<>%s; echo one; read x <&3; echo two >&2; read x <&3; exit 3", next)
	req.Tag = "job"
	first := c.start(t, req)
	first.until(t, "one\n")
	id := first.selector()
	tag := &portalv1.ProcessSelector{Tag: "job"}
	live := c.attach(t, &portalv1.AttachProcessRequest{Process: id})
	replay := c.attach(t, &portalv1.AttachProcessRequest{Process: tag, Replay: true})
	exit := c.attach(t, &portalv1.AttachProcessRequest{Process: tag, NoOutput: true, Replay: true})
	for _, e := range []*events{live, exit} {
		if e.started.GetSkippedBytes() != 4 {
			t.Errorf("a call that begins after %q has %v", "one\n", e.started)
		}
	}
	past := c.attach(t, &portalv1.AttachProcessRequest{Process: id, Replay: true, NoFollow: true})
	for past.read() {
	}
	if past.err != io.EOF || text(past.out) != "stdout: one\n" || past.exit != nil {
		t.Errorf("no_follow while the process runs: %v, exit %v, output\n%s", past.err, past.exit, text(past.out))
	}
	release(t, next)
	for _, e := range []*events{first, live, replay} {
		e.until(t, "two\n")
	}
	release(t, next)
	for what, tt := range map[string]struct {
		*events
		want string
	}{
		"start": {first, "stdout: one\nstderr: two\n"}, "live": {live, "stderr: two\n"},
		"replay": {replay, "stdout: one\nstderr: two\n"}, "exit": {exit, ""},
	} {
		if exit := tt.finish(t); exit.GetExitCode() != 3 || text(tt.out) != tt.want {
			t.Errorf("%s: exit %v, output\n%swant\n%s", what, exit, text(tt.out), tt.want)
		}
	}

	// The ended process.
	for _, tt := range []struct {
		req  *portalv1.AttachProcessRequest
		want string
	}{
		{&portalv1.AttachProcessRequest{Process: id}, ""},
		{&portalv1.AttachProcessRequest{Process: tag, Replay: true}, "stdout: one\nstderr: two\n"},
		{&portalv1.AttachProcessRequest{Process: tag, Replay: true, NoFollow: true}, "stdout: one\nstderr: two\n"},
		{&portalv1.AttachProcessRequest{Process: tag, Replay: true, NoOutput: true}, ""},
	} {
		e := c.attach(t, tt.req)
		if exit := e.finish(t); exit.GetExitCode() != 3 || text(e.out) != tt.want {
			t.Errorf("%v: exit %v, output\n%s", tt.req, exit, text(e.out))
		}
		if want := uint64(8 - len(e.data())); e.started.GetSkippedBytes() != want {
			t.Errorf("%v: %d bytes skipped, want %d", tt.req, e.started.GetSkippedBytes(), want)
		}
	}

	// A tag stands for the newest process.
	req = shell("exit 4")
	req.Tag = "job"
	c.start(t, req).finish(t)
	if exit := c.attach(t, &portalv1.AttachProcessRequest{Process: tag}).finish(t); exit.GetExitCode() != 4 {
		t.Errorf("the newest process with the tag: %v", exit)
	}
}

// TestReplayUnderLoad attaches calls at many moments while a process prints 10 MB. What each of them gets, after what was
// skipped, is the rest of the output.
func TestReplayUnderLoad(t *testing.T) {
	t.Parallel()
	c := startGuest(t).dial(t)
	begin := fifo(t)
	// Change the stream sometimes, but wait for the readers of the pipes, so that the order is known.
	e := c.start(t, shell("read x <%s; seq 1000000 1700000; seq 1700001 2250000", begin))
	var want bytes.Buffer
	for i := 1000000; i <= 2250000; i++ {
		want.WriteString(strconv.Itoa(i) + "\n")
	}
	release(t, begin)
	var all sync.WaitGroup
	check := func(what string, e *events) {
		if exit := e.finish(t); exit.GetExitCode() != 0 {
			t.Errorf("%s: %v", what, exit)
		}
		if data := e.data(); e.started.GetSkippedBytes() > uint64(want.Len()) || data != want.String()[e.started.GetSkippedBytes():] {
			t.Errorf("%s: after %d bytes, %d bytes follow that are not the rest", what, e.started.GetSkippedBytes(), len(data))
		}
	}
	for i := range 20 {
		for len(e.data()) < want.Len()/20*i && e.read() {
		}
		for _, replay := range []bool{true, false} {
			e := c.attach(t, &portalv1.AttachProcessRequest{Process: e.selector(), Replay: replay})
			all.Go(func() { check(fmt.Sprintf("call %d, replay %t", i, replay), e) })
		}
	}
	check("start", e)
	all.Wait()
}

// TestBackpressure checks that a process waits for a call that does not read, and goes on when that call is gone.
func TestBackpressure(t *testing.T) {
	t.Parallel()
	c := startGuest(t).dial(t)
	const size = 32 << 20
	script := fmt.Sprintf("head -c %d /dev/zero", size)
	slow := c.start(t, shell("%s", script))
	exit := c.attach(t, &portalv1.AttachProcessRequest{Process: slow.selector(), NoOutput: true})
	// While slow is not read, another call gets only what the buffers of slow have room for.
	other := c.attach(t, &portalv1.AttachProcessRequest{Process: slow.selector(), Replay: true})
	if !other.read() {
		t.Fatal(other.err)
	}
	if printed := c.list(t)[0].GetOutputBytes(); printed > size/2 {
		t.Errorf("the process has printed %d bytes although a call does not read", printed)
	}
	other.cancel()
	if slow.finish(t); len(slow.data()) != size {
		t.Errorf("the slow call got %d bytes, want %d", len(slow.data()), size)
	}
	exit.finish(t)

	// The process waits for two calls. One is canceled, and the connection of the other one ends.
	next := fifo(t)
	stuck := c.start(t, shell("read x <%s; %s", next, script))
	second := c.attach(t, &portalv1.AttachProcessRequest{Process: stuck.selector()})
	exit = c.attach(t, &portalv1.AttachProcessRequest{Process: stuck.selector(), NoOutput: true})
	release(t, next)
	stuck.read()
	second.read()
	stuck.cancel()
	second.cancel()
	exit.finish(t)
}

// TestRing lets a process print without a call that reads it.
// The log of a program that has ended is complete, also while another reader keeps its last output from being read.
func TestLogOfAnEndedProcess(t *testing.T) {
	t.Parallel()
	c := startGuest(t).dial(t)
	const size = 1 << 20
	slow := c.start(t, &portalv1.StartProcessRequest{Argv: []string{"head", "-c", strconv.Itoa(size), "/dev/zero"}, Tag: "x"})
	process := &portalv1.ProcessSelector{Tag: "x"}
	// It ends when the pipe has the last of its output, which slow does not read yet.
	for len(slow.data()) < size-64<<10 {
		slow.read()
	}
	if e := c.attach(t, &portalv1.AttachProcessRequest{Process: process, NoOutput: true}); e.read() || e.exit == nil {
		t.Fatalf("the process has not ended: %v", e.err)
	}
	log := c.attach(t, &portalv1.AttachProcessRequest{Process: process, Replay: true, NoFollow: true})
	slow.cancel()
	for log.read() {
	}
	if got := log.started.GetSkippedBytes() + uint64(len(log.data())); log.exit == nil || got != size {
		t.Errorf("the log ends after %d bytes, with exit %v, error %v; want %d and the exit", got, log.exit, log.err, size)
	}
}

// Runs are forgotten once they have ended, so that however many there are, the other processes are remembered.
func TestRunsAreForgotten(t *testing.T) {
	t.Parallel()
	c := startGuest(t).dial(t)
	run := func(req *portalv1.StartProcessRequest) {
		t.Helper()
		e := c.start(t, req)
		for e.read() {
		}
		if e.exit == nil {
			t.Fatal(e.err)
		}
	}
	run(&portalv1.StartProcessRequest{Argv: []string{"echo", "done"}, Tag: "job"})
	for range 70 {
		run(&portalv1.StartProcessRequest{Argv: []string{"true"}, WithCall: true})
	}
	e := c.attach(t, &portalv1.AttachProcessRequest{Process: &portalv1.ProcessSelector{Tag: "job"}, Replay: true})
	for e.read() {
	}
	if e.exit == nil || e.data() != "done\n" {
		t.Errorf("the job printed %q, error %v", e.data(), e.err)
	}
}

func TestRing(t *testing.T) {
	t.Parallel()
	c := startGuest(t).dial(t)
	begin, printed := fifo(t), fifo(t)
	e := c.start(t, shell("read x <%s; seq 1000000 1400000; echo >%s; read x <%[1]s; echo end", begin, printed))
	e.cancel()
	for e.read() {
	}
	release(t, begin)
	wait(t, printed)
	replay := c.attach(t, &portalv1.AttachProcessRequest{Process: e.selector(), Replay: true})
	const total = 400001 * 8
	// The portal may not have added the last 64 KiB that it has read, and the pipe holds as much.
	if skipped := replay.started.GetSkippedBytes(); skipped > total-(1<<20) || skipped < total-(1<<20)-(128<<10) {
		t.Errorf("%d bytes are skipped, want %d", skipped, total-1<<20)
	}
	release(t, begin)
	replay.finish(t)
	at := int(replay.started.GetSkippedBytes())
	var want strings.Builder
	for i := 1000000; i <= 1400000; i++ {
		want.WriteString(strconv.Itoa(i) + "\n")
	}
	if replay.data() != want.String()[at:]+"end\n" {
		t.Errorf("the replay is not the end of the output")
	}
	infos := c.list(t)
	if n := infos[0].GetOutputBytes(); n != total+4 {
		t.Errorf("output_bytes is %d, want %d", n, total+4)
	}
	again := c.attach(t, &portalv1.AttachProcessRequest{Process: e.selector(), Replay: true})
	if again.finish(t); len(again.data()) != 1<<20 || again.started.GetSkippedBytes() != total+4-1<<20 {
		t.Errorf("the ring has %d bytes after %v, want 1 MiB", len(again.data()), again.started)
	}
}

func TestProcessSurvivesItsClient(t *testing.T) {
	t.Parallel()
	g := startGuest(t)
	c := g.dial(t)
	next := fifo(t)
	req := shell("echo before; read line; echo got $line; read x <%s; echo after", next)
	req.OpenInput, req.Tag = true, "survivor"
	e := c.start(t, req)
	e.until(t, "before")
	withCall := shell("echo started; sleep 600")
	withCall.WithCall = true
	doomed := c.start(t, withCall)
	doomed.until(t, "started")
	c.conn.Close()
	for e.read() {
	}

	c = g.dial(t)
	id := &portalv1.ProcessSelector{Tag: "survivor"}
	if err := c.write(t, &portalv1.WriteInputRequest{Process: id, Data: []byte("hello\n")}); err != nil {
		t.Fatal(err)
	}
	again := c.attach(t, &portalv1.AttachProcessRequest{Process: id, Replay: true})
	again.until(t, "got hello")
	release(t, next)
	if again.finish(t); again.data() != "before\ngot hello\nafter\n" {
		t.Errorf("output after the client was replaced: %q", again.data())
	}
	for syscall.Kill(int(doomed.started.GetPid()), 0) == nil { // it gets a signal when its client is gone
		if _, err := c.portal.Ping(t.Context(), &portalv1.PingRequest{}); err != nil {
			t.Fatal(err)
		}
	}
}
