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
	stageName   = "restore.json"
	tempPattern = "backup-*.tmp"
)

// stage is what a restore is to bring into force, kept on the disk until that is done. It holds the
// signing key.
type stage struct {
	By      uint32    `json:"by"`
	TakenAt time.Time `json:"taken_at"`
	// ReplacedKeyID is the signing key before, SigningKeyID that of the backup.
	ReplacedKeyID string        `json:"replaced_key_id"`
	SigningKeyID  string        `json:"signing_key_id"`
	Keyring       []byte        `json:"keyring"`
	Records       []keys.Record `json:"records"`
}

func (s *stage) keyring() keys.Secret { return keys.NewSecret(string(s.Keyring)) }

func stagePath(dir string) string { return filepath.Join(dir, stageName) }

// save writes the stage to the disk, in place of another, complete or not at all. Its first line is the
// checksum of the rest.
func (s *stage) save(dir string) error {
	content, err := json.Marshal(s)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(content)
	data := append(hex.AppendEncode(nil, sum[:]), '\n')
	err = durable.WriteFile(stagePath(dir), append(data, content...), 0o600)
	if errors.Is(err, durable.ErrNotDurable) {
		err = errors.Join(err, os.Remove(stagePath(dir))) // the restore has failed: nothing may complete it
	}
	return err
}

// loadStage returns nil if there is none.
func loadStage(dir string) (*stage, error) {
	data, err := os.ReadFile(stagePath(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read what a restore put aside: %w", err)
	}
	want, content, _ := bytes.Cut(data, []byte("\n"))
	sum := sha256.Sum256(content)
	s := new(stage)
	if string(want) != hex.EncodeToString(sum[:]) || json.Unmarshal(content, s, json.RejectUnknownMembers(true)) != nil {
		return nil, fmt.Errorf("%s, by which a restore that was cut short would be completed, is damaged: remove it, "+
			"and restore the backup again: %w", stagePath(dir), errdefs.ErrDataLoss)
	}
	return s, nil
}

// removeStage removes the stage for good, also if an earlier attempt did so only until a power loss.
func removeStage(dir string) error {
	if err := os.Remove(stagePath(dir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return durable.SyncDir(dir)
}

// createTemp makes a file that only we can read.
func createTemp(dir string) (*os.File, error) { return os.CreateTemp(dir, tempPattern) }

// removeTemps removes what a crash left of temporary files.
func removeTemps(dir string) error {
	paths, err := filepath.Glob(filepath.Join(dir, tempPattern))
	for _, path := range paths {
		err = errors.Join(err, os.Remove(path))
	}
	if removed := os.Remove(stagePath(dir) + durable.TempSuffix); !errors.Is(removed, fs.ErrNotExist) {
		err = errors.Join(err, removed)
	}
	return err
}
