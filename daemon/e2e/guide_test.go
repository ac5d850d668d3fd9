package e2e

import (
	"encoding/base64"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// The tests in this file run the guide's commands as people type them, each in a new shell. The guide's curl command is
// in TestSandboxLifecycle.

// shell runs a command line in directory dir, with msb in PATH and this server's socket in the environment.
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

// claims is the readable part of an API key.
type claims struct {
	Namespace string    `json:"ns"`
	Issued    time.Time `json:"iat"`
	Expires   time.Time `json:"exp"`
}

// keyClaims decodes the claims of an API key. Its last part is the base64 of JSON and of a signature of 64 bytes.
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
		expiry := got.Issued.Add(want.life)
		if want.months > 0 {
			expiry = got.Issued.AddDate(0, want.months, 0)
			if expiry.Day() != got.Issued.Day() { // the month has no such day, so the key expires on its last day
				expiry = expiry.AddDate(0, 0, -expiry.Day())
			}
		} else if want.life == 0 {
			expiry = time.Time{}
		}
		if !got.Expires.Equal(expiry) || got.Namespace != want.namespace {
			t.Errorf("%s created a key with the claims %+v, want namespace %q and expiry %s", command, got, want.namespace, expiry)
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
	substitutes := strings.NewReplacer("your-api-key-here", key, "ADDRESS", s.address)
	const request = `
curl -sf http://ADDRESS/api/v1/rpc -H "Content-Type: application/json" -H "Authorization: Bearer $MSB_API_KEY" \
  -d '{"jsonrpc": "2.0", "method": "sandbox.metrics.get", "id": "1"}'`
	for _, script := range []string{
		`export MSB_API_KEY="your-api-key-here"` + request,
		`echo 'MSB_API_KEY="your-api-key-here"' >> .env
set -a; . ./.env` + request,
		// msb reads .env by itself.
		`MSB_SERVER_URL=http://ADDRESS msb sandbox metrics --json`,
	} {
		if out := s.shell(t, dir, substitutes.Replace(script)); !strings.Contains(out, `"sandboxes"`) {
			t.Errorf("%s\nprints %s", script, out)
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, ".env"))
	if err != nil || string(text) != "MSB_API_KEY=\""+key+"\"\n" {
		t.Errorf(".env: %q, %v", text, err)
	}
}

// TestGuideResetAsksForConfirmation tests that msb asks a person at a terminal for confirmation before it resets the
// signing key, which invalidates every API key.
func TestGuideResetAsksForConfirmation(t *testing.T) {
	parallel(t)
	s := testServer(t)
	if out := s.shell(t, "", "msb server status"); !regexp.MustCompile(`(?m)^authentication\s+API key required`).MatchString(out) {
		t.Errorf("status does not say that an API key is required: %s", out)
	}
	key, next := s.newKey(t), s.newKey(t, "--expire", "30d")
	for _, key := range []string{key, next} { // a new key does not invalidate the earlier ones
		s.mustCall(t, key, "sandbox.metrics.get", params{}, nil)
	}
	atTerminal := func(answer string) (string, error) {
		// script runs the command in a terminal and exits with the exit code of the command.
		cmd := exec.Command("script", "--quiet", "--return", "--echo", "never", "--command", "msb server start --reset-key", "/dev/null")
		cmd.Env, cmd.Stdin = append(s.env(), "SHELL=/bin/bash"), strings.NewReader(answer+"\n")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := atTerminal("no"); err == nil || !strings.Contains(out, "every API key") || !strings.Contains(out, "nothing was changed") {
		t.Errorf("reset answered with no: error %v, want a warning and that nothing was changed\n%s", err, out)
	}
	s.mustCall(t, key, "sandbox.metrics.get", params{}, nil)
	if out, err := atTerminal("yes"); err != nil || !strings.Contains(out, "signing key was replaced") {
		t.Errorf("reset answered with yes: error %v, want that the signing key was replaced\n%s", err, out)
	}
	for _, key := range []string{key, next} {
		s.wantError(t, key, "sandbox.metrics.get", params{}, 401, -32002, "")
	}
	s.mustCall(t, s.newKey(t), "sandbox.metrics.get", params{}, nil)
}
