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

// save puts the stage on the disk, in place of another, whole or not at all. A line with its checksum
// comes first.
func (s *stage) save(dir string) (err error) {
	content, err := json.Marshal(s)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(content)
	f, err := createTemp(dir)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.Write(append(hex.AppendEncode(nil, sum[:]), '\n'))
	if err == nil {
		_, err = f.Write(content)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), stagePath(dir)); err != nil {
		return err
	}
	if err = syncDir(dir); err != nil {
		err = errors.Join(err, os.Remove(stagePath(dir))) // it was not to be used
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
	return syncDir(dir)
}

// createTemp makes a file that only we can read.
func createTemp(dir string) (*os.File, error) { return os.CreateTemp(dir, tempPattern) }

func removeTemps(dir string) error {
	paths, err := filepath.Glob(filepath.Join(dir, tempPattern))
	for _, path := range paths {
		err = errors.Join(err, os.Remove(path))
	}
	return err
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
