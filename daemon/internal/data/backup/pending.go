package backup

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"

	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/sys/durable"
)

const (
	pendingName = "restore.json"
	tempPattern = "backup-*.tmp"
)

// pendingRestore holds everything that a restore needs. Its file is on the disk until the restore is done, so that the next
// start can complete the restore after a crash. It contains the signing key.
type pendingRestore struct {
	By      uint32    `json:"by"`
	TakenAt time.Time `json:"taken_at"`
	// ReplacedKeyID is the id of the signing key before the restore.
	ReplacedKeyID string `json:"replaced_key_id"`
	// SigningKeyID is the id of the signing key in the backup.
	SigningKeyID string        `json:"signing_key_id"`
	Keyring      []byte        `json:"keyring"`
	Records      []keys.Record `json:"records"`
}

func (s *pendingRestore) keyring() keys.Secret { return keys.NewSecret(string(s.Keyring)) }

func pendingPath(dir string) string { return filepath.Join(dir, pendingName) }

// save writes the file atomically, replacing an earlier one. The first line of the file is the checksum of the rest.
func (s *pendingRestore) save(dir string) error {
	content, err := json.Marshal(s)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(content)
	data := append(hex.AppendEncode(nil, sum[:]), '\n')
	err = durable.WriteFile(pendingPath(dir), append(data, content...), 0o600)
	if errors.Is(err, durable.ErrNotDurable) {
		err = errors.Join(err, os.Remove(pendingPath(dir))) // the restore fails, so the next start must not complete it
	}
	return err
}

// loadPending reads the file. It returns nil if there is none.
func loadPending(dir string) (*pendingRestore, error) {
	data, err := os.ReadFile(pendingPath(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the file of an interrupted restore: %w", err)
	}
	want, content, _ := bytes.Cut(data, []byte("\n"))
	sum := sha256.Sum256(content)
	s := new(pendingRestore)
	if string(want) != hex.EncodeToString(sum[:]) || json.Unmarshal(content, s, json.RejectUnknownMembers(true)) != nil {
		return nil, fmt.Errorf("complete an interrupted restore: %s is damaged: remove it, and restore the backup again: %w",
			pendingPath(dir), errdefs.ErrDataLoss)
	}
	return s, nil
}

// removePending removes the file durably. It syncs the directory even if the file does not exist, because an earlier
// removal may not be on the disk.
func removePending(dir string) error {
	if err := os.Remove(pendingPath(dir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return durable.SyncDir(dir)
}

// createTemp creates a temporary file with mode 0600.
func createTemp(dir string) (*os.File, error) { return os.CreateTemp(dir, tempPattern) }

// removeTemps removes the temporary files that a crash left.
func removeTemps(dir string) error {
	paths, err := filepath.Glob(filepath.Join(dir, tempPattern))
	for _, path := range paths {
		err = errors.Join(err, os.Remove(path))
	}
	if removeErr := os.Remove(pendingPath(dir) + durable.TempSuffix); !errors.Is(removeErr, fs.ErrNotExist) {
		err = errors.Join(err, removeErr)
	}
	return err
}
