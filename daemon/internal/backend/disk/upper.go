package disk

import (
	"context"
	"errors"
	"os"
)

const (
	// maxBlanks is how many blanks a Store remembers, and maxBlank the size of the largest, in bytes. A disk of 4 GiB has
	// a blank of 104 KiB, and one of 100 GiB has one of 1.1 MB.
	maxBlanks = 8
	maxBlank  = 2 << 20
)

// makeUpper makes an empty writable disk.
func (s *Store) makeUpper(path string, size int64) (err error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	if err := file.Truncate(size); err != nil {
		return err
	}
	s.mu.Lock()
	known := s.blanks[size]
	s.mu.Unlock()
	if known != nil {
		return known.Write(file)
	}
	// Without a journal, because nobody reads the disk after a crash of the guest. The inode tables stay holes in the file
	// until they are used: the guest mounts the disk with noinit_itable.
	err = MkfsExt4.run(context.Background(), "-q", "-F", "-O", "^has_journal,^resize_inode", "-m", "0",
		"-E", "lazy_itable_init=1,nodiscard,root_owner=0:0", path)
	if err != nil {
		return err
	}
	made, err := ReadExtents(file, maxBlank)
	if errors.Is(err, ErrTooLarge) {
		return nil
	}
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.blanks) == maxBlanks {
		clear(s.blanks)
	}
	s.blanks[size] = made
	return nil
}
