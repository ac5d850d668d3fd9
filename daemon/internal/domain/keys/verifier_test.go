package keys

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/binary"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestKeysExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, i, v := newIssuer(t)
		seen, _ := issue(t, i, IssueRequest{Expire: "1h"})
		unseen, _ := issue(t, i, IssueRequest{Expire: "1h"})
		forever, _ := issue(t, i, IssueRequest{})
		time.Sleep(time.Hour - time.Nanosecond)
		accepted(t, v, seen)
		accepted(t, v, forever)
		time.Sleep(time.Nanosecond)
		for range 2 {
			for _, key := range []string{seen, unseen} {
				if cause := refused(t, v, key); !strings.Contains(cause, causeExpired) {
					t.Errorf("the logged cause is %q", cause)
				}
			}
		}
		time.Sleep(time.Microsecond)
		synctest.Wait()
		if n := sessionCount(v); n != 1 {
			t.Errorf("%d sessions are open, want only that of the key that never expires", n)
		}
		time.Sleep(100 * 365 * 24 * time.Hour)
		accepted(t, v, forever)
		if c := i.Counts(); c != (Counts{Live: 1, Expired: 2}) {
			t.Errorf("counts are %+v", c)
		}
	})
}

func sessionCount(v *Verifier) (n int) {
	v.keys.sessions.byHash.Range(func(any, any) bool {
		n++
		return true
	})
	return n
}

// Malformed tokens and other spellings of a valid token are refused.
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
	for _, c := range alphabet { // the last characters of the body and of the footer have unused bits
		bad = append(bad,
			header+body[:len(body)-1]+string(c)+"."+footer,
			header+body+"."+footer[:len(footer)-1]+string(c))
	}
	for n := range len(key) {
		bad = append(bad, key[:n], key[:n]+string(key[n]^1)+key[n+1:], key[:n]+key[n+1:])
	}
	for _, hasSession := range []bool{false, true} {
		for _, token := range bad {
			if token != key {
				refused(t, v, token)
			}
		}
		if _, err := v.Verify(key, from); err != nil {
			t.Errorf("with a session %t: %v", hasSession, err)
		}
	}
	if n := sessionCount(v); n != 1 {
		t.Errorf("%d sessions are open", n)
	}
}

// Tokens that are signed with the server's signing key are refused if there is no record, or if they differ from the
// record.
func TestSignedButNotIssued(t *testing.T) {
	store, i, v := newIssuer(t)
	_, r := issue(t, i, IssueRequest{Namespaces: []string{"a"}, Expire: "1h"})
	ring := i.keyring.Load()
	good, err := ring.payload(r)
	if err != nil {
		t.Fatal(err)
	}
	other := func(change func(*Record)) string {
		c := r
		change(&c)
		payload, err := ring.payload(c)
		if err != nil {
			t.Fatal(err)
		}
		return string(payload)
	}
	tests := map[string]string{
		"no record":         other(func(r *Record) { r.ID = randomID() }),
		"wider namespace":   other(func(r *Record) { r.Namespaces = nil }),
		"other namespace":   other(func(r *Record) { r.Namespaces = []string{"b"} }),
		"other scopes":      other(func(r *Record) { r.Scopes = []Scope{ScopeStart} }),
		"no expiry":         other(func(r *Record) { r.ExpiresAt = time.Time{} }),
		"later expiry":      other(func(r *Record) { r.ExpiresAt = r.ExpiresAt.Add(time.Hour) }),
		"other issue time":  other(func(r *Record) { r.CreatedAt = r.CreatedAt.Add(time.Hour) }),
		"other server":      strings.Replace(string(good), i.SigningKey().InstanceID, randomID(), 1),
		"other issuer":      strings.Replace(string(good), `"iss":"msbd"`, `"iss":"msb"`, 1),
		"no exp claim":      string(good[:bytes.Index(good, []byte(`,"exp"`))]) + "}",
		"duplicate claim":   `{"iss":"msbd",` + string(good[1:]),
		"claim in capitals": strings.Replace(string(good), `"ns"`, `"NS"`, 1),
		"unknown claim":     `{"sub":"x",` + string(good[1:]),
		"trailing text":     string(good) + " ",
		"two values":        string(good) + "{}",
		"invalid UTF-8":     strings.Replace(string(good), `"ns":"a"`, "\"ns\":\"\xff\"", 1),
		"not an object":     `["` + r.ID + `"]`,
		"empty object":      `{}`,
		"escaped spelling":  strings.Replace(string(good), `"ns":"a"`, `"ns":"\u0061"`, 1),
	}
	private := ed25519.PrivateKey(ring.private.Reveal())
	for name, payload := range tests {
		t.Run(name, func(t *testing.T) {
			if payload == string(good) {
				t.Fatal("this is the valid payload")
			}
			token, err := sign(private, []byte(payload), []byte(ring.footer))
			if err != nil {
				t.Fatal(err)
			}
			refused(t, v, token)
		})
	}
	for name, footer := range map[string]string{
		"other kid": `{"kid":"0123456789abcdef"}`, "no kid": `{}`, "no footer": "", "more footer": `{"kid":"` + ring.keyID + `","x":1}`,
	} {
		t.Run(name, func(t *testing.T) {
			token, err := sign(private, good, []byte(footer))
			if err != nil {
				t.Fatal(err)
			}
			refused(t, v, token)
		})
	}
	t.Run("the valid payload", func(t *testing.T) {
		token, err := sign(private, good, []byte(ring.footer))
		if err != nil {
			t.Fatal(err)
		}
		accepted(t, v, token)
	})
	t.Run("key of another server", func(t *testing.T) {
		_, alien, _ := newIssuer(t)
		token, _ := issue(t, alien, IssueRequest{})
		refused(t, v, token)
		// A token of another server is refused even if it has this server's footer.
		token, err := sign(ed25519.PrivateKey(alien.keyring.Load().private.Reveal()), good, []byte(ring.footer))
		if err != nil {
			t.Fatal(err)
		}
		refused(t, v, token)
	})
	if len(store.Records()) != 1 || sessionCount(v) != 1 {
		t.Error("refused tokens created records or sessions")
	}
}

func TestVerifyWithoutHeap(t *testing.T) {
	_, i, v := newIssuer(t)
	key, _ := issue(t, i, IssueRequest{Expire: "1h", Namespaces: []string{"team-alpha"}})
	accepted(t, v, key)
	body, footer, _ := strings.Cut(strings.TrimPrefix(key, header), ".")
	for name, token := range map[string]string{
		"with a session": key,
		"1 MiB of dots":  header + strings.Repeat(".", 1<<20),
		"2 KiB of dots":  header + strings.Repeat(".", maxLength-len(header)),
		"2 KiB of text":  header + strings.Repeat("A", maxLength-len(header)-len(footer)-1) + "." + footer + "!",
		"other kid":      header + body + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"kid":"x"}`)),
		"empty":          "",
		"unused bit set": header + body + "." + footer[:len(footer)-1] + "_",
	} {
		if n := testing.AllocsPerRun(100, func() { _, _ = v.Verify(token, from) }); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
	use := alternating(v, key)
	if n := testing.AllocsPerRun(100, use); n > 1 {
		t.Errorf("from two addresses in turn: %v allocations", n)
	}
}

// countChecks counts the signatures that v checks.
func countChecks(v *Verifier) *atomic.Int64 {
	var checks atomic.Int64
	check := v.checkSignature
	v.checkSignature = func(public ed25519.PublicKey, token string) (payload, footer []byte, err error) {
		checks.Add(1)
		return check(public, token)
	}
	return &checks
}

// forgeSignature returns a token that differs from token only in its signature, which is invalid. It differs for each n.
func forgeSignature(token string, n int) string {
	body, footer, _ := strings.Cut(token[len(header):], ".")
	raw, _ := base64.RawURLEncoding.DecodeString(body)
	signature := raw[len(raw)-ed25519.SignatureSize:]
	binary.LittleEndian.PutUint32(signature, uint32(n))
	return header + base64.RawURLEncoding.EncodeToString(raw) + "." + footer
}

// A token that cannot be valid costs no signature check, except for the few that detect a stolen signing key.
func TestBadTokensCostNoSignatureCheck(t *testing.T) {
	synctest.Test(t, testBadTokensCostNoSignatureCheck)
}

func testBadTokensCostNoSignatureCheck(t *testing.T) {
	_, i, v := newIssuer(t)
	ring := i.keyring.Load()
	clock := i.clock.time()
	live, _ := issue(t, i, IssueRequest{})
	revokedToken, revoked := issue(t, i, IssueRequest{})
	revoke(t, i, revoked.ID)
	_, other, _ := newIssuer(t)
	alien, _ := issue(t, other, IssueRequest{})
	token := func(r Record) string {
		r.CreatedAt = clock
		payload, err := ring.payload(r)
		if err != nil {
			t.Fatal(err)
		}
		signed, err := sign(ed25519.PrivateKey(other.keyring.Load().private.Reveal()), payload, []byte(ring.footer))
		if err != nil {
			t.Fatal(err)
		}
		return signed
	}
	for range suspectChecksBurst { // use up the checks that detect a stolen signing key
		refused(t, v, token(Record{ID: randomID()}))
	}
	checks := countChecks(v)
	for name, bad := range map[string]string{
		"junk": "msb_wrong", "of another server": alien, "revoked": revokedToken, "revoked, with another signature": forgeSignature(revokedToken, 1),
		"changed claims of a revoked key": token(Record{ID: revoked.ID, Scopes: []Scope{ScopeExec}}), "unknown key": token(Record{ID: randomID()}),
		"expired long ago": token(Record{ID: randomID(), ExpiresAt: clock.Add(-time.Hour)}),
	} {
		before := checks.Load()
		for range 5 {
			refused(t, v, bad)
		}
		if n := checks.Load() - before; n != 0 {
			t.Errorf("%s: %d signatures were checked", name, n)
		}
	}
	before := checks.Load()
	for n := range 5 {
		refused(t, v, forgeSignature(live, n)) // it names a key that is not in use
	}
	accepted(t, v, live)
	if n := checks.Load() - before; n != 6 {
		t.Errorf("%d signatures were checked of 6 tokens that name a live key", n)
	}
}

// Any number of forged tokens with the claims of a key do not keep the key from its first use. Their signatures are
// checked one at a time.
func TestForgeriesDoNotLockOutTheirKey(t *testing.T) {
	t.Parallel()
	_, i, v := newIssuer(t)
	token, r := issue(t, i, IssueRequest{})
	var checking, most atomic.Int64
	v.checkSignature = func(public ed25519.PublicKey, token string) (payload, footer []byte, err error) {
		most.Store(max(most.Load(), checking.Add(1)))
		defer checking.Add(-1)
		return verifySignature(public, token)
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for worker := range 20 {
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
					if _, err := v.Verify(forgeSignature(token, worker<<16+n), from); err == nil {
						t.Error("a forged token is accepted")
					}
				}
			}
		})
	}
	for range 50 { // each is the first use after a restart
		accepted(t, v, token)
		i.keys.mu.Lock()
		i.keys.closeSession(i.keys.byID[r.ID], errForm)
		i.keys.mu.Unlock()
	}
	close(stop)
	wg.Wait()
	if n := most.Load(); n != 1 {
		t.Errorf("%d signatures were checked at the same time", n)
	}
}

// alternating returns a function that uses a key from one of two addresses in turn.
func alternating(v *Verifier, key string) func() {
	addresses, next := [2]netip.Addr{from, netip.MustParseAddr("2001:db8::1")}, 0
	return func() {
		next = 1 - next
		_, _ = v.Verify(key, addresses[next])
	}
}
