package client

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/client/internal/dotenv"
)

// The environment variables of LoadConfig.
const (
	EnvAPIKey    = "MSB_API_KEY"
	EnvServerURL = "MSB_SERVER_URL"
)

// maxDotenv is the largest .env file that is read, in bytes. It is larger than any that people write.
const maxDotenv = 1 << 20

// Config is the server that requests go to, the API key for it, and where each of the two was found.
type Config struct {
	ServerURL string
	// ServerFrom is where ServerURL was found: the path of a file, "the environment", "the default" or "the
	// caller".
	ServerFrom string
	// Key is zero if no key was found.
	Key Key
	// KeyFrom is where Key was found, as in ServerFrom. It is empty if Key is zero.
	KeyFrom string
}

const (
	fromEnvironment = "the environment"
	fromDefault     = "the default"
)

// LoadConfig looks up MSB_SERVER_URL and MSB_API_KEY independently of each other, in
//
//  1. the environment,
//  2. the file .env in the working directory and then in each directory above it,
//  3. [ConfigFile], which has the format of a .env file,
//
// and uses the first value that is not empty. If no server is found, it is DefaultServerURL. A serverURL that
// is not empty takes precedence over all of them.
//
// Anyone who can write such a file could send the key to a server of their own. Therefore LoadConfig refuses
//   - a value from a file that everyone can write, or that belongs to a user other than this one and root;
//   - a server on another machine from a .env file, unless the key is from the same file.
//
// Its error is then errdefs.ErrPermissionDenied and says what to do.
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
	if err != nil && serverURL != "" {
		if strings.ContainsAny(serverURL, "@?#") || strings.HasPrefix(serverURL, "msb_") { // it may contain a password or a key
			return nil, err
		}
		return nil, fmt.Errorf("server %q: %w", serverURL, err)
	}
	if err != nil {
		return nil, fmt.Errorf("%s from %s: %w", EnvServerURL, c.ServerFrom, err)
	}
	key, from, err := lookup(EnvAPIKey, files)
	if err != nil {
		return nil, err
	}
	c.Key, c.KeyFrom = NewKey(key), from
	if !c.Key.IsZero() && slices.Contains(dotenvs, c.ServerFrom) && c.KeyFrom != c.ServerFrom && !isLoopback(u.Hostname()) {
		return nil, errorf(errdefs.ErrPermissionDenied, "%s sets the server to %s, but the API key is from %s: the key is not sent to a server from "+
			"a .env file that does not contain the key, because somebody else may have written that file. If the server is right, set %s where the key is set",
			c.ServerFrom, c.ServerURL, c.KeyFrom, EnvServerURL)
	}
	return c, nil
}

// Client returns a Client for the server and the key.
func (c *Config) Client() *Client { return &Client{ServerURL: c.ServerURL, Key: c.Key} }

// ConfigFile returns the path of the user's own file with the variables of LoadConfig: msb/env in
// $XDG_CONFIG_HOME or ~/.config. It is empty for a user without a home directory.
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

// dotenvFiles returns the paths where a .env file may be, the nearest first. It returns none if the working
// directory was deleted.
func dotenvFiles() (paths []string) {
	dir, err := os.Getwd()
	for up := ""; err == nil && dir != up; dir, up = filepath.Dir(dir), dir {
		paths = append(paths, filepath.Join(dir, ".env"))
	}
	return paths
}

// lookup returns the value of a variable and where it was found. Both are empty if it was not found.
func lookup(name string, files []string) (value, from string, err error) {
	if value := os.Getenv(name); value != "" {
		return value, fromEnvironment, nil
	}
	for _, path := range files {
		text, untrusted, err := readDotenv(path)
		if err != nil {
			return "", "", fmt.Errorf("read %s: %w", path, err)
		}
		value, err := dotenv.Lookup(text, name)
		if err != nil {
			return "", "", errorf(errdefs.ErrInvalidArgument, "read %s from %s: %w", name, path, err)
		}
		if value == "" {
			continue
		}
		if untrusted != "" {
			return "", "", errorf(errdefs.ErrPermissionDenied, "%s in %s is not used, because %s, or set %s in the environment", name, path, untrusted, name)
		}
		return value, path, nil
	}
	return "", "", nil
}

// readDotenv returns the text of a .env file, which is empty if there is no such file. If the text may have been
// written by another user, untrusted says why and what to do.
func readDotenv(path string) (text, untrusted string, err error) {
	// Only a regular file counts: some virtual environments are directories named .env, and opening a pipe would
	// block.
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.ENOTDIR):
		return "", "", nil // Stat returns fs.ErrPermission if this user may not enter a directory above the file
	case err != nil:
		return "", "", err
	case !info.Mode().IsRegular():
		return "", "", nil
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrPermission) {
		return "", "", errorf(errdefs.ErrPermissionDenied, "permission denied: make the file your own ('sudo chown \"$USER\" %s'), or set %s and %s in the environment",
			path, EnvServerURL, EnvAPIKey)
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
		return "", "", errorf(errdefs.ErrInvalidArgument, "the file is longer than %d KiB", maxDotenv>>10)
	}
	return string(data), untrustedReason(info, path), nil
}
