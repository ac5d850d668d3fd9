package client

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/containerd/errdefs"
)

// The variables that remote use reads.
const (
	EnvAPIKey    = "MSB_API_KEY"
	EnvServerURL = "MSB_SERVER_URL"
)

// maxDotenv is longer than any .env file that people write.
const maxDotenv = 1 << 20

// Config is which server requests go to and with which key, and where each of the two was found: a file's
// path, "the environment", or "the default".
type Config struct {
	ServerURL  string
	ServerFrom string
	// Key may be zero: none was found, and KeyFrom is empty.
	Key     Key
	KeyFrom string
}

const (
	fromEnvironment = "the environment"
	fromDefault     = "the default"
)

// LoadConfig looks for MSB_SERVER_URL and MSB_API_KEY, each by itself, in
//
//  1. the environment,
//  2. the file .env of the working directory, and then of each directory above it, the nearest first,
//  3. [ConfigFile], which has the form of a .env file,
//
// and takes the first that is not empty. The server is DefaultServerURL when none is named. A serverURL that
// is not empty goes before all of them.
//
// Whoever can write such a file can have the key sent to a server of his own, so LoadConfig does not take
//   - a value from a file that everyone can write, or that belongs to another user than this one and root;
//   - a server off this machine from a .env file, unless the key is from the same file.
//
// Then its error is errdefs.ErrPermissionDenied and says what to do.
func LoadConfig(serverURL string) (*Config, error) {
	c := &Config{ServerURL: serverURL, ServerFrom: "the caller"}
	dotenvs := dotenvFiles()
	files := append(slices.Clip(dotenvs), ConfigFile())
	var err error
	if serverURL == "" {
		if c.ServerURL, c.ServerFrom, err = lookup(EnvServerURL, files); err != nil {
			return nil, err
		}
	}
	if c.ServerURL == "" {
		c.ServerURL, c.ServerFrom = DefaultServerURL, fromDefault
	}
	u, err := parseServerURL(c.ServerURL)
	if err != nil {
		return nil, fmt.Errorf("%s from %s: %w", EnvServerURL, c.ServerFrom, err)
	}
	key, from, err := lookup(EnvAPIKey, files)
	if err != nil {
		return nil, err
	}
	c.Key, c.KeyFrom = NewKey(key), from
	if !c.Key.IsZero() && slices.Contains(dotenvs, c.ServerFrom) && c.KeyFrom != c.ServerFrom && !isLoopback(u.Hostname()) {
		return nil, fmt.Errorf("%s names the server %s, but the API key is from %s: a key is not sent where a .env file beside it says, which "+
			"may be another's. If the server is right, set %s where the key is: %w", c.ServerFrom, c.ServerURL, c.KeyFrom, EnvServerURL, errdefs.ErrPermissionDenied)
	}
	return c, nil
}

// Client makes a Client of what was found.
func (c *Config) Client() *Client { return &Client{ServerURL: c.ServerURL, Key: c.Key} }

// ConfigFile is the user's own file for the variables of LoadConfig: msb/env in $XDG_CONFIG_HOME or ~/.config.
// It is empty for a user without a home.
func ConfigFile() string {
	dir := os.Getenv("XDG_CONFIG_HOME")
	if !filepath.IsAbs(dir) {
		home, err := os.UserHomeDir()
		if err != nil {
			return ""
		}
		dir = filepath.Join(home, ".config")
	}
	return filepath.Join(dir, "msb", "env")
}

// dotenvFiles are the places of .env files, the nearest first. There are none in a directory that is gone.
func dotenvFiles() (paths []string) {
	dir, err := os.Getwd()
	for up := ""; err == nil && dir != up; dir, up = filepath.Dir(dir), dir {
		paths = append(paths, filepath.Join(dir, ".env"))
	}
	return paths
}

// lookup finds a variable, and says where.
func lookup(name string, files []string) (value, from string, err error) {
	if value := os.Getenv(name); value != "" {
		return value, fromEnvironment, nil
	}
	for _, path := range files {
		text, distrust, err := readDotenv(path)
		if err != nil {
			return "", "", fmt.Errorf("read %s: %w", path, err)
		}
		value, err := lookupDotenv(text, name)
		if err != nil {
			return "", "", fmt.Errorf("read %s from %s: %w: %w", name, path, err, errdefs.ErrInvalidArgument)
		}
		if value == "" {
			continue
		}
		if distrust != "" {
			return "", "", fmt.Errorf("%s in %s is not used, since %s; or set %s in the environment: %w", name, path, distrust, name, errdefs.ErrPermissionDenied)
		}
		return value, path, nil
	}
	return "", "", nil
}

// readDotenv reads a file, which need not be there, and says why what it holds cannot be trusted, if so.
func readDotenv(path string) (text, distrust string, err error) {
	// Not a directory, as virtual environments are called at times, nor a pipe, which would block.
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.ENOTDIR):
		return "", "", nil // fs.ErrPermission: a directory above that this user cannot enter
	case err != nil:
		return "", "", err
	case !info.Mode().IsRegular():
		return "", "", nil
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrPermission) {
		return "", "", fmt.Errorf("permission denied: make it your own ('sudo chown \"$USER\" %s'), or set %s and %s in the environment: %w",
			path, EnvServerURL, EnvAPIKey, errdefs.ErrPermissionDenied)
	}
	if err != nil {
		return "", "", err
	}
	defer f.Close()
	if info, err = f.Stat(); err != nil {
		return "", "", err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxDotenv+1))
	if err != nil {
		return "", "", err
	}
	if len(data) > maxDotenv {
		return "", "", fmt.Errorf("it is longer than %d KiB: %w", maxDotenv>>10, errdefs.ErrInvalidArgument)
	}
	return string(data), distrustOf(info, path), nil
}
