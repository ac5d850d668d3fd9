package sandbox

import (
	"crypto/rand"
	"regexp"
)

const (
	idLength = 20
	idChars  = "abcdefghijklmnopqrstuvwxyz0123456789"
)

// idPattern also matches the ids that earlier versions created.
var idPattern = regexp.MustCompile(`^([a-z0-9]{20}|sb-[0-9a-f]{16})$`)

// IsID reports whether s has the form of the id of a sandbox, also of one that an earlier version started.
func IsID(s string) bool { return idPattern.MatchString(s) }

// newID returns an id of idLength random characters of idChars.
func newID() string {
	// A random byte below limit selects each character with the same probability.
	const limit = 256 - 256%len(idChars)
	id := make([]byte, 0, idLength)
	var random [2 * idLength]byte
	for {
		rand.Read(random[:])
		for _, b := range random {
			if int(b) >= limit {
				continue
			}
			if id = append(id, idChars[int(b)%len(idChars)]); len(id) == idLength {
				return string(id)
			}
		}
	}
}
