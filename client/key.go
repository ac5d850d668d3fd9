package client

import (
	"fmt"
	"io"
	"log/slog"
	"strings"
)

const redactedKey = "[API key]"

// Key is an API key. It is printed, logged and marshalled as "[API key]", so that it cannot leak that way. The
// zero value is no key.
type Key struct {
	// fmt does not call the methods of a Key in an unexported field of another struct. It prints the address of
	// a pointer, but it would print a string.
	text *string
}

// NewKey returns the API key in key, without surrounding white space. If key is empty, so is the Key.
func NewKey(key string) Key {
	if key = strings.TrimSpace(key); key == "" {
		return Key{}
	}
	return Key{text: &key}
}

// IsZero reports whether k is the zero value, which means no key.
func (k Key) IsZero() bool { return k.text == nil }

func (Key) String() string               { return redactedKey }
func (Key) GoString() string             { return redactedKey }
func (Key) LogValue() slog.Value         { return slog.StringValue(redactedKey) }
func (Key) MarshalText() ([]byte, error) { return []byte(redactedKey), nil }

// Format covers the verbs for which fmt does not call String.
func (Key) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redactedKey) }

// validHeader reports whether the key can be sent in an HTTP header. A key that was copied wrongly often cannot.
func (k Key) validHeader() bool {
	return !strings.ContainsFunc(*k.text, func(r rune) bool { return r <= ' ' || r > '~' })
}
