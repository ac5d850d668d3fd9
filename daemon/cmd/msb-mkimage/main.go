// Command msb-mkimage builds this project's images from the Debian packages of the host's apt sources, and from fixed
// versions of packages of npm and PyPI:
//
//	msb-mkimage --out bin/images --cache bin/cache python node
//
// The result is an OCI archive for `msb image import`. Equal packages give equal digests. It must run as root on Debian
// and needs mmdebstrap and curl. It is a build tool and is not installed.
package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/msbd/msbd/daemon/internal/backend/image/archive"
)

// epoch is the date of the image and of all files that the build creates. Files of packages keep their dates if these
// are older.
var epoch = time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "msb-mkimage:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, log io.Writer) error {
	flags := flag.NewFlagSet("msb-mkimage", flag.ContinueOnError)
	flags.SetOutput(log)
	known := strings.Join(slices.Sorted(maps.Keys(recipes)), ", ")
	flags.Usage = func() {
		fmt.Fprintf(log, "usage: msb-mkimage --out DIR --cache DIR IMAGE...\nImages: %s\n", known)
		flags.PrintDefaults()
	}
	out := flags.String("out", "", "write the archive of each image to `DIR`/IMAGE.tar")
	cache := flags.String("cache", "", "keep the downloaded packages of npm and PyPI in `DIR`")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	if flags.NArg() == 0 || *out == "" || *cache == "" {
		flags.Usage()
		return errors.New("give --out, --cache and at least one image")
	}
	for _, name := range flags.Args() {
		if _, ok := recipes[name]; !ok {
			return fmt.Errorf("there is no image %q; choose from %s", name, known)
		}
	}
	// Build in parallel, because a build waits for the network and the disk as much as for the processor.
	g, ctx := errgroup.WithContext(ctx)
	for _, name := range flags.Args() {
		g.Go(func() error { return buildFile(ctx, name, filepath.Join(*out, name+".tar"), *cache, log) })
	}
	return g.Wait()
}

// buildFile builds an image and reports the archive's size and digest.
func buildFile(ctx context.Context, name, out, cache string, log io.Writer) error {
	started := time.Now()
	d, err := build(ctx, name, recipes[name], out, cache, log)
	if err != nil {
		return fmt.Errorf("build image %s: %w", name, err)
	}
	info, err := os.Stat(out)
	if err != nil {
		return err
	}
	fmt.Fprintf(log, "%s: %d MB, %s, in %s\n", out, info.Size()/1e6, d, time.Since(started).Round(time.Second))
	return nil
}

// build builds an image and writes its archive. It writes to a temporary file first, so that an interrupted build
// leaves no incomplete archive.
func build(ctx context.Context, name string, r recipe, out, cache string, log io.Writer) (digest.Digest, error) {
	sources, err := debianSources(ctx)
	if err != nil {
		return "", err
	}
	hooks, err := partHooks(ctx, r.parts, cache)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return "", err
	}
	file, err := os.CreateTemp(filepath.Dir(out), filepath.Base(out)+".*")
	if err != nil {
		return "", err
	}
	defer os.Remove(file.Name())
	defer file.Close()

	rootfs, writer := io.Pipe()
	built := make(chan error, 1)
	go func() {
		err := mmdebstrap(ctx, r, hooks, sources, writer, log)
		writer.CloseWithError(err)
		built <- err
	}()
	d, err := archive.Write(file, rootfs, archive.Image{
		Name:         "docker.io/microsandbox/" + name + ":latest",
		Architecture: runtime.GOARCH,
		Created:      epoch,
		Config: ocispec.ImageConfig{
			Env: []string{
				"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
				"LANG=C.UTF-8",
			},
			Cmd:        r.cmd,
			WorkingDir: cmp.Or(r.workdir, "/root"),
		},
	})
	rootfs.CloseWithError(err)
	if err := errors.Join(err, <-built); err != nil {
		return "", err
	}
	if err := file.Chmod(0o644); err != nil {
		return "", err
	}
	return d, os.Rename(file.Name(), out)
}

// debianSources returns the Debian sources of the host's apt, as lines of a sources.list. It leaves out other vendors'
// sources, because with these the image would depend on the host's configuration.
func debianSources(ctx context.Context) (string, error) {
	const format = "$(ORIGIN)|deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(REPO_URI) $(RELEASE) $(COMPONENT)"
	var out, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", format, "Identifier: Packages")
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("ask apt for its sources: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
	}
	var lines []string
	for line := range strings.Lines(out.String()) {
		if source, ok := strings.CutPrefix(line, "Debian|"); ok && !slices.Contains(lines, source) {
			lines = append(lines, source)
		}
	}
	if len(lines) == 0 {
		return "", errors.New("apt has no Debian source; run apt-get update on a Debian machine")
	}
	return strings.Join(lines, ""), nil
}

// partHooks downloads what the parts need and returns the hooks for mmdebstrap that add them. mmdebstrap runs a hook with
// sh and the image's root as $1.
func partHooks(ctx context.Context, parts []part, cache string) ([]string, error) {
	cache, err := filepath.Abs(cache)
	if err != nil {
		return nil, err
	}
	var hooks []string
	for _, p := range parts {
		arguments := `"$1"`
		if p.downloads != nil {
			downloads, err := p.downloads(runtime.GOARCH)
			if err != nil {
				return nil, err
			}
			for _, d := range downloads {
				file, err := d.fetch(ctx, cache)
				if err != nil {
					return nil, err
				}
				arguments += " '" + strings.ReplaceAll(file, "'", `'\''`) + "'"
			}
		}
		hooks = append(hooks, "--customize-hook=set -eu; umask 022; set -- "+arguments+"\n"+p.script)
	}
	return hooks, nil
}

// mmdebstrap writes the image's file tree to w as a tar stream. It runs the hooks after the packages are installed.
func mmdebstrap(ctx context.Context, r recipe, hooks []string, sources string, w, log io.Writer) error {
	args := []string{
		"--mode=root", "--variant=apt", "--format=tar", "--quiet",
		"--include=" + strings.Join(append(slices.Clone(base), r.packages...), ","),
		"--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
		`--aptopt=APT::Install-Recommends "0"`,
	}
	for _, dir := range []string{"doc", "info", "locale", "man"} {
		args = append(args, "--dpkgopt=path-exclude=/usr/share/"+dir+"/*")
	}
	args = append(args, "--dpkgopt=path-include=/usr/share/doc/*/copyright")
	args = append(args, proxies(ctx)...)
	// mmdebstrap copies these files from the host for the time of the build.
	remove := append([]string{"etc/hostname", "etc/resolv.conf"}, r.remove...)
	args = append(args, `--customize-hook=cd "$1" && rm -rf -- `+strings.Join(remove, " "))
	args = append(args, hooks...)
	args = append(args,
		`--customize-hook=sed -i "/Proxy/d" "$1/etc/apt/apt.conf.d/99mmdebstrap"`,
		// An empty suite, because the sources on standard input name it.
		"", "-", "-")

	cmd := exec.CommandContext(ctx, "mmdebstrap", args...)
	cmd.Env = environment()
	cmd.Stdin = strings.NewReader(sources)
	cmd.Stdout = w
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	// mmdebstrap unmounts and removes its chroot on SIGTERM, but not on SIGKILL.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 30 * time.Second
	if err := cmd.Run(); err != nil {
		fmt.Fprintf(log, "%s", stderr.Bytes())
		return fmt.Errorf("mmdebstrap: %w", err)
	}
	return nil
}

// environment returns the environment of the build. The scripts of packages see it. So that they work in the same way
// on every machine, only the proxies and the temporary directory depend on the machine.
func environment() []string {
	env := []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=/root",
		"LANG=C.UTF-8",
		"TZ=UTC",
		fmt.Sprintf("SOURCE_DATE_EPOCH=%d", epoch.Unix()),
		// Without this, the order of installation would decide which files are compiled on import, and how.
		"PYTHONDONTWRITEBYTECODE=1",
		// Without this, the order of sets would be random, and so that of the fonts in matplotlib's list.
		"PYTHONHASHSEED=0",
	}
	for _, name := range []string{"http_proxy", "https_proxy", "no_proxy", "TMPDIR"} {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	return env
}

// proxies returns mmdebstrap arguments with the proxies of the host's apt, because mmdebstrap does not read the host's
// configuration.
func proxies(ctx context.Context) []string {
	var args []string
	for _, key := range []string{"Acquire::http::Proxy", "Acquire::https::Proxy"} {
		out, err := exec.CommandContext(ctx, "apt-config", "shell", "value", key).Output()
		if value, ok := strings.CutPrefix(strings.TrimSpace(string(out)), "value="); err == nil && ok {
			args = append(args, fmt.Sprintf("--aptopt=%s %q", key, strings.Trim(value, "'")))
		}
	}
	return args
}
