package main

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// check is a script for the shell of an image.
type check struct {
	user   uint32
	script string
	want   string // the output
}

// common are the checks of every image.
var common = []check{
	{0, `bash -c 'echo $((6 * 7))'; pwd; ls /etc/resolv.conf 2>/dev/null || echo none`, "42\n/root\nnone\n"},
	{0, "curl --version | grep -o https | head -n 1; ls /etc/ssl/certs/ca-certificates.crt", "https\n/etc/ssl/certs/ca-certificates.crt\n"},
	{0, "TZ=America/New_York date --date 2026-01-01T00:00Z +%Z", "EST\n"},
}

var pythonChecks = []check{
	{0, "python --version; python3 -c 'import ssl, sqlite3, venv, zoneinfo; print(zoneinfo.ZoneInfo(\"Asia/Tokyo\"))'", "Python 3.11.2\nAsia/Tokyo\n"},
	// pip installs packages for the system.
	{0, "pip --version | cut -d ' ' -f 1; ls /usr/lib/python3*/EXTERNALLY-MANAGED 2>/dev/null || echo none", "pip\nnone\n"},
}

var nodeChecks = []check{
	{0, "node --version; nodejs --version; npm --version; npx --version", "v" + nodeVersion + "\nv" + nodeVersion + "\n" + npmVersion + "\n" + npmVersion + "\n"},
	{0, "head -n 1 /usr/local/share/doc/node/LICENSE", "Node.js is licensed for use as follows:\n"},
	// npm installs commands for the system.
	{0, `mkdir /tmp/n && cd /tmp/n && npm init --yes >/dev/null && npm pkg set bin=n.js && printf '#!/usr/bin/env node\nconsole.log(6 * 7)' >n.js &&
		npm pack --silent && npm install --global --offline --silent n-1.0.0.tgz && n`, "n-1.0.0.tgz\n42\n"},
}

// chart uses each package, and matplotlib without making a list of fonts.
const chart = `python3 -c '
import io, os, PIL.Image, matplotlib.pyplot as plt, numpy, pandas, requests, scipy.optimize
fonts = os.path.expanduser("~/.cache/matplotlib/")
before = [(f.name, f.stat().st_mtime) for f in os.scandir(fonts)]
print(scipy.optimize.brentq(lambda x: x * x - 4, 0, 10), pandas.Series(numpy.arange(5)).sum())
plt.plot([1, 3, 2])
plt.title("text")
png = io.BytesIO()
plt.savefig(png)
print(PIL.Image.open(png).size, len(before), before == [(f.name, f.stat().st_mtime) for f in os.scandir(fonts)])
try:
    requests.get("http://localhost:1")
except requests.ConnectionError:
    print("refused")
'`

const charted = "2.0 10\n(640, 480) 1 True\nrefused\n"

var imageChecks = map[string][]check{
	"python": pythonChecks,
	"node":   nodeChecks,
	"code-interpreter": append(append([]check{
		{1000, chart, charted},
		{0, chart, charted},
		// Root could have written compiled modules, but they were all there.
		{0, "find / -xdev -newermt 2025-01-02 -name '*.pyc' | wc -l", "0\n"},
		{0, "pip check; pip freeze | grep -cE '^(numpy|pandas)=='", "No broken requirements found.\n2\n"},
		{1000, "id; pwd; ls ~/.bashrc; sudo -n id -u 2>/dev/null", "uid=1000(user) gid=1000(user) groups=1000(user)\n/home/user\n/home/user/.bashrc\n0\n"},
		{1000, "cd /tmp && git init --quiet g && cd g && git -c user.name=n -c user.email=e commit --quiet --allow-empty -m one && git log --format=%s", "one\n"},
	}, pythonChecks...), nodeChecks...),
}

// TestImages runs the programs of the built images, in a chroot.
func TestImages(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, for chroot")
	}
	for name := range recipes {
		t.Run(name, func(t *testing.T) {
			file, err := os.Open(filepath.Join("../../../bin/images", name+".tar"))
			if err != nil {
				t.Fatalf("%v; run make images", err)
			}
			defer file.Close()
			root := t.TempDir()
			config := unpack(t, file, root)
			// A sandbox has its own /dev.
			for name, minor := range map[string]int{"null": 3, "urandom": 9} {
				device := filepath.Join(root, "dev", name)
				if err := errors.Join(syscall.Mknod(device, syscall.S_IFCHR, 1<<8|minor), os.Chmod(device, 0o666)); err != nil {
					t.Fatal(err)
				}
			}
			for _, c := range append(common, imageChecks[name]...) {
				if got := c.run(root, config); got != c.want {
					t.Errorf("uid %d: %s\ngot  %q\nwant %q", c.user, c.script, got, c.want)
				}
			}
		})
	}
}

// run returns the output of c's script in the directory root, or the error.
func (c check) run(root string, config ocispec.ImageConfig) string {
	home, dir := "/root", "/root"
	if c.user != 0 {
		home, dir = "/home/user", config.WorkingDir
	}
	cmd := exec.Command("/bin/sh", "-c", c.script)
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Credential: &syscall.Credential{Uid: c.user, Gid: c.user}}
	cmd.Dir, cmd.Env = dir, append([]string{"HOME=" + home}, config.Env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return err.Error() + ": " + string(out)
	}
	return string(out)
}

// unpack extracts the layer of an archive into the directory root and returns the image's configuration.
func unpack(t *testing.T, file *os.File, root string) ocispec.ImageConfig {
	t.Helper()
	var image ocispec.Image
	var manifest ocispec.Manifest
	var index ocispec.Index
	r := tar.NewReader(file)
	for {
		h, err := r.Next()
		if err == io.EOF {
			return image.Config
		}
		if err != nil {
			t.Fatal(err)
		}
		// The index comes first, then the manifest, the configuration and the layer.
		switch {
		case h.Name == ocispec.ImageIndexFile:
			err = json.NewDecoder(r).Decode(&index)
		case len(index.Manifests) == 0:
		case path.Base(h.Name) == index.Manifests[0].Digest.Encoded():
			err = json.NewDecoder(r).Decode(&manifest)
		case path.Base(h.Name) == manifest.Config.Digest.Encoded():
			err = json.NewDecoder(r).Decode(&image)
		default:
			err = extract(r, root)
		}
		if err != nil {
			t.Fatalf("%s: %v", h.Name, err)
		}
	}
}

func extract(layer io.Reader, root string) error {
	plain, err := zstd.NewReader(layer)
	if err != nil {
		return err
	}
	defer plain.Close()
	cmd := exec.Command("tar", "-x", "--numeric-owner", "-C", root)
	cmd.Stdin = plain
	if out, err := cmd.CombinedOutput(); err != nil {
		return errors.New(err.Error() + ": " + strings.TrimSpace(string(out)))
	}
	return nil
}
