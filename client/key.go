package client

import (
	"fmt"
	"io"
	"log/slog"
	"strings"
)

const redactedKey = "[API key]"

// Key is an API key. However it is printed, logged or marshalled, it says [API key]. The zero value is no key.
type Key struct {
	// A pointer, because fmt looks through the unexported fields of whatever holds a Key without asking its
	// methods; it prints the address of a pointer.
	text *string
}

// NewKey is the key that key spells; white space around it is dropped. An empty text is no key.
func NewKey(key string) Key {
	if key = strings.TrimSpace(key); key == "" {
		return Key{}
	}
	return Key{text: &key}
}

// IsZero says that there is no key.
func (k Key) IsZero() bool { return k.text == nil }

func (Key) String() string               { return redactedKey }
func (Key) GoString() string             { return redactedKey }
func (Key) LogValue() slog.Value         { return slog.StringValue(redactedKey) }
func (Key) MarshalText() ([]byte, error) { return []byte(redactedKey), nil }

// Format covers the verbs for which fmt does not ask String.
func (Key) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redactedKey) }

// sendable says whether the key can stand in a header. A key that was cut or copied wrongly often cannot.
func (k Key) sendable() bool {
	return !strings.ContainsFunc(*k.text, func(r rune) bool { return r <= ' ' || r > '~' })
}
