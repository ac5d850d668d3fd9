package client

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

const testKey = "msb_v2.public.c2VjcmV0"

func TestKeyIsNeverPrinted(t *testing.T) {
	t.Parallel()
	type holder struct {
		Shown  Key
		hidden Key
		client *Client
	}
	c := &Client{ServerURL: "http://127.0.0.1:1", Key: NewKey(testKey)}
	h := holder{NewKey(testKey), NewKey(testKey), c}
	var out bytes.Buffer
	for _, v := range []any{c.Key, &c.Key, c, *c, h, &h, []Key{c.Key}, Config{Key: c.Key}, c.Sandbox("a", "b")} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
		marshalled, err := json.Marshal(v)
		if err != nil {
			t.Logf("%T: %v", v, err)
		}
		out.Write(marshalled)
		slog.New(slog.NewTextHandler(&out, nil)).Info("it", "v", v)
		slog.New(slog.NewJSONHandler(&out, nil)).Info("it", "v", v)
	}
	out.WriteString(c.Key.String() + c.Key.GoString())
	for _, secret := range []string{testKey, fmt.Sprintf("%x", testKey), fmt.Sprintf("%d", []byte(testKey))} {
		if strings.Contains(out.String(), strings.Trim(secret, "[]")) {
			t.Errorf("the key was printed:\n%s", &out)
		}
	}
	if !strings.Contains(out.String(), redactedKey) {
		t.Error("no key was printed at all")
	}
}

func TestNewKey(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{testKey: testKey, " " + testKey + "\n": testKey, "": "", " \n": ""} {
		switch k := NewKey(text); {
		case k.IsZero() != (want == ""):
			t.Errorf("NewKey(%q) is zero: %t", text, k.IsZero())
		case want != "" && *k.text != want:
			t.Errorf("NewKey(%q) is %q", text, *k.text)
		}
	}
}
