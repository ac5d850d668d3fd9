package keys

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	jsonv2 "github.com/go-json-experiment/json"
)

func TestSecretsPrintNothing(t *testing.T) {
	const canary = "canary-in-a-coal-mine"
	secret := NewSecret(canary)
	if secret.Reveal() != canary {
		t.Fatal("Reveal does not return the text")
	}
	holder := struct {
		Public  Secret
		private Secret
		List    []Secret
		Map     map[string]Secret
		Pointer *Secret
	}{secret, secret, []Secret{secret}, map[string]Secret{"a": secret}, &secret}

	_, issuer, _ := newIssuer(t)
	ring := issuer.keyring.Load()
	private := ring.private.Reveal()

	var out bytes.Buffer
	for _, v := range []any{secret, &secret, holder, &holder, issuer, *ring, ring, fmt.Errorf("wrapped: %v", secret)} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%t", "%o"} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
		fmt.Fprintln(&out, v)
		slog.New(slog.NewTextHandler(&out, nil)).Info("m", "v", v)
		slog.New(slog.NewJSONHandler(&out, nil)).Info("m", "v", v)
		for _, marshal := range []func(any) ([]byte, error){
			json.Marshal,
			func(v any) ([]byte, error) { return jsonv2.Marshal(v) },
		} {
			data, err := marshal(v)
			fmt.Fprintf(&out, "%s %v\n", data, err)
		}
	}
	for _, hidden := range []string{
		canary, fmt.Sprintf("%x", canary), fmt.Sprintf("%X", canary),
		private, fmt.Sprintf("%x", private[:8]), fmt.Sprint([]byte(private[:8])), fmt.Sprintf("%#v", []byte(private[:8])),
		strings.Trim(fmt.Sprint([]byte(private[:8])), "[]"),
	} {
		if strings.Contains(out.String(), hidden) {
			t.Errorf("%q was printed in\n%s", hidden, out.String())
		}
	}
	if !strings.Contains(out.String(), redacted) {
		t.Errorf("%q was not printed", redacted)
	}
}
