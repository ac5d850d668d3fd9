package backup

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"time"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

// The members of an archive, which is a tar file, in their order.
const (
	manifestName = "manifest.json"
	keyringName  = "keyring.json"
	storeName    = "msb.db"
	auditName    = "audit.jsonl"
)

const (
	formatName    = "msb-backup"
	formatVersion = 1
	// Limits in bytes. The manifest and the keyring are held in memory.
	maxManifest = 16 << 10
	maxKeyring  = 16 << 10
	maxPadding  = 64 << 10 // zeros after the end of the archive
	maxTotal    = 16 << 30 // all members after the manifest together
)

// manifest is the first member. It describes the other members, so that damage is detected. It is not signed, so it does
// not protect against deliberate changes.
type manifest struct {
	Format       string    `json:"format"`
	Version      int       `json:"version"`
	TakenAt      time.Time `json:"taken_at"`
	InstanceID   string    `json:"instance_id"`
	SigningKeyID string    `json:"signing_key_id"`
	Members      []member  `json:"members"`
}

type member struct {
	Name string `json:"name"`
	// Size is in bytes.
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// copyMember copies r to w and returns a member with the size and the checksum of the data.
func copyMember(name string, w io.Writer, r io.Reader) (member, error) {
	sum := sha256.New()
	n, err := io.Copy(io.MultiWriter(w, sum), r)
	return member{Name: name, Size: n, SHA256: digest(sum)}, err
}

func digest(sum hash.Hash) string { return hex.EncodeToString(sum.Sum(nil)) }

// writeArchive writes the manifest and the contents of the members that it names.
func writeArchive(w io.Writer, m manifest, contents ...io.Reader) error {
	head, err := json.Marshal(m, jsontext.WithIndent("  "))
	if err != nil {
		return fmt.Errorf("encode manifest: %w", err)
	}
	archive := tar.NewWriter(w)
	add := func(name string, size int64, content io.Reader) error {
		err := archive.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600, Size: size, ModTime: m.TakenAt})
		if err == nil {
			_, err = io.Copy(archive, content)
		}
		return err
	}
	if err := add(manifestName, int64(len(head)), bytes.NewReader(head)); err != nil {
		return err
	}
	for i, content := range contents {
		if err := add(m.Members[i].Name, m.Members[i].Size, content); err != nil {
			return err
		}
	}
	return archive.Close()
}

// readArchive reads an archive to the end of r and writes the store in it to db. It returns errdefs.ErrInvalidArgument if
// r is not an archive of msbd, errdefs.ErrFailedPrecondition if a newer version wrote it, and errdefs.ErrDataLoss if it
// is damaged. It wraps an error of r without adding a class.
func readArchive(r io.Reader, db io.Writer) (manifest, keys.Secret, error) {
	source := &errReader{Reader: r}
	m, keyring, err := readMembers(source, db)
	if source.err != nil { // readMembers reports damage instead
		err = fmt.Errorf("read archive: %w", source.err)
	}
	return m, keyring, err
}

func readMembers(r io.Reader, db io.Writer) (m manifest, keyring keys.Secret, err error) {
	archive := tar.NewReader(r)
	if m, err = readManifest(archive); err != nil {
		return m, keyring, err
	}
	var secret bytes.Buffer
	for i, to := range []io.Writer{&secret, db, io.Discard} {
		if err := readMember(archive, m.Members[i], to); err != nil {
			return m, keyring, err
		}
	}
	if _, err := archive.Next(); err != io.EOF {
		return m, keyring, damaged("extra data after the last member")
	}
	// Some programs pad archives with zeros.
	rest, err := io.ReadAll(io.LimitReader(r, maxPadding+1))
	if err == nil && (len(rest) > maxPadding || len(bytes.Trim(rest, "\x00")) > 0) {
		err = damaged("extra data after the end")
	}
	return m, keys.NewSecret(secret.String()), err
}

func readManifest(archive *tar.Reader) (m manifest, err error) {
	header, err := archive.Next()
	if err != nil || header.Name != manifestName || header.Typeflag != tar.TypeReg || header.Size > maxManifest {
		return m, fmt.Errorf("this is not a backup of msbd: %w", errdefs.ErrInvalidArgument)
	}
	data, err := io.ReadAll(archive)
	if err != nil {
		return m, damaged("truncated in the manifest")
	}
	// Read only these two values at first, because everything else may differ in a newer version.
	var format struct {
		Format  string `json:"format"`
		Version int    `json:"version"`
	}
	switch err := json.Unmarshal(data, &format); {
	case err != nil:
		return m, damaged("invalid manifest")
	case format.Format != formatName:
		return m, fmt.Errorf("this is not a backup of msbd: %w", errdefs.ErrInvalidArgument)
	case format.Version > formatVersion:
		return m, fmt.Errorf("the backup was written by a newer msbd (format %d, this version supports up to %d): restore it with the newer version: %w",
			format.Version, formatVersion, errdefs.ErrFailedPrecondition)
	case format.Version < 1 || json.Unmarshal(data, &m, json.RejectUnknownMembers(true)) != nil:
		return m, damaged("invalid manifest")
	}
	limits := []struct {
		name string
		size int64
	}{{keyringName, maxKeyring}, {storeName, maxTotal}, {auditName, maxTotal}}
	if len(m.Members) != len(limits) {
		return m, damaged("the manifest lists unexpected members")
	}
	var total int64
	for i, limit := range limits {
		size := m.Members[i].Size
		if m.Members[i].Name != limit.name || size < 0 || size > limit.size {
			return m, damaged("the manifest lists unexpected members")
		}
		total += size
	}
	if total > maxTotal {
		return m, fmt.Errorf("the backup has %d bytes, more than the maximum of %d: %w", total, int64(maxTotal), errdefs.ErrInvalidArgument)
	}
	return m, nil
}

func readMember(archive *tar.Reader, want member, to io.Writer) error {
	header, err := archive.Next()
	if err != nil {
		return damaged("truncated before " + want.Name)
	}
	if header.Name != want.Name || header.Typeflag != tar.TypeReg || header.Size != want.Size {
		return damaged("unexpected member instead of " + want.Name)
	}
	sink := &errWriter{Writer: to}
	got, err := copyMember(want.Name, sink, archive)
	switch {
	case sink.err != nil:
		return fmt.Errorf("write %s to a temporary file: %w: %w", want.Name, sink.err, errdefs.ErrUnavailable)
	case err != nil:
		return damaged("truncated in " + want.Name)
	case got != want:
		return damaged("wrong size or checksum of " + want.Name)
	}
	return nil
}

func damaged(what string) error {
	return fmt.Errorf("the backup is damaged (%s): nothing was changed; use another backup: %w", what, errdefs.ErrDataLoss)
}

// errReader and errWriter record the error of their Reader or Writer, because the code that uses them may return a
// different error.
type errReader struct {
	io.Reader
	err error
}

func (r *errReader) Read(b []byte) (int, error) {
	n, err := r.Reader.Read(b)
	if err != nil && err != io.EOF {
		r.err = err
	}
	return n, err
}

type errWriter struct {
	io.Writer
	err error
}

func (w *errWriter) Write(b []byte) (int, error) {
	n, err := w.Writer.Write(b)
	if err != nil {
		w.err = err
	}
	return n, err
}
