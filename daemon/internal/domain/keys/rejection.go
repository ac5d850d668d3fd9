package keys

import (
	"log/slog"

	"github.com/containerd/errdefs"
)

// rejection is the error for every refused token. The message is the same for all causes, so that a client learns
// nothing from it. slog calls LogValue and thus logs the cause.
type rejection struct {
	cause string
	keyID string // set only if the signature is valid
}

func (*rejection) Error() string { return "API key missing, invalid, expired or revoked" }

func (*rejection) Unwrap() error { return errdefs.ErrUnauthenticated }

func (r *rejection) LogValue() slog.Value {
	if r.keyID == "" {
		return slog.StringValue("token refused: " + r.cause)
	}
	return slog.StringValue("token of key " + r.keyID + " refused: " + r.cause)
}

// The rejections of tokens without a valid signature are allocated once, so that a flood of such tokens allocates
// nothing.
var (
	errTooLong    = &rejection{cause: "longer than any token"}
	errForm       = &rejection{cause: "not of the form msb_v2.public.PAYLOAD.FOOTER"}
	errEncoding   = &rejection{cause: "not canonical base64url"}
	errUnknownKey = &rejection{cause: "the footer does not name the current signing key"}
	errSignature  = &rejection{cause: "bad signature"}
)

// The causes of rejections of tokens with a valid signature. The first three do not occur with a key that this
// server has issued and not pruned.
const (
	causeClaims   = "signed correctly, but the claims do not have the form that this server writes"
	causeUnknown  = "this server has no record of the key: it was pruned, or it was not issued by this server"
	causeMismatch = "the claims do not match the record of the key"
	causeRevoked  = "revoked"
	causeExpired  = "expired"
	causeReset    = "its signing key was replaced"
)
