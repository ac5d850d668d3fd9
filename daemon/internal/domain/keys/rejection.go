package keys

import (
	"log/slog"

	"github.com/containerd/errdefs"
)

// rejection is the error for every refused token. The message is the same for all causes, so that a client learns
// nothing from it. slog calls LogValue and thus logs the cause.
type rejection struct {
	cause string
	// keyID is the id of the key that the token names, if the server knows it. The signature need not be valid.
	keyID string
	// suspicious reports whether the cause does not occur with the token of a key that this server has issued and not
	// pruned, so that a valid signature suggests that somebody else uses the signing key.
	suspicious bool
}

func (*rejection) Error() string { return "API key missing, invalid, expired or revoked" }

func (*rejection) Unwrap() error { return errdefs.ErrUnauthenticated }

func (r *rejection) LogValue() slog.Value {
	if r.keyID == "" {
		return slog.StringValue("token refused: " + r.cause)
	}
	return slog.StringValue("token of key " + r.keyID + " refused: " + r.cause)
}

// The rejections of tokens that name no record are allocated once, so that a flood of such tokens allocates little.
var (
	errTooLong    = &rejection{cause: "longer than any token"}
	errForm       = &rejection{cause: "not of the form msb_v2.public.PAYLOAD.FOOTER"}
	errEncoding   = &rejection{cause: "not canonical base64url"}
	errUnknownKey = &rejection{cause: "the footer does not name the current signing key"}
	errClaims     = &rejection{cause: causeClaims, suspicious: true}
	errNoRecord   = &rejection{cause: causeUnknown, suspicious: true}
	errExpired    = &rejection{cause: causeExpired}
	errSignature  = &rejection{cause: "bad signature"}
	errOtherToken = &rejection{cause: causeOther, suspicious: true}
)

// The causes of rejections of tokens that name the current signing key. The first four do not occur with a key that
// this server has issued and not pruned.
const (
	causeClaims   = "the claims do not have the form that this server writes"
	causeUnknown  = "this server has no record of the key"
	causeMismatch = "the claims do not match the record of the key"
	causeOther    = "it differs from the token of the key, which is in use"
	causeRevoked  = "revoked"
	causePruned   = "revoked, and its record was pruned"
	causeExpired  = "expired"
	causeReset    = "its signing key was replaced"
)
