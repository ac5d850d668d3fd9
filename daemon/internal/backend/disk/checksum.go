package disk

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/msbd/msbd/daemon/internal/sys/ctxio"
	"github.com/msbd/msbd/daemon/internal/sys/durable"
)

// checksumFile is next to the disk of an image.
const checksumFile = "checksum.json"

// A checksum describes the content of the disk of an image, as it was built.
type checksum struct {
	Size   int64         `json:"size"` // in bytes
	Digest digest.Digest `json:"digest"`
}

// checksumOf returns the checksum of a file.
func checksumOf(ctx context.Context, path string) (checksum, error) {
	file, err := os.Open(path)
	if err != nil {
		return checksum{}, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return checksum{}, err
	}
	sum, err := digest.FromReader(ctxio.Reader(ctx, file))
	return checksum{info.Size(), sum}, err
}

func (c checksum) write(dir string) error {
	data, err := json.Marshal(c)
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(dir, checksumFile), data, 0o600)
}

var errDamaged = errors.New("the file is damaged")

// readChecksum returns the checksum that the disk in dir had when it was built. It returns errDamaged if the file has none.
func readChecksum(dir string) (c checksum, err error) {
	data, err := os.ReadFile(filepath.Join(dir, checksumFile))
	if err == nil && json.Unmarshal(data, &c) != nil {
		return checksum{}, errDamaged
	}
	return c, err
}

// isComplete reports whether there is a disk of an image in dir that has its complete size.
func isComplete(dir string) bool {
	want, err := readChecksum(dir)
	if err != nil {
		return false
	}
	info, err := os.Stat(filepath.Join(dir, imageFile))
	return err == nil && info.Size() == want.Size
}

// VerifyImages reads the disks of all images and removes those that are damaged, so that BuildImage makes them again.
// Sandboxes that use such a disk keep it. It takes about a second for each 500 MB.
func (s *Store) VerifyImages(ctx context.Context) error {
	entries, err := os.ReadDir(s.images)
	if err != nil {
		return fmt.Errorf("list the disks of images: %w", err)
	}
	var errs []error
	for _, entry := range entries {
		if strings.HasSuffix(entry.Name(), incomplete) || strings.HasSuffix(entry.Name(), obsolete) {
			continue
		}
		dir := filepath.Join(s.images, entry.Name())
		want, err := readChecksum(dir)
		var got checksum
		if err == nil {
			got, err = checksumOf(ctx, filepath.Join(dir, imageFile))
		}
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err == nil && got == want:
			continue
		case err != nil && !errors.Is(err, errDamaged) && !errors.Is(err, fs.ErrNotExist): // perhaps a lack of descriptors
			errs = append(errs, fmt.Errorf("verify the disk of an image: %w", err))
			continue
		}
		s.mu.Lock()
		if now, _ := readChecksum(dir); now == want { // otherwise it was made again or removed meanwhile
			s.log.Error("the disk of an image is damaged; removing it, so that it is made again", "disk", entry.Name())
			errs = append(errs, discardImage(dir))
		}
		s.mu.Unlock()
	}
	return errors.Join(errs...)
}

// discardImage removes the disk of an image in dir, if there is one. s.mu must be held.
func discardImage(dir string) error {
	err := os.RemoveAll(dir + obsolete) // which an earlier removal may have left
	if err == nil {
		err = os.Rename(dir, dir+obsolete)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = os.RemoveAll(dir + obsolete)
	}
	if err != nil {
		return fmt.Errorf("remove the disk of an image: %w", err)
	}
	return nil
}
