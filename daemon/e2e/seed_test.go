package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// seed is the state directory of a server that has imported the Python image and built its template. Most servers under
// test begin with a copy, so that not each of them imports the image and boots its sandboxes.
var seed struct {
	once  sync.Once
	state string
	err   error
}

// seedDirs are the parts of a state directory that a copy has. They do not hold the keys.
var seedDirs = []string{"containerd", "disks", "templates"}

// plant makes the server, which has not started, one that has imported the Python image and built its template. On Kata's own
// driver there are no templates, and plant does nothing.
func (s *server) plant() error {
	if hypervisorSettings["hypervisor"] == "kata" {
		return nil
	}
	seed.once.Do(func() { seed.state, seed.err = makeSeed() })
	if seed.err != nil {
		return fmt.Errorf("make the state that servers begin with: %w", seed.err)
	}
	for _, dir := range seedDirs {
		if err := copyState(filepath.Join(seed.state, dir), filepath.Join(s.state(), dir)); err != nil {
			return err
		}
	}
	s.imported["python"] = true
	return nil
}

// makeSeed starts a server, imports the Python image, waits for its template, and stops the server.
func makeSeed() (state string, err error) {
	s, err := newServer()
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.start(); err != nil {
		return "", err
	}
	if err := s.importImages("python"); err != nil {
		return "", err
	}
	for deadline := time.Now().Add(hung); ; time.Sleep(20 * time.Millisecond) {
		built, err := filepath.Glob(filepath.Join(s.state(), "templates", "*", "meta.json"))
		if err == nil && len(built) == 1 && filepath.Ext(filepath.Dir(built[0])) == "" {
			return s.state(), nil
		}
		if err != nil || time.Now().After(deadline) {
			return "", fmt.Errorf("there is no template (%v):\n%s", err, s.log)
		}
	}
}

// copyState copies a directory of msbd's state. It links the files that are never changed in place, which are all except
// databases.
func copyState(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		switch {
		case d.IsDir():
			return os.MkdirAll(target, 0o700)
		case filepath.Ext(path) != ".db" && d.Type().IsRegular():
			return os.Link(path, target)
		case d.Type().IsRegular():
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			return os.WriteFile(target, data, 0o600)
		}
		return nil
	})
}
