package keys

import (
	"encoding/base64"
	"testing"
	"time"
)

// schema1Keyring is a keyring that the first release wrote. schema1Tokens holds tokens that the first release issued
// with it, and their records in today's form. Such tokens must remain valid forever.
const schema1Keyring = `{"version":1,"instance_id":"45beec9d1e47e4668dcabd352588f976","key_id":"d8b49c3024176f13","created_at":"2026-11-23T21:14:06.902Z","seed":"F4K7k3drIzdgSMw/bbT+CWLFmDLpcRhHLHGY/4V+oAM="}`

var schema1Tokens = []struct {
	record Record
	claims string
	token  string
}{
	{
		Record{ID: "a3910ecd77b960e7a4f55a4e683c641b", CreatedAt: schema1Time(903)},
		`{"iss":"msbd","aud":"45beec9d1e47e4668dcabd352588f976","jti":"a3910ecd77b960e7a4f55a4e683c641b","ns":"","iat":"2026-11-23T21:14:06.903Z","exp":null}`,
		"msb_v2.public.eyJpc3MiOiJtc2JkIiwiYXVkIjoiNDViZWVjOWQxZTQ3ZTQ2NjhkY2FiZDM1MjU4OGY5NzYiLCJqdGkiOiJhMzkxMGVjZDc3Yjk2MGU3YTRmNTVhNGU2ODNjNjQxYiIsIm5zIjoiIiwiaWF0IjoiMjAyNi0xMS0yM1QyMToxNDowNi45MDNaIiwiZXhwIjpudWxsfbi2aMN_1TCwth2qClZJtoormQuymmesfGnnZQ_Ld3wD1ZuVEYFm-l83HWgZNAFs3nxdUSXIlSqNXPceBlJu4QI.eyJraWQiOiJkOGI0OWMzMDI0MTc2ZjEzIn0",
	},
	{
		Record{ID: "83979406e03b693fa351f3c34ecc9268", Namespaces: []string{"team-alpha"}, CreatedAt: schema1Time(904)},
		`{"iss":"msbd","aud":"45beec9d1e47e4668dcabd352588f976","jti":"83979406e03b693fa351f3c34ecc9268","ns":"team-alpha","iat":"2026-11-23T21:14:06.904Z","exp":null}`,
		"msb_v2.public.eyJpc3MiOiJtc2JkIiwiYXVkIjoiNDViZWVjOWQxZTQ3ZTQ2NjhkY2FiZDM1MjU4OGY5NzYiLCJqdGkiOiI4Mzk3OTQwNmUwM2I2OTNmYTM1MWYzYzM0ZWNjOTI2OCIsIm5zIjoidGVhbS1hbHBoYSIsImlhdCI6IjIwMjYtMTEtMjNUMjE6MTQ6MDYuOTA0WiIsImV4cCI6bnVsbH3hlTh_Fb4bwF3ERFxTl3i0zBM-X0gBFfwnxpzoeDpZTop6xybbXZqipKQ7622J9f3tzQ2jMgkMpCyWm3jvKIwP.eyJraWQiOiJkOGI0OWMzMDI0MTc2ZjEzIn0",
	},
	{
		Record{
			ID: "7f7d5827c1d23a775ac755f44b5e1fc8", Namespaces: []string{"project-web"}, CreatedAt: schema1Time(904),
			ExpiresAt: schema1Time(904).AddDate(900, 0, 0),
		},
		`{"iss":"msbd","aud":"45beec9d1e47e4668dcabd352588f976","jti":"7f7d5827c1d23a775ac755f44b5e1fc8","ns":"project-web","iat":"2026-11-23T21:14:06.904Z","exp":"2926-11-23T21:14:06.904Z"}`,
		"msb_v2.public.eyJpc3MiOiJtc2JkIiwiYXVkIjoiNDViZWVjOWQxZTQ3ZTQ2NjhkY2FiZDM1MjU4OGY5NzYiLCJqdGkiOiI3ZjdkNTgyN2MxZDIzYTc3NWFjNzU1ZjQ0YjVlMWZjOCIsIm5zIjoicHJvamVjdC13ZWIiLCJpYXQiOiIyMDI2LTExLTIzVDIxOjE0OjA2LjkwNFoiLCJleHAiOiIyOTI2LTExLTIzVDIxOjE0OjA2LjkwNFoifUzdDl4pRpN_pPjJwlwP1nhVTxirojKLZZaJYpwCBj5eu4jmko8npX6Ohv5T1uXGOQXrTwr2ayFbBuQi1ErthAI.eyJraWQiOiJkOGI0OWMzMDI0MTc2ZjEzIn0",
	},
}

// schema1Time returns a time in the second in which schema1Keyring was created.
func schema1Time(millis int) time.Time {
	return time.Date(2026, 11, 23, 21, 14, 6, millis*1e6, time.UTC)
}

func TestTokensOfSchema1StayAsTheyAre(t *testing.T) {
	ring, err := decodeKeyring([]byte(schema1Keyring))
	if err != nil {
		t.Fatal(err)
	}
	path := keyringPath(t)
	if err := ring.save(path); err != nil {
		t.Fatal(err)
	}
	store, records := NewMemory(), map[string]Record{}
	for _, tt := range schema1Tokens {
		r := tt.record
		r.SigningKeyID = ring.keyID
		records[r.ID] = r
	}
	store.SetRecords(records)
	_, v := openIssuer(t, store, path)
	for _, tt := range schema1Tokens {
		payload, err := ring.payload(tt.record)
		if err != nil || string(payload) != tt.claims {
			t.Errorf("the claims are\n%s, %v, want\n%s", payload, err, tt.claims)
		}
		token, err := ring.sign(tt.record)
		if err != nil || token.Reveal() != tt.token {
			t.Errorf("the token is\n%s, %v, want\n%s", token.Reveal(), err, tt.token)
		}
		if p := accepted(t, v, tt.token); p.KeyID != tt.record.ID {
			t.Errorf("the token of key %s gives the principal of key %s", tt.record.ID, p.KeyID)
		}
	}
}

// The encoding of the claims is part of the format.
func TestClaims(t *testing.T) {
	ring, err := decodeKeyring([]byte(schema1Keyring))
	if err != nil {
		t.Fatal(err)
	}
	r := Record{
		ID: "83979406e03b693fa351f3c34ecc9268", Name: "ci", Namespaces: []string{"a", "b-c"}, Scopes: []Scope{ScopeExec, ScopeStart},
		CreatedAt: schema1Time(900), ExpiresAt: schema1Time(0), Life: "1d", CreatedBy: 7,
	}
	const want = `{"iss":"msbd","aud":"45beec9d1e47e4668dcabd352588f976","jti":"83979406e03b693fa351f3c34ecc9268","ns":"a,b-c",` +
		`"scopes":["sandbox:exec","sandbox:start"],"iat":"2026-11-23T21:14:06.9Z","exp":"2026-11-23T21:14:06Z"}`
	payload, err := ring.payload(r)
	if err != nil || string(payload) != want {
		t.Errorf("the claims are\n%s, %v, want\n%s", payload, err, want)
	}
	if exp := claimedExpiry(payload); !exp.Equal(r.ExpiresAt) {
		t.Errorf("they expire at %s", exp)
	}
	r.ExpiresAt = time.Time{}
	if payload, err = ring.payload(r); err != nil || !claimedExpiry(payload).IsZero() {
		t.Errorf("%s expires at %s, %v", payload, claimedExpiry(payload), err)
	}
	if want := base64.RawURLEncoding.EncodeToString([]byte(`{"kid":"d8b49c3024176f13"}`)); ring.encodedFooter != want {
		t.Errorf("the footer is %s", ring.encodedFooter)
	}
}
