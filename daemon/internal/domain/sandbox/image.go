package sandbox

import "time"

// Image is an image that sandboxes can start from.
type Image struct {
	// Name is as sandbox.start takes it, such as "microsandbox/python" for
	// docker.io/microsandbox/python:latest.
	Name string
	// Digest is that of the image's manifest or index, such as "sha256:" and 64 hexadecimal digits.
	Digest string
	// Size is that of the compressed content, in bytes.
	Size    int64
	Created time.Time
}
