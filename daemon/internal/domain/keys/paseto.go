package keys

// This file alone touches the PASETO library, and of it only NewV2().Sign and .Verify on raw bytes.
// Parse accepts forged v1.local and v2.local tokens when it is given no symmetric key; JSONToken
// checks no expiry and takes the last of duplicate claims.

import (
	"crypto/ed25519"
	"slices"
	"strings"

	"github.com/o1egl/paseto"
)

const (
	// keyPrefix marks our keys for people and for secret scanners; it is not part of the PASETO.
	keyPrefix = "msb_"
	header    = keyPrefix + "v2.public."
	maxLength = 2 << 10
	// minBody is what a signature and an empty JSON object take, in base64url.
	minBody = (ed25519.SignatureSize + 2) * 8 / 6
)

// sign makes a token. The library appends into the spare capacity of what it is given: it gets none.
func sign(private ed25519.PrivateKey, payload, footer []byte) (string, error) {
	t, err := paseto.NewV2().Sign(private, slices.Clip(payload), slices.Clip(footer))
	if err != nil {
		return "", err
	}
	return keyPrefix + t, nil
}

// open checks the signature of a token that checkForm let through, and returns fresh copies of what
// was signed.
func open(public ed25519.PublicKey, token string) (payload, footer []byte, err error) {
	if err := paseto.NewV2().Verify(token[len(keyPrefix):], public, &payload, &footer); err != nil {
		return nil, nil, errSignature
	}
	return payload, footer, nil
}

// checkForm refuses, without cryptography and without heap, what cannot be one of our tokens, and
// returns the encoded footer. The library would decode some 15 other spellings of each token, skip
// newlines, and spend tens of milliseconds on a megabyte of dots.
func checkForm(token string) (footer string, err *rejection) {
	if len(token) > maxLength {
		return "", errTooLong
	}
	rest, ok := strings.CutPrefix(token, header)
	if !ok {
		return "", errForm
	}
	body, footer, ok := strings.Cut(rest, ".")
	if !ok || len(body) < minBody || footer == "" {
		return "", errForm
	}
	// A further dot is not in the alphabet.
	if !canonicalBase64(body) || !canonicalBase64(footer) {
		return "", errEncoding
	}
	return footer, nil
}

// canonicalBase64 says whether s is what encoding some bytes as unpadded base64url gives.
func canonicalBase64(s string) bool {
	var last byte
	for i := range len(s) {
		if last = base64Value[s[i]]; last == notBase64 {
			return false
		}
	}
	switch len(s) % 4 {
	case 0:
		return true
	case 2:
		return last&0b1111 == 0
	case 3:
		return last&0b11 == 0
	default:
		return false
	}
}

const notBase64 = 0xff

// base64Value maps a character to its six bits.
var base64Value = func() (v [256]byte) {
	for i := range v {
		v[i] = notBase64
	}
	for i, c := range []byte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_") {
		v[c] = byte(i)
	}
	return v
}()
