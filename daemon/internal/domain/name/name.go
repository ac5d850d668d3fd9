// Package name defines which names sandboxes and tenant namespaces may have. API keys, sandboxes and the
// configuration use it.
package name

import (
	"fmt"
	"regexp"

	"github.com/containerd/errdefs"
)

// Pattern is the regular expression that every valid name matches.
const Pattern = `^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$`

var nameRE = regexp.MustCompile(Pattern)

// Validate checks the name of a sandbox or tenant namespace. The error message begins with kind, such as
// "sandbox name". The error is errdefs.ErrInvalidArgument.
func Validate(kind, name string) error {
	if nameRE.MatchString(name) {
		return nil
	}
	if len(name) > 80 {
		name = name[:80] + "…"
	}
	return fmt.Errorf("%s %q: use 1 to 63 characters of A-Z, a-z, 0-9, - and _, and begin with a letter or digit: %w",
		kind, name, errdefs.ErrInvalidArgument)
}
