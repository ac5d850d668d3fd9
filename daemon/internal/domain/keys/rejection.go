package keys

import (
	"log/slog"

	"github.com/containerd/errdefs"
)

// rejection is the error of every refused token. To a client all of them are the same; slog, which
// asks LogValue, learns the cause.
type rejection struct {
	cause string
	keyID string // known only once the signature was good
}

func (*rejection) Error() string { return "API key missing, invalid, expired or revoked" }

func (*rejection) Unwrap() error { return errdefs.ErrUnauthenticated }

func (r *rejection) LogValue() slog.Value {
	if r.keyID == "" {
		return slog.StringValue("token refused: " + r.cause)
	}
	return slog.StringValue("token of key " + r.keyID + " refused: " + r.cause)
}

// The refusals that need no signature check are values, so that a flood of them costs no heap.
var (
	errTooLong    = &rejection{cause: "longer than a token can be"}
	errForm       = &rejection{cause: "not of the form msb_v2.public.PAYLOAD.FOOTER"}
	errEncoding   = &rejection{cause: "not canonical base64url"}
	errUnknownKey = &rejection{cause: "not of the current signing key"}
	errSignature  = &rejection{cause: "bad signature"}
)

// What else a token is refused for. The first three cannot happen to a key that this server issued and
// did not prune.
const (
	causeClaims   = "signed, but not claims as this server writes them"
	causeUnknown  = "no record of it: it was pruned, or not issued here"
	causeMismatch = "its claims are not those of its record"
	causeRevoked  = "revoked"
	causeExpired  = "expired"
	causeReset    = "its signing key was replaced"
)
