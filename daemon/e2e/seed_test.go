package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
)

// seed is the state directory of a server that has imported the images python and node, and built their templates. Most servers
// under test begin with a copy, so that not each of them imports the images and boots its sandboxes.
var seed struct {
	once  sync.Once
	state string
	err   error
}

// seedDirs are the parts of a state directory that a copy has. They do not hold the keys.
var seedDirs = []string{"containerd", "disks", "templates"}

// seedImages are the images of the seed.
var seedImages = []string{"python", "node"}

// plant makes the server, which has not started, one that has imported seedImages and built their templates. On Kata's own
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
	for _, image := range seedImages {
		s.imported[image] = true
	}
	return nil
}

// makeSeed starts a server, imports seedImages, waits for their templates, and stops the server.
func makeSeed() (state string, err error) {
	s, err := newServer()
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.start(); err != nil {
		return "", err
	}
	if err := s.importImages(seedImages...); err != nil {
		return "", err
	}
	return s.state(), s.waitForTemplates(len(seedImages))
}

// waitForTemplates waits until the server has built the templates of n images for sandboxes of the default size.
func (s *server) waitForTemplates(n int) error {
	if !poll(hung, func() bool { return storedTemplates(s.state()) >= n }) {
		return fmt.Errorf("there are %d templates, want %d:\n%s", storedTemplates(s.state()), n, s.log)
	}
	return nil
}

// storedTemplates returns the number of complete templates for sandboxes of the default size in a state directory.
func storedTemplates(state string) (n int) {
	files, _ := filepath.Glob(filepath.Join(state, "templates", "*", "meta.json"))
	for _, file := range files {
		var meta struct{ Keep bool }
		data, err := os.ReadFile(file)
		if err == nil && json.Unmarshal(data, &meta) == nil && meta.Keep && filepath.Ext(filepath.Dir(file)) == "" {
			n++
		}
	}
	return n
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
