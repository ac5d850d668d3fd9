package portal

import (
	"slices"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestLookupUser(t *testing.T) {
	for _, tt := range []struct {
		spec       string
		uid, gid   uint32
		name, home string
	}{
		{"root", 0, 0, "root", "/root"},
		{"0", 0, 0, "root", "/root"},
		{"nobody", 65534, 65534, "nobody", "/nonexistent"},
		{"65534", 65534, 65534, "nobody", "/nonexistent"},
		{"nobody:daemon", 65534, 1, "nobody", "/nonexistent"},
		{"nobody:7", 65534, 7, "nobody", "/nonexistent"},
		{"4000000000", 4000000000, 0, "4000000000", "/"},
		{"4000000000:4000000001", 4000000000, 4000000001, "4000000000", "/"},
	} {
		a, err := lookupUser(tt.spec)
		if err != nil {
			t.Errorf("lookupUser(%q): %v", tt.spec, err)
			continue
		}
		if a.uid != tt.uid || a.gid != tt.gid || a.name != tt.name || a.home != tt.home || !slices.Contains(a.groups, tt.gid) {
			t.Errorf("lookupUser(%q) = %+v, want %+v", tt.spec, *a, tt)
		}
	}
	for spec, want := range map[string]string{
		"no-such-user":   `user "no-such-user" does not exist in the sandbox`,
		":daemon":        `user "" does not exist in the sandbox`,
		"-1":             `user "-1" does not exist in the sandbox`,
		"4294967295":     `user "4294967295" does not exist in the sandbox`,
		"nobody:":        `group "" does not exist in the sandbox`,
		"nobody:nowhere": `group "nowhere" does not exist in the sandbox`,
	} {
		_, err := lookupUser(spec)
		if s := status.Convert(err); s.Code() != codes.InvalidArgument || s.Message() != want {
			t.Errorf("lookupUser(%q): %v, want InvalidArgument: %s", spec, err, want)
		}
	}
	if a, err := lookupUser(""); err != nil || !a.own() || a.home == "" || a.name == "" {
		t.Errorf(`lookupUser("") = %+v, %v, want the account of this process`, a, err)
	}
}
