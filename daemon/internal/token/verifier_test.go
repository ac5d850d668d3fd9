package token

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
)

// memory is a Store without a disk.
type memory struct {
	mu      sync.Mutex
	records []Record
	fail    error
}

func (m *memory) AddKey(r Record) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail == nil {
		m.records = append(m.records, r)
	}
	return m.fail
}

func (m *memory) Keys() ([]Record, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.records), nil
}

func (m *memory) RevokeKeysNotSignedBy(id string, at time.Time) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range m.records {
		if r := &m.records[i]; m.fail == nil && !r.Revoked() && r.SigningKeyID != id {
			r.RevokedAt = at
		}
	}
	return m.fail
}

func newIssuer(t testing.TB) (*memory, *Issuer, *Verifier) {
	t.Helper()
	store := new(memory)
	i, v := openIssuer(t, store, filepath.Join(t.TempDir(), "keys", "keyring.json"))
	return store, i, v
}

func openIssuer(t testing.TB, store Store, path string) (*Issuer, *Verifier) {
	t.Helper()
	i, v, err := Open(Options{KeyringPath: path, Store: store, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return i, v
}

func issue(t testing.TB, i *Issuer, req IssueRequest) (string, Record) {
	t.Helper()
	secret, r, err := i.Issue(context.Background(), req)
	if err != nil {
		t.Fatal(err)
	}
	return secret.Reveal(), r
}

// refused fails unless the token is refused with the one error; it returns the cause for the log.
func refused(t testing.TB, v *Verifier, token string) (cause string) {
	t.Helper()
	p, err := v.Verify(token)
	if !errdefs.IsUnauthorized(err) || p.KeyID != "" || p.Allows("default") {
		t.Errorf("%.60q speaks for %+v, %v", token, p, err)
		return ""
	}
	if err.Error() != errForm.Error() {
		t.Errorf("%.60q: the text %q gives its cause away", token, err)
	}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("", "err", err)
	return log.String()
}

func TestIssueAndVerify(t *testing.T) {
	store, i, v := newIssuer(t)
	key, r := issue(t, i, IssueRequest{Expire: "1w", Namespace: "project-web", CreatedBy: 1000})
	if !strings.HasPrefix(key, "msb_v2.public.") || len(key) > maxLength {
		t.Errorf("the key is %q", key)
	}
	if len(r.ID) != 32 || r.CreatedBy != 1000 || r.ExpiresAt.Sub(r.CreatedAt) != 7*24*time.Hour || r.SigningKeyID != i.SigningKey().ID {
		t.Errorf("the record is %+v", r)
	}
	for range 2 { // the second from the cache
		p, err := v.Verify(key)
		if err != nil || p.KeyID != r.ID || p.Namespace != "project-web" || p.Scopes != nil {
			t.Errorf("the key speaks for %+v, %v", p, err)
		}
		if !p.Allows("project-web") || p.Allows("default") || p.Allows("") {
			t.Error("the key is not limited to its namespace")
		}
	}
	all, _ := issue(t, i, IssueRequest{})
	if p, err := v.Verify(all); err != nil || !p.Allows("default") || !p.Allows("project-web") {
		t.Errorf("a key without limits speaks for %+v, %v", p, err)
	}
	if (Principal{}).Allows("default") {
		t.Error("nobody is allowed something")
	}
	if c := i.Counts(); c != (Counts{Live: 2}) {
		t.Errorf("counts are %+v", c)
	}
	for _, bad := range []IssueRequest{{Expire: "1"}, {Namespace: "*"}, {Namespace: "a/b"}} {
		if _, _, err := i.Issue(context.Background(), bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Issue(%+v): %v", bad, err)
		}
	}
	store.fail = errors.New("disk full")
	if secret, _, err := i.Issue(context.Background(), IssueRequest{}); !errors.Is(err, store.fail) || secret.Reveal() != "" {
		t.Errorf("a key that is not stored: %v", err)
	}
	if c := i.Counts(); c.Live != 2 {
		t.Errorf("a key that is not stored counts: %+v", c)
	}
}

func TestKeysExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, i, v := newIssuer(t)
		seen, _ := issue(t, i, IssueRequest{Expire: "1h"})
		unseen, _ := issue(t, i, IssueRequest{Expire: "1h"})
		forever, _ := issue(t, i, IssueRequest{})
		time.Sleep(time.Hour - time.Nanosecond)
		for _, key := range []string{seen, forever} {
			if _, err := v.Verify(key); err != nil {
				t.Error(err)
			}
		}
		time.Sleep(time.Nanosecond)
		for range 2 {
			for _, key := range []string{seen, unseen} {
				if cause := refused(t, v, key); !strings.Contains(cause, causeExpired) {
					t.Errorf("the log says %q", cause)
				}
			}
		}
		if len(v.verified) != 1 {
			t.Errorf("%d tokens are remembered, want that which never expires", len(v.verified))
		}
		time.Sleep(100 * 365 * 24 * time.Hour)
		if _, err := v.Verify(forever); err != nil {
			t.Error(err)
		}
		if c := i.Counts(); c != (Counts{Live: 1, Expired: 2}) {
			t.Errorf("counts are %+v", c)
		}
	})
}

// No other spelling of a good token is good.
func TestMalformedTokensAreRefused(t *testing.T) {
	_, i, v := newIssuer(t)
	key, _ := issue(t, i, IssueRequest{})
	body, footer, _ := strings.Cut(strings.TrimPrefix(key, header), ".")
	bad := []string{
		"", "msb_", header, header + ".", header + "." + footer, header + body, header + body + ".",
		strings.TrimPrefix(key, keyPrefix), "MSB_" + key[4:], " " + key, key + " ", key + "\n", key + "=", key + ".", key + "." + footer,
		header + body + "\n." + footer, header + body[:5] + "\r\n" + body[5:] + "." + footer,
		strings.Replace(key, "v2.public", "v1.public", 1), strings.Replace(key, "v2.public", "v2.local", 1),
		strings.Replace(key, ".public.", ".Public.", 1), key + strings.Repeat("A", maxLength),
		strings.Repeat(".", 1<<20), header + strings.Repeat("A", 1<<20), strings.Repeat("\x00", 100),
	}
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	for _, c := range alphabet { // the last character of body and of footer carry spare bits
		bad = append(bad,
			header+body[:len(body)-1]+string(c)+"."+footer,
			header+body+"."+footer[:len(footer)-1]+string(c))
	}
	for n := range len(key) {
		bad = append(bad, key[:n], key[:n]+string(key[n]^1)+key[n+1:], key[:n]+key[n+1:])
	}
	for _, warm := range []bool{false, true} {
		for _, token := range bad {
			if token != key {
				refused(t, v, token)
			}
		}
		if _, err := v.Verify(key); err != nil {
			t.Errorf("warm %t: %v", warm, err)
		}
	}
	if len(v.verified) != 1 {
		t.Errorf("%d tokens are remembered", len(v.verified))
	}
}

// Whoever has the signing key still mints nothing without a record, and nothing beside one.
func TestSignedButNotIssued(t *testing.T) {
	store, i, v := newIssuer(t)
	_, r := issue(t, i, IssueRequest{Namespace: "a", Expire: "1h"})
	good, err := i.keyring.payload(r)
	if err != nil {
		t.Fatal(err)
	}
	other := func(change func(*Record)) string {
		c := r
		change(&c)
		payload, err := i.keyring.payload(c)
		if err != nil {
			t.Fatal(err)
		}
		return string(payload)
	}
	tests := map[string]string{
		"no record":        other(func(r *Record) { r.ID = randomID() }),
		"wider namespace":  other(func(r *Record) { r.Namespace = "" }),
		"other namespace":  other(func(r *Record) { r.Namespace = "b" }),
		"other scopes":     other(func(r *Record) { r.Scopes = []string{"sandbox:start"} }),
		"no expiry":        other(func(r *Record) { r.ExpiresAt = time.Time{} }),
		"later expiry":     other(func(r *Record) { r.ExpiresAt = r.ExpiresAt.Add(time.Hour) }),
		"other birth":      other(func(r *Record) { r.CreatedAt = r.CreatedAt.Add(time.Hour) }),
		"other server":     strings.Replace(string(good), i.SigningKey().InstanceID, randomID(), 1),
		"other issuer":     strings.Replace(string(good), `"iss":"msbd"`, `"iss":"msb"`, 1),
		"exp left out":     string(good[:bytes.Index(good, []byte(`,"exp"`))]) + "}",
		"duplicate claim":  `{"iss":"msbd",` + string(good[1:]),
		"claim of case":    strings.Replace(string(good), `"ns"`, `"NS"`, 1),
		"unknown claim":    `{"sub":"x",` + string(good[1:]),
		"trailing text":    string(good) + " ",
		"two values":       string(good) + "{}",
		"invalid UTF-8":    strings.Replace(string(good), `"ns":"a"`, "\"ns\":\"\xff\"", 1),
		"not an object":    `["` + r.ID + `"]`,
		"empty object":     `{}`,
		"escaped spelling": strings.Replace(string(good), `"ns":"a"`, `"ns":"\u0061"`, 1),
	}
	private := ed25519.PrivateKey(i.keyring.private.Reveal())
	for name, payload := range tests {
		t.Run(name, func(t *testing.T) {
			if payload == string(good) {
				t.Fatal("this is the good payload")
			}
			token, err := sign(private, []byte(payload), []byte(i.keyring.footer))
			if err != nil {
				t.Fatal(err)
			}
			refused(t, v, token)
		})
	}
	for name, footer := range map[string]string{
		"other kid": `{"kid":"0123456789abcdef"}`, "no kid": `{}`, "no footer": "", "more footer": `{"kid":"` + i.keyring.keyID + `","x":1}`,
	} {
		t.Run(name, func(t *testing.T) {
			token, err := sign(private, good, []byte(footer))
			if err != nil {
				t.Fatal(err)
			}
			refused(t, v, token)
		})
	}
	t.Run("the good payload", func(t *testing.T) {
		token, err := sign(private, good, []byte(i.keyring.footer))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := v.Verify(token); err != nil {
			t.Error(err)
		}
	})
	t.Run("another server's key", func(t *testing.T) {
		_, alien, _ := newIssuer(t)
		token, _ := issue(t, alien, IssueRequest{})
		refused(t, v, token)
		// Even one that borrows this server's footer.
		token, err := sign(ed25519.PrivateKey(alien.keyring.private.Reveal()), good, []byte(i.keyring.footer))
		if err != nil {
			t.Fatal(err)
		}
		refused(t, v, token)
	})
	t.Run("revoked", func(t *testing.T) {
		revoked := r
		revoked.RevokedAt = now()
		v := newVerifier([]Record{revoked})
		v.trust(i.keyring.identity, now())
		token, err := i.keyring.sign(r)
		if err != nil {
			t.Fatal(err)
		}
		if cause := refused(t, v, token.Reveal()); !strings.Contains(cause, causeRevoked) || !strings.Contains(cause, r.ID) {
			t.Errorf("the log says %q", cause)
		}
	})
	if len(store.records) != 1 {
		t.Error("verifying wrote records")
	}
}

func TestCacheIsBounded(t *testing.T) {
	_, i, v := newIssuer(t)
	key, _ := issue(t, i, IssueRequest{})
	v.mu.Lock()
	for n := range maxVerified {
		v.verified[fmt.Sprint(n)] = verified{}
	}
	v.mu.Unlock()
	if _, err := v.Verify(key); err != nil {
		t.Fatal(err)
	}
	if _, ok := v.verified[key]; !ok || len(v.verified) != maxVerified {
		t.Errorf("%d tokens are remembered, the new one: %t", len(v.verified), ok)
	}
}

func TestVerifyWithoutHeap(t *testing.T) {
	_, i, v := newIssuer(t)
	key, _ := issue(t, i, IssueRequest{Expire: "1h", Namespace: "team-alpha"})
	if _, err := v.Verify(key); err != nil {
		t.Fatal(err)
	}
	body, footer, _ := strings.Cut(strings.TrimPrefix(key, header), ".")
	for name, token := range map[string]string{
		"seen before":    key,
		"1 MiB of dots":  header + strings.Repeat(".", 1<<20),
		"2 KiB of dots":  header + strings.Repeat(".", maxLength-len(header)),
		"2 KiB of text":  header + strings.Repeat("A", maxLength-len(header)-len(footer)-1) + "." + footer + "!",
		"another kid":    header + body + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"kid":"x"}`)),
		"no key at all":  "",
		"spare bits set": header + body + "." + footer[:len(footer)-1] + "_",
	} {
		if n := testing.AllocsPerRun(100, func() { _, _ = v.Verify(token) }); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// Issue, verify and reset at once: a key is never taken after a reset that began after it was issued
// has returned, and always before one began.
func TestConcurrentUse(t *testing.T) {
	_, i, v := newIssuer(t)
	ctx := context.Background()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 50 {
				secret, r, err := i.Issue(ctx, IssueRequest{Namespace: "a"})
				if err != nil {
					t.Error(err)
					return
				}
				p, err := v.Verify(secret.Reveal())
				if err == nil && p.KeyID != r.ID {
					t.Errorf("the key of %s speaks for %s", r.ID, p.KeyID)
				}
				i.Counts()
				if err == nil || r.SigningKeyID == i.SigningKey().ID {
					continue
				}
				refused(t, v, secret.Reveal()) // a reset came between, and it stays so
			}
		})
	}
	wg.Go(func() {
		for range 10 {
			before, _, err := i.Issue(ctx, IssueRequest{})
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := v.Verify(before.Reveal()); err != nil {
				t.Error(err)
			}
			if _, err := i.Reset(ctx); err != nil {
				t.Error(err)
			}
			refused(t, v, before.Reveal())
		}
	})
	wg.Wait()
}
