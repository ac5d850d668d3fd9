package main

import (
	"context"
	_ "crypto/sha512" // for go-digest
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
)

// download is a file that is fetched over HTTPS, with the digest that it must have.
type download struct {
	url    string
	digest digest.Digest
}

// fetch returns the path of the file in the directory cache. It downloads the file unless the directory has it, and
// checks its digest in either case.
func (d download) fetch(ctx context.Context, cache string) (string, error) {
	name := filepath.Join(cache, path.Base(d.url))
	if d.check(name) == nil {
		return name, nil
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	// Write to a temporary file first, because another build may need the same file.
	file, err := os.CreateTemp(cache, filepath.Base(name)+".*")
	if err != nil {
		return "", err
	}
	file.Close()
	defer os.Remove(file.Name())
	curl := exec.CommandContext(ctx, "curl", "--silent", "--show-error", "--fail", "--location", "--retry", "3", "--output", file.Name(), d.url)
	if out, err := curl.CombinedOutput(); err != nil {
		return "", fmt.Errorf("download %s: %w: %s", d.url, err, strings.TrimSpace(string(out)))
	}
	if err := d.check(file.Name()); err != nil {
		return "", fmt.Errorf("download %s: %w", d.url, err)
	}
	return name, os.Rename(file.Name(), name)
}

// check returns an error unless the file called name has the digest of d.
func (d download) check(name string) error {
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	defer file.Close()
	got, err := d.digest.Algorithm().FromReader(file)
	if err == nil && got != d.digest {
		err = fmt.Errorf("the digest is %s, not %s", got, d.digest)
	}
	return err
}

// npmPackage returns the download of a package of npm's registry. integrity is the field dist.integrity of its version
// in the registry.
func npmPackage(name, version, integrity string) (download, error) {
	hash, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(integrity, "sha512-"))
	if err != nil {
		return download{}, fmt.Errorf("integrity of the npm package %s: %w", name, err)
	}
	return download{
		url:    fmt.Sprintf("https://registry.npmjs.org/%[1]s/-/%[1]s-%[2]s.tgz", name, version),
		digest: digest.NewDigestFromBytes(digest.SHA512, hash),
	}, nil
}

// wheels returns the downloads in list, which has the format of wheels.txt, that are for machine or for every machine.
// machine is the machine as wheels name it, such as x86_64.
func wheels(list, machine string) ([]download, error) {
	var found []download
	for line := range strings.Lines(list) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		url, hash, ok := strings.Cut(strings.TrimSpace(line), "#sha256=")
		d := download{url, digest.NewDigestFromEncoded(digest.SHA256, hash)}
		if err := d.digest.Validate(); !ok || err != nil {
			return nil, errors.Join(fmt.Errorf("%q is not a URL with a hash", line), err)
		}
		if strings.HasSuffix(url, "-any.whl") || strings.HasSuffix(url, "_"+machine+".whl") {
			found = append(found, d)
		}
	}
	return found, nil
}
