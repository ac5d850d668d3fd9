//go:build linux

package client

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
)

// place is a directory tree with configuration files. The working directory is project/sub in it, and
// $XDG_CONFIG_HOME is config.
type place struct {
	root string
}

func newPlace(t *testing.T) place {
	t.Helper()
	root, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	p := place{root}
	for _, dir := range []string{"project/sub", "config/msb"} {
		if err := os.MkdirAll(p.path(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(p.path("project/sub"))
	t.Setenv("XDG_CONFIG_HOME", p.path("config"))
	t.Setenv(EnvAPIKey, "")
	t.Setenv(EnvServerURL, "")
	return p
}

func (p place) path(name string) string { return filepath.Join(p.root, name) }

func (p place) write(t *testing.T, name, text string, mode fs.FileMode) {
	t.Helper()
	if err := os.WriteFile(p.path(name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(p.path(name), mode); err != nil {
		t.Fatal(err)
	}
}

const (
	theKey = "MSB_API_KEY='" + testKey + "'\n"
	remote = "MSB_SERVER_URL=https://sandboxes.example.org\n"
	local  = "MSB_SERVER_URL=http://127.0.0.1:7001\n"
)

func TestLoadConfig(t *testing.T) {
	const near, far, config = "project/sub/.env", "project/.env", "config/msb/env"
	for name, tt := range map[string]struct {
		files             map[string]string
		env               map[string]string
		given             string
		server, from, key string // from, key: where the server and the key were found
	}{
		"nothing":      {server: DefaultServerURL, from: "the default"},
		"environment":  {env: map[string]string{EnvAPIKey: testKey, EnvServerURL: "https://a"}, server: "https://a", from: "the environment", key: "the environment"},
		"working dir":  {files: map[string]string{near: theKey + remote}, server: "https://sandboxes.example.org", from: near, key: near},
		"parent":       {files: map[string]string{far: theKey + remote}, server: "https://sandboxes.example.org", from: far, key: far},
		"own file":     {files: map[string]string{config: theKey + remote}, server: "https://sandboxes.example.org", from: config, key: config},
		"nearest":      {files: map[string]string{near: theKey, far: "MSB_API_KEY=msb_other\n"}, server: DefaultServerURL, from: "the default", key: near},
		"each by self": {files: map[string]string{near: local, far: theKey}, server: "http://127.0.0.1:7001", from: near, key: far},
		"environment first": {
			files: map[string]string{near: "MSB_API_KEY=msb_other\nMSB_SERVER_URL=https://other\n", config: theKey},
			env:   map[string]string{EnvAPIKey: testKey, EnvServerURL: "https://a"}, server: "https://a", from: "the environment", key: "the environment",
		},
		"before the own file": {files: map[string]string{far: theKey, config: "MSB_API_KEY=msb_other\n"}, server: DefaultServerURL, from: "the default", key: far},
		"empty is unset":      {files: map[string]string{near: "MSB_API_KEY=\nMSB_SERVER_URL=''\n", far: theKey + local}, server: "http://127.0.0.1:7001", from: far, key: far},
		"given": {
			files: map[string]string{near: theKey + remote}, env: map[string]string{EnvServerURL: "https://a"},
			given: "https://b", server: "https://b", from: "the caller", key: near,
		},
		"own file names the server":    {files: map[string]string{config: remote, near: theKey}, server: "https://sandboxes.example.org", from: config, key: near},
		"environment names the server": {files: map[string]string{near: theKey}, env: map[string]string{EnvServerURL: "https://a"}, server: "https://a", from: "the environment", key: near},
		"no key to lose":               {files: map[string]string{near: remote}, server: "https://sandboxes.example.org", from: near},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t)
			for file, text := range tt.files {
				p.write(t, file, text, 0o600)
			}
			for name, value := range tt.env {
				t.Setenv(name, value)
			}
			c, err := LoadConfig(tt.given)
			if err != nil {
				t.Fatal(err)
			}
			where := func(from string) string {
				if strings.Contains(from, "/") {
					return p.path(from)
				}
				return from
			}
			if c.ServerURL != tt.server || c.ServerFrom != where(tt.from) || c.KeyFrom != where(tt.key) || c.Key.IsZero() != (tt.key == "") {
				t.Errorf("got %+v, want %+v", c, tt)
			}
			if !c.Key.IsZero() && *c.Key.text != testKey {
				t.Errorf("got the key %q", *c.Key.text)
			}
			if client := c.Client(); client.ServerURL != c.ServerURL || client.Key != c.Key {
				t.Errorf("the client is %+v", client)
			}
		})
	}
}

// A file that others may have written determines neither the key nor the server that the key is sent to.
func TestUntrustedConfig(t *testing.T) {
	const near, far, config = "project/sub/.env", "project/.env", "config/msb/env"
	type file struct {
		name, text string
		mode       fs.FileMode
	}
	for name, tt := range map[string]struct {
		files []file
		key   string // in the environment
		class error  // nil: the file is used
		text  string
	}{
		"server in .env, key in environment": {[]file{{near, remote, 0o600}}, testKey, errdefs.ErrPermissionDenied, "the API key is from the environment"},
		"server in .env, key in own file":    {[]file{{near, remote, 0o600}, {config, theKey, 0o600}}, "", errdefs.ErrPermissionDenied, config},
		"server and key in different .env":   {[]file{{far, remote, 0o600}, {near, theKey, 0o600}}, "", errdefs.ErrPermissionDenied, near},
		"server on this machine":             {[]file{{near, local, 0o600}}, testKey, nil, ""},
		"server and key in one .env":         {[]file{{near, remote + theKey, 0o644}}, "", nil, ""},
		"the key of that .env is not used":   {[]file{{near, remote + theKey, 0o644}}, "msb_other", errdefs.ErrPermissionDenied, "the environment"},
		"writable by everyone, key":          {[]file{{far, theKey, 0o666}}, "", errdefs.ErrPermissionDenied, "chmod o-w"},
		"writable by everyone, server":       {[]file{{far, local, 0o602}}, testKey, errdefs.ErrPermissionDenied, "MSB_SERVER_URL in"},
		"writable by everyone, own file":     {[]file{{config, theKey, 0o666}}, "", errdefs.ErrPermissionDenied, "chmod o-w"},
		"writable by everyone, neither":      {[]file{{far, "A=b\n", 0o666}}, testKey, nil, ""},
		"writable by everyone, not used":     {[]file{{far, theKey, 0o666}}, testKey, nil, ""},
		"writable by the group":              {[]file{{far, theKey, 0o664}}, "", nil, ""},
		"malformed":                          {[]file{{near, "MSB_API_KEY: hunter2\n", 0o600}}, "", errdefs.ErrInvalidArgument, ".env: line 1"},
		"no URL":                             {[]file{{near, "MSB_SERVER_URL=hunter2\n", 0o600}}, testKey, errdefs.ErrInvalidArgument, "must be https://"},
		"too long":                           {[]file{{near, strings.Repeat("# hello\n", maxDotenv/8+1), 0o600}}, "", errdefs.ErrInvalidArgument, "longer than"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t)
			for _, f := range tt.files {
				p.write(t, f.name, f.text, f.mode)
			}
			t.Setenv(EnvAPIKey, tt.key)
			c, err := LoadConfig("")
			if !errors.Is(err, tt.class) || (c == nil) != (tt.class != nil) {
				t.Fatalf("got %+v, %v; want %v", c, err, tt.class)
			}
			if err == nil {
				return
			}
			if !strings.Contains(err.Error(), tt.text) {
				t.Errorf("%q does not contain %q", err, tt.text)
			}
			if strings.Contains(err.Error(), testKey) || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%q contains the value", err)
			}
		})
	}
}

type owned struct {
	fs.FileInfo
	uid int
}

func (o owned) Sys() any { return &syscall.Stat_t{Uid: uint32(o.uid)} }

func TestFilesOfOtherUsers(t *testing.T) {
	path := filepath.Join(t.TempDir(), ".env")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	for uid, trusted := range map[int]bool{0: true, os.Geteuid(): true, os.Geteuid() + 1: false, 65534: false} {
		if why := untrustedReason(owned{info, uid}, path); (why == "") != trusted || !trusted && !strings.Contains(why, fmt.Sprint(uid)) {
			t.Errorf("a file of user %d: %q", uid, why)
		}
	}
}

// A directory or a pipe named .env is skipped. A missing or unusual configuration directory, home or working
// directory is not an error.
func TestSkippedPlaces(t *testing.T) {
	p := newPlace(t)
	if err := os.Mkdir(p.path("project/sub/.env"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(p.path("project/.env"), 0o600); err != nil {
		t.Fatal(err)
	}
	p.write(t, ".env", theKey, 0o600)
	if c, err := LoadConfig(""); err != nil || c.KeyFrom != p.path(".env") {
		t.Errorf("got %+v, %v", c, err)
	}
	t.Setenv("XDG_CONFIG_HOME", "/dev/null")
	if _, err := LoadConfig(""); err != nil {
		t.Error(err)
	}
	t.Setenv("XDG_CONFIG_HOME", "not/absolute")
	t.Setenv("HOME", p.root)
	if got := ConfigFile(); got != p.path(".config/msb/env") {
		t.Errorf("the configuration file is %s", got)
	}
	t.Setenv("HOME", "")
	if got := ConfigFile(); got != "" {
		t.Errorf("without a home directory, the configuration file is %s", got)
	}
	if err := os.RemoveAll(p.path("project")); err != nil {
		t.Fatal(err)
	}
	t.Setenv(EnvAPIKey, testKey)
	if c, err := LoadConfig(""); err != nil || c.KeyFrom != "the environment" {
		t.Errorf("in a deleted directory: %+v, %v", c, err)
	}
}

func TestUnreadableDotenv(t *testing.T) {
	p := newPlace(t)
	for _, dir := range []string{p.root, filepath.Dir(p.root)} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	p.write(t, "project/.env", theKey, 0o000)
	asOther(t, func() {
		_, err := LoadConfig("")
		if !errors.Is(err, errdefs.ErrPermissionDenied) || !strings.Contains(err.Error(), p.path("project/.env")+": permission denied") || !strings.Contains(err.Error(), "chown") {
			t.Errorf("got %v", err)
		}
	})
	// A file in a directory that the user may not enter does not exist for the user.
	t.Setenv("XDG_CONFIG_HOME", p.path("closed"))
	p.write(t, "project/.env", "", 0o644)
	if err := os.MkdirAll(p.path("closed/msb"), 0o700); err != nil {
		t.Fatal(err)
	}
	p.write(t, "closed/msb/env", theKey, 0o644)
	if err := os.Chmod(p.path("closed"), 0o000); err != nil {
		t.Fatal(err)
	}
	asOther(t, func() {
		if c, err := LoadConfig(""); err != nil || !c.Key.IsZero() {
			t.Errorf("got %+v, %v", c, err)
		}
	})
	if err := os.Chmod(p.path("closed"), 0o700); err != nil {
		t.Fatal(err)
	}
}

// asOther runs f with the file permissions of a user who is not root.
func asOther(t *testing.T, f func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		f()
		return
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked, so that the thread exits with the goroutine
		err := syscall.Setfsuid(65534)
		if err == nil {
			f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
