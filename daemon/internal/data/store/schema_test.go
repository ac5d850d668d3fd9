package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// schema1 returns the files of a state directory of the first release, and the API keys in it by their description.
func schema1(t testing.TB) (files map[string][]byte, tokens map[string]string) {
	return fixture(t, "schema1", 5, "msb.db", "keyring.json")
}

// fixture returns the files with these names in a directory of testdata, and the API keys that its file tokens.txt has, by
// their description.
func fixture(t testing.TB, dir string, keys int, names ...string) (files map[string][]byte, tokens map[string]string) {
	t.Helper()
	files, tokens = map[string][]byte{}, map[string]string{}
	for _, name := range append(names, "tokens.txt") {
		content, err := os.ReadFile(filepath.Join("testdata", dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if name != "tokens.txt" {
			files[name] = content
			continue
		}
		for line := range strings.Lines(string(content)) {
			description, key, _ := strings.Cut(strings.TrimSpace(line), " ")
			tokens[description] = key
		}
	}
	if len(tokens) != keys {
		t.Fatalf("the fixture has %d keys, want %d", len(tokens), keys)
	}
	return files, tokens
}

// After an upgrade from schema 1, every live key is still accepted, and every refused key is still refused.
func TestSchema1(t *testing.T) {
	t.Parallel()
	files, tokens := schema1(t)
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	writeFiles(t, dir, files)
	for range 2 { // the second start finds the new schema
		srv := mustStart(t, dir)
		accepted := map[string]keys.Principal{}
		for description, key := range tokens {
			if p, err := srv.verifier.Verify(key, netip.Addr{}); err == nil {
				accepted[description] = p
			}
		}
		if diff := cmp.Diff([]string{"live-expiring", "live-global", "live-namespace"}, slices.Sorted(maps.Keys(accepted))); diff != "" {
			t.Error(diff)
		}
		if p := accepted["live-namespace"]; len(p.Namespaces) != 1 || p.Allows("default") {
			t.Errorf("the key of one namespace is valid in %v", p.Namespaces)
		}
		if p := accepted["live-global"]; !p.Allows("default") || !p.Has(keys.ScopeStart) {
			t.Error("the key of every namespace is not valid in the default one")
		}
		all, _, err := srv.issuer.List(keys.Filter{}, "", 100)
		if err != nil {
			t.Fatal(err)
		}
		states := map[keys.Revocation]int{}
		for _, k := range all {
			if k.RevokedAt.IsZero() != (k.Revocation == "") {
				t.Errorf("key %s: revoked at %v, revocation %q, want both or neither", k.ID, k.RevokedAt, k.Revocation)
			}
			states[k.Revocation]++
		}
		if diff := cmp.Diff(map[keys.Revocation]int{"": 4, keys.ByReset: 1}, states); diff != "" {
			t.Error(diff)
		}
		sandboxes, err := srv.Sandboxes()
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, r := range sandboxes {
			got = append(got, fmt.Sprint(r.Name, " ", r.Config.Image, " ", r.State, " ", r.Config.MemoryMiB))
		}
		want := []string{"default/box0 microsandbox/python running 512", "default/box1 microsandbox/python failed 512"}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
		if _, err := srv.VerifyAudit(t.Context()); err != nil {
			t.Error(err)
		}
		if err := srv.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// After an upgrade, every live key is still accepted, every refused key is still refused, and the audit log continues.
func TestSchema2(t *testing.T) { testUpgrade(t, "schema2") }

func TestSchema3(t *testing.T) { testUpgrade(t, "schema3") }

func TestSchema4(t *testing.T) { testUpgrade(t, "schema4") }

// testUpgrade tests an upgrade from the state directory schema in testdata.
func testUpgrade(t *testing.T, schema string) {
	t.Helper()
	t.Parallel()
	files, tokens := fixture(t, schema, 6, "msb.db", "keyring.json", "audit.jsonl")
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	writeFiles(t, dir, files)
	for start := range uint64(2) { // the second start finds the new schema
		srv := mustStart(t, dir)
		var accepted []string
		for description, key := range tokens {
			if _, err := srv.verifier.Verify(key, netip.Addr{}); err == nil {
				accepted = append(accepted, description)
			}
		}
		slices.Sort(accepted)
		if diff := cmp.Diff([]string{"live-expiring", "live-global", "live-limited"}, accepted); diff != "" {
			t.Error(diff)
		}
		st, err := observe(srv, nil)
		if err != nil || len(st.Sandboxes) != 2 || st.Requests == 0 {
			t.Errorf("the state is %+v, %v, want the sandboxes and the usage", st, err)
		}
		if head := srv.AuditHead(); head.Seq != uint64(bytes.Count(files["audit.jsonl"], []byte("\n")))+start {
			t.Errorf("the audit log ends with entry %d", head.Seq)
		}
		if err := checkAudit(srv, srv.AuditHead()); err != nil {
			t.Error(err)
		}
		if _, err := srv.SealAudit(t.Context(), "uid:0"); err != nil && start == 0 {
			t.Error(err)
		}
		if err := srv.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// writeFixture writes a state directory of the current version to dir. It adds a file tokens.txt; each line has the
// description of a key and the key. Before a release, run it and commit the files. The next release adds a test like the
// one above for them and never changes the files. The command is:
//
//	MSB_TEST_ROLE=fixture MSB_TEST_DIR=$PWD/daemon/internal/data/store/testdata/schema5 go test -count=1 ./daemon/internal/data/store
func writeFixture(dir string) error {
	ctx := context.Background()
	srv, err := start(dir)
	if err != nil {
		return err
	}
	var tokens strings.Builder
	issue := func(description string, req keys.IssueRequest) {
		secret, _, issued := srv.issuer.Issue(ctx, req)
		err = errors.Join(err, issued)
		fmt.Fprintln(&tokens, description, secret.Reveal())
	}
	done := func(_ any, failed error) { err = errors.Join(err, failed) }
	issue("reset", keys.IssueRequest{})
	done(srv.issuer.Reset(ctx, 0))
	issue("live-global", keys.IssueRequest{Name: "live-global"})
	issue("live-limited", keys.IssueRequest{
		Namespaces: []string{"team-alpha", "team-beta"}, Scopes: []keys.Scope{keys.ScopeExec, keys.ScopeRead}, CreatedBy: 1000,
	})
	issue("live-expiring", keys.IssueRequest{Expire: "100y"})
	issue("expired", keys.IssueRequest{Expire: "1s"})
	issue("revoked", keys.IssueRequest{Name: "revoked"})
	done(srv.issuer.Revoke(ctx, "revoked", 0))
	usage := map[string]keys.Usage{}
	all, _, listed := srv.issuer.List(keys.Filter{}, "", 100)
	done(nil, listed)
	for i, key := range all {
		usage[key.ID] = keys.Usage{Requests: uint64(i), LastUsedAt: time.Now().UTC(), LastUsedFrom: netip.MustParseAddr("192.0.2.1")}
	}
	done(nil, srv.SaveUsage(usage, time.Now().UTC()))
	for i, state := range []sandbox.State{sandbox.Running, sandbox.Failed} {
		id := fmt.Sprint("box", i)
		name := sandbox.Name{Namespace: sandbox.DefaultNamespace, Name: id}
		cfg := sandbox.Config{Template: sandbox.Template{Image: "microsandbox/python", CPUs: 1, MemoryMiB: 512}}
		done(nil, srv.PutSandbox(sandbox.Record{ID: id, Name: name, Config: cfg, State: state, CreatedAt: time.Now().UTC()}))
	}
	done(nil, os.WriteFile(filepath.Join(dir, "tokens.txt"), []byte(tokens.String()), 0o600))
	return errors.Join(err, srv.Close(), os.Remove(filepath.Join(dir, "msbd.lock")))
}
