package keys

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/sys/durable"
)

const (
	keyringVersion = 1
	maxKeyringSize = 4 << 10
)

// keyring is the signing key and the identity of this server.
type keyring struct {
	*identity
	createdAt time.Time
	private   Secret // an ed25519.PrivateKey's bytes
}

// keyringFile is the keyring on disk. KeyID is a fingerprint of all the rest, so that a damaged file
// is noticed, not used.
type keyringFile struct {
	Version    int       `json:"version"`
	InstanceID string    `json:"instance_id"`
	KeyID      string    `json:"key_id"`
	CreatedAt  time.Time `json:"created_at"`
	Seed       []byte    `json:"seed"`
}

// newKeyring makes a signing key. An empty instanceID makes a new instance, too.
func newKeyring(instanceID string, now time.Time) (*keyring, error) {
	if instanceID == "" {
		instanceID = randomID()
	}
	seed := make([]byte, ed25519.SeedSize)
	_, _ = rand.Read(seed) // never fails
	return keyringFrom(keyringFile{InstanceID: instanceID, CreatedAt: now, Seed: seed})
}

func keyringFrom(f keyringFile) (*keyring, error) {
	private := ed25519.NewKeyFromSeed(f.Seed)
	public := private.Public().(ed25519.PublicKey)
	sum := sha256.New()
	fmt.Fprintf(sum, "%q %q ", f.InstanceID, f.CreatedAt.UTC().Format(time.RFC3339Nano))
	sum.Write(public)
	id, err := newIdentity(f.InstanceID, hex.EncodeToString(sum.Sum(nil)[:8]), public)
	if err != nil {
		return nil, err
	}
	return &keyring{identity: id, createdAt: f.CreatedAt.UTC(), private: NewSecret(string(private))}, nil
}

func (k *keyring) sign(r Record) (Secret, error) {
	payload, err := k.payload(r)
	if err != nil {
		return Secret{}, err
	}
	t, err := sign(ed25519.PrivateKey(k.private.Reveal()), payload, []byte(k.footer))
	if err != nil {
		return Secret{}, err
	}
	return NewSecret(t), nil
}

// loadKeyring reads a keyring that only this process's user can have written and read. A missing
// file is fs.ErrNotExist; one that is damaged is errdefs.ErrDataLoss.
func loadKeyring(path string) (*keyring, error) {
	if err := checkPrivate(filepath.Dir(path), fs.ModeDir); err != nil {
		return nil, err
	}
	// O_NONBLOCK: a FIFO put there must not hang the start.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) {
		return nil, fmt.Errorf("keyring %s is a symbolic link: %w", path, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := private(path, info, 0); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxKeyringSize+1))
	if err != nil {
		return nil, err
	}
	ring, err := decodeKeyring(data)
	switch {
	case errdefs.IsDataLoss(err):
		return nil, fmt.Errorf("keyring %s: %w: put it back from a backup, or start with --reset-key, "+
			"which makes a new one and invalidates every API key", path, err)
	case err != nil:
		return nil, fmt.Errorf("keyring %s: %w", path, err)
	}
	return ring, nil
}

// decodeKeyring reads what encode wrote. A damaged one is errdefs.ErrDataLoss, one of a newer version
// errdefs.ErrFailedPrecondition.
func decodeKeyring(data []byte) (*keyring, error) {
	damaged := func(what string) error { return fmt.Errorf("damaged (%s): %w", what, errdefs.ErrDataLoss) }
	if len(data) > maxKeyringSize {
		return nil, damaged("too long")
	}
	var k keyringFile
	switch err := json.Unmarshal(data, &k, json.RejectUnknownMembers(true)); {
	case err != nil:
		return nil, damaged("not a keyring") // not err, which may quote the seed
	case k.Version > keyringVersion:
		return nil, fmt.Errorf("written by a newer msbd (version %d, known %d): %w",
			k.Version, keyringVersion, errdefs.ErrFailedPrecondition)
	case k.Version < 1 || len(k.Seed) != ed25519.SeedSize || k.InstanceID == "":
		return nil, damaged("values out of range")
	}
	ring, err := keyringFrom(k)
	if err != nil {
		return nil, err
	}
	if ring.keyID != k.KeyID {
		return nil, damaged("its key id is not that of its contents")
	}
	return ring, nil
}

// encode is the keyring as a file holds it.
func (k *keyring) encode() (Secret, error) {
	private := ed25519.PrivateKey(k.private.Reveal())
	data, err := json.Marshal(keyringFile{
		Version:    keyringVersion,
		InstanceID: k.instanceID,
		KeyID:      k.keyID,
		CreatedAt:  k.createdAt,
		Seed:       private.Seed(),
	})
	if err != nil {
		return Secret{}, fmt.Errorf("encode keyring: %w", err)
	}
	return NewSecret(string(data)), nil
}

// save replaces the keyring at path in one step that survives a power loss. durable.ErrNotDurable is the one
// error after which it is in place.
func (k *keyring) save(path string) error {
	data, err := k.encode()
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make keyring directory: %w", err)
	}
	if err := checkPrivate(dir, fs.ModeDir); err != nil {
		return err
	}
	if err := writeFile(path, []byte(data.Reveal()), 0o600); err != nil {
		return fmt.Errorf("write keyring: %w: %w", err, errdefs.ErrUnavailable)
	}
	return nil
}

// writeFile is a variable so that a test can make it fail, as a bad disk does.
var writeFile = durable.WriteFile

// checkPrivate refuses a path that is not of the wanted type, not ours, or open to others.
func checkPrivate(path string, typ fs.FileMode) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	return private(path, info, typ)
}

func private(path string, info fs.FileInfo, typ fs.FileMode) error {
	var fix string
	switch stat := info.Sys().(*syscall.Stat_t); {
	case info.Mode().Type() != typ:
		fix = "is not what it should be (" + info.Mode().String() + ")"
	case int(stat.Uid) != os.Geteuid():
		fix = fmt.Sprintf("belongs to uid %d, not to %d, which runs msbd", stat.Uid, os.Geteuid())
	case info.Mode().Perm()&0o077 != 0:
		fix = fmt.Sprintf("is open to other users (mode %04o): see who changed it, then chmod go= it", info.Mode().Perm())
	default:
		return nil
	}
	return fmt.Errorf("keyring: %s %s: %w", path, fix, errdefs.ErrFailedPrecondition)
}

// idLength is that of what randomID returns.
const idLength = 32

// randomID is 128 random bits in hex.
func randomID() string {
	var b [idLength / 2]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// isID reports whether s is of the form that randomID gives.
func isID[T string | []byte](s T) bool {
	for n := range len(s) {
		if c := s[n]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return len(s) == idLength
}
