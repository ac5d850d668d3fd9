package e2e

import (
	"encoding/base64"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Here are the guide's commands as people type them, each in a shell of its own; the curl of the guide is in
// TestSandboxLifecycle.

// shell runs a command line where msb is in PATH and finds this server.
func (s *server) shell(t *testing.T, dir, command string) (stdout string) {
	t.Helper()
	cmd := exec.Command("bash", "-c", command)
	cmd.Dir, cmd.Env = dir, s.env()
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	return string(out)
}

// claims is what a key says of itself: base64 of JSON and a signature of 64 bytes.
type claims struct {
	Namespace string    `json:"ns"`
	Issued    time.Time `json:"iat"`
	Expires   time.Time `json:"exp"`
}

func keyClaims(t *testing.T, key string) (c claims) {
	t.Helper()
	payload, err := base64.RawURLEncoding.DecodeString(strings.Split(key, ".")[2])
	if err == nil {
		err = json.Unmarshal(payload[:len(payload)-64], &c)
	}
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestGuideKeygen(t *testing.T) {
	s, _ := sharedServer(t)
	for command, want := range map[string]struct {
		namespace string
		life      time.Duration
		months    int
	}{
		"msb server keygen":                                     {},
		"msb server keygen --expire 3mo":                        {months: 3},
		"msb server keygen --expire 30s":                        {life: 30 * time.Second},
		"msb server keygen --expire 15m":                        {life: 15 * time.Minute},
		"msb server keygen --expire 24h":                        {life: 24 * time.Hour},
		"msb server keygen --expire 7d":                         {life: 7 * 24 * time.Hour},
		"msb server keygen --expire 2w":                         {life: 14 * 24 * time.Hour},
		"msb server keygen --expire 1y":                         {months: 12},
		"msb server keygen --expire 1h":                         {life: time.Hour},
		"msb server keygen --expire 6mo":                        {months: 6},
		"msb server keygen --expire 30d":                        {life: 30 * 24 * time.Hour},
		"msb server keygen --namespace team-alpha":              {namespace: "team-alpha"},
		"msb server keygen --expire 1w --namespace project-web": {namespace: "project-web", life: 7 * 24 * time.Hour},
	} {
		key := strings.TrimSpace(s.shell(t, t.TempDir(), command))
		got := keyClaims(t, key)
		end := got.Issued.Add(want.life)
		if want.months > 0 {
			end = got.Issued.AddDate(0, want.months, 0)
			if end.Day() != got.Issued.Day() { // that month has no such day: its last is meant
				end = end.AddDate(0, 0, -end.Day())
			}
		} else if want.life == 0 {
			end = time.Time{}
		}
		if !got.Expires.Equal(end) || got.Namespace != want.namespace {
			t.Errorf("%s made a key of %+v, want namespace %q and expiry %s", command, got, want.namespace, end)
		}
		s.mustCall(t, key, "sandbox.metrics.get", params{}, nil)
		if want.namespace == "" {
			s.mustCall(t, key, "sandbox.metrics.get", params{"namespace": "team-alpha"}, nil)
		} else {
			s.wantError(t, key, "sandbox.metrics.get", params{"namespace": "default"}, 403, -32004, want.namespace)
		}
	}
}

func TestGuideKeysInEnvironmentAndFile(t *testing.T) {
	s, _ := sharedServer(t)
	key, dir := s.newKey(t), t.TempDir()
	fill := strings.NewReplacer("your-api-key-here", key, "ADDRESS", s.address)
	const ask = `
curl -sf http://ADDRESS/api/v1/rpc -H "Content-Type: application/json" -H "Authorization: Bearer $MSB_API_KEY" \
  -d '{"jsonrpc": "2.0", "method": "sandbox.metrics.get", "id": "1"}'`
	for _, script := range []string{
		`export MSB_API_KEY="your-api-key-here"` + ask,
		`echo 'MSB_API_KEY="your-api-key-here"' >> .env
set -a; . ./.env` + ask,
		// msb finds the file by itself.
		`MSB_SERVER_URL=http://ADDRESS msb sandbox metrics --json`,
	} {
		if out := s.shell(t, dir, fill.Replace(script)); !strings.Contains(out, `"sandboxes"`) {
			t.Errorf("%s\nanswers %s", script, out)
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, ".env"))
	if err != nil || string(text) != "MSB_API_KEY=\""+key+"\"\n" {
		t.Errorf(".env: %q, %v", text, err)
	}
}

// A person at a terminal is asked before every key is lost.
func TestGuideResetAsksForConfirmation(t *testing.T) {
	parallel(t)
	s := testServer(t)
	if out := s.shell(t, "", "msb server status"); !strings.Contains(out, "API key required") {
		t.Errorf("status: %s", out)
	}
	key, next := s.newKey(t), s.newKey(t, "--expire", "30d")
	for _, key := range []string{key, next} { // a new key leaves the earlier ones valid
		s.mustCall(t, key, "sandbox.metrics.get", params{}, nil)
	}
	atTerminal := func(answer string) (string, error) {
		// script gives the command a terminal, and its exit code is the command's.
		cmd := exec.Command("script", "--quiet", "--return", "--echo", "never", "--command", "msb server start --reset-key", "/dev/null")
		cmd.Env, cmd.Stdin = append(s.env(), "SHELL=/bin/bash"), strings.NewReader(answer+"\n")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := atTerminal("no"); err == nil || !strings.Contains(out, "every API key") || !strings.Contains(out, "nothing was changed") {
		t.Errorf("no: %v\n%s", err, out)
	}
	s.mustCall(t, key, "sandbox.metrics.get", params{}, nil)
	if out, err := atTerminal("yes"); err != nil || !strings.Contains(out, "signing key was replaced") {
		t.Errorf("yes: %v\n%s", err, out)
	}
	for _, key := range []string{key, next} {
		s.wantError(t, key, "sandbox.metrics.get", params{}, 401, -32002, "")
	}
	s.mustCall(t, s.newKey(t), "sandbox.metrics.get", params{}, nil)
}
