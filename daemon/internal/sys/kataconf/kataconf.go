// Package kataconf reads a Kata configuration that an administrator wrote, in the same way as Kata's shim reads it. It
// returns the few settings that msbd depends on. It is in sys because packages host and kata both need it. Package host
// chooses the hypervisor for sandboxes, and package kata starts them. They do not import each other.
package kataconf

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

// Config has the settings of a Kata configuration that msbd needs. The zero Config enables nothing.
type Config struct {
	// Driver is the NAME of the one table [hypervisor.NAME], such as "qemu" or "remote".
	Driver string
	// StaticResources is set if a guest starts with its final size. Otherwise Kata adds CPUs and memory after the start.
	StaticResources bool

	// RemoteSocket is the socket of the hypervisor service that the driver "remote" calls.
	RemoteSocket string

	annotations []string // the regular expressions of enable_annotations
}

// Read reads the configuration at path and then the files in config.d beside it, in the order of their names. Each file
// overrides single settings of the earlier ones. Read returns errdefs.ErrInvalidArgument if a file cannot be read or is
// not valid.
func Read(path string) (Config, error) {
	// The configuration of an installation is often a symbolic link, and config.d is beside its target.
	if target, err := filepath.EvalSymlinks(path); err == nil {
		path = target
	}
	paths := []string{path}
	dropIns, err := os.ReadDir(filepath.Join(filepath.Dir(path), "config.d"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Config{}, fmt.Errorf("read kata-config: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	for _, d := range dropIns {
		paths = append(paths, filepath.Join(filepath.Dir(path), "config.d", d.Name()))
	}
	merged := map[string]any{}
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			return Config{}, fmt.Errorf("read kata-config: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		layer := map[string]any{}
		if err := toml.Unmarshal(data, &layer); err != nil {
			return Config{}, fmt.Errorf("read kata-config %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
		}
		mergeTOML(merged, layer)
	}
	var file struct {
		Hypervisor map[string]struct {
			EnableAnnotations []string `toml:"enable_annotations"`
			RemoteSocket      string   `toml:"remote_hypervisor_socket"`
		} `toml:"hypervisor"`
		Runtime struct {
			StaticResources bool `toml:"static_sandbox_resource_mgmt"`
		} `toml:"runtime"`
	}
	data, err := toml.Marshal(merged)
	if err == nil {
		err = toml.Unmarshal(data, &file)
	}
	if err != nil {
		return Config{}, fmt.Errorf("read kata-config %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	// If there are several tables, Kata uses an arbitrary one.
	drivers := slices.Sorted(maps.Keys(file.Hypervisor))
	if len(drivers) != 1 {
		return Config{}, fmt.Errorf("read kata-config %s: it must have one table [hypervisor.NAME], but has %d %q: %w",
			path, len(drivers), drivers, errdefs.ErrInvalidArgument)
	}
	return Config{
		Driver: drivers[0], StaticResources: file.Runtime.StaticResources,
		RemoteSocket: file.Hypervisor[drivers[0]].RemoteSocket, annotations: file.Hypervisor[drivers[0]].EnableAnnotations,
	}, nil
}

// mergeTOML sets the values of layer in base. Tables are merged recursively.
func mergeTOML(base, layer map[string]any) {
	for key, value := range layer {
		table, isTable := value.(map[string]any)
		if below, ok := base[key].(map[string]any); ok && isTable {
			mergeTOML(below, table)
			continue
		}
		base[key] = value
	}
}

// AllowsAnnotation reports whether the configuration allows a sandbox to set the hypervisor's value annotation, such as
// "default_vcpus", with an annotation.
func (c Config) AllowsAnnotation(annotation string) bool {
	return slices.ContainsFunc(c.annotations, func(pattern string) bool {
		ok, _ := regexp.MatchString(pattern, annotation) // not anchored, as in Kata
		return ok
	})
}
