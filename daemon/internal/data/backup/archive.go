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

// An archive is a tar file of these members, in this order.
const (
	manifestName = "manifest.json"
	keyringName  = "keyring.json"
	storeName    = "msb.db"
	auditName    = "audit.jsonl"
)

const (
	formatName    = "msb-backup"
	formatVersion = 1
	// In bytes. What maxManifest and maxKeyring limit is held in memory.
	maxManifest = 16 << 10
	maxKeyring  = 16 << 10
	maxPadding  = 64 << 10
	maxTotal    = 16 << 30
)

// manifest is the first member. It says what the others are, so that damage is noticed; it does not make
// an archive trustworthy.
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

// measure copies r to w, and returns what it was as a member.
func measure(name string, w io.Writer, r io.Reader) (member, error) {
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

// readArchive reads an archive to the end of r. The store in it goes to db. What is not an archive of
// ours is errdefs.ErrInvalidArgument, a newer one errdefs.ErrFailedPrecondition, a damaged one
// errdefs.ErrDataLoss; an error of r is passed on.
func readArchive(r io.Reader, db io.Writer) (manifest, keys.Secret, error) {
	source := &faultReader{Reader: r}
	m, keyring, err := readMembers(source, db)
	if source.err != nil { // whatever the archive looked like for it
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
		return m, keyring, damaged("something follows the last member")
	}
	// Some programs fill archives up with zeros.
	rest, err := io.ReadAll(io.LimitReader(r, maxPadding+1))
	if err == nil && (len(rest) > maxPadding || len(bytes.Trim(rest, "\x00")) > 0) {
		err = damaged("something follows its end")
	}
	return m, keys.NewSecret(secret.String()), err
}

func readManifest(archive *tar.Reader) (m manifest, err error) {
	header, err := archive.Next()
	if err != nil || header.Name != manifestName || header.Typeflag != tar.TypeReg || header.Size > maxManifest {
		return m, fmt.Errorf("this is no backup of msbd: %w", errdefs.ErrInvalidArgument)
	}
	data, err := io.ReadAll(archive)
	if err != nil {
		return m, damaged("it ends within its manifest")
	}
	// All else may be different in what a newer version wrote.
	var is struct {
		Format  string `json:"format"`
		Version int    `json:"version"`
	}
	switch err := json.Unmarshal(data, &is); {
	case err != nil:
		return m, damaged("its manifest cannot be read")
	case is.Format != formatName:
		return m, fmt.Errorf("this is no backup of msbd: %w", errdefs.ErrInvalidArgument)
	case is.Version > formatVersion:
		return m, fmt.Errorf("the backup was made by a newer msbd (format %d, this one knows %d): restore it with that version: %w",
			is.Version, formatVersion, errdefs.ErrFailedPrecondition)
	case is.Version < 1 || json.Unmarshal(data, &m, json.RejectUnknownMembers(true)) != nil:
		return m, damaged("its manifest cannot be read")
	}
	limits := []struct {
		name string
		size int64
	}{{keyringName, maxKeyring}, {storeName, maxTotal}, {auditName, maxTotal}}
	if len(m.Members) != len(limits) {
		return m, damaged("its manifest names other members")
	}
	var total int64
	for i, limit := range limits {
		size := m.Members[i].Size
		if m.Members[i].Name != limit.name || size < 0 || size > limit.size {
			return m, damaged("its manifest names other members")
		}
		total += size
	}
	if total > maxTotal {
		return m, fmt.Errorf("the backup has %d bytes, the most is %d: %w", total, int64(maxTotal), errdefs.ErrInvalidArgument)
	}
	return m, nil
}

func readMember(archive *tar.Reader, want member, to io.Writer) error {
	header, err := archive.Next()
	if err != nil {
		return damaged("it ends before " + want.Name)
	}
	if header.Name != want.Name || header.Typeflag != tar.TypeReg || header.Size != want.Size {
		return damaged("another member is where " + want.Name + " belongs")
	}
	sink := &faultWriter{Writer: to}
	got, err := measure(want.Name, sink, archive)
	switch {
	case sink.err != nil:
		return fmt.Errorf("put %s aside: %w: %w", want.Name, sink.err, errdefs.ErrUnavailable)
	case err != nil:
		return damaged("it ends within " + want.Name)
	case got != want:
		return damaged(want.Name + " is not what was saved")
	}
	return nil
}

func damaged(what string) error {
	return fmt.Errorf("the backup is damaged (%s): nothing was changed; use another one: %w", what, errdefs.ErrDataLoss)
}

// faultReader and faultWriter remember what went wrong with them: who reads and writes rephrases it.
type faultReader struct {
	io.Reader
	err error
}

func (r *faultReader) Read(b []byte) (int, error) {
	n, err := r.Reader.Read(b)
	if err != nil && err != io.EOF {
		r.err = err
	}
	return n, err
}

type faultWriter struct {
	io.Writer
	err error
}

func (w *faultWriter) Write(b []byte) (int, error) {
	n, err := w.Writer.Write(b)
	if err != nil {
		w.err = err
	}
	return n, err
}
