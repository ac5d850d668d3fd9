package e2e

import (
	"bufio"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestUpgradeKeepsKeys starts on the state of each released schema. tokens.txt beside it says what became of
// which key.
func TestUpgradeKeepsKeys(t *testing.T) {
	fixtures, err := filepath.Glob(filepath.Join(root, "daemon", "internal", "data", "store", "testdata", "schema*"))
	if err != nil || len(fixtures) == 0 {
		t.Fatalf("no fixtures: %v", err)
	}
	for _, fixture := range fixtures {
		t.Run(filepath.Base(fixture), func(t *testing.T) {
			s, err := newServer()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := s.close(); err != nil {
					t.Error(err)
				}
			})
			if err := os.Mkdir(s.state(), 0o700); err != nil {
				t.Fatal(err)
			}
			replaceFiles(t, s.state(), fixture)
			if err := os.Remove(filepath.Join(s.state(), "tokens.txt")); err != nil {
				t.Fatal(err)
			}
			if err := s.start(); err != nil {
				t.Fatal(err)
			}
			tokens, err := os.Open(filepath.Join(fixture, "tokens.txt"))
			if err != nil {
				t.Fatal(err)
			}
			defer tokens.Close()
			keys, live := map[string]string{}, map[string]bool{}
			for lines := bufio.NewScanner(tokens); lines.Scan(); {
				what, key, _ := strings.Cut(lines.Text(), " ")
				keys[what], live[what] = key, strings.HasPrefix(what, "live")
			}
			if len(keys) < 5 {
				t.Fatalf("tokens.txt has %d keys", len(keys))
			}
			for _, when := range []string{"upgraded", "restarted"} {
				s.wantAccepted(t, when, live, keys)
				s.wantWhole(t)
				s.kill()
				if err := s.start(); err != nil {
					t.Fatal(err)
				}
			}
			if namespace := claimsOf(t, keys["live-namespace"]).Namespace; namespace == "" {
				t.Error("live-namespace is not limited")
			} else {
				s.mustCall(t, keys["live-namespace"], "sandbox.metrics.get", params{"namespace": namespace}, nil)
				s.wantError(t, keys["live-namespace"], "sandbox.metrics.get", params{"namespace": "elsewhere"}, 403, -32004, namespace)
			}
			if ok, err := s.accepts(s.key(t)); !ok || err != nil {
				t.Errorf("a new key: accepted: %t, %v", ok, err)
			}
		})
	}
}
