package sandbox

import (
	"strings"
	"time"

	"github.com/distribution/reference"
)

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

// ShortImage returns the shortest name of an image: without docker.io and latest, which stand for a registry and a tag that are
// missing. It returns a name that is not valid unchanged.
func ShortImage(name string) string {
	ref, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return name
	}
	return strings.TrimSuffix(reference.FamiliarString(ref), ":latest")
}

// ImportProgress is how far the import of an archive of images has come.
type ImportProgress struct {
	Phase ImportPhase
	// Image is the name of the image that is prepared, as in Image. It is empty while the archive is read.
	Image string
	// Done and Total are numbers of bytes of this phase and this image. Total is 0 while it is unknown.
	Done, Total int64
}

// ImportPhase is a part of an import.
type ImportPhase string

// The phases of an import: the archive is read once, then each of its images is unpacked.
const (
	ImportReading   ImportPhase = "reading"
	ImportUnpacking ImportPhase = "unpacking"
)
