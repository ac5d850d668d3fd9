package keys

import (
	"crypto"
	"crypto/ed25519"
	"strings"
	"testing"

	"github.com/o1egl/paseto"
)

// forge makes tokens without a signing key: tokens that are encrypted without a key, with the public key, or with a key
// of zeros. paseto.Parse accepts the first of these, because it lets the token choose its purpose.
func forge(t testing.TB, public ed25519.PublicKey, payload, footer []byte) map[string]string {
	t.Helper()
	forged := map[string]string{}
	for name, by := range map[string]struct {
		protocol paseto.Protocol
		key      []byte
	}{
		"v1.local without a key":       {paseto.NewV1(), nil},
		"v1.local with the public key": {paseto.NewV1(), public},
		"v2.local with the public key": {paseto.NewV2(), public},
		"v2.local with a key of zeros": {paseto.NewV2(), make([]byte, 32)},
	} {
		token, err := by.protocol.Encrypt(by.key, payload, footer)
		if err != nil {
			t.Fatal(err)
		}
		forged[name] = token
	}
	return forged
}

// parse calls the library's own parser with only a public key.
func parse(public ed25519.PublicKey, token string, payload any) error {
	_, err := paseto.Parse(token, payload, nil, nil, map[paseto.Version]crypto.PublicKey{paseto.Version2: public})
	return err
}

// Tokens made by forge are refused, even with the payload of a live key.
func TestForgedTokensAreRefused(t *testing.T) {
	_, i, v := newIssuer(t)
	key, r := issue(t, i, IssueRequest{})
	payload, err := i.keyring.Load().payload(r)
	if err != nil {
		t.Fatal(err)
	}
	forged := forge(t, i.keyring.Load().public, payload, []byte(i.keyring.Load().footer))

	var got []byte
	err = parse(i.keyring.Load().public, forged["v1.local without a key"], &got)
	if err != nil || string(got) != string(payload) {
		t.Errorf("the library's Parse refuses the forgery (%v), so this test no longer proves anything", err)
	}
	for name, token := range forged {
		t.Run(name, func(t *testing.T) {
			_, body, _ := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(token, "v1."), "v2."), ".")
			for _, spelling := range []string{token, keyPrefix + token, header + body} {
				refused(t, v, spelling)
			}
		})
	}
	if _, err := v.Verify(key, from); err != nil {
		t.Error(err)
	}
}

func FuzzVerify(f *testing.F) {
	_, i, v := newIssuer(f)
	key, r := issue(f, i, IssueRequest{Namespaces: []string{"team-alpha"}})
	payload, err := i.keyring.Load().payload(r)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(key)
	for _, token := range forge(f, i.keyring.Load().public, payload, []byte(i.keyring.Load().footer)) {
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
		p, err := v.Verify(token, from)
		if (err == nil) != (token == key) || (err == nil) != (p.KeyID == r.ID) {
			t.Errorf("Verify(%q) = %+v, %v", token, p, err)
		}
	})
}
