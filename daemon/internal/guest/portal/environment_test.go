package portal

import (
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestEnvironmentOverridesThePortals(t *testing.T) {
	t.Setenv("KEPT", "1")
	t.Setenv("CHANGED", "old")
	t.Setenv("HOME", "/portal")
	user := &account{name: "bob", home: "/home/bob", named: true}
	env, err := environment(user, []string{"CHANGED=new=x", "ADDED=", "TWICE=1"}, []string{"TWICE=2", "USER=other"})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"KEPT": "1", "CHANGED": "new=x", "ADDED": "", "TWICE": "2", "HOME": "/home/bob", "LOGNAME": "bob", "USER": "other",
	} {
		if got, ok := getenv(env, name); !ok || got != want {
			t.Errorf("%s is %q (set: %t), want %q", name, got, ok, want)
		}
		if n := strings.Count("\n"+strings.Join(env, "\n"), "\n"+name+"="); n != 1 {
			t.Errorf("the environment has %d entries for %s, want 1", n, name)
		}
	}
	if env, err = environment(ownAccount()); err != nil {
		t.Fatal(err)
	}
	if home, _ := getenv(env, "HOME"); home != "/portal" {
		t.Errorf("without a user, HOME is %q, want /portal", home)
	}
	for _, entry := range []string{"", "x", "=x", "x=\x00"} {
		if _, err := environment(ownAccount(), []string{entry}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("entry %q: %v, want InvalidArgument", entry, err)
		}
	}
}

func TestDirectory(t *testing.T) {
	workdir, home := t.TempDir(), t.TempDir()
	for _, dir := range []string{workdir + "/sub", home + "/sub", workdir + "/~x"} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(workdir)
	for _, tt := range []struct{ workdir, cwd, want string }{
		{"", "", ""},
		{workdir, "", workdir},
		{workdir, "sub", workdir + "/sub"},
		{"", "sub", workdir + "/sub"},
		{workdir, home, home},
		{"/nonexistent", home, home},
		{workdir, "~", home},
		{workdir, "~/sub", home + "/sub"},
		{workdir, "~x", workdir + "/~x"},
	} {
		if got, err := directory(tt.workdir, tt.cwd, home); got != tt.want || err != nil {
			t.Errorf("directory(%q, %q) = %q, %v, want %q", tt.workdir, tt.cwd, got, err, tt.want)
		}
	}
	for _, tt := range []struct {
		workdir, cwd string
		code         codes.Code
		want         string
	}{
		{"/nonexistent", "", codes.FailedPrecondition, `workdir "/nonexistent" does not exist in the sandbox: stop the sandbox`},
		{"/etc/passwd", "", codes.FailedPrecondition, `workdir "/etc/passwd" is not a directory`},
		{"tmp", "", codes.InvalidArgument, `workdir "tmp" is not absolute`},
		{workdir, "nope", codes.InvalidArgument, `cwd "nope" does not exist in the sandbox`},
		{workdir, "~/nope", codes.InvalidArgument, `cwd "~/nope" does not exist in the sandbox`},
		{workdir, "/etc/passwd", codes.InvalidArgument, `cwd "/etc/passwd" is not a directory`},
		{workdir, "a\x00b", codes.InvalidArgument, "cannot be used"},
	} {
		if _, err := directory(tt.workdir, tt.cwd, home); status.Code(err) != tt.code || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("directory(%q, %q): %v, want %v: %s", tt.workdir, tt.cwd, err, tt.code, tt.want)
		}
	}
}
