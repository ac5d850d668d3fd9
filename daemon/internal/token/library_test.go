package token

import (
	"crypto"
	"crypto/ed25519"
	"strings"
	"testing"

	"github.com/o1egl/paseto"
)

// forge makes tokens that need no signing key: encrypted with no key at all, or with the public key.
// paseto.Parse, which lets a token choose its own purpose, takes the first for good.
func forge(t testing.TB, public ed25519.PublicKey, payload, footer []byte) map[string]string {
	t.Helper()
	forged := map[string]string{}
	for name, by := range map[string]struct {
		protocol paseto.Protocol
		key      []byte
	}{
		"v1.local without a key":        {paseto.NewV1(), nil},
		"v1.local by the public key":    {paseto.NewV1(), public},
		"v2.local by the public key":    {paseto.NewV2(), public},
		"v2.local by a key of all zero": {paseto.NewV2(), make([]byte, 32)},
	} {
		token, err := by.protocol.Encrypt(by.key, payload, footer)
		if err != nil {
			t.Fatal(err)
		}
		forged[name] = token
	}
	return forged
}

// A regression test: the payload of a live key, in tokens that no signing key made.
func TestForgedTokensAreRefused(t *testing.T) {
	_, i, v := newIssuer(t)
	key, r := issue(t, i, IssueRequest{})
	payload, err := i.keyring.payload(r)
	if err != nil {
		t.Fatal(err)
	}
	forged := forge(t, i.keyring.public, payload, []byte(i.keyring.footer))

	var got []byte
	_, err = paseto.Parse(forged["v1.local without a key"], &got, nil, nil,
		map[paseto.Version]crypto.PublicKey{paseto.Version2: i.keyring.public})
	if err != nil || string(got) != string(payload) {
		t.Errorf("the library's Parse refuses the forgery (%v): this test no longer proves what it says", err)
	}
	for name, token := range forged {
		t.Run(name, func(t *testing.T) {
			_, body, _ := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(token, "v1."), "v2."), ".")
			for _, spelling := range []string{token, keyPrefix + token, header + body} {
				refused(t, v, spelling)
			}
		})
	}
	if _, err := v.Verify(key); err != nil {
		t.Error(err)
	}
}

func FuzzVerify(f *testing.F) {
	_, i, v := newIssuer(f)
	key, r := issue(f, i, IssueRequest{Namespace: "team-alpha"})
	payload, err := i.keyring.payload(r)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(key)
	for _, token := range forge(f, i.keyring.public, payload, []byte(i.keyring.footer)) {
		f.Add(token)
		f.Add(keyPrefix + token)
	}
	for _, n := range []int{len(keyPrefix), len(header), len(header) + 1, len(key) / 2, len(key) - 1} {
		f.Add(key[:n])
		f.Add(key[:n] + "." + key[n:])
		f.Add(key[:n] + "\n" + key[n:])
		f.Add(key[:n] + string(key[n]^1) + key[n+1:])
	}
	f.Add(key + key)
	f.Fuzz(func(t *testing.T, token string) {
		p, err := v.Verify(token)
		if (err == nil) != (token == key) || (err == nil) != (p.KeyID == r.ID) {
			t.Errorf("%q speaks for %+v, %v", token, p, err)
		}
	})
}

// What an authenticated request costs with a key that was seen before.
func BenchmarkVerifySeen(b *testing.B) {
	_, i, v := newIssuer(b)
	key, _ := issue(b, i, IssueRequest{Expire: "1h", Namespace: "team-alpha"})
	if _, err := v.Verify(key); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := v.Verify(key); err != nil {
			b.Fatal(err)
		}
	}
}

// What the first request with a key costs, beside the signature check that it cannot do without.
func BenchmarkVerifyFirst(b *testing.B) {
	_, i, v := newIssuer(b)
	key, r := issue(b, i, IssueRequest{Expire: "1h", Namespace: "team-alpha"})
	payload, err := i.keyring.payload(r)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("msbd", func(b *testing.B) {
		for b.Loop() {
			v.forget(key)
			if _, err := v.Verify(key); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("raw Ed25519", func(b *testing.B) {
		signature := ed25519.Sign(ed25519.PrivateKey(i.keyring.private.Reveal()), payload)
		for b.Loop() {
			if !ed25519.Verify(i.keyring.public, payload, signature) {
				b.Fatal("bad signature")
			}
		}
	})
}

// What it costs to refuse a megabyte of dots, beside the library's own parser.
func BenchmarkRefuseHostile(b *testing.B) {
	_, i, v := newIssuer(b)
	token := header + strings.Repeat(".", 1<<20)
	b.Run("msbd", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := v.Verify(token); err == nil {
				b.Fatal("accepted")
			}
		}
	})
	b.Run("library", func(b *testing.B) {
		keys := map[paseto.Version]crypto.PublicKey{paseto.Version2: i.keyring.public}
		b.ReportAllocs()
		for b.Loop() {
			if _, err := paseto.Parse(token[len(keyPrefix):], nil, nil, nil, keys); err == nil {
				b.Fatal("accepted")
			}
		}
	})
}
