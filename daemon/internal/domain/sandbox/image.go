package sandbox

import "time"

// Image is an image that sandboxes can start from.
type Image struct {
	// Name is the name that sandbox.start takes, such as "microsandbox/python" for docker.io/microsandbox/python:latest.
	Name string
	// Digest is the digest of the image's manifest or index: "sha256:" and 64 hexadecimal digits.
	Digest string
	// Size is the size of the compressed content, in bytes.
	Size    int64
	Created time.Time
}
