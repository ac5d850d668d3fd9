package keys

import (
	"crypto/ed25519"
	"encoding/base64"
	"fmt"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/msbd/msbd/daemon/internal/sys/randtest"
)

// forger makes tokens that this server did not issue. It uses only what an attacker can have: valid tokens of this
// server, the signing key of another server, and the public key of this one.
type forger struct {
	rnd   *rand.Rand
	valid []string
	alien *keyring // the keyring of another server
	ring  *keyring // the keyring of this server, of which only the public information is used
	local []string // encrypted tokens, see forge
}

const base64Alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"

var forgeries = map[string]func(f *forger) string{
	"bits": func(f *forger) string { // flipped in the payload or in the signature
		body, footer := f.parts()
		raw, _ := base64.RawURLEncoding.DecodeString(body)
		for range 1 + f.rnd.IntN(3) {
			raw[f.rnd.IntN(len(raw))] ^= 1 << f.rnd.IntN(8)
		}
		return header + base64.RawURLEncoding.EncodeToString(raw) + "." + footer
	},
	"signature": func(f *forger) string {
		body, footer := f.parts()
		raw, _ := base64.RawURLEncoding.DecodeString(body)
		signature := raw[len(raw)-ed25519.SignatureSize:]
		switch f.rnd.IntN(4) {
		case 0:
			clear(signature)
		case 1: // S plus the order of the group, which a careless implementation accepts as the same signature
			order := []byte{0xed, 0xd3, 0xf5, 0x5c, 0x1a, 0x63, 0x12, 0x58, 0xd6, 0x9c, 0xf7, 0xa2, 0xde, 0xf9, 0xde, 0x14, 31: 0x10}
			var carry int
			for n := range order {
				carry += int(signature[32+n]) + int(order[n])
				signature[32+n] = byte(carry)
				carry >>= 8
			}
		case 2: // the signature of another token, with one bit flipped in case it is the same token
			other, _ := f.parts()
			raw2, _ := base64.RawURLEncoding.DecodeString(other)
			copy(signature, raw2[len(raw2)-ed25519.SignatureSize:])
			signature[f.rnd.IntN(len(signature))] ^= 1 << f.rnd.IntN(8)
		default:
			for n := range signature {
				signature[n] = byte(f.rnd.Uint32())
			}
		}
		return header + base64.RawURLEncoding.EncodeToString(raw) + "." + footer
	},
	"claims": func(f *forger) string { // unlimited access, signed by another signing key
		r := Record{ID: seededID(f.rnd), CreatedAt: schema1Time(f.rnd.IntN(1000))}
		payload, _ := f.ring.payload(r)
		token, _ := sign(ed25519.PrivateKey(f.alien.private.Reveal()), payload, []byte(f.ring.footer))
		return token
	},
	"versions": func(f *forger) string {
		version := []string{"v1", "v2", "v3", "v4", "v0", "V2", "v2 ", ""}[f.rnd.IntN(8)]
		purpose := []string{"local", "public", "Public", "none", ""}[f.rnd.IntN(5)]
		body, footer := f.parts()
		if version == "v2" && purpose == "public" {
			purpose = "publi"
		}
		return keyPrefix + version + "." + purpose + "." + body + "." + footer
	},
	"local": func(f *forger) string {
		token := f.local[f.rnd.IntN(len(f.local))]
		if f.rnd.IntN(2) == 0 {
			return keyPrefix + token
		}
		_, rest, _ := strings.Cut(token[3:], ".")
		return header + rest
	},
	"kids": func(f *forger) string {
		body, _ := f.parts()
		kid := []string{f.alien.keyID, "", "0123456789abcdef", f.ring.keyID + "0", strings.ToUpper(f.ring.keyID)}[f.rnd.IntN(5)]
		footer := fmt.Sprintf(`{"kid":%q}`, kid)
		if kid == f.ring.keyID {
			footer += " "
		}
		return header + body + "." + base64.RawURLEncoding.EncodeToString([]byte(footer))
	},
	"footers": func(f *forger) string {
		body, _ := f.parts()
		footer := []byte(f.ring.footer)
		switch f.rnd.IntN(4) {
		case 0:
			footer = append(footer, byte(f.rnd.Uint32()))
		case 1:
			footer = footer[:f.rnd.IntN(len(footer))]
		case 2:
			footer[f.rnd.IntN(len(footer))] ^= 1 << f.rnd.IntN(8)
		default:
			footer = []byte(strings.Replace(f.ring.footer, "{", `{"kid":"x",`, 1))
		}
		return header + body + "." + base64.RawURLEncoding.EncodeToString(footer)
	},
	"encodings": func(f *forger) string { // other spellings of a valid token
		token := f.valid[f.rnd.IntN(len(f.valid))]
		at := len(header) + f.rnd.IntN(len(token)-len(header))
		body, footer := f.parts()
		switch f.rnd.IntN(7) {
		case 0:
			return token[:at] + []string{"\n", "\r", "=", "+", "/", " ", "\x00", "."}[f.rnd.IntN(8)] + token[at:]
		case 1:
			return token + strings.Repeat("=", 1+f.rnd.IntN(3))
		case 2: // the last characters have unused bits, which must be 0
			return token[:len(token)-1] + other(f.rnd, token[len(token)-1])
		case 3:
			return header + body[:len(body)-1] + other(f.rnd, body[len(body)-1]) + "." + footer
		case 4:
			return token[:at] + other(f.rnd, token[at]) + token[at+1:]
		case 5:
			return token[:at]
		default:
			return token + token[at:]
		}
	},
	"alien": func(f *forger) string { // a token of another server
		payload, _ := f.alien.payload(Record{ID: seededID(f.rnd)})
		footer := f.alien.footer
		if f.rnd.IntN(2) == 0 {
			footer = f.ring.footer
		}
		token, _ := sign(ed25519.PrivateKey(f.alien.private.Reveal()), payload, []byte(footer))
		return token
	},
}

// other returns a random character of base64url other than c.
func other(rnd *rand.Rand, c byte) string {
	n := rnd.IntN(len(base64Alphabet))
	if base64Alphabet[n] == c {
		n = (n + 1) % len(base64Alphabet)
	}
	return base64Alphabet[n : n+1]
}

// parts returns the encoded body and footer of a random valid token.
func (f *forger) parts() (body, footer string) {
	body, footer, _ = strings.Cut(f.valid[f.rnd.IntN(len(f.valid))][len(header):], ".")
	return body, footer
}

// No token is accepted except those that the server issued.
func TestForgeriesAreRefused(t *testing.T) {
	t.Parallel()
	seed := randtest.Seed(t)
	rnd := rand.New(rand.NewPCG(seed, 0))
	ring, alien := seededKeyring(t, rnd), seededKeyring(t, rnd)
	path := keyringPath(t)
	if err := ring.save(path); err != nil {
		t.Fatal(err)
	}
	// The tokens are not from Issue, because its random ids and the time would make each run different.
	issued, records := map[string]bool{}, map[string]Record{}
	var tokens []string
	for n := range 10 {
		r := Record{
			ID: seededID(rnd), Namespaces: []string{"a", "b", "c"}[:n%4%3], Scopes: Scopes[:n%3], CreatedAt: schema1Time(n),
			SigningKeyID: ring.keyID,
		}
		if n%2 == 0 {
			r.ExpiresAt = r.CreatedAt.AddDate(900, 0, 0)
		}
		if n%3 == 0 {
			r.RevokedAt, r.Revocation = r.CreatedAt, ByHand
		}
		token, err := ring.sign(r)
		if err != nil {
			t.Fatal(err)
		}
		records[r.ID] = r
		issued[token.Reveal()] = true
		tokens = append(tokens, token.Reveal())
	}
	store := NewMemory()
	store.SetRecords(records)
	i, v := openIssuer(t, store, path)
	for n, token := range tokens {
		if n%3 == 0 {
			refused(t, v, token)
		} else {
			accepted(t, v, token) // opens a session
		}
	}
	payload, err := ring.payload(i.keys.records()[0])
	if err != nil {
		t.Fatal(err)
	}
	encrypted := forge(t, ring.public, payload, []byte(ring.footer))
	var local []string
	for _, name := range slices.Sorted(maps.Keys(encrypted)) {
		local = append(local, encrypted[name])
	}

	total := iterations(t, 5_000, 10_000_000)
	workers := runtime.GOMAXPROCS(0)
	var tried [16]atomic.Int64
	kinds := slices.Sorted(maps.Keys(forgeries))
	var wg sync.WaitGroup
	for worker := range workers {
		wg.Go(func() {
			source := rand.NewPCG(0, 0)
			f := &forger{rand.New(source), tokens, alien, ring, local}
			for n := worker; n < total; n += workers {
				source.Seed(seed, uint64(n)+1) // so that the forgeries do not depend on the number of workers
				kind := n % len(kinds)
				token := forgeries[kinds[kind]](f)
				if issued[token] {
					continue // the forgery is by chance a valid token
				}
				tried[kind].Add(1)
				if p, err := v.Verify(token, from); err == nil || p.KeyID != "" {
					t.Errorf("forgery %d, %s: %q is accepted: %+v", n, kinds[kind], token, p)
					return
				}
			}
		})
	}
	wg.Wait()
	for n, kind := range kinds {
		t.Logf("%s: %d refused", kind, tried[n].Load())
		if tried[n].Load() < int64(total/len(kinds)/2) {
			t.Errorf("%s: too few forgeries were tried", kind)
		}
	}
	if events := i.suspects.take(); events != nil {
		t.Errorf("forgeries were reported as signed by the signing key: %+v", events)
	}
	for token := range issued {
		_, err := v.Verify(token, from)
		if s := v.keys.sessions.find(token); (err == nil) != (s != nil) {
			t.Errorf("an issued token, after the forgeries: %v", err)
		}
	}
}
