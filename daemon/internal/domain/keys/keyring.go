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

// keyring holds the signing key and the identity of this server.
type keyring struct {
	*identity
	createdAt time.Time
	private   Secret // the bytes of an ed25519.PrivateKey
}

// keyringFile is the format of the keyring on disk. KeyID is a fingerprint of the other fields except Version, so
// that a damaged file is detected.
type keyringFile struct {
	Version    int       `json:"version"`
	InstanceID string    `json:"instance_id"`
	KeyID      string    `json:"key_id"`
	CreatedAt  time.Time `json:"created_at"`
	Seed       []byte    `json:"seed"`
}

// newKeyring creates a signing key. If instanceID is empty, newKeyring creates an instance id as well.
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

// loadKeyring reads a keyring. It refuses a file that another user could have read or written. The error is
// fs.ErrNotExist if the file is missing, and errdefs.ErrDataLoss if it is damaged.
func loadKeyring(path string) (*keyring, error) {
	if err := checkPrivate(filepath.Dir(path), fs.ModeDir); err != nil {
		return nil, err
	}
	// With O_NONBLOCK, a FIFO at this path cannot block the start of the server.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) {
		return nil, fmt.Errorf("keyring %s is a symbolic link: replace it with the file itself: %w", path, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := checkPrivateInfo(path, info, 0); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxKeyringSize+1))
	if err != nil {
		return nil, err
	}
	ring, err := decodeKeyring(data)
	switch {
	case errdefs.IsDataLoss(err):
		return nil, fmt.Errorf("keyring %s: %w: restore the file from a backup, or start with --reset-key, "+
			"which creates a new signing key and invalidates every API key", path, err)
	case err != nil:
		return nil, fmt.Errorf("keyring %s: %w", path, err)
	}
	return ring, nil
}

// decodeKeyring decodes what encode wrote. The error is errdefs.ErrDataLoss if data is damaged, and
// errdefs.ErrFailedPrecondition if a newer version of msbd wrote it.
func decodeKeyring(data []byte) (*keyring, error) {
	damaged := func(what string) error { return fmt.Errorf("damaged (%s): %w", what, errdefs.ErrDataLoss) }
	if len(data) > maxKeyringSize {
		return nil, damaged("too long")
	}
	var k keyringFile
	switch err := json.Unmarshal(data, &k, json.RejectUnknownMembers(true)); {
	case err != nil:
		return nil, damaged("not a keyring") // err is left out because it may quote the seed
	case k.Version > keyringVersion:
		return nil, fmt.Errorf("written by a newer msbd (version %d, this one supports %d): install that version again: %w",
			k.Version, keyringVersion, errdefs.ErrFailedPrecondition)
	case k.Version < 1 || len(k.Seed) != ed25519.SeedSize || k.InstanceID == "":
		return nil, damaged("values out of range")
	}
	ring, err := keyringFrom(k)
	if err != nil {
		return nil, err
	}
	if ring.keyID != k.KeyID {
		return nil, damaged("its key id does not match its contents")
	}
	return ring, nil
}

// encode returns the contents of the keyring file.
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

// save atomically and durably replaces the keyring at path. If the error is durable.ErrNotDurable, the new keyring
// is in place but may not survive a power loss. After any other error, the old keyring is still in place.
func (k *keyring) save(path string) error {
	data, err := k.encode()
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("create keyring directory: %w", err)
	}
	if err := checkPrivate(dir, fs.ModeDir); err != nil {
		return err
	}
	if err := writeFile(path, []byte(data.Reveal()), 0o600); err != nil {
		return fmt.Errorf("write keyring: %w: %w", err, errdefs.ErrUnavailable)
	}
	return nil
}

// writeFile is a variable so that tests can simulate a failing disk.
var writeFile = durable.WriteFile

// checkPrivate returns an error if path is not of the file type typ, belongs to another user, or is accessible to
// other users.
func checkPrivate(path string, typ fs.FileMode) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	return checkPrivateInfo(path, info, typ)
}

func checkPrivateInfo(path string, info fs.FileInfo, typ fs.FileMode) error {
	what, problem := "keyring", ""
	if typ == fs.ModeDir {
		what = "the state directory"
	}
	switch stat := info.Sys().(*syscall.Stat_t); {
	case info.Mode().Type() != typ:
		problem = "has the wrong file type (" + info.Mode().String() + ")"
	case int(stat.Uid) != os.Geteuid():
		problem = fmt.Sprintf("belongs to uid %d, but msbd runs as uid %d", stat.Uid, os.Geteuid())
	case info.Mode().Perm()&0o077 != 0 && typ == fs.ModeDir: // the files in it are private, or are refused
		problem = fmt.Sprintf("is accessible to other users (mode %04o): run 'chmod 700 %s'", info.Mode().Perm(), path)
	case info.Mode().Perm()&0o077 != 0:
		problem = fmt.Sprintf("is accessible to other users (mode %04o): find out who changed the mode, then run 'chmod go= %s'", info.Mode().Perm(), path)
	default:
		return nil
	}
	return fmt.Errorf("%s %s %s: %w", what, path, problem, errdefs.ErrFailedPrecondition)
}

// idLength is the length of the ids that randomID returns.
const idLength = 32

// randomID returns 128 random bits in hex.
func randomID() string {
	var b [idLength / 2]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// isID reports whether s has the form of the ids that randomID returns.
func isID[T string | []byte](s T) bool {
	for n := range len(s) {
		if c := s[n]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return len(s) == idLength
}
