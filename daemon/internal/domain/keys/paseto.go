package keys

// Only this file may use the PASETO library, and it may use only NewV2().Sign and NewV2().Verify on raw bytes. The
// rest of the library is unsafe: Parse accepts forged v1.local and v2.local tokens when it is given no symmetric
// key. JSONToken does not check the expiry, and of duplicate claims it uses the last.

import (
	"crypto/ed25519"
	"encoding/base64"
	"slices"
	"strings"

	"github.com/o1egl/paseto"
)

const (
	// keyPrefix lets people and secret scanners recognize our keys. It is not part of the PASETO.
	keyPrefix = "msb_"
	header    = keyPrefix + "v2.public."
	maxLength = 2 << 10
	// minBody is the length of a signature and an empty JSON object in base64url.
	minBody = (ed25519.SignatureSize + 2) * 8 / 6
)

// sign creates a token. It clips its arguments because the library appends to them, which would overwrite what
// follows them in the same array.
func sign(private ed25519.PrivateKey, payload, footer []byte) (string, error) {
	t, err := paseto.NewV2().Sign(private, slices.Clip(payload), slices.Clip(footer))
	if err != nil {
		return "", err
	}
	return keyPrefix + t, nil
}

// verifySignature checks the signature of a token that checkForm has accepted. It returns new copies of the signed
// payload and footer.
func verifySignature(public ed25519.PublicKey, token string) (payload, footer []byte, err error) {
	if err := paseto.NewV2().Verify(token[len(keyPrefix):], public, &payload, &footer); err != nil {
		return nil, nil, errSignature
	}
	return payload, footer, nil
}

// decodeBody decodes a body that checkForm has returned, or as much of it as fits in buffer. The last
// ed25519.SignatureSize bytes of the complete body are the signature.
func decodeBody(buffer []byte, body string) []byte {
	body = body[:min(len(body), len(buffer)/3*4)]
	n, _ := base64.RawURLEncoding.Decode(buffer, []byte(body)) // cannot fail, because checkForm has checked the encoding
	return buffer[:n]
}

// checkForm refuses a string that cannot be one of our tokens, and returns the encoded body and footer of one that can.
// The body is at least as long as a signature. checkForm uses no cryptography and allocates nothing. The library alone
// would accept some 15 other spellings of each token, skip newlines, and spend tens of milliseconds on a megabyte of dots.
func checkForm(token string) (body, footer string, err *rejection) {
	if len(token) > maxLength {
		return "", "", errTooLong
	}
	rest, ok := strings.CutPrefix(token, header)
	if !ok {
		return "", "", errForm
	}
	body, footer, ok = strings.Cut(rest, ".")
	if !ok || len(body) < minBody || footer == "" {
		return "", "", errForm
	}
	// This also refuses further dots, which are not in the alphabet.
	if !canonicalBase64(body) || !canonicalBase64(footer) {
		return "", "", errEncoding
	}
	return body, footer, nil
}

// canonicalBase64 reports whether s is unpadded base64url as an encoder writes it, that is, with all unused bits 0.
func canonicalBase64(s string) bool {
	var last, all byte
	for i := range len(s) {
		last = base64Value[s[i]]
		all |= last
	}
	switch {
	case all == notBase64: // only notBase64 has the highest bit, and it has all others
		return false
	case len(s)%4 == 0:
		return true
	case len(s)%4 == 2:
		return last&0b1111 == 0
	case len(s)%4 == 3:
		return last&0b11 == 0
	default:
		return false
	}
}

const notBase64 = 0xff

// base64Value maps each character of base64url to its six bits, and all other bytes to notBase64.
var base64Value = func() (v [256]byte) {
	for i := range v {
		v[i] = notBase64
	}
	for i, c := range []byte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_") {
		v[c] = byte(i)
	}
	return v
}()
