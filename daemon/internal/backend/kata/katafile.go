package kata

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
)

// A kataFile is what msbd needs to know of a Kata configuration of the host's own.
type kataFile struct {
	Hypervisor map[string]struct {
		EnableAnnotations []string `toml:"enable_annotations"`
	} `toml:"hypervisor"`
	Runtime struct {
		StaticResources bool `toml:"static_sandbox_resource_mgmt"`
	} `toml:"runtime"`
}

// readKataFile reads a configuration as a shim will: with the files of config.d beside it laid over it.
// What is wrong with it is errdefs.ErrInvalidArgument.
func readKataFile(path string) (kataFile, error) {
	var file kataFile
	// An install's configuration is often a link, and config.d lies beside what it leads to.
	if target, err := filepath.EvalSymlinks(path); err == nil {
		path = target
	}
	paths := []string{path}
	dropIns, err := os.ReadDir(filepath.Join(filepath.Dir(path), "config.d"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return file, fmt.Errorf("read kata-config: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	for _, d := range dropIns {
		paths = append(paths, filepath.Join(filepath.Dir(path), "config.d", d.Name()))
	}
	whole := map[string]any{}
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			return file, fmt.Errorf("read kata-config: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		layer := map[string]any{}
		if err := toml.Unmarshal(data, &layer); err != nil {
			return file, fmt.Errorf("read kata-config %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
		}
		lay(layer, whole)
	}
	data, err := toml.Marshal(whole)
	if err == nil {
		err = toml.Unmarshal(data, &file)
	}
	if err != nil {
		return file, fmt.Errorf("read kata-config %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	// Kata takes any of several, a different one each time.
	if n := len(file.Hypervisor); n != 1 {
		return file, fmt.Errorf("read kata-config %s: it needs one table [hypervisor.NAME], and has %d %q: %w",
			path, n, slices.Sorted(maps.Keys(file.Hypervisor)), errdefs.ErrInvalidArgument)
	}
	return file, nil
}

// lay puts a layer over what is below it, table by table.
func lay(layer, below map[string]any) {
	for key, value := range layer {
		table, isTable := value.(map[string]any)
		if under, ok := below[key].(map[string]any); ok && isTable {
			lay(table, under)
			continue
		}
		below[key] = value
	}
}

// enables says whether the configuration lets a sandbox set a value of its hypervisor.
func (f kataFile) enables(annotation string) bool {
	for _, h := range f.Hypervisor {
		for _, pattern := range h.EnableAnnotations {
			if ok, _ := regexp.MatchString(pattern, annotation); ok { // anywhere in it, as Kata does
				return true
			}
		}
	}
	return false
}
