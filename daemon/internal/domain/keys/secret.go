package keys

import (
	"fmt"
	"io"
	"log/slog"
)

const redacted = "[redacted]"

// Secret holds text that must not be disclosed by accident. If it is printed, logged or marshalled, the result is
// [redacted]. Only Reveal returns the text.
type Secret struct {
	// text is a pointer because fmt does not call the methods of unexported fields. If a Secret is in such a field,
	// fmt prints the address and not the text.
	text *string
}

// NewSecret returns a Secret that holds text.
func NewSecret(text string) Secret { return Secret{text: &text} }

// Reveal returns the text. It is empty for the zero Secret.
func (s Secret) Reveal() string {
	if s.text == nil {
		return ""
	}
	return *s.text
}

func (Secret) String() string               { return redacted }
func (Secret) GoString() string             { return redacted }
func (Secret) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }
func (Secret) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// Format covers the verbs for which fmt does not call String.
func (Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }
