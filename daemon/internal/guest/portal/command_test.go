package portal

import (
	"strings"
	"testing"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

func TestProcessEnvironmentOverridesThePortals(t *testing.T) {
	t.Setenv("KEPT", "1")
	t.Setenv("CHANGED", "old")
	env, dir, err := processEnvironment(&portalv1.Environment{Env: []string{"CHANGED=new=x", "ADDED="}, Workdir: "/"})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"KEPT": "1", "CHANGED": "new=x", "ADDED": ""} {
		if got, ok := getenv(env, name); !ok || got != want {
			t.Errorf("%s is %q (set: %t), want %q", name, got, ok, want)
		}
	}
	if n := strings.Count(strings.Join(env, "\n"), "CHANGED="); n != 1 {
		t.Errorf("the environment has %d entries for CHANGED, want 1", n)
	}
	if dir != "/" {
		t.Errorf("working directory is %q, want /", dir)
	}
}
