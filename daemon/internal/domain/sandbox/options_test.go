package sandbox_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"

	. "github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
)

// A start with options records them, and the same start again changes nothing.
func TestOptions(t *testing.T) {
	f := newFixture(t)
	for _, tt := range []struct {
		name string
		req  Request
		want Config
		// other is a request that is not equal, and differs what its error says.
		other   Request
		differs string
	}{
		{"defaults", Request{}, Config{Template: Template{DiskMiB: 1024}, Binding: Binding{Hostname: "sandbox"}}, Request{DiskMiB: 2048}, "disk is 1024 MiB, not 2048"},
		{"disk", Request{DiskMiB: 64}, Config{Template: Template{DiskMiB: 64}, Binding: Binding{Hostname: "sandbox"}}, Request{}, "disk is 64 MiB, not 1024"},
		{"user", Request{User: "app:staff"}, Config{Template: Template{DiskMiB: 1024}, Binding: Binding{Hostname: "sandbox", User: "app:staff"}}, Request{User: "app"}, `user is "app:staff", not "app"`},
		{"hostname", Request{Hostname: "Web-1"}, Config{Template: Template{DiskMiB: 1024}, Binding: Binding{Hostname: "Web-1"}}, Request{}, "hostname is Web-1, not sandbox"},
		{"workdir", Request{Workdir: "/w"}, Config{Template: Template{DiskMiB: 1024}, Binding: Binding{Hostname: "sandbox", Workdir: "/w"}}, Request{}, `workdir is "/w", not ""`},
		{"label", Request{Hostname: "1" + strings.Repeat("x", 62)}, Config{Template: Template{DiskMiB: 1024}, Binding: Binding{Hostname: "1" + strings.Repeat("x", 62)}}, Request{Hostname: "x"}, "hostname is 1x"},
	} {
		tt.want.Image, tt.want.CPUs, tt.want.MemoryMiB = "default", 1, 512
		name := Name{"default", tt.name}
		for range 2 {
			if err := f.Start(t.Context(), name, tt.req); err != nil {
				t.Fatalf("%s: %v", tt.name, err)
			}
		}
		rec, err := f.Get(name)
		if diff := tt.want.Diff(rec.Config); err != nil || diff != "" || rec.Config.DiskMiB != tt.want.DiskMiB || rec.Config.Hostname != tt.want.Hostname {
			t.Errorf("%s: got %+v, error %v, want %+v", tt.name, rec.Config, err, tt.want)
		}
		if !IsID(rec.ID) {
			t.Errorf("%s has the id %q", tt.name, rec.ID)
		}
		if err := f.Start(t.Context(), name, tt.other); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), tt.differs) {
			t.Errorf("%s: start with another configuration: got error %v, want %s", tt.name, err, tt.differs)
		}
	}
}

// On a server that cannot limit disks, a start with a disk is refused, and another one has no limit.
func TestServerWithoutDisks(t *testing.T) {
	f := newFixture(t)
	f.restartWith(t, func(o *Options) { o.Disks = false })
	err := f.Start(t.Context(), testName, Request{DiskMiB: 1024})
	if !errdefs.IsInvalidArgument(err) || !strings.HasPrefix(err.Error(), "this server runs sandboxes with Kata's own driver, which cannot limit the disk of a sandbox; leave out config.disk") {
		t.Errorf("start with a disk: got error %v", err)
	}
	if len(f.records(t)) != 0 || f.rt.Len() != 0 {
		t.Error("the refused start left something behind")
	}
	if err := f.Start(t.Context(), testName, Request{}); err != nil {
		t.Fatal(err)
	}
	if rec, err := f.Get(testName); err != nil || rec.Config.DiskMiB != 0 {
		t.Errorf("got %+v, error %v, want no limit of the disk", rec.Config, err)
	}
	// The sandbox still is the same when the server can limit disks again.
	f.restart(t)
	if err := f.Start(t.Context(), testName, Request{}); err != nil {
		t.Error(err)
	}
}

// A running sandbox of an earlier version, whose record has no disk, user and hostname, is adopted, and starting it again as it
// was started changes nothing.
func TestRecordOfAnEarlierVersion(t *testing.T) {
	var rec Record
	if err := json.Unmarshal([]byte(`{"id":"sb-1634ca3220e1ee80","name":{"namespace":"default","name":"one"},`+
		`"config":{"image":"default","cpus":2,"memory_mib":512,"env":["A=b"],"workdir":"/w"},"state":"running","created_at":"2026-01-02T03:04:05Z"}`), &rec); err != nil {
		t.Fatal(err)
	}
	f := newFixture(t)
	if err := f.store.PutSandbox(rec); err != nil {
		t.Fatal(err)
	}
	f.rt = sandboxtest.NewRuntime(rec.ID)
	if r := f.restart(t); r != (Recovery{Adopted: 1}) {
		t.Fatalf("recovery: %+v, want 1 adopted", r)
	}
	as := Request{CPUs: 2, Env: []string{"A=b"}, Workdir: "/w"}
	if err := f.Start(t.Context(), testName, as); err != nil {
		t.Errorf("start it again: %v", err)
	}
	if got, err := f.Get(testName); err != nil || got.ID != rec.ID {
		t.Errorf("got %+v, error %v, want the same sandbox", got, err)
	}
	as.User = "app"
	if err := f.Start(t.Context(), testName, as); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), `user is "", not "app"`) {
		t.Errorf("start it with a user: got error %v, want AlreadyExists", err)
	}
}

// making is a portal that notes the directories that it is asked for.
type making struct {
	Portal
	paths *[]Path
}

func (m making) MakeDirectory(ctx context.Context, path Path, mode *uint32) (FileInfo, bool, error) {
	*m.paths = append(*m.paths, path)
	return m.Portal.MakeDirectory(ctx, path, mode)
}

// The start creates the workdir for the user of the sandbox, and asks nothing of the portal if it has neither.
func TestStartCreatesTheWorkdir(t *testing.T) {
	for _, tt := range []struct {
		req  Request
		want []Path
	}{
		{Request{}, nil},
		{Request{Workdir: "/w"}, []Path{{Path: "/w"}}},
		{Request{User: "app"}, []Path{{Path: "/", User: "app"}}},
		{Request{Workdir: "/w", User: "app"}, []Path{{Path: "/", User: "app"}, {Path: "/w", User: "app"}}},
	} {
		f := newFixture(t)
		var got []Path
		f.Manager.Connect = func(ctx context.Context, stream io.ReadWriteCloser, attach Attach) (Portal, error) {
			p, err := f.guest.Connect(ctx, stream, attach)
			return making{p, &got}, err
		}
		if err := f.Start(t.Context(), testName, tt.req); err != nil || !slices.Equal(got, tt.want) {
			t.Errorf("%+v: the directories are %+v, error %v, want %+v", tt.req, got, err, tt.want)
		}
	}
}

// A user or a workdir that the sandbox refuses is an error that names the field, and leaves nothing behind.
func TestRefusedConfiguration(t *testing.T) {
	for name, tt := range map[string]struct {
		req  Request
		want string
	}{
		"user":             {Request{User: sandboxtest.AbsentUser}, `sandbox default/one was not started: config.user: user "no-such-user" does not exist in the sandbox`},
		"user and workdir": {Request{User: sandboxtest.AbsentUser, Workdir: "/w"}, `sandbox default/one was not started: config.user: user "no-such-user" does not exist in the sandbox`},
		"workdir":          {Request{Workdir: "/etc/passwd/w"}, `sandbox default/one was not started: config.workdir: "/etc/passwd/w" is not a directory`},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			// What an earlier start left goes as well.
			f.rt.OnStart = func(context.Context, string) error { return errors.New("no such luck") }
			if err := f.Start(t.Context(), testName, Request{}); err == nil {
				t.Fatal("the start succeeded")
			}
			f.rt.OnStart = nil
			if err := f.Start(t.Context(), testName, tt.req); !errdefs.IsInvalidArgument(err) || !strings.HasPrefix(err.Error(), tt.want) {
				t.Errorf("got error %v, want InvalidArgument: %s", err, tt.want)
			}
			if recs := f.records(t); len(recs) != 0 || f.rt.Len() != 0 || len(f.List("")) != 0 {
				t.Errorf("the refused start left %v and %d microVMs behind", recs, f.rt.Len())
			}
			if err := f.Start(t.Context(), testName, Request{User: "app", Workdir: "/w"}); err != nil {
				t.Errorf("a start after it: %v", err)
			}
		})
	}
}

// If the connection to the portal ends while the start prepares the sandbox, the start has failed.
func TestPortalEndsDuringAStart(t *testing.T) {
	f := newFixture(t)
	f.Manager.Connect = func(ctx context.Context, stream io.ReadWriteCloser, attach Attach) (Portal, error) {
		p, err := f.guest.Connect(ctx, stream, attach)
		if err == nil {
			p.Close()
		}
		return p, err
	}
	if err := f.Start(t.Context(), testName, Request{User: "app"}); !errdefs.IsUnavailable(err) {
		t.Errorf("got error %v, want Unavailable", err)
	}
	if rec, err := f.Get(testName); err != nil || rec.State != Failed || f.rt.Len() != 0 {
		t.Errorf("got %+v, error %v, and %d microVMs, want a failed sandbox without one", rec, err, f.rt.Len())
	}
}

// users is a portal that notes the users of its calls.
type users struct {
	Portal
	note func(call, user string)
}

func (u users) CreateContext(_ context.Context, req ContextRequest) (Context, error) {
	u.note("context", req.User)
	return Context{}, nil
}

func (u users) StatFile(_ context.Context, p Path, _ bool) (FileInfo, error) {
	u.note("stat", p.User)
	return FileInfo{}, nil
}

func (u users) WriteFile(_ context.Context, p Path, _ WriteOptions, _ io.Reader) (FileInfo, bool, error) {
	u.note("write", p.User)
	return FileInfo{}, true, nil
}

func (u users) WriteTree(_ context.Context, p Path, _ bool, _ io.Reader) (uint64, error) {
	u.note("tree", p.User)
	return 0, nil
}

func (u users) MoveFile(_ context.Context, from, to Path) (FileInfo, error) {
	u.note("move from", from.User)
	u.note("move to", to.User)
	return FileInfo{}, nil
}

// What runs in a sandbox, and the files that requests create there, are those of its user, unless the request names another.
func TestUserOfTheSandbox(t *testing.T) {
	for _, tt := range []struct{ config, request, want string }{{"", "", ""}, {"", "root", "root"}, {"app", "", "app"}, {"app", "root", "root"}} {
		f := newFixture(t)
		var mu sync.Mutex
		got := map[string]string{}
		note := func(call, user string) {
			mu.Lock()
			defer mu.Unlock()
			got[call] = user
		}
		f.guest.OnRun = func(_ context.Context, run any) error {
			switch run := run.(type) {
			case Code:
				note("code", run.User)
			case Command:
				note(run.Args[0], run.User)
			}
			return nil
		}
		f.Manager.Connect = func(ctx context.Context, stream io.ReadWriteCloser, attach Attach) (Portal, error) {
			p, err := f.guest.Connect(ctx, stream, attach)
			return users{p, note}, err
		}
		if err := f.Start(t.Context(), testName, Request{User: tt.config}); err != nil {
			t.Fatal(err)
		}
		options := RunOptions{User: tt.request}
		path := Path{Path: "/f", User: tt.request}
		echo := func(call string) Command { return Command{Program: "echo", Args: []string{call}, RunOptions: options} }
		_, err := sandboxtest.Read(f.RunCode(t.Context(), testName, Code{Language: Python, Text: "1", RunOptions: options}))
		_, commandErr := sandboxtest.Read(f.RunCommand(t.Context(), testName, echo("command")))
		_, processErr := sandboxtest.Read(f.StartProcess(t.Context(), testName, ProcessRequest{Command: echo("process")}))
		_, runErr := sandboxtest.Read(f.StartProcess(t.Context(), testName, ProcessRequest{Command: echo("process with its call"), WithCall: true}))
		_, contextErr := f.CreateContext(t.Context(), testName, ContextRequest{Name: "c", Language: Python, User: tt.request})
		_, statErr := f.StatFile(t.Context(), testName, path, false)
		_, _, writeErr := f.WriteFile(t.Context(), testName, path, WriteOptions{}, strings.NewReader(""))
		_, treeErr := f.WriteTree(t.Context(), testName, path, false, strings.NewReader(""))
		_, moveErr := f.MoveFile(t.Context(), testName, path, path)
		if err := errors.Join(err, commandErr, processErr, runErr, contextErr, statErr, writeErr, treeErr, moveErr); err != nil {
			t.Fatal(err)
		}
		want := map[string]string{}
		for _, call := range []string{
			"code", "command", "process", "process with its call", "context", "stat", "write", "tree", "move from", "move to",
		} {
			want[call] = tt.want
		}
		if !maps.Equal(got, want) {
			t.Errorf("config %q, request %q: the users are %v, want %q for all", tt.config, tt.request, got, tt.want)
		}
	}
}
